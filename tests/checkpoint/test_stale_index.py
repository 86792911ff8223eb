"""An index of shards that has outlived its shards: what is whole loads, what is not names it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from tiny_pairs import FIXTURES

from pyengine.checkpoint.pair import load
from pyengine.checkpoint.safetensors import INDEX, SINGLE

SRC = FIXTURES / "dense31" / "target"
OLD = "model-00001-of-00007.safetensors"


def tensors() -> dict[str, mx.array]:
    loaded = mx.load(str(SRC / SINGLE))
    assert isinstance(loaded, dict)
    return loaded


def split(folder: Path, stem: str, count: int) -> dict[str, str]:
    """The target's tensors in so many shards; the index that is true of them."""
    where = {}
    for i in range(count):
        part = dict(list(tensors().items())[i::count])
        name = f"{stem}-{i + 1:05}-of-{count:05}.safetensors"
        mx.save_safetensors(str(folder / name), part)
        where |= dict.fromkeys(part, name)
    return where


def index(folder: Path, where: dict[str, str]) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": where}))


def stale(folder: Path) -> None:
    index(folder, dict.fromkeys(tensors(), OLD))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The target without its weights."""
    return Path(shutil.copytree(SRC, tmp_path / "t", ignore=lambda *_: [SINGLE]))


def single_file(folder: Path) -> None:
    shutil.copyfile(SRC / SINGLE, folder / SINGLE)
    stale(folder)


def numbered_shards(folder: Path) -> None:
    split(folder, "model", 3)
    stale(folder)


def shards_of_an_older_name(folder: Path) -> None:
    split(folder, "pytorch", 2)
    stale(folder)


def tensors_have_moved(folder: Path) -> None:
    where = split(folder, "model", 2)
    names = sorted(set(where.values()))
    index(folder, {tensor: names[1 - names.index(name)] for tensor, name in where.items()})


def tensors_have_other_names(folder: Path) -> None:
    where = split(folder, "model", 2)
    index(folder, {f"old.{tensor}": name for tensor, name in where.items()})


def no_index(folder: Path) -> None:
    split(folder, "model", 4)


def remains_of_an_older_set(folder: Path) -> None:
    split(folder, "model", 2)
    shutil.copyfile(folder / "model-00002-of-00002.safetensors", folder / OLD)
    index(folder, {"a": OLD, "b": "model-00002-of-00007.safetensors"})


WHOLE = [
    single_file,
    numbered_shards,
    shards_of_an_older_name,
    tensors_have_moved,
    tensors_have_other_names,
    no_index,
    remains_of_an_older_set,
]


@pytest.mark.parametrize("lay", WHOLE)
def test_whole_weights_load_beside_a_stale_index(lay: Callable[[Path], None], folder: Path) -> None:
    lay(folder)
    assert mx.array_equal(load(folder).logits([2, 7, 1]), load(SRC).logits([2, 7, 1]))


def one_shard_gone(folder: Path) -> None:
    index(folder, split(folder, "model", 3))
    (folder / "model-00002-of-00003.safetensors").unlink()


def a_tensor_gone(folder: Path) -> None:
    where = split(folder, "model", 2)
    index(folder, where)
    path = folder / "model-00001-of-00002.safetensors"
    part = mx.load(str(path))
    assert isinstance(part, dict)
    kept = {name: mx.array(x) for name, x in part.items() if not name.endswith("up_proj.weight")}
    mx.eval(kept)
    mx.save_safetensors(str(path), kept)


def shards_without_index_nor_end(folder: Path) -> None:
    split(folder, "model", 3)
    (folder / "model-00003-of-00003.safetensors").unlink()


def two_sets(folder: Path) -> None:
    split(folder, "model", 2)
    split(folder, "model", 3)


LACKING = [
    (one_shard_gone, rf"misses the shard model-00002-of-00003\.safetensors; .* is {INDEX} stale\?"),
    (
        a_tensor_gone,
        rf"weights miss `.*`; {INDEX} is stale: it puts `.*up_proj.weight` into",
    ),
    (shards_without_index_nor_end, "no index of shards, nor all shards of one set"),
    (two_sets, "must hold one set of shards but holds model-\\*-of-00002 and model-\\*-of-00003"),
]


@pytest.mark.parametrize(("lay", "message"), LACKING)
def test_weights_that_lack_something_name_it(
    lay: Callable[[Path], None], message: str, folder: Path
) -> None:
    lay(folder)
    with pytest.raises(ValueError, match=rf"^\[load\] .*{message}"):
        load(folder)


def test_a_true_index_keeps_other_files_out(folder: Path) -> None:
    index(folder, split(folder, "model", 2))
    mx.save_safetensors(str(folder / "adapter.safetensors"), {"unknown": mx.zeros(3)})
    split(folder, "other", 3)
    assert load(folder).logits([2]).shape == (1, 256)
