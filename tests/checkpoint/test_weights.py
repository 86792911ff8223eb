"""Every naming gives the same model; whatever else a file says is refused by name."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from tiny_pairs import FIXTURES, FLAVOURS, bits, gap, greedy_text, quantized_fixtures, tiny_pair

from pyengine.checkpoint.config_json import read_assistant_config, read_target_config
from pyengine.checkpoint.weights import (
    canonical,
    load_assistant_weights,
    load_target_weights,
    target_layout,
)
from pyengine.model.target import Target


def tensors_of(folder):
    loaded = mx.load(str(folder / "model.safetensors"))
    assert isinstance(loaded, dict)
    return loaded


def rewritten(tmp_path, flavour, change, part="target", root=FIXTURES, config=None):
    """A copy of a fixture whose tensors went through `change`, and its config through `config`."""
    source, folder = root / flavour / part, tmp_path / part
    folder.mkdir(parents=True)
    values = json.loads((source / "config.json").read_text())
    if config is not None:
        config(values)
    (folder / "config.json").write_text(json.dumps(values))
    tensors = tensors_of(source)
    tensors = change(tensors) or tensors
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    return folder


def load_target(folder, dtype=mx.float32) -> Target:
    config = read_target_config(folder)
    return Target(config, load_target_weights(folder, config, dtype))


def load_assistant(folder, dtype=None):
    return load_assistant_weights(folder, read_assistant_config(folder), dtype)


def renamed(prefix):
    return lambda tensors: {prefix + canonical(name): a for name, a in tensors.items()}


def hf_experts(name):
    return (
        name.removesuffix(".weight")
        if name.endswith("_proj.weight") and ".experts." in name
        else name
    )


def assert_same_model(folder, flavour):
    ids = greedy_text(flavour)[:30]
    ours = load_target(folder).logits(ids)
    assert np.array_equal(bits(ours), bits(tiny_pair(flavour).target.logits(ids)))


@pytest.mark.parametrize("prefix", ["model.language_model.", "model.", "language_model.model."])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_every_prefix(tmp_path, flavour, prefix):
    assert_same_model(rewritten(tmp_path, flavour, renamed(prefix)), flavour)


def split_experts(tensors):
    """switch_glu stacks, as MLX conversions have them."""
    out = {}
    for name, a in tensors.items():
        if name.endswith("experts.gate_up_proj"):
            at, m = name.removesuffix("gate_up_proj") + "switch_glu.", a.shape[1] // 2
            out[f"{at}gate_proj.weight"], out[f"{at}up_proj.weight"] = a[:, :m], a[:, m:]
        elif name.endswith("experts.down_proj"):
            out[name.replace("experts.", "experts.switch_glu.") + ".weight"] = a
        else:
            out[name] = a
    return out


def single_experts(tensors):
    """One entry per expert."""
    out = {}
    for name, a in split_experts(tensors).items():
        if ".switch_glu." not in name:
            out[name] = a
            continue
        for x in range(a.shape[0]):
            out[name.replace(".switch_glu.", f".{x}.")] = a[x]
    return out


@pytest.mark.parametrize("change", [split_experts, single_experts])
def test_every_form_of_experts(tmp_path, change):
    assert_same_model(rewritten(tmp_path, "moe26", change), "moe26")


def test_quantised_gate_up_is_split(tmp_path):
    """Joint stacks are accepted quantised too: rows split alike in weight, scales and biases."""

    def join(tensors):
        out = {n: a for n, a in tensors.items() if ".experts." not in n}
        for name, a in tensors.items():
            if ".experts.switch_glu.gate_proj." in name:
                up = tensors[name.replace("gate_proj", "up_proj")]
                joint = name.replace("switch_glu.gate_proj", "gate_up_proj")
                out[joint] = mx.concatenate([a, up], axis=1)
            elif ".experts.switch_glu.down_proj." in name:
                out[name.replace(".switch_glu", "")] = a
        return out

    folder = rewritten(tmp_path, "moe26", join, root=quantized_fixtures())
    ids = greedy_text("moe26")[:30]
    expected = tiny_pair("moe26", "float32-q8").target.logits(ids)
    assert np.array_equal(bits(load_target(folder).logits(ids)), bits(expected))


@pytest.mark.parametrize("flavour", ["dense31", "e2b"])
def test_shards(tmp_path, flavour):
    folder = tmp_path / "target"
    shutil.copytree(FIXTURES / flavour / "target", folder)
    tensors = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number in range(3):
        shard = f"model-0000{number + 1}-of-00003.safetensors"
        own = names[number::3]
        weight_map |= dict.fromkeys(own, shard)
        mx.save_safetensors(str(folder / shard), {name: tensors[name] for name in own})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same_model(folder, flavour)


def test_other_towers_and_a_tied_head_are_skipped(tmp_path):
    extra = mx.zeros((2, 2))
    names = [
        "model.vision_tower.encoder.layers.0.self_attn.q_proj.linear.weight",
        "vision_tower.patch_embedder.weight",
        "model.embed_vision.embedding_projection.weight",
        "model.audio_tower.layers.0.norm.weight",
        "embed_audio.embedding_projection.weight",
        "model.vision_embedder.patch_dense.weight",
        "model.multi_modal_projector.mm_input_projection_weight",
        "model.language_model.layers.0.self_attn.q_proj.input_max",
        "language_model.model.layers.1.mlp.gate_proj.output_min",
        "lm_head.weight",
        "language_model.lm_head.weight",
    ]
    change = lambda tensors: tensors | dict.fromkeys(names, extra)  # noqa: E731
    assert_same_model(rewritten(tmp_path, "dense31", change), "dense31")


def test_dead_tensors_of_sharing_layers_are_ignored():
    names = tensors_of(FIXTURES / "e2b" / "target")
    assert "model.language_model.layers.5.self_attn.k_proj.weight" in names
    weights = load_target_weights(
        FIXTURES / "e2b" / "target", read_target_config(FIXTURES / "e2b" / "target")
    )
    assert "layers.5.self_attn.k_proj" not in weights.matrices


def drop(name):
    return lambda tensors: {n: a for n, a in tensors.items() if n != name}


@pytest.mark.parametrize(
    "name, canonical_name",
    [
        ("model.language_model.norm.weight", "norm.weight"),
        (
            "model.language_model.layers.3.self_attn.q_norm.weight",
            "layers.3.self_attn.q_norm.weight",
        ),
        ("model.language_model.layers.0.layer_scalar", "layers.0.layer_scalar"),
        (
            "model.language_model.layers.0.self_attn.v_proj.weight",
            "layers.0.self_attn.v_proj.weight",
        ),
    ],
)
def test_a_missing_tensor_is_named(tmp_path, name, canonical_name):
    folder = rewritten(tmp_path, "dense31", drop(name))
    message = rf"\[load\] weights miss `{canonical_name}`; is this a Gemma 4 checkpoint\?"
    with pytest.raises(ValueError, match=message):
        load_target(folder)


def test_a_missing_expert_is_named(tmp_path):
    def change(tensors):
        tensors = single_experts(tensors)
        return drop(next(n for n in tensors if "layers.1.experts.5.up_proj" in n))(tensors)

    with pytest.raises(ValueError, match=r"weights miss `layers\.1\.experts\.up_proj\.weight`"):
        load_target(rewritten(tmp_path, "moe26", change))


@pytest.mark.parametrize(
    "name",
    [
        "model.language_model.layers.0.self_attn.q_bias",
        "model.layers.99.mlp.gate_proj.weight",
        "score.weight",
        # A full layer whose keys double as values has no v_proj
        "model.language_model.layers.2.self_attn.v_proj.weight",
    ],
)
def test_an_unknown_tensor_is_named(tmp_path, name):
    folder = rewritten(tmp_path, "dense31", lambda tensors: tensors | {name: mx.zeros((2, 2))})
    with pytest.raises(ValueError, match=rf"\[load\] `{name}` is no tensor of this Gemma 4 model"):
        load_target(folder)


def test_the_same_tensor_twice_is_refused(tmp_path):
    change = lambda tensors: tensors | {"language_model.model.norm.weight": mx.ones(64)}  # noqa: E731
    with pytest.raises(ValueError, match="must not both be there: they are the same tensor"):
        load_target(rewritten(tmp_path, "dense31", change))


def test_a_wrong_shape_is_named(tmp_path):
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    change = lambda tensors: tensors | {name: mx.zeros((64, 63), dtype=mx.bfloat16)}  # noqa: E731
    message = r"`layers\.0\.mlp\.up_proj\.weight` must have shape \[64, 64\] but got \[64, 63\]"
    with pytest.raises(ValueError, match=message):
        load_target(rewritten(tmp_path, "dense31", change))


def test_a_wrong_dtype_is_named(tmp_path):
    name = "model.language_model.norm.weight"
    integer = lambda tensors: tensors | {name: mx.zeros(64, dtype=mx.int32)}  # noqa: E731
    with pytest.raises(ValueError, match=r"`norm\.weight` must be bfloat16 or .* but got int32"):
        load_target(rewritten(tmp_path / "a", "dense31", integer))
    wide = rewritten(tmp_path / "b", "dense31", lambda t: t | {name: mx.ones(64)})
    message = r"`norm\.weight` must be bfloat16 like the rest of .* but got float32; pass dtype="
    with pytest.raises(ValueError, match=message):
        load_target(wide, None)
    assert load_target(wide, mx.float32).dtype == mx.float32


@pytest.mark.parametrize("dtype", [None, mx.float32, mx.float16, mx.bfloat16])
def test_storage_dtype(dtype):
    for root in (FIXTURES, quantized_fixtures()):
        model = load_target(root / "e2b" / "target", dtype)
        assert model.dtype == (dtype or mx.bfloat16)
        assert model.table.dtype == model.norm.dtype == model.dtype


def set_quantization(**changes):
    def change(values):
        values["quantization"] |= changes

    return change


def test_quantised_modules_follow_the_scales_rule(tmp_path):
    """A table kept in bfloat16 beside quantised layers ("PLE-safe" uploads)."""
    plain = tensors_of(FIXTURES / "e2b" / "target")
    name = "language_model.model.embed_tokens_per_layer"

    def change(tensors):
        out = {n: a for n, a in tensors.items() if not n.startswith(name + ".")}
        out[f"{name}.weight"] = plain["model.language_model.embed_tokens_per_layer.weight"]
        return out

    for entry in ({}, {name: False}):
        folder = rewritten(
            tmp_path / str(len(entry)),
            "e2b",
            change,
            root=quantized_fixtures(),
            config=set_quantization(**entry),
        )
        model = load_target(folder)
        assert model.per_layer_table.scales is None and model.table.scales is not None
        assert gap(model.logits([3, 4, 5]), tiny_pair("e2b").target.logits([3, 4, 5])) < 2.0


def test_quantisation_must_agree_with_config(tmp_path):
    def load_with(number, change):
        folder = rewritten(
            tmp_path / str(number),
            "dense31",
            lambda tensors: tensors,
            root=quantized_fixtures(),
            config=change,
        )
        return load_target(folder)

    with pytest.raises(ValueError, match=r"`embed_tokens\.weight` must have shape \[256, 8\]"):
        load_with(1, set_quantization(bits=4))
    with pytest.raises(ValueError, match=r"`embed_tokens\.scales` must have shape \[256, 2\]"):
        load_with(2, set_quantization(group_size=32))
    with pytest.raises(ValueError, match=r"scales` is there, but config\.json says `embed_tokens`"):
        load_with(3, set_quantization(**{"language_model.model.embed_tokens": False}))
    with pytest.raises(ValueError, match=r"must have a `quantization` block"):
        load_with(4, lambda values: [values.pop("quantization"), values.pop("quantization_config")])
    message = "its 64 inputs are no multiple of the group size 128"
    with pytest.raises(ValueError, match=message):
        load_with(5, set_quantization(group_size=128))


def test_mixed_bits_by_module(tmp_path):
    """Overrides are looked up under any spelling of the module's path."""
    name = "language_model.model.layers.0.mlp.gate_proj"
    plain = tensors_of(FIXTURES / "dense31" / "target")
    matrix = plain["model.language_model.layers.0.mlp.gate_proj.weight"]

    def change(tensors):
        parts = zip(("weight", "scales", "biases"), mx.quantize(matrix, 32, 4), strict=True)
        return tensors | {f"{name}.{part}": a for part, a in parts}

    for number, path in enumerate([name, name.replace("language_model.model", "model")]):
        folder = rewritten(
            tmp_path / str(number),
            "dense31",
            change,
            root=quantized_fixtures(),
            config=set_quantization(**{path: {"bits": 4, "group_size": 32}}),
        )
        gate = load_target(folder).layers[0].mlp.gate
        assert (gate.bits, gate.group_size) == (4, 32)
        assert gap(gate.values(), matrix) < 0.1


