"""`pyengine doctor`: what is there, what each op runs, and lines that fix what is not."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from typing import Any

import pytest
from typer.testing import CliRunner

from pyengine import cli, generation, ops, task
from pyengine.cli import doctor
from pyengine.cli.doctor import EXTRAS, examine


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["doctor", *arguments])


def test_a_healthy_machine() -> None:
    done = run("--json")
    report = json.loads(done.stdout)
    assert done.exit_code == 0 and report["ok"] and report["problems"] == []
    assert report["ops"] == ops.status()
    assert report["check"]["tokens"] == doctor.CHECK_TOKENS and report["check"]["exact"]
    text = run().stdout
    for word in ("quantized_matmul", "row-stable", "mlx", "embedded pair", "extras"):
        assert word in text


def test_missing_extras_come_with_the_line_that_brings_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = importlib.util.find_spec
    missing = {module for modules, _ in EXTRAS.values() for module in modules}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in missing else whole(name)
    )
    report = examine()
    assert report["ok"] and not any(report["extras"].values())
    for extra in EXTRAS:
        assert any(f'pip install "pyengine-mlx[{extra}]"' in hint for hint in report["hints"])


def test_ops_that_are_not_row_stable_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{**row, "row_stable": row["op"] != "quantized_matmul"} for row in ops.status()]
    monkeypatch.setattr(ops, "status", lambda: rows)
    done = run()
    assert done.exit_code == 0 and "quantized_matmul run as plain MLX here" in done.stdout
    assert "not row-stable" in done.stdout


def test_an_engine_that_fails_is_exit_1(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Any:
        raise ValueError("[load] the header of x is damaged.")

    monkeypatch.setattr(task, "embedded_pair", fail)
    done = run()
    assert done.exit_code == 1 and "pip install --force-reinstall ." in done.stdout
    monkeypatch.undo()
    whole = generation.generate

    def wrong(prompt: str, *, block_size: int, **kw: Any) -> Any:
        result = whole(prompt, block_size=block_size, **kw)
        return replace(result, tokens=[*result.tokens[:-1], 5]) if block_size > 1 else result

    monkeypatch.setattr(generation, "generate", wrong)
    assert run().exit_code == 1
    monkeypatch.undo()
    monkeypatch.setattr(doctor, "_check", lambda: {"tokens": 1, "exact": False, "acceptance": 0.0})
    done = run("--json")
    assert (
        done.exit_code == 1 and "differs from plain text" in json.loads(done.stdout)["problems"][0]
    )
