"""The fingerprint changes with whatever the keys and values follow from, and with nothing else."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from pyengine import ops
from pyengine.checkpoint.fingerprint import fingerprint
from pyengine.checkpoint.pair import Pair, load


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    """The embedded pair, from a folder of its own."""
    shutil.copytree(load().path, tmp_path / "pair")
    return load(bundle=tmp_path / "pair")


def test_it_is_of_files_and_not_of_where_they_lie(pair: Pair, tmp_path: Path) -> None:
    first = fingerprint(pair, tmp_path / "cache")
    assert first == fingerprint(load(), tmp_path / "other")
    assert len(first) == 64 and int(first, 16)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_changed_file_changes_it(pair: Pair, tmp_path: Path, name: str) -> None:
    first = fingerprint(pair, tmp_path / "cache")
    path = pair.target_path / name
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    assert fingerprint(pair, tmp_path / "cache") != first


def test_kernels_and_dtype_change_it(pair: Pair, tmp_path: Path) -> None:
    found = {fingerprint(pair, tmp_path)}
    ops.use("reference")
    try:
        found.add(fingerprint(pair, tmp_path))
    finally:
        ops.use("native")
    target = load(bundle=pair.path, dtype="float32").target
    found.add(fingerprint(replace(pair, target=target), tmp_path))
    assert len(found) == 3


def test_a_file_is_hashed_once(pair: Pair, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    first = fingerprint(pair, tmp_path / "cache", lambda *at: seen.append(at))
    done, total = seen[-1]
    assert done == total and total > 1 << 20
    seen.clear()
    assert fingerprint(pair, tmp_path / "cache", lambda *at: seen.append(at)) == first
    assert seen == []
    os.utime(pair.target_path / "model.safetensors")
    assert fingerprint(pair, tmp_path / "cache", lambda *at: seen.append(at)) == first
    assert seen


@pytest.mark.parametrize("content", ["", "[]", "{", '{"x": 1}'])
def test_damaged_notes_are_made_anew(pair: Pair, tmp_path: Path, content: str) -> None:
    first = fingerprint(pair, tmp_path)
    (tmp_path / "hashes.json").write_text(content)
    assert fingerprint(pair, tmp_path) == first


def test_a_missing_file_is_one_sentence(pair: Pair, tmp_path: Path) -> None:
    (pair.target_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"^\[cache\] .*config\.json cannot be used: No such file"):
        fingerprint(pair, tmp_path)
