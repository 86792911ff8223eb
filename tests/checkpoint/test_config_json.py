"""config.json: both published forms give the same facts, and nothing is guessed."""

import json

import pytest
from tiny_pairs import FIXTURES, FLAVOURS

from pyengine.checkpoint.config_json import read_assistant_config, read_target_config
from pyengine.checkpoint.published import PUBLISHED, check_pair, published_name
from pyengine.model.config import Rope

SLIDING, FULL = "sliding_attention", "full_attention"
ROPE = {
    SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
}
# What the published 31B says, written out (vision and audio left away)
TEXT_31B = {
    "model_type": "gemma4_text",
    "vocab_size": 262144,
    "vocab_size_per_layer_input": 262144,
    "hidden_size": 5376,
    "intermediate_size": 21504,
    "num_hidden_layers": 60,
    "layer_types": ([SLIDING] * 5 + [FULL]) * 10,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "num_global_key_value_heads": 4,
    "head_dim": 256,
    "global_head_dim": 512,
    "attention_k_eq_v": True,
    "sliding_window": 1024,
    "max_position_embeddings": 262144,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "use_double_wide_mlp": False,
    "enable_moe_block": False,
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "tie_word_embeddings": True,
    "final_logit_softcapping": 30.0,
    "rope_parameters": ROPE,
    "eos_token_id": 1,
    "use_bidirectional_attention": "vision",
}
TARGET_31B = {"model_type": "gemma4", "eos_token_id": [1, 106], "text_config": TEXT_31B}
ASSISTANT_31B = {
    "model_type": "gemma4_assistant",
    "backbone_hidden_size": 5376,
    "use_ordered_embeddings": False,
    "num_centroids": 2048,
    "centroid_intermediate_top_k": 32,
    "text_config": {
        **TEXT_31B,
        "hidden_size": 1024,
        "intermediate_size": 8192,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 4,
        "layer_types": [SLIDING, SLIDING, SLIDING, FULL],
        "final_logit_softcapping": None,
    },
}
E2B = {
    "hidden_size": 1536,
    "num_hidden_layers": 35,
    "layer_types": ([SLIDING] * 4 + [FULL]) * 7,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "num_global_key_value_heads": None,
    "intermediate_size": 6144,
    "use_double_wide_mlp": True,
    "sliding_window": 512,
    "hidden_size_per_layer_input": 256,
    "num_kv_shared_layers": 20,
    "attention_k_eq_v": False,
}


def write(folder, values):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def edited(values, **changes):
    """A deep copy with changed text_config keys; None-valued `drop` names a key to remove."""
    copy = json.loads(json.dumps(values))
    text = copy.get("text_config", copy)
    for key, value in changes.items():
        if value is ...:
            text.pop(key)
        else:
            text[key] = value
    return copy


def test_31b_reads_as_the_geometry_table_says(tmp_path):
    config = read_target_config(write(tmp_path, TARGET_31B))
    assert (len(config.layers), config.hidden_size, config.window) == (60, 5376, 1024)
    sliding, full = config.layers[0], config.layers[5]
    assert (sliding.head_dim, sliding.num_kv_heads, sliding.key_is_value) == (256, 16, False)
    assert (full.head_dim, full.num_kv_heads, full.key_is_value) == (512, 4, True)
    assert (config.last_source(True), config.last_source(False)) == (58, 59)
    assert config.eos_ids == (1, 106)
    assert config.softcap == 30.0 and config.quantization is None


def test_e2b_shares_keys_and_doubles_the_mlp(tmp_path):
    config = read_target_config(write(tmp_path, edited(TARGET_31B, **E2B)))
    assert (config.last_source(True), config.last_source(False)) == (13, 14)
    assert [layer.kv_source for layer in config.layers[13:20]] == [13, 14, 13, 13, 13, 13, 14]
    assert (config.layers[14].ffn_width, config.layers[15].ffn_width) == (6144, 12288)
    # Without keys as values, full layers keep num_key_value_heads
    assert (config.layers[4].head_dim, config.layers[4].num_kv_heads) == (512, 1)
    assert not config.layers[4].key_is_value


def test_text_only_form_equals_multimodal(tmp_path):
    wrapped = read_target_config(write(tmp_path / "a", TARGET_31B))
    alone = read_target_config(write(tmp_path / "b", TEXT_31B))
    assert wrapped.layers == alone.layers and alone.eos_ids == (1,)


def test_per_layer_config_form_equals_global_keys(tmp_path):
    published = read_target_config(write(tmp_path / "a", TARGET_31B))
    saved = edited(TARGET_31B, global_head_dim=..., num_global_key_value_heads=...)
    saved["text_config"]["per_layer_config"] = {
        f"{i:02}": {"head_dim": 512, "num_key_value_heads": 4} for i in range(5, 60, 6)
    }
    assert read_target_config(write(tmp_path / "b", saved)) == published
    saved["text_config"]["per_layer_config"]["05"] = 512
    with pytest.raises(ValueError, match="per_layer_config` must map a layer index to an object"):
        read_target_config(write(tmp_path / "c", saved))


