"""Faults that are planted in ops: each is caught, reported, and set aside; text stays right."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faulty_worker
import pytest
from typer.testing import CliRunner

from pyengine import _ext, cli, generation, ops, task
from pyengine.doctor import examination, first_use, machine, quarantine, report, runner

PROMPT = "Create a single-file HTML5 canvas Snake game."
GREEDY = {"temperature": 0.0}
# Op to fault; all others are sound
PLANTED = {
    "copy_pages": "stale",
    "draw_token": "aborting",
    "embed": "dropped",
    "glu": "wrong",
    "quantized_matmul": "refused",
    "random_uniform": "faulting",
    "residual_norm": "unstable",
    "route_experts": "failing",
    "weigh_experts": "endless",
}
VERDICTS = {
    "copy_pages": "hazard",
    "draw_token": "crashed",
    "embed": "dropped",
    "glu": "wrong",
    "quantized_matmul": "refused",
    "random_uniform": "crashed",
    "residual_norm": "unstable",
    "route_experts": "error",
    "weigh_experts": "hung",
}


def command(**planted: str) -> tuple[str, ...]:
    faults = (f"{op}={fault}" for op, fault in planted.items())
    return (sys.executable, faulty_worker.__file__, *faults)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def examined(home: Path) -> dict[str, Any]:
    """`pyengine doctor --quick` with every fault at once; what it wrote, printed and kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "COMMAND", command(**PLANTED))
        patch.setattr(runner, "STEP_LIMIT_S", 4.0)
        patch.setattr(quarantine, "folder", lambda: home / "pyengine")
        # A process for all ops until one fails: starts are what takes long
        alone = examination.runner.examine
        shared = functools.partial(_shared, alone)
        patch.setattr(runner, "examine", shared)
        patch.setattr(first_use, "_asked", set())
        patch.setattr(first_use, "_told", set())
        output = home / "report.json"
        with warnings.catch_warnings(record=True) as warned:
            done = CliRunner().invoke(cli.app, ["doctor", "--quick", "--output", str(output)])
        ops.dispatch.set_aside(())
        kept = quarantine.read("processor", fail)
    whole = json.loads(output.read_text())
    return {"done": done, "report": whole, "kept": kept, "warned": warned}


def _shared(examine: Any, *args: Any, **kw: Any) -> Any:
    return examine(*args, **{**kw, "shared": True})


def fail(line: str) -> None:
    raise AssertionError(line)


