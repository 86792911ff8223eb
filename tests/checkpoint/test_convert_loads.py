"""Whatever convert writes, load loads: over random sources, of mixed dtypes and in every form."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from models import decode
from tiny_pairs import FIXTURES, FLAVOURS, greedy_text

from pyengine.checkpoint.convert import convert
from pyengine.checkpoint.inspect import inspect
from pyengine.checkpoint.pair import Pair, load
from pyengine.checkpoint.safetensors import INDEX, SINGLE
from pyengine.engine.stats import Stats
from pyengine.sampling.settings import Sampling

DTYPES = [mx.float32, mx.float16, mx.bfloat16]


def tensors_of(folder: Path) -> dict[str, mx.array]:
    loaded = mx.load(str(folder / SINGLE))
    assert isinstance(loaded, dict)
    return loaded


def is_float(array: mx.array) -> bool:
    return mx.issubdtype(array.dtype, mx.floating)


def is_norm(name: str) -> bool:
    return "norm" in name or "scal" in name


def mixed(rng: random.Random, tensors: dict[str, mx.array]) -> dict[str, mx.array]:
    """All of one dtype; or norms of another; or each of its own."""
    way = rng.choice(["one", "norms", "each", "each"])
    base, other = rng.choice(DTYPES), rng.choice(DTYPES)
    out = {}
    for name, array in tensors.items():
        dtype = base
        if way == "norms" and is_norm(name):
            dtype = other
        if way == "each":
            dtype = rng.choice(DTYPES)
        out[name] = array.astype(dtype) if is_float(array) else array.astype(rng.choice(INTEGERS))
    return out


INTEGERS = [mx.int32, mx.int64]


def one_by_one(rng: random.Random, tensors: dict[str, mx.array]) -> dict[str, mx.array]:
    """Experts as a tensor each, each of a dtype of its own."""
    out = {}
    for name, array in tensors.items():
        if not name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            out[name] = array
            continue
        for x in range(array.shape[0]):
            at = name.replace(".experts.", f".experts.{x}.")
            parts = {at: array[x]}
            if "gate_up" in name:
                gate, up = mx.split(array[x], 2)
                parts = {at.replace("gate_up", "gate"): gate, at.replace("gate_up", "up"): up}
            for part, value in parts.items():
                out[f"{part}.weight"] = value.astype(rng.choice([array.dtype, *DTYPES]))
    return out


def unread(rng: random.Random) -> dict[str, mx.array]:
    return {
        "model.vision_tower.patch.weight": mx.zeros((3, 5), dtype=rng.choice(DTYPES)),
        "model.audio_tower.bias": mx.full((7,), float("nan")),
        "lm_head.weight": mx.zeros((2, 2), dtype=mx.uint8),
    }


def write(rng: random.Random, folder: Path, tensors: dict[str, mx.array]) -> None:
    """One file or several, with or without an index, with or without a stale one."""
    names = list(tensors)
    rng.shuffle(names)
    count = rng.randint(1, 4)
    if count == 1:
        mx.save_safetensors(str(folder / SINGLE), tensors)
        if rng.random() < 0.3:
            stale = dict.fromkeys(names, "model-00001-of-00009.safetensors")
            (folder / INDEX).write_text(json.dumps({"weight_map": stale}))
        return
    where = {}
    for i in range(count):
        file = f"model-{i + 1:05}-of-{count:05}.safetensors"
        part = {name: tensors[name] for name in names[i::count]}
        mx.save_safetensors(str(folder / file), part)
        where |= dict.fromkeys(part, file)
    if rng.random() < 0.7:
        (folder / INDEX).write_text(json.dumps({"weight_map": where}))


def source(rng: random.Random, src: Path, dst: Path) -> None:
    shutil.copytree(src, dst, ignore=lambda *_: [SINGLE])
    tensors = mixed(rng, tensors_of(src))
    if rng.random() < 0.5:
        tensors = one_by_one(rng, tensors)
    if rng.random() < 0.5:
        tensors |= unread(rng)
    mx.eval(tensors)
    write(rng, dst, tensors)
    config = json.loads((dst / "config.json").read_text())
    config |= rng.choice([{}, {"quantization": None}, {"quantization_config": None}])
    config |= rng.choice([{}, {"vision_config": "none"}, {"dtype": "float64"}])
    (dst / "config.json").write_text(json.dumps(config))


def generated(pair: Pair, ids: list[int], block: int) -> list[int]:
    """A short greedy text; logits that are not finite end it with an error."""
    rounds = decode(
        pair.target,
        pair.assistant,
        ids,
        sampling=Sampling(temperature=0.0),
        block_size=block,
        max_tokens=12,
        stop_ids=frozenset(),
        stats=Stats(),
    )
    return [token for step in rounds for token in step[0]]


@pytest.mark.parametrize("seed", range(48))
def test_whatever_convert_writes_load_loads(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    flavour = FLAVOURS[seed % len(FLAVOURS)]
    for part in ("target", "assistant"):
        source(rng, FIXTURES / flavour / part, tmp_path / "src" / part)
    recipe: dict[str, Any] = {
        "bits": rng.choice([4, 6, 8]),
        "group_size": rng.choice([32, 64, 128]),
    }
    form = rng.choice(["bundle", "pair", "pair", "target"])
    src, out = tmp_path / "src", tmp_path / "out"
    if form == "bundle":
        convert(src, out, **recipe)
    elif form == "pair":
        convert(src / "target", out, assistant=src / "assistant", **recipe)
    else:
        convert(src / "target", out, **recipe)
        convert(src / "assistant", tmp_path / "drafter", **recipe)
    pair = load(out) if form == "target" else load(bundle=out)
    # The fixtures have no tokenizer, which loading for token ids does without
    assert all(said.startswith("[tokenizer]") for said in inspect(out)["refused"])
    ids = greedy_text(flavour)[:20]
    assert mx.isfinite(pair.logits(ids)).all()
    plain = generated(pair, ids, 1)
    assert len(plain) == 12
    if form != "target":
        assert generated(pair, ids, rng.randint(2, 6)) == plain
    with pytest.raises(ValueError, match="must not be quantised already"):
        convert(out, tmp_path / "again", **recipe)


@pytest.mark.parametrize("storage", DTYPES)
def test_a_pair_has_the_dtype_of_the_target_s_embedding(storage: mx.Dtype, tmp_path: Path) -> None:
    for part in ("target", "assistant"):
        src, dst = FIXTURES / "dense31" / part, tmp_path / part
        shutil.copytree(src, dst)
        cast = {name: array.astype(mx.float32) for name, array in tensors_of(src).items()}
        if part == "target":
            name = next(n for n in cast if n.endswith("embed_tokens.weight"))
            cast[name] = cast[name].astype(storage)
        mx.eval(cast)
        mx.save_safetensors(str(dst / SINGLE), cast)
    convert(tmp_path / "target", tmp_path / "out", assistant=tmp_path / "assistant")
    pair = load(bundle=tmp_path / "out")
    assert pair.assistant is not None
    assert pair.target.dtype == storage == pair.assistant.dtype


def test_casting_norms_equals_loading_them_cast(tmp_path: Path) -> None:
    src = FIXTURES / "dense31" / "target"
    shutil.copytree(src, tmp_path / "src")
    cast = {
        name: array.astype(mx.float32 if is_norm(name) else mx.bfloat16)
        for name, array in tensors_of(src).items()
    }
    mx.eval(cast)
    mx.save_safetensors(str(tmp_path / "src" / SINGLE), cast)
    convert(tmp_path / "src", tmp_path / "mixed")
    mx.save_safetensors(
        str(tmp_path / "src" / SINGLE),
        {name: array.astype(mx.bfloat16) for name, array in cast.items()},
    )
    convert(tmp_path / "src", tmp_path / "plain")
    assert (tmp_path / "mixed" / SINGLE).read_bytes() == (tmp_path / "plain" / SINGLE).read_bytes()


def overflow(tensors: dict[str, mx.array], suffix: str, values: tuple[float, float]) -> None:
    name = next(n for n in tensors if n.endswith(suffix))
    rows = mx.zeros(tensors[name].shape, dtype=mx.float32)
    rows[..., 0], rows[..., 1] = values
    tensors[name] = rows


@pytest.mark.parametrize(
    ("storage", "suffix", "values"),
    [
        (mx.float16, "norm.weight", (1e6, 0.0)),
        (mx.float16, "up_proj.weight", (1e6, 0.0)),
        (mx.bfloat16, "up_proj.weight", (3.4e38, 0.0)),
        (mx.float32, "up_proj.weight", (3e38, -3e38)),  # finite numbers of an endless range
    ],
)
def test_what_the_dtype_cannot_hold_is_refused_and_nothing_left(
    storage: mx.Dtype, suffix: str, values: tuple[float, float], tmp_path: Path
) -> None:
    src = tmp_path / "src"
    shutil.copytree(FIXTURES / "dense31" / "target", src)
    tensors = {name: array.astype(storage) for name, array in tensors_of(src).items()}
    overflow(tensors, suffix, values)
    mx.eval(tensors)
    mx.save_safetensors(str(src / SINGLE), tensors)
    with pytest.raises(ValueError, match=rf"must fit {str(storage)[9:]}, the dtype of the token"):
        convert(src, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def settings(src: Path) -> None:
    (src / "target" / "generation_config.json").write_text('{"eos_token_id": 100000}')


def ordering(src: Path) -> None:
    tensors = tensors_of(src / "assistant")
    name = next(n for n in tensors if n.endswith("token_ordering"))
    changed = {**tensors, name: mx.zeros_like(tensors[name])}
    mx.eval(changed)
    mx.save_safetensors(str(src / "assistant" / SINGLE), changed)


@pytest.mark.parametrize(
    ("spoil", "dst", "message"),
    [
        (settings, "out", "`eos_token_id` of generation_config.json must hold ids"),
        (ordering, "out", "token_ordering` must hold every token id once"),
        (lambda src: None, "a\x1b[31m", r"\[convert\] dst must have a printable name"),
        (lambda src: None, "n" * 201, r"\[convert\] dst must have a printable name"),
    ],
)
def test_what_load_would_refuse_is_refused_before_the_first_byte(
    spoil: Any, dst: str, message: str, tmp_path: Path
) -> None:
    shutil.copytree(FIXTURES / "e2b", tmp_path / "src")
    spoil(tmp_path / "src")
    steps: list[str] = []
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "src", tmp_path / dst, on_progress=lambda *row: steps.append(row[2]))
    assert steps == [] and [path.name for path in tmp_path.iterdir()] == ["src"]