def test_unified_text_lacks_keys_of_the_others(tmp_path):
    text = {
        key: value
        for key, value in TEXT_31B.items()
        if "per_layer_input" not in key and key != "enable_moe_block"
    }
    text["model_type"] = "gemma4_unified_text"
    config = read_target_config(
        write(tmp_path, {"model_type": "gemma4_unified", "text_config": text})
    )
    assert config.per_layer_width == 0 and config.num_experts == 0


@pytest.mark.parametrize(
    "key",
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "layer_types",
        "num_attention_heads",
        "num_key_value_heads",
        "num_global_key_value_heads",
        "head_dim",
        "global_head_dim",
        "attention_k_eq_v",
        "sliding_window",
        "max_position_embeddings",
        "hidden_size_per_layer_input",
        "num_kv_shared_layers",
        "use_double_wide_mlp",
        "enable_moe_block",
        "rms_norm_eps",
        "hidden_activation",
        "final_logit_softcapping",
        "rope_parameters",
    ],
)
def test_a_missing_key_is_named(tmp_path, key):
    broken = edited(TARGET_31B, **{key: ...})
    with pytest.raises(ValueError, match=rf"\[config\] config.json misses `text_config.{key}`"):
        read_target_config(write(tmp_path, broken))


@pytest.mark.parametrize(
    "key, value",
    [
        ("vocab_size", 0),
        ("vocab_size", 1 << 40),
        ("vocab_size", "262144"),
        ("vocab_size", True),
        ("hidden_size", -5376),
        ("hidden_size", 5376.0),
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", 59),
        ("layer_types", "sliding"),
        ("layer_types", ["linear_attention"] * 60),
        ("num_key_value_heads", 5),
        ("head_dim", 255),
        ("sliding_window", 1),
        ("rms_norm_eps", 0),
        ("rms_norm_eps", float("inf")),
        ("final_logit_softcapping", -30.0),
        ("hidden_activation", "silu"),
        ("attention_bias", True),
        ("attention_k_eq_v", 1),
        ("use_bidirectional_attention", "all"),
        ("tie_word_embeddings", False),
        ("num_kv_shared_layers", 60),
        ("num_kv_shared_layers", 59),
        ("rope_parameters", []),
        ("eos_token_id", "stop"),
    ],
)
def test_a_wrong_value_is_named(tmp_path, key, value):
    broken = edited(TARGET_31B, **{key: value})
    if key == "eos_token_id":
        broken.pop("eos_token_id")
    with pytest.raises(ValueError, match=r"\[config\] `text_config\.\w+` must .* but got "):
        read_target_config(write(tmp_path, broken))


def test_per_layer_vocabulary_must_be_the_vocabulary(tmp_path):
    broken = edited(TARGET_31B, hidden_size_per_layer_input=256, vocab_size_per_layer_input=1000)
    with pytest.raises(ValueError, match="vocab_size_per_layer_input` must equal vocab_size"):
        read_target_config(write(tmp_path, broken))


def test_experts_need_their_keys(tmp_path):
    broken = edited(TARGET_31B, enable_moe_block=True, num_experts=8, moe_intermediate_size=64)
    with pytest.raises(ValueError, match=r"misses `text_config\.top_k_experts`"):
        read_target_config(write(tmp_path / "a", broken))
    broken["text_config"]["top_k_experts"] = 9
    with pytest.raises(ValueError, match="top_k_experts` must be at most num_experts"):
        read_target_config(write(tmp_path / "b", broken))


def test_rope_errors_name_the_inner_key(tmp_path):
    broken = edited(TARGET_31B)
    del broken["text_config"]["rope_parameters"][FULL]["partial_rotary_factor"]
    with pytest.raises(ValueError, match=rf"rope_parameters\.{FULL}\.partial_rotary_factor"):
        read_target_config(write(tmp_path / "a", broken))
    broken = edited(TARGET_31B)
    broken["text_config"]["rope_parameters"][SLIDING]["rope_type"] = "yarn"
    with pytest.raises(ValueError, match="must be default or proportional but got 'yarn'"):
        read_target_config(write(tmp_path / "b", broken))


def test_not_gemma_4(tmp_path):
    with pytest.raises(ValueError, match=r"`model_type` must be one of gemma4, .* but got 'llama'"):
        read_target_config(write(tmp_path, {"model_type": "llama"}))
    with pytest.raises(ValueError, match=r"`model_type` must be one of gemma4_assistant"):
        read_assistant_config(write(tmp_path, TARGET_31B))


def test_not_a_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="does not exist; is this a checkpoint folder"):
        read_target_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gem')
    with pytest.raises(ValueError, match="must be JSON but is not"):
        read_target_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object"):
        read_target_config(tmp_path)


