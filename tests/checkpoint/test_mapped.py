"""Tensors as pages of their file: the same bits, nothing copied, files that change under them."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from models import decode
from tiny_pairs import quantized_fixtures

from pyengine import _ext, mapped
from pyengine.checkpoint import memory, weights
from pyengine.checkpoint.pair import load
from pyengine.checkpoint.safetensors import read_header
from pyengine.sampling.settings import Sampling

WORDS = {dtype: name for name, dtype in mapped.DTYPES.items()} | {mx.int32: "I32"}
pytestmark = pytest.mark.usefixtures("small")
here = pytest.mark.skipif(not _ext.can_map(), reason="tensors are mapped on Linux processors only")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """However small a tensor is, it is mapped."""
    monkeypatch.setattr(mapped, "LEAST", 1)


def tensor(path: Path, name: str) -> mx.array | None:
    file = os.open(path, os.O_RDONLY)
    try:
        return mapped.tensor(file, *read_header(path)[name])
    finally:
        os.close(file)


def saved(path: Path, **arrays: mx.array) -> dict[str, mx.array]:
    """Arrays in a file in this order, the first at a multiple of eight bytes; as MLX reads them."""
    header, end = {}, 0
    for name, array in arrays.items():
        begin, end = end, end + array.nbytes
        dtype = WORDS[array.dtype]
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = [bytes(memoryview(array.reshape(-1).view(mx.uint8))) for array in arrays.values()]
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data))
    loaded = mx.load(str(path))
    assert isinstance(loaded, dict)
    return loaded


@here
@pytest.mark.parametrize("dtype", mapped.DTYPES)
def test_a_mapped_tensor_has_the_bits_of_a_read_one(tmp_path: Path, dtype: str) -> None:
    x = mx.random.randint(0, 1000, (37, 5000), key=mx.random.key(3)).astype(mapped.DTYPES[dtype])
    # Behind 4000 bytes of another, so that it begins in the middle of a page
    want = saved(tmp_path / "x.safetensors", a=mx.zeros(1000), x=x)["x"]
    before = mapped.nbytes()
    got = tensor(tmp_path / "x.safetensors", "x")
    assert got is not None and (got.shape, got.dtype) == (x.shape, x.dtype)
    assert mapped.nbytes() - before >= x.nbytes
    for made in (got, got[3:, 7::3], got.T, got.reshape(-1)[5:], got * 2, got.astype(mx.float32)):
        mx.eval(made)
    assert mx.array_equal(got, want) and mx.array_equal(got[3:, 7::3], want[3:, 7::3])
    del made, got
    assert mapped.nbytes() == before


@here
def test_what_lies_between_multiples_of_its_size_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    saved(path, a=mx.zeros(1, mx.bfloat16), x=mx.arange(100, dtype=mx.uint32))
    assert read_header(path)["x"].begin % 4 == 2
    assert tensor(path, "x") is None and tensor(path, "a") is not None


def test_small_tensors_and_other_dtypes_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.safetensors"
    saved(path, i=mx.arange(100, dtype=mx.int32), x=mx.zeros(100))
    assert tensor(path, "i") is None
    monkeypatch.setattr(mapped, "LEAST", 401)
    assert tensor(path, "x") is None


@here
def test_what_an_op_takes_over_never_reaches_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    saved(path, x=mx.arange(5000, dtype=mx.float32))
    content = path.read_bytes()
    x = tensor(path, "x")
    assert x is not None
    for _ in range(3):
        x = -x  # the buffer is free to be written to
        mx.eval(x)
    assert mx.array_equal(x, -mx.arange(5000, dtype=mx.float32))
    assert path.read_bytes() == content
    again = tensor(path, "x")
    assert again is not None and mx.array_equal(again, mx.arange(5000, dtype=mx.float32))


@here
@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_a_file_that_goes_stays_for_who_has_it(tmp_path: Path, how: str) -> None:
    path, other = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    saved(path, x=mx.arange(5000, dtype=mx.float32))
    x = tensor(path, "x")
    if how == "replaced":
        saved(other, x=mx.zeros(5000))
        other.rename(path)
    else:
        path.unlink()
    assert x is not None and mx.array_equal(x, mx.arange(5000, dtype=mx.float32))
    mapped.check("test")


@here
def test_reading_ahead_is_told_by_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "PART", 8192)
    path, told = tmp_path / "x.safetensors", []
    loaded = saved(path, x=mx.arange(5000, dtype=mx.float32))
    x = tensor(path, "x")
    assert x is not None and mapped.read(x, told.append) == 20000
    assert told == [8192, 8192, 3616]
    assert mapped.read(loaded["x"], told.append) == 0 and len(told) == 3  # lazy, MLX's own
    assert mapped.read(mx.zeros(100), told.append) == 0


@here
def test_what_is_mapped_is_not_free(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    saved(path, x=mx.zeros((64 << 20) // 4))
    path.read_bytes()  # so that the system counts its pages as free
    x = tensor(path, "x")
    assert x is not None
    listed = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    said = int(listed["MemAvailable"].split()[0]) * 1024
    there = memory._available_to_machine()
    assert there is not None and said - there > 32 << 20  # others take and give memory meanwhile


@here
@pytest.mark.parametrize("flavour", ["e2b", "moe26", "dense31"])
def test_a_pair_by_maps_says_the_same(flavour: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = quantized_fixtures() / flavour

    def text(pair: Any) -> list[int]:
        made = decode(
            pair.target,
            pair.assistant,
            [5, 1, 4, 9],
            sampling=Sampling(seed=1),
            block_size=4,
            max_tokens=20,
        )
        return [token for done in made for token in done.tokens]

    told: list[tuple[int, int]] = []
    gc.collect()  # what an earlier test had mapped
    before = mapped.nbytes()
    by_maps = load(folder / "target", folder / "assistant", on_progress=lambda *n: told.append(n))
    taken = mapped.nbytes() - before
    said = text(by_maps)
    assert told == sorted(told) and 0.99 * told[-1][1] < told[-1][0] <= told[-1][1]
    del by_maps
    monkeypatch.setattr(mapped, "LEAST", 1 << 62)
    read = load(folder / "target", folder / "assistant")
    assert text(read) == said and len(said) == 20
    layers = [matrix for layer in read.target.layers for matrix in (layer.mlp.gate, layer.mlp.down)]
    assert taken > sum(array.nbytes for matrix in layers for array in matrix.arrays)


@here
def test_a_file_that_was_cut_before_it_is_mapped_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "target"
    shutil.copytree(quantized_fixtures() / "dense31" / "target", folder)
    opened = weights._open

    def cut(shard: Path) -> Any:
        found = opened(shard)
        os.truncate(shard, shard.stat().st_size // 2)
        return found

    monkeypatch.setattr(weights, "_open", cut)
    with pytest.raises(ValueError, match=r"\[load\] .*model\.safetensors is cut off\."):
        load(folder)


CUT = """
import os, shutil, sys
import mlx.core as mx
from pyengine import mapped
from pyengine.checkpoint.pair import load
from pyengine.engine import loop
from pyengine.sampling.settings import Sampling
mapped.LEAST = 1
source, folder, when = sys.argv[1:]
shutil.copytree(source, folder)
file = folder + "/model.safetensors"
if when == "loading":
    read = mapped.read
    def cut(array, on_read):
        os.truncate(file, 20000)
        return read(array, on_read)
    mapped.read = cut
