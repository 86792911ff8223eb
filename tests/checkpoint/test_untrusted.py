"""The small files of a checkpoint: JSON of one meaning, bounded; files written whole or not."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pyengine import untrusted
from pyengine.untrusted import MAX_DEPTH, MAX_VALUES, parse, read_object, write_whole


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('{"a": 1, "a": 1}', "'a'"),
        ('{"a": 1, "b": {"c": [], "c": {}}}', "'c'"),
        ('[{"x": 1}, {"x": 1, "y": 2, "\\u0078": 3}]', "'x'"),
        ('{"": 0, "": 0}', "''"),
    ],
)
def test_a_repeated_key_is_refused_by_name(text: str, key: str) -> None:
    with pytest.raises(ValueError, match=r"^\[x\] it must name each key once but .* comes twice"):
        parse(text, "[x] it")
    with pytest.raises(ValueError, match=key):
        parse(text, "[x] it")


def test_the_same_key_in_two_objects_is_no_repetition() -> None:
    assert parse('{"a": {"a": 1}, "b": [{"a": 2}, {"a": 3}]}', "[x] it")["b"][1] == {"a": 3}


@pytest.mark.parametrize("opened, closed", ["[]", ('{"a":', "}"), ('[{"a":', "}]")])
def test_depth_is_bounded(opened: str, closed: str) -> None:
    per = len(opened.replace('"a":', ""))
    levels = MAX_DEPTH // per
    text = opened * levels + "1" + closed * levels
    assert parse(text, "[x] it")
    for more in (levels + 1, 10 * levels, 100_000):
        with pytest.raises(ValueError, match=r"^\[x\] it must be JSON but is nested too deeply\.$"):
            parse(opened * more + "1" + closed * more, "[x] it")


@pytest.mark.parametrize("value", ["[]", "{}", "0", '{"a":0}', '""'])
def test_the_number_of_values_is_bounded(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(untrusted, "MAX_VALUES", 1000)
    fits = 1000 // (sum(map(value.count, ":[{")) + 1) - 1
    assert len(parse("[" + ",".join([value] * fits) + "]", "[x] it")) == fits
    with pytest.raises(ValueError, match=r"^\[x\] it must hold at most 1000 values but"):
        parse("[" + ",".join([value] * (fits + 2)) + "]", "[x] it")
    assert MAX_VALUES > 4 * 100_000  # a header of 35,000 tensors has 14 marks each


def test_a_large_file_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(ValueError, match=r"^\[x\] .*config\.json must be at most 8 MB"):
        read_object(path, "x")


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_whole(path, "one\n")
    write_whole(path, "two\n")
    assert path.read_text() == "two\n" and os.listdir(tmp_path) == ["report.json"]
    with pytest.raises(UnicodeEncodeError, match="surrogates not allowed"):
        write_whole(path, "half \ud800")
    assert path.read_text() == "two\n" and os.listdir(tmp_path) == ["report.json"]


def test_writing_opens_nothing_that_lies_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where the temporary name is guessed: it is made, never opened."""
    monkeypatch.setattr(untrusted.secrets, "token_hex", lambda count: "0" * 2 * count)
    foreign = tmp_path / "foreign"
    foreign.write_text("keep")
    (tmp_path / (".report.json." + "0" * 16)).symlink_to(foreign)
    with pytest.raises(FileExistsError, match=r"\.report\.json\.0{16}"):
        write_whole(tmp_path / "report.json", "{}")
    assert foreign.read_text() == "keep"
    # A link of the wanted name is replaced, not followed
    monkeypatch.undo()
    (tmp_path / "link").symlink_to(foreign)
    write_whole(tmp_path / "link", json.dumps({}))
    assert foreign.read_text() == "keep" and not (tmp_path / "link").is_symlink()


def test_a_written_file_has_the_mode_that_the_user_set(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "x", "")
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640