def test_token_ordering_must_be_a_permutation(tmp_path):
    name = "masked_embedding.token_ordering"
    order = tensors_of(FIXTURES / "e2b" / "assistant")[name]
    assert order.dtype == mx.int64
    for number, spoiled in enumerate([order.at[3].add(256), order * 0, order - 1]):
        folder = rewritten(
            tmp_path / str(number), "e2b", lambda t, s=spoiled: t | {name: s}, "assistant"
        )
        with pytest.raises(ValueError, match="must hold every token id once"):
            load_assistant(folder)
    narrow = lambda tensors: tensors | {name: order.astype(mx.int32)}  # noqa: E731
    folder = rewritten(tmp_path / "narrow", "e2b", narrow, "assistant")
    assert load_assistant(folder).vectors[name].tolist() == order.tolist()


def test_an_assistant_has_no_keys_of_its_own(tmp_path):
    name = "model.layers.0.self_attn.k_proj.weight"
    folder = rewritten(tmp_path, "dense31", lambda t: t | {name: mx.zeros((32, 64))}, "assistant")
    with pytest.raises(ValueError, match=rf"`{name}` is no tensor of this Gemma 4 model"):
        load_assistant(folder)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_layout_names_every_tensor_of_the_file(flavour):
    """The table of names and the published file agree, dead tensors aside."""
    folder = FIXTURES / flavour / "target"
    layout = target_layout(read_target_config(folder))
    names = {canonical(name) for name in tensors_of(folder)}
    live = {name for name in names if layout.dead is None or not layout.dead.match(name)}
    wanted = {f"{path}.weight" for path in layout.matrices} | set(layout.vectors)
    split = {n for n in wanted if ".experts.gate_proj" in n or ".experts.up_proj" in n}
    joint = {n.replace(".gate_proj", ".gate_up_proj") for n in split if ".gate_proj" in n}
    assert live == wanted - split | joint