pair = load(folder)
text = loop.decode(pair.target, None, [5, 1, 4], sampling=Sampling(seed=1), block_size=1,
                   max_tokens=50)
if when == "decoding":
    print(next(text).tokens, next(text).tokens)
os.truncate(file, 20000)
for done in text:
    print(done.tokens)
"""


@here
@pytest.mark.parametrize(
    ("when", "message"),
    [
        ("prefill", "RuntimeError: [prefill] a file of weights must stay whole while they are"),
        ("decoding", "RuntimeError: [generate] a file of weights must stay whole while they are"),
        ("loading", "cannot be read from its file: "),
    ],
)
def test_a_file_that_is_cut_under_a_map_ends_in_a_sentence(
    tmp_path: Path, when: str, message: str
) -> None:
    source = quantized_fixtures() / "dense31" / "target"
    command = [sys.executable, "-c", CUT, str(source), str(tmp_path / "target"), when]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    assert message in done.stderr.splitlines()[-1]
    # No token that came of zeros
    assert done.stdout.count("[") == (2 if when == "decoding" else 0)


FOREIGN = """
import mmap, os, sys
from pathlib import Path
import mlx.core as mx
from pyengine import _ext
path = Path(sys.argv[1])
mx.save_safetensors(str(path), {"x": mx.zeros(5000)})
file = os.open(path, os.O_RDONLY)
x = _ext.map_tensor(file, 4096, [1000], mx.float32)
other = mmap.mmap(file, 0, prot=mmap.PROT_READ)
os.truncate(path, 0)
print(float(x.sum()), _ext.lost_mapped(), flush=True)
print(other[8000])
"""


@here
def test_a_fault_in_anothers_map_is_its_own(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FOREIGN, str(tmp_path / "x.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout == "0.0 True\n" and done.returncode == -signal.SIGBUS


def test_bytes_that_are_not_there_are_not_read() -> None:
    with pytest.raises(ValueError, match="no such bytes"):
        _ext.read_mapped(mx.zeros(4), 8, 9)
