"""Names of the hub: told from folders, fetched through huggingface_hub, refused without it."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from pyengine import cli
from pyengine.checkpoint.hub import PATTERNS, locate
from pyengine.checkpoint.pair import load

NANO = Path(cli.__file__).parents[1] / "nano"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple]:
    """The names asked for; the embedded pair, as the hub's cache holds it, answers."""
    calls: list[tuple] = []

    def snapshot_download(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        calls.append((repo, revision, allow_patterns))
        if "absent" in repo:
            raise RuntimeError("404 Client Error.\nRepository Not Found for url.")
        folder = tmp_path / "hub" / "snapshots" / "0123"
        if not folder.exists():
            shutil.copytree(NANO, folder)
        return str(folder)

    fake: Any = SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    monkeypatch.chdir(tmp_path)
    return calls


def test_names_are_fetched_and_folders_are_not(asked: list[tuple], tmp_path: Path) -> None:
    pair = load(bundle="someone/pair")
    assert asked == [("someone/pair", None, PATTERNS)]
    assert pair.name == "pyengine-nano" and not pair.embedded
    assert locate("someone/pair@v1.2") and asked[-1][:2] == ("someone/pair", "v1.2")
    (tmp_path / "someone" / "here").mkdir(parents=True)
    count = len(asked)
    for place in ("someone/here", "a", "a/b/c", "/a/b", "./a/b", "../a", "~/a", "a/..", "a b/c"):
        assert locate(place) == Path(place)
    assert locate(Path("any/pair")) == Path("any/pair")
    assert len(asked) == count


def test_a_missing_path_is_not_asked_for_as_a_name(asked: list[tuple], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    rule = r"must be a folder that is there, or owner/name on the hub, but"
    with pytest.raises(
        ValueError, match=rf"\[hub\] mine/gemma {rule} the folder mine is here with"
    ):
        load(bundle="mine/gemma")
    for place in ("models/gemma", "datasets/gemma@main"):
        with pytest.raises(ValueError, match=rf"{rule} (models|datasets) is no owner there and /"):
            load(place)
    for command in (["generate", "fox", "--target"], ["inspect"], ["convert", "--bits", "8"]):
        for place in ("mine/gemma", "models/gemma", "./models/gemma", "a/b/c", "models/gemma/"):
            out = ["out"] if command[0] == "convert" else []
            done = CliRunner().invoke(cli.app, [*command, place, *out])
            assert done.exit_code == 2 and "must be a folder" in done.stderr, done.stderr
    assert asked == []
    assert load(bundle="mine/gemma@main").name == "pyengine-nano"
    assert asked == [("mine/gemma", "main", PATTERNS)]


def test_what_cannot_be_fetched_is_one_sentence(asked: list[tuple]) -> None:
    done = CliRunner().invoke(cli.app, ["generate", "fox", "--target", "someone/absent"])
    assert done.exit_code == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("pyengine: [hub] someone/absent must be a folder that is there")
    assert "404 Client Error. Repository Not Found" in done.stderr


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        ValueError, match=r'\[hub\] a/b must be a folder that .* pip install "pyengine-mlx\[hub\]"'
    ):
        load("a/b")
    for command in (["inspect", "a/b"], ["convert", "a/b", "out"], ["chat", "--bundle", "a/b"]):
        done = CliRunner().invoke(cli.app, command)
        assert done.exit_code == 2 and "pyengine-mlx[hub]" in done.stderr, command
