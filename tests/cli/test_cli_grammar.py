"""Forms of answers from the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pyengine import cli

pytest.importorskip("llguidance", reason="the extra grammar is not installed")


def run(*args: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(cli.app, ["generate", "Rate Snake.", "--seed", "1", *args])
    return done.exit_code, done.stdout, done.stderr


def test_each_form(tmp_path: Path) -> None:
    schema, lark = tmp_path / "a.json", tmp_path / "a.lark"
    schema.write_text('{"enum": ["good", "bad"]}')
    lark.write_text('start: "so" "so"')
    code, out, err = run("--json-schema", str(schema), "--stats")
    assert (code, json.loads(out) in ("good", "bad")) == (0, True)
    assert "forced" in err
    code, out, _ = run("--regex", "[1-5] of 5")
    assert (code, out[1:]) == (0, " of 5\n")
    assert run("--grammar", str(lark))[:2] == (0, "soso\n")


def test_what_is_refused_before_the_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "a.json"
    broken.write_text("{")
    for args, said in (
        (("--json-schema", str(broken)), "must be JSON but"),
        (("--json-schema", str(tmp_path / "none")), "cannot be read"),
        (("--regex", "a", "--grammar", str(broken)), "one of response_format, grammar and regex"),
    ):
        code, out, err = run(*args)
        assert (code, out) == (2, "")
        assert said in " ".join(err.split())
    monkeypatch.setitem(sys.modules, "llguidance", None)
    code, _, err = run("--regex", "a")
    assert code == 2
    assert 'pip install "pyengine-mlx[grammar]"' in " ".join(err.split())


def test_what_cannot_be_compiled_is_one_sentence() -> None:
    code, out, err = run("--regex", "(")
    assert (code, out) == (2, "")
    assert err.startswith("pyengine: [grammar] a regex must be one that can be followed but cannot")
    assert "Traceback" not in err
