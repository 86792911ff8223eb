"""Pages in a folder: what is read is what was written, and everything else is not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pyengine.engine.page_files import PageFiles

MODEL, OTHER = "a" * 64, "b" * 64


class Told(list[str]):
    __call__ = list[str].append


def files(folder: Path, told: Told, model: str = MODEL, limit: int = 1 << 20) -> PageFiles:
    return PageFiles(folder, model, limit, told)


def test_a_page_is_there_for_the_next_process(tmp_path: Path) -> None:
    told = Told()
    kept = files(tmp_path / "new" / "folder", told)
    key = kept.key(None, range(64), False)
    assert kept.read(key, "full", 5) is None and not kept.has(key, "full")
    kept.write(key, "full", b"12345")
    again = files(tmp_path / "new" / "folder", told)
    assert again.has(key, "full") and again.read(key, "full", 5) == b"12345"
    assert not again.has(key, "sliding") and again.read(key, "sliding", 5) is None
    assert told == []


def test_a_key_is_of_all_that_a_page_follows_from(tmp_path: Path) -> None:
    own, foreign = files(tmp_path, Told()), files(tmp_path, Told(), OTHER)
    first = own.key(None, [1, 2], False)
    keys = [
        first,
        foreign.key(None, [1, 2], False),
        own.key(None, [2, 1], False),
        own.key(None, [1, 2], True),
        own.key(first, [1, 2], False),
        own.key(own.key(None, [1, 3], False), [1, 2], False),
    ]
    assert len(set(keys)) == len(keys)
    assert own.key(None, [1, 2], False) == first


@pytest.mark.parametrize("harm", ["cut", "longer", "bit", "digest", "swapped", "empty", "folder"])
def test_a_damaged_file_is_ignored_with_a_line(tmp_path: Path, harm: str) -> None:
    told = Told()
    kept = files(tmp_path, told)
    key, other = (kept.key(None, [n], False) for n in (1, 2))
    kept.write(key, "full", b"0123456789")
    kept.write(other, "full", b"9876543210")
    path, second = (tmp_path / MODEL[:32] / f"{k}.full.page" for k in (key, other))
    data = path.read_bytes()
    damaged = {
        "cut": data[:-1],
        "longer": data + b"0",
        "bit": data[:-1] + b"8",
        "digest": bytes([data[0] ^ 1]) + data[1:],
        "swapped": second.read_bytes(),
        "empty": b"",
        "folder": b"",
    }
    path.unlink()
    if harm == "folder":
        path.mkdir()
    else:
        path.write_bytes(damaged[harm])
    assert kept.read(key, "full", 10) is None
    assert len(told) == 1 and str(path) in told[0]
    assert kept.read(other, "full", 10) == b"9876543210"


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    kept = files(tmp_path, Told(), limit=400)
    keys = [kept.key(None, [n], False) for n in range(5)]
    for n, key in enumerate(keys[:4]):
        kept.write(key, "full", bytes(68))  # 100 bytes with its hash
        os.utime(tmp_path / MODEL[:32] / f"{key}.full.page", (n, n))
    kept.read(keys[0], "full", 68)
    kept.write(keys[4], "full", bytes(68))
    assert [kept.has(key, "full") for key in keys] == [True, False, True, True, True]
    # Of whatever model
    foreign = files(tmp_path, Told(), OTHER, limit=200)
    assert sum(kept.has(key, "full") for key in keys) == 2
    foreign.write(foreign.key(None, [1], False), "full", bytes(169))  # too large for all of it
    assert sum(kept.has(key, "full") for key in keys) == 2


def test_a_folder_that_cannot_be_written_to_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Told()
    kept = files(tmp_path, told)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pyengine.engine.page_files.write_whole", full)
    for n in range(3):
        kept.write(kept.key(None, [n], False), "full", b"1")
    assert len(told) == 1 and "No space left on device" in told[0]
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"\[cache\] .*file must be a folder to write to"):
        files(tmp_path / "file", told)


def test_nothing_half_written_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = files(tmp_path, Told())

    def fails(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fdopen", fails)
    with pytest.raises(KeyboardInterrupt):
        kept.write(kept.key(None, [1], False), "full", b"1")
    monkeypatch.undo()
    assert list((tmp_path / MODEL[:32]).iterdir()) == []
