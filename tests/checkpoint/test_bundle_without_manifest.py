"""A folder with target/ and assistant/ is a bundle for every command, manifest or none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pyengine import cli
from pyengine.checkpoint.manifest import MANIFEST
from pyengine.checkpoint.pair import load

NANO = Path(cli.__file__).parents[1] / "nano"
FLOATS = Path(__file__).parents[1] / "fixtures" / "uni12"


@pytest.fixture
def bundle(tmp_path: Path) -> str:
    """The embedded pair's two folders alone."""
    for part in ("target", "assistant"):
        shutil.copytree(NANO / part, tmp_path / "bundle" / part)
    assert not (tmp_path / "bundle" / MANIFEST).exists()
    return str(tmp_path / "bundle")


def test_load_takes_it(bundle: str) -> None:
    pair = load(bundle=bundle)
    assert pair.assistant is not None and pair.manifest == {}
    assert (pair.name, pair.embedded) == ("bundle", False)


@pytest.mark.parametrize(
    "command",
    [
        "generate Snake --max-tokens 4 --bundle",
        "chat --max-tokens 4 --bundle",
        "bench gemma-mtp --allow-unverified-gemma --repeats 1 --max-tokens 2 --bundle",
        "inspect",
    ],
)
def test_commands_take_it(bundle: str, command: str) -> None:
    done = CliRunner().invoke(cli.app, [*command.split(), bundle], input="Snake\n")
    assert done.exit_code == 0 and "refused" not in done.output, done.output


def test_what_convert_takes_is_what_the_others_take(tmp_path: Path) -> None:
    """Its source here has no manifest, and what it writes has one."""
    assert not (FLOATS / MANIFEST).exists()
    assert load(bundle=FLOATS).target.config.vocab_size == 256
    out = tmp_path / "out"
    assert CliRunner().invoke(cli.app, ["convert", str(FLOATS), str(out)]).exit_code == 0
    manifest = json.loads((out / MANIFEST).read_text())
    assert load(bundle=out).name == manifest["name"]
    (out / MANIFEST).unlink()
    assert load(bundle=out).name == "out"