def test_quantization_block(tmp_path):
    block = {
        "bits": 4,
        "group_size": 32,
        "mode": "affine",
        "language_model.model.layers.0.router.proj": {"bits": 8},
        "language_model.model.embed_tokens_per_layer": False,
    }
    config = read_target_config(write(tmp_path / "a", {**TARGET_31B, "quantization": block}))
    assert config.quantization is not None
    assert (config.quantization.bits, config.quantization.group_size) == (4, 32)
    assert config.quantization.overrides == {
        "language_model.model.layers.0.router.proj": (8, 32),
        "language_model.model.embed_tokens_per_layer": None,
    }
    for change, message in [
        ({"bits": 5}, "`quantization.bits` must be 4, 6 or 8 but got 5"),
        ({"group_size": 16}, "`quantization.group_size` must be 32, 64 or 128 but got 16"),
        ({"mode": "mxfp4"}, "`quantization.mode` must be MLX affine quantisation but got 'mxfp4'"),
        ({"quant_method": "bitsandbytes"}, "`quantization.quant_method` must be MLX affine"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_target_config(
                write(tmp_path / "b", {**TARGET_31B, "quantization": {**block, **change}})
            )
    with pytest.raises(ValueError, match=r"misses `quantization_config\.bits`"):
        read_target_config(
            write(tmp_path / "c", {**TARGET_31B, "quantization_config": {"group_size": 64}})
        )


def test_published_pair_is_recognised(tmp_path):
    target = read_target_config(write(tmp_path / "t", TARGET_31B))
    assistant = read_assistant_config(write(tmp_path / "a", ASSISTANT_31B))
    check_pair(target, assistant)
    assert published_name(target, assistant) == "31B"
    assert assistant.num_centroids == 0  # the key is there but the head is plain
    other = read_target_config(write(tmp_path / "o", edited(TARGET_31B, intermediate_size=21440)))
    assert published_name(other, assistant) is None
    assert len(PUBLISHED) == 5


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_tiny_pairs_fit_and_are_not_published(flavour):
    target = read_target_config(FIXTURES / flavour / "target")
    assistant = read_assistant_config(FIXTURES / flavour / "assistant")
    check_pair(target, assistant)
    assert published_name(target, assistant) is None
    assert (assistant.num_centroids, assistant.num_centroids_used) == (
        (16, 4) if flavour == "e2b" else (0, 0)
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"vocab_size": 1000}, "vocabulary size must equal the target's 262144 but got 1000"),
        ({"sliding_window": 512}, "sliding window must equal the target's 1024 but got 512"),
        ({"head_dim": 128}, "sliding head width must equal the target's 256 but got 128"),
        ({"global_head_dim": 256}, "full head width must equal the target's 512 but got 256"),
        ({"num_key_value_heads": 8}, "sliding key/value heads must equal the target's 16"),
        ({"num_global_key_value_heads": 8}, "full key/value heads must equal the target's 4"),
        (
            {"rope_parameters": {**ROPE, SLIDING: {"rope_type": "default", "rope_theta": 1e6}}},
            "sliding rope must equal",
        ),
    ],
)
def test_a_mismatched_pair_is_refused(tmp_path, changes, message):
    target = read_target_config(write(tmp_path / "t", TARGET_31B))
    assistant = read_assistant_config(write(tmp_path / "a", edited(ASSISTANT_31B, **changes)))
    with pytest.raises(ValueError, match=message):
        check_pair(target, assistant)


def test_a_foreign_backbone_is_refused(tmp_path):
    target = read_target_config(write(tmp_path / "t", TARGET_31B))
    foreign = {**ASSISTANT_31B, "backbone_hidden_size": 2816}
    with pytest.raises(ValueError, match="backbone hidden size must equal the target's 5376"):
        check_pair(target, read_assistant_config(write(tmp_path / "a", foreign)))


def test_assistant_rules(tmp_path):
    with pytest.raises(ValueError, match="must equal num_hidden_layers in an assistant"):
        read_assistant_config(write(tmp_path / "a", edited(ASSISTANT_31B, num_kv_shared_layers=3)))
    with pytest.raises(ValueError, match="final_logit_softcapping` must be off in an assistant"):
        read_assistant_config(
            write(tmp_path / "b", edited(ASSISTANT_31B, final_logit_softcapping=30.0))
        )
    ordered = {**ASSISTANT_31B, "use_ordered_embeddings": True, "num_centroids": 1000}
    with pytest.raises(ValueError, match="`num_centroids` must divide vocab_size"):
        read_assistant_config(write(tmp_path / "c", ordered))


def test_rope_frequencies():
    sliding = Rope(1e4, 1.0, 1.0).frequencies(256)
    assert len(sliding) == 128 and sliding[0] == 1.0 and sliding[127] == 1e4 ** (-254 / 256)
    full = Rope(1e6, 0.25, 1.0).frequencies(512)
    assert len(full) == 256 and full[64:] == [0.0] * 192
    assert full[63] == 1e6 ** (-126 / 512)  # over the whole head, not over the rotated quarter
    assert Rope(1e6, 0.25, 2.0).frequencies(512)[1] == full[1] / 2
