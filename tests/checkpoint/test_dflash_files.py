"""DFlash drafters on disk: what is one, what is refused and by which key, bundles, conversion."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tiny_dflash import config_of, folder_of, shapes_of, weights_of, write
from tiny_pairs import FIXTURES
from typer.testing import CliRunner

from pyengine import cli
from pyengine.checkpoint.config_json import names_dflash, read_dflash_config
from pyengine.checkpoint.convert import convert
from pyengine.checkpoint.fingerprint import fingerprint
from pyengine.checkpoint.inspect import inspect
from pyengine.checkpoint.manifest import MANIFEST, bundle_parts
from pyengine.checkpoint.pair import load
from pyengine.checkpoint.weights import dflash_layout
from pyengine.model.config import LayerConfig

PAIR = FIXTURES / "dense31"

# config.json of two published files, as far as they are known word for word
PUBLISHED: dict[str, dict[str, Any]] = {
    "26B-A4B": {
        "architectures": ["DFlashDraftModel"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "block_size": 16,
        "dflash_config": {"mask_token_id": 4, "target_layer_ids": [1, 6, 11, 17, 22, 27]},
        "dtype": "bfloat16",
        "final_logit_softcapping": 30.0,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2816,
        "intermediate_size": 5632,
        "layer_types": ["sliding_attention"] * 4 + ["full_attention"],
        "max_position_embeddings": 262144,
        "model_type": "qwen3",
        "num_attention_heads": 32,
        "num_hidden_layers": 5,
        "num_key_value_heads": 8,
        "num_target_layers": 30,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 2048,
        "tie_word_embeddings": False,
        "use_sliding_window": True,
        "vocab_size": 262144,
    }
}
PUBLISHED["31B"] = PUBLISHED["26B-A4B"] | {
    "hidden_size": 5376,
    "intermediate_size": 10752,
    "num_attention_heads": 64,
    "num_target_layers": 60,
    "tie_word_embeddings": True,
    "dflash_config": {"mask_token_id": 4, "target_layer_ids": [1, 12, 23, 35, 46, 57]},
}


def as_file(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(("name", "parameters"), [("26B-A4B", 429_689_088), ("31B", 1_535_967_488)])
def test_published_files(name: str, parameters: int, tmp_path: Path) -> None:
    """58 tensors, and as many numbers as the files have."""
    config = read_dflash_config(as_file(tmp_path, PUBLISHED[name]))
    layout = dflash_layout(config)
    shapes = [*layout.matrices.values(), *layout.vectors.values()]
    assert len(shapes) == 58
    assert sum(int(np.prod(shape)) for shape in shapes) == parameters
    assert all(shape[-1] % 128 == 0 for shape in layout.matrices.values())
    assert (config.block_size, config.mask_id, config.window) == (16, 4, 2048)
    assert [layer.sliding for layer in config.layers] == [True] * 4 + [False]
    assert not any(layer.sliding for layer in config.kept)
    assert config.is_causal and config.embedding_scale is None
    names = {f"{path}.weight" for path in layout.matrices} | set(layout.vectors)
    assert names == set(shapes_of(PUBLISHED[name]))


OURS = config_of("dense31")


def changed(key: str, value: Any) -> dict[str, Any]:
    if not key.startswith("dflash_config."):
        return OURS | {key: value}
    own = OURS["dflash_config"] | {key.removeprefix("dflash_config."): value}
    return OURS | {"dflash_config": own}


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("architectures", ["DFlash2DraftModel"], r'be \["DFlashDraftModel"\] in a DFlash drafter'),
        ("architectures", ["Gemma4DSparkModel"], r'be \["DFlashDraftModel"\] in a DFlash drafter'),
        ("architectures", None, r'be \["DFlashDraftModel"\] in a DFlash drafter'),
        ("speculators_model_type", "dflash", "be absent in a DFlash drafter"),
        ("dflash_config.attention_sink_bias", True, "be off in a DFlash drafter"),
        ("attention_sink_bias", True, "be off in a DFlash drafter"),
        ("dflash_config.output_multiplier", 0.5, "be 1 in a DFlash drafter"),
        ("dflash_config.use_swa", False, "be true in a DFlash drafter"),
        ("dflash_config.swa_window_size", 13, "equal sliding_window in a DFlash drafter"),
        ("rope_scaling", {"type": "yarn"}, "be null in a DFlash drafter"),
        ("attention_bias", True, "be false in a DFlash drafter"),
        ("hidden_act", "gelu", "be silu"),
        ("dflash_config", [], "be an object"),
        ("dflash_config.mask_token_id", 256, r"be below vocab_size \(256\)"),
        ("dflash_config.target_layer_ids", [], "list layers of the target"),
        ("dflash_config.target_layer_ids", [0, "1"], "list layers of the target"),
        ("dflash_config.target_layer_ids", [True], "list layers of the target"),
        ("dflash_config.target_layer_ids", [1, 1], "rise from 0"),
        ("dflash_config.target_layer_ids", [-1, 1], "rise from 0"),
        ("dflash_config.causal", 1, "be true or false"),
        ("dflash_config.input_embedding_scale", 0, "be a number from 1e-06 to 1e\\+06"),
        ("block_size", 1, "be an integer from 2 to 1024"),
        ("layer_types", ["full_attention"], "list 3 times sliding_attention or full_attention"),
        ("head_dim", 24, "be a multiple of 16 and at most 512"),
        ("num_key_value_heads", 3, None),
    ],
)
def test_what_is_refused_is_named(key: str, value: Any, rule: str | None, tmp_path: Path) -> None:
    config = changed(key, value)
    if key == "architectures" and value is None:
        del config["architectures"]
    as_file(tmp_path, config)
    name = "num_attention_heads` must be a multiple of 3" if rule is None else f"{key}` must {rule}"
    with pytest.raises(ValueError, match=rf"^\[config\] `{name}") as error:
        read_dflash_config(tmp_path)
    assert str(error.value).endswith(".")
    assert names_dflash(config) or "dflash_config" not in config
    report = inspect(tmp_path)  # takes it for one, and tells the same
    assert report["kind"] == "dflash" and report["refused"] == [str(error.value)]


@pytest.mark.parametrize(
    "key", ["dflash_config", "dflash_config.mask_token_id", "block_size", "rope_theta"]
)
def test_what_is_missing_is_named(key: str, tmp_path: Path) -> None:
    config = json.loads(json.dumps(OURS))
    holder = config["dflash_config"] if "." in key else config
    del holder[key.rpartition(".")[2]]
    with pytest.raises(ValueError, match=rf"\[config\] config\.json misses `{key}`\."):
        read_dflash_config(as_file(tmp_path, config))


def test_keys_may_stand_in_either_place(tmp_path: Path) -> None:
    config = json.loads(json.dumps(OURS))
    for key in ("block_size", "num_target_layers", "final_logit_softcapping"):
        config["dflash_config"][key] = config.pop(key)
    usual = read_dflash_config(as_file(tmp_path / "a", OURS))
    assert read_dflash_config(as_file(tmp_path / "b", config)) == usual
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}
    assert read_dflash_config(as_file(tmp_path / "c", config)) == usual
    for key in ("num_target_layers", "final_logit_softcapping"):
        del config["dflash_config"][key]
    bare = read_dflash_config(as_file(tmp_path / "d", config))
    assert bare.target_layers is None and bare.softcap is None


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "hidden_size",
            128,
            r"DFlash drafter's hidden size must equal the target's 64 but got 128",
        ),
        ("vocab_size", 512, r"vocabulary size must equal the target's 256 but got 512"),
        ("num_target_layers", 5, r"`num_target_layers` must equal the target's 6 but got 5"),
        ("final_logit_softcapping", 15.0, r"softcap must equal the target's 30.0 but got 15.0"),
        (
            "dflash_config",
            {"target_layer_ids": [0, 6], "mask_token_id": 4},
            r"`target_layer_ids` must be below the target's 6 layers but got 6",
        ),
    ],
)
def test_another_targets_drafter_is_refused(
    key: str, value: Any, message: str, tmp_path: Path
) -> None:
    """Before a tensor is read, at every door."""
    as_file(tmp_path / "dflash", OURS | {key: value})
    with pytest.raises(ValueError, match=message):
        load(PAIR / "target", dflash=tmp_path / "dflash")
    with pytest.raises(ValueError, match=message):
        convert(PAIR / "target", tmp_path / "out", dflash=tmp_path / "dflash")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["lm_head.weight", "mask_embedding.weight", "d2t", "model.x"])
def test_a_tensor_too_many_is_refused(name: str, tmp_path: Path) -> None:
    """A head too, which in other checkpoints repeats the table."""
    weights = weights_of(OURS) | {name: np.zeros((4, 4), np.float32)}
    folder = write(tmp_path / "dflash", OURS, weights)
    with pytest.raises(ValueError, match=rf"\[load\] `{name}` is no tensor of this DFlash model\."):
        load(PAIR / "target", dflash=folder, dtype="float32")


def test_a_tensor_too_few_and_one_misshapen(tmp_path: Path) -> None:
    weights = weights_of(OURS)
    missing = {k: v for k, v in weights.items() if k != "layers.1.mlp.up_proj.weight"}
    folder = write(tmp_path / "few", OURS, missing)
    with pytest.raises(ValueError, match=r"miss `layers.1.mlp.up_proj.weight`; is this a DFlash"):
        load(PAIR / "target", dflash=folder, dtype="float32")
    folder = write(tmp_path / "bad", OURS, weights | {"norm.weight": np.ones(63, np.float32)})
    with pytest.raises(ValueError, match=r"`norm.weight` must have shape \[64\] but got \[63\]"):
        load(PAIR / "target", dflash=folder, dtype="float32")


def test_names_may_have_a_prefix(tmp_path: Path) -> None:
    weights = {f"model.{name}": x for name, x in weights_of(OURS).items()}
    pair = load(PAIR / "target", dflash=write(tmp_path / "d", OURS, weights), dtype="float32")
    assert pair.dflash is not None and pair.assistant is None
    assert repr(pair).count("without assistant and with DFlash") == 1


def test_dtypes_must_be_one() -> None:
    with pytest.raises(ValueError, match=r"the DFlash drafter's dtype must equal the target's"):
        load(PAIR / "target", dflash=folder_of("dense31"))


def test_arguments() -> None:
    dflash = folder_of("dense31")
    with pytest.raises(ValueError, match=r"\[load\] dflash must come with a target but got none\."):
        load(dflash=dflash)
    with pytest.raises(ValueError, match=r"bundle must stand alone but dflash is given too\."):
        load(bundle=PAIR, dflash=dflash)
    with pytest.raises(ValueError, match=r"dflash must be a folder or a name but got 3\."):
        load(PAIR / "target", dflash=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\[load\] dflash must be a folder but got .*nowhere\."):
        load(PAIR / "target", dflash=Path("nowhere"))


@pytest.mark.parametrize("bits", [8, 4])
def test_conversion(bits: int, tmp_path: Path) -> None:
    """Alone, with a target, and with its assistant: the same files, which a bundle loads."""
    source, mode = folder_of("dense31"), {"bits": bits, "group_size": 32}
    alone = convert(source, tmp_path / "alone", **mode)
    assert alone.kind == "dflash"
    both = convert(PAIR / "target", tmp_path / "both", dflash=source, **mode)
    all_ = convert(
        PAIR / "target", tmp_path / "all", assistant=PAIR / "assistant", dflash=source, **mode
    )
    assert (both.kind, all_.kind) == ("pair", "pair")
    assert list(bundle_parts(all_.path)) == ["target", "assistant", "dflash"]
    assert list(bundle_parts(both.path)) == ["target", "dflash"]
    one, other = (
        (folder / "model.safetensors").read_bytes()
        for folder in (both.path / "dflash", all_.path / "dflash")
    )
    assert one == other
    tensors = mx.load(str(all_.path / "dflash" / "model.safetensors"))
    wanted = mx.quantize(mx.array(weights_of(OURS)["fc.weight"]).astype(mx.bfloat16), 32, bits)
    for found, want in zip(("weight", "scales", "biases"), wanted, strict=True):
        assert mx.array_equal(tensors[f"fc.{found}"], want)
    assert tensors["layers.0.input_layernorm.weight"].dtype == mx.bfloat16
    pairs = [load(bundle=done.path) for done in (both, all_)]
    assert [pair.assistant is None for pair in pairs] == [True, False]
    for pair in pairs:
        assert pair.dflash is not None and pair.dflash.fuse.packing == (32, bits)
        assert pair.dflash.config.taps == (0, 5)
    report = inspect(all_.path)
    assert report["kind"] == "pair" and report["dflash"]["taps"] == [0, 5]
    assert report["dflash"]["tensors"]["matrices"] == {f"{bits} bit, group 32": 22}
    parts = [report[part]["tensors"]["bytes"] for part in ("target", "assistant", "dflash")]
    assert report["memory"]["weights"] == sum(parts)
    without = inspect(_without_dflash(all_.path, tmp_path / "less"))
    pages = -(-(512 + 7) // 64)  # of the context of 512 and a block
    assert report["memory"]["cache"] - without["memory"]["cache"] == pages * 3 * 2 * 2 * 64 * 16 * 2


def _without_dflash(bundle: Path, folder: Path) -> Path:
    shutil.copytree(bundle, folder)
    shutil.rmtree(folder / "dflash")
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["layout"]["dflash"], manifest["dflash"]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


def test_what_is_quantised_is_not_quantised_again(tmp_path: Path) -> None:
    convert(folder_of("dense31"), tmp_path / "q8", group_size=32)
    with pytest.raises(ValueError, match=r"src must not be quantised already but .*q8 is"):
        convert(tmp_path / "q8", tmp_path / "more")


def test_bundles(tmp_path: Path) -> None:
    """A folder dflash/ is part of a bundle, whether the manifest names it or not; one that is
    named must be there, and inside."""
    bundle = tmp_path / "bundle"
    shutil.copytree(PAIR / "target", bundle / "target")
    shutil.copytree(folder_of("dense31"), bundle / "dflash")
    assert load(bundle=bundle, dtype="float32").dflash is not None
    manifest = {"layout": {"target": "target", "dflash": "flash"}}
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="dflash must be a folder but got"):
        load(bundle=bundle)
    (bundle / "dflash").rename(bundle / "flash")
    assert load(bundle=bundle, dtype="float32").dflash is not None
    manifest["layout"]["assistant"] = "assistant"
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="assistant must be a folder but got"):
        load(bundle=bundle)
    manifest["layout"] = {"dflash": "../x"}
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"`layout.dflash` of .* must lie inside the bundle"):
        load(bundle=bundle)


def test_kept_pages_are_of_one_drafter(tmp_path: Path) -> None:
    """Other weights of the drafter, other pages; none at all, other ones again."""
    other = write(tmp_path / "other", OURS, weights_of(OURS, seed=1))
    prints = {
        fingerprint(load(PAIR / "target", dflash=place, dtype="float32"), tmp_path / "known")
        for place in (None, folder_of("dense31"), other)
    }
    assert len(prints) == 3


def test_commands(tmp_path: Path) -> None:
    target, dflash = str(PAIR / "target"), str(folder_of("dense31"))
    words = ["convert", target, str(tmp_path / "x"), "--dflash", dflash, "--json"]
    done = CliRunner().invoke(cli.app, [*words, "--group-size", "32"])
    assert done.exit_code == 0 and json.loads(done.stdout)["kind"] == "pair"
    done = CliRunner().invoke(cli.app, ["inspect", dflash])
    assert done.exit_code == 0 and "mask token" in done.stdout
    words = ["generate", "x", "--target", target, "--assistant", str(PAIR / "assistant")]
    words += ["--dflash", "nowhere"]
    for drafter, told in (
        ("dflash", "[load] dflash must be a folder but got nowhere."),
        ("assistant", "[load] --dflash must go with --drafter dflash but got assistant."),
    ):
        done = CliRunner().invoke(cli.app, [*words, "--drafter", drafter])
        assert done.exit_code == 2 and told in done.stderr


def test_pages_of_full_layers_are_what_they_need() -> None:
    config = read_dflash_config(folder_of("dense31"))
    assert config.kept == tuple(
        LayerConfig(False, layer.head_dim, layer.num_kv_heads, layer.ffn_width, i, False)
        for i, layer in enumerate(config.layers)
    )