@pytest.fixture(autouse=True)
def clean(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process that has dealt with no pair, in which no op is set aside."""
    monkeypatch.setattr(quarantine, "folder", lambda: home / "pyengine")
    monkeypatch.setattr(first_use, "_asked", set())
    monkeypatch.setattr(first_use, "_told", set())
    yield
    ops.dispatch.set_aside(())


@pytest.mark.parametrize("op", sorted(PLANTED))
def test_each_fault_is_caught(examined: dict[str, Any], op: str) -> None:
    (row,) = [row for row in examined["report"]["ops"] if row["op"] == op]
    assert row["verdict"] == VERDICTS[op]
    first = row["failed"][0]
    assert first["verdict"] == VERDICTS[op] and first["case"].startswith(op)
    assert examined["kept"].failed[op]["verdict"] == VERDICTS[op]
    assert (row["now_kernel"], row["verdict"] == "ok") == ("MLX", False)


def test_what_is_known_of_each(examined: dict[str, Any]) -> None:
    failed = {row["op"]: row["failed"][0] for row in examined["report"]["ops"] if "failed" in row}
    assert "SIGABRT" in failed["draw_token"]["detail"]
    assert "a fault of the device" in failed["draw_token"]["log"]
    assert "SIGSEGV" in failed["random_uniform"]["detail"]
    assert failed["weigh_experts"]["detail"] == "no end of the step `compile` within 4 s"
    assert "16 numbers" not in failed["embed"]["detail"]
    assert "were never written" in failed["embed"]["detail"]
    assert "ignored" in failed["route_experts"]["detail"]
    assert failed["residual_norm"]["first"]["rows"] == [6, 16]
    # 16 rows of 384, the third number from the end
    assert failed["glu"]["first"]["index"] == [15, 381]
    refused = failed["quantized_matmul"]
    kernel = refused["detail"].partition(":")[0]
    source = _ext.metal_source("quantized_matmul", kernel).splitlines()
    assert refused["source_lines"] == {"1": source[0], "12": source[11]}
    assert "undeclared identifier 'lane'" in refused["detail"] and "note:" in refused["log"]
    assert "16 writes" not in failed["copy_pages"]["case"] and "of one place" in str(failed)


def test_the_others_are_sound(examined: dict[str, Any]) -> None:
    rows = examined["report"]["ops"]
    assert [row["op"] for row in rows] == list(ops.dispatch.OPS)
    sound = [row for row in rows if row["op"] not in PLANTED]
    assert sound and all(row["verdict"] == "ok" for row in sound)
    assert all(row["seconds"] > 0 and row["max_error"] >= 0 and row["cases"] for row in sound)
    assert set(examined["kept"].failed) == set(PLANTED), examined["kept"].failed


def test_the_command_tells(examined: dict[str, Any]) -> None:
    done, text = examined["done"], examined["done"].stdout
    assert done.exit_code == 1 and not examined["report"]["ok"]
    lines = text.splitlines()
    assert len(lines) <= report.MOST_LINES
    for op in ops.dispatch.OPS:
        (line,) = [line for line in lines if line.startswith(f"{op} ")]
        assert line.split()[1] == VERDICTS.get(op, "ok")
    assert any(line.startswith("log of draw_token") for line in lines)
    assert done.stderr.count("failed pyengine doctor") == 1 and not examined["warned"]
    assert examined["report"]["check"]["exact"]  # by MLX's own, where they are set aside


@pytest.fixture(scope="module")
def native_text() -> list[int]:
    """What our kernels give, all of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(first_use, "ready", lambda pair: None)
        return generation.generate(PROMPT, sampling=GREEDY, max_tokens=24, block_size=4).tokens


def test_text_is_right_after_a_quarantine(
    native_text: list[int], examined: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process the ops themselves are broken, so what is not set aside would show."""
    for op in ("glu", "residual_norm"):
        broken = faulty_worker.blank(getattr(_ext, op))
        monkeypatch.setattr(_ext, op, broken)
    ask = functools.partial(generation.generate, PROMPT, sampling=GREEDY, max_tokens=24)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        texts = [ask(block_size=size).tokens for size in (1, 4)]
    assert texts == [native_text, native_text]
    (line,) = [str(one.message) for one in seen]
    assert line.startswith("copy_pages, draw_token, embed, glu") and "MLX's own" in line
    # And it is the quarantine that does it
    ops.dispatch.set_aside(())
    with pytest.raises(RuntimeError, match="not finite") as error:
        wrong = ask(block_size=4).tokens
        raise RuntimeError(f"not finite, or other text: {wrong == native_text}")
    assert "True" not in str(error.value)


def test_a_later_process_runs_mlx_in_its_place(
    native_text: list[int], examined: dict[str, Any], home: Path
) -> None:
    words = ["generate", PROMPT, "--temperature=0", "--max-tokens=24", "--json", "--stats"]
    done = subprocess.run(
        [sys.executable, "-m", "pyengine", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "XDG_CACHE_HOME": str(home)},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tokens"] == native_text
    assert done.stderr.count("failed pyengine doctor on this machine") == 1
    assert "mlx for copy_pages, draw_token, embed" in " ".join(done.stderr.split())
    assert "exactness is not promised" in " ".join(done.stderr.split())


# ---- The file


def kept(op: str = "glu") -> dict[str, Any]:
    why = {"verdict": "wrong", "case": "glu F=384", "detail": "one number"}
    key = machine.key("processor")
    return {"format": 1, "key": key, "failed": {op: why}, "checked": []}


LIES = {
    "damaged": ('{"format": 1, "key', "must be JSON"),
    "a list": ("[]", "must have format 1"),
    "another format": ({**kept(), "format": 2}, "must have format 1"),
    "a foreign key": ({**kept(), "key": {"chip": "of somebody else"}}, "another machine"),
    "another build": (
        {**kept(), "key": {**machine.key("processor"), "sources": "0"}},
        "another machine, system or build",
    ),
    "no such op": (kept("os.system"), "must say of each op why"),
    "no reason": ({**kept(), "failed": {"glu": "because"}}, "must say of each op why"),
    "a number": ({**kept(), "checked": 3}, "must have `failed` and `checked`"),
    "numbers": ({**kept(), "checked": [3]}, "must hold digests"),
}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the file of this processor lies, in a folder of this test's."""
    monkeypatch.setattr(quarantine, "folder", lambda: tmp_path / "pyengine")
    (tmp_path / "pyengine").mkdir()
    return quarantine.path("processor")


@pytest.mark.parametrize("name", LIES)
def test_a_file_that_lies_is_ignored_with_a_line(name: str, own: Path) -> None:
    content, rule = LIES[name]
    own.write_text(content if isinstance(content, str) else json.dumps(content))
    said: list[str] = []
    first_use.ready(task.embedded_pair(), said.append)
    assert len(said) == 1 and said[0].startswith(f"{own} is ignored: ") and rule in said[0]
    assert ops.dispatch.exact()


def test_a_file_that_is_right_counts_and_none_is_none(own: Path) -> None:
    first_use.ready(task.embedded_pair(), fail)
    assert ops.dispatch.exact()
    first_use._asked.clear()
    own.write_text(json.dumps(kept()))
    said: list[str] = []
    for _ in range(2):  # once in a process
        first_use.ready(task.embedded_pair(), said.append)
    assert ops.dispatch.runs("glu") == "mlx" and len(said) == 1
    ops.use("reference")
    try:
        first_use._asked.clear()
        first_use.ready(task.embedded_pair(), fail)  # nothing to say of other kernels
    finally:
        ops.use("native")


def test_what_does_well_again_is_taken_out(own: Path) -> None:
    own.write_text(json.dumps(kept()))
    row = {"op": "glu", "verdict": "ok", "shapes": ["glu F=512"]}
    assert set(quarantine.update("processor", [row], fail).failed) == {"glu"}
    assert quarantine.update("processor", [row], fail, whole=True).failed == {}
    own.write_text(json.dumps(kept()))
    row["shapes"] = ["glu F=512", "glu F=384"]
    assert quarantine.update("processor", [row], fail).failed == {}
    assert quarantine.read("processor", fail) == quarantine.Record()
    assert [path.name for path in own.parent.iterdir()] == [own.name]


def test_a_home_that_cannot_be_written_is_said(own: Path) -> None:
    own.parent.rmdir()
    own.parent.write_text("no folder")
    said: list[str] = []
    first = {"verdict": "wrong", "case": "c", "detail": "d"}
    row = {"op": "glu", "verdict": "wrong", "failed": [first], "shapes": []}
    record = quarantine.update("processor", [row], said.append)
    assert set(record.failed) == {"glu"}  # in this process it counts
    assert len(said) == 1 and "could not be written" in said[0]


# ---- First use


def test_the_first_use_of_a_device_is_examined_and_kept(
    own: Path, native_text: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What only a GPU does, here with the processor in its place."""
    first_use._asked.clear()
    monkeypatch.setattr(first_use, "EXAMINED_ON", ("processor",))
    monkeypatch.setattr(runner, "COMMAND", command(glu="wrong"))
    said: list[str] = []
    began: list[str] = []
    pair = task.embedded_pair()
    first_use.ready(pair, said.append, lambda done, total, op: began.append(op))
    assert began[0] == "accept_block" and "glu" in began and len(began) > 15
    assert len(said) == 1 and said[0].startswith("glu failed") and "glu" in own.read_text()
    result = generation.generate(PROMPT, sampling=GREEDY, max_tokens=24, block_size=4)
    assert result.tokens == native_text
    # The next process only reads
    first_use._asked.clear()
    first_use._told.clear()
    monkeypatch.setattr(runner, "COMMAND", command(start="not at all"))
    first_use.ready(pair, said.append, lambda *_: fail("examined again"))
    assert said[0] == said[1] and len(said) == 2


def test_a_worker_that_does_not_start_is_no_failure_of_ops(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(first_use, "EXAMINED_ON", ("processor",))
    monkeypatch.setattr(runner, "COMMAND", command(start="not at all"))
    said: list[str] = []
    first_use.ready(task.embedded_pair(), said.append)
    assert len(said) == 1 and "could not be checked" in said[0] and "no MLX here" in said[0]
    assert ops.dispatch.exact() and not own.exists()
    done = CliRunner().invoke(cli.app, ["doctor", "--quick", "--output", str(own)])
    assert done.exit_code == 1 and "[doctor] a worker must start" in done.stderr
    assert not own.exists()
