"""`pyengine doctor`: what it examines and says on a machine where all is well."""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import os
import select
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from typer.testing import CliRunner

from pyengine import _ext, cli, generation, ops, task
from pyengine.cli import doctor
from pyengine.cli.doctor import EXTRAS
from pyengine.doctor import checks, device, machine, report, runner, shapes
from pyengine.ops.sizes import Limits


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["doctor", *arguments])


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """`pyengine doctor --quick --json`, in one process for all ops; what it printed and wrote."""
    folder = tmp_path_factory.mktemp("doctor")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "examine", functools.partial(shared, runner.examine))
        done = run("--quick", "--json", "--output", str(folder / "out.json"))
    names = [path.name for path in folder.iterdir()]
    written = json.loads((folder / "out.json").read_text())
    return {"done": done, "printed": json.loads(done.stdout), "written": written, "names": names}


def shared(examine: Any, *args: Any, **kw: Any) -> Any:
    return examine(*args, **{**kw, "shared": True})


def test_a_healthy_machine(quick: dict[str, Any]) -> None:
    found = quick["printed"]
    assert quick["done"].exit_code == 0 and found["ok"] and found["problems"] == []
    assert quick["written"] == found and quick["names"] == ["out.json"]
    assert [row["op"] for row in found["ops"]] == list(ops.dispatch.OPS)
    for row in found["ops"]:
        assert row["verdict"] == "ok" and row["seconds"] > 0 and row["cases"] > 0
        assert math.isfinite(row["max_error"]) and row["of_bound"] <= 1
        assert row["now_kernel"].startswith("SIMD") and row["now_row_stable"]
        assert {one["clock"] for one in row["times"]} == {"processor"}
    assert found["check"]["tokens"] == doctor.CHECK_TOKENS and found["check"]["exact"]
    assert found["device"] == "processor" and found["machine"]["chip"] == machine.chip()
    probed = {row["op"] for row in found["ops"] if any("writes" in x for x in row["shapes"])}
    assert probed == {"copy_pages", "move_rows", "prepare_qkv"}


def test_its_text_is_a_line_per_op(quick: dict[str, Any]) -> None:
    lines = report.lines(quick["printed"])
    assert len(lines) <= report.MOST_LINES and max(map(len, lines)) <= report.WIDTH
    for op in ops.dispatch.OPS:
        (line,) = [line for line in lines if line.startswith(f"{op} ")]
        assert line.split()[1] == "ok" and "[processor]" in line
    text = "\n".join(lines)
    for word in (mx.__version__, machine.chip(), _ext.instruction_set(), "the same text", "free"):
        assert word in text


def test_all_fails_and_the_text_still_fits(quick: dict[str, Any]) -> None:
    whole = json.loads(json.dumps(quick["printed"]))
    failure = {"case": "c" * 300, "detail": "d\x1b[31m" * 90, "log": "line\n" * 900}
    for row in whole["ops"]:
        row |= {"verdict": "refused", "failed": [failure, failure]}
    whole["hints"], whole["problems"] = ["h"] * 3, ["p"] * 3
    lines = report.lines(whole)
    assert len(lines) == report.MOST_LINES and max(map(len, lines)) <= report.WIDTH
    assert not any("\x1b" in line for line in lines)
    assert sum("(2 cases)" in line or " ..." in line for line in lines) == len(ops.dispatch.OPS)


def test_missing_extras_come_with_the_line_that_brings_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = importlib.util.find_spec
    missing = {module for modules, _ in EXTRAS.values() for module in modules}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in missing else whole(name)
    )
    done = run("--quick", "--op", "softcap", "--output", str(tmp_path / "out.json"))
    found = json.loads((tmp_path / "out.json").read_text())
    assert done.exit_code == 0 and found["ok"] and not any(found["extras"].values())
    for extra in EXTRAS:
        line = f'pip install "pyengine-mlx[{extra}]"'
        assert line in done.stdout and any(line in hint for hint in found["hints"])
    assert [row["op"] for row in found["ops"]] == ["softcap"] and "check" not in found


def test_an_engine_that_fails_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Any:
        raise ValueError("[load] the header of x is damaged.")

    def problems() -> list[str]:
        found: dict[str, Any] = {"hints": [], "notes": [], "problems": []}
        doctor._run_pair(found)
        return found["problems"]

    assert problems() == []
    monkeypatch.setattr(task, "embedded_pair", fail)
    assert "the header of x is damaged" in problems()[0]
    monkeypatch.undo()
    whole = generation.generate

    def wrong(prompt: str, *, block_size: int, **kw: Any) -> Any:
        result = whole(prompt, block_size=block_size, **kw)
        return replace(result, tokens=[*result.tokens[:-1], 5]) if block_size > 1 else result

    monkeypatch.setattr(generation, "generate", wrong)
    assert "differs from plain text" in problems()[0]
    ops.dispatch.set_aside(["rms_norm"])  # which nobody promises to be exact
    try:
        assert problems() == []
    finally:
        ops.dispatch.set_aside(())


ARGUMENTS = {
    "no such op": (["--op", "q8_matmul"], 2, "[doctor] --op must be one of accept_block,"),
    "no such folder": (["--output", "/nowhere/x.json"], 2, "must lie in a folder that exists"),
    "a folder": (["--output", "/"], 2, "must be a file but / is a folder"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_wrong_arguments_are_one_sentence(name: str) -> None:
    words, code, text = ARGUMENTS[name]
    done = run("--quick", *words)
    assert done.exit_code == code and text in done.stderr and not done.stdout
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(mx.metal.is_available(), reason="a GPU is here")
def test_a_gpu_that_is_not_here_is_one_sentence(tmp_path: Path) -> None:
    done = run("--device", "gpu", "--output", str(tmp_path / "out.json"))
    assert done.exit_code == 1 and "must have a GPU with Metal but there is none" in done.stderr


def test_ctrl_c_ends_it_and_its_workers(tmp_path: Path) -> None:
    words = ["-m", "pyengine", "doctor", "--quick"]
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
    )
    assert process.stderr is not None
    count = sum(f"{name}_reference" in ops.__all__ for name in ops.__all__)
    assert process.stderr.readline() == f"[1/{count}] accept_block\n"  # a worker is under way
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    pids = children.read_text().split() if children.exists() else []
    workers = [os.pidfd_open(int(pid)) for pid in pids]
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Interrupted." in err and not out
    assert "Traceback" not in err and list(tmp_path.iterdir()) == []
    for worker in workers:  # readable when it has ended
        assert select.select([worker], [], [], 60)[0]
        os.close(worker)


# ---- The GPU's seam, with the processor in its place


@pytest.fixture
def metal(monkeypatch: pytest.MonkeyPatch) -> device.Metal:
    monkeypatch.setattr(device.mx, "gpu", mx.cpu)
    return device.Metal()


def call(op: str) -> Any:
    (case, *_) = [case for case in shapes.embedded(Limits(1e9)) if case.op == op]
    return case.call


def test_what_a_pipeline_allows_is_compared_with_what_is_started(
    metal: device.Metal, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = call("filter_logits")
    run = functools.partial(made.run, 0, 16)
    seen = []

    def compile_launch(launch: Any) -> tuple[int, int, float]:
        seen.append(launch.kernel)
        return 1024 - 10 * len(seen), 100 * len(seen), 0.5

    monkeypatch.setattr(_ext, "compile_launch", compile_launch)
    found = metal.compile(run)
    assert found is not None and len(seen) == 2
    assert (found.seconds, found.threads, found.threadgroup_bytes) == (1.0, 1004, 200)
    monkeypatch.setattr(_ext, "compile_launch", lambda launch: (16, 0, 0.0))
    with pytest.raises(device.Refused, match="threads but its pipeline allows 16"):
        metal.compile(run)
    monkeypatch.setattr(_ext, "compile_launch", lambda launch: (1024, 40000, 0.0))
    with pytest.raises(device.Refused, match="40000 bytes of threadgroup memory of 32768"):
        metal.compile(run)


def test_the_compilers_log_names_lines_of_the_source(
    metal: device.Metal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile_launch(launch: Any) -> Any:
        raise RuntimeError("[metal] program_source:\nprogram_source:7:3: error: no such thing")

    monkeypatch.setattr(_ext, "compile_launch", compile_launch)
    with pytest.raises(device.Refused, match="no such thing") as refused:
        metal.compile(functools.partial(call("softcap").run, 0, 1))
    said = checks.refusal(refused.value)
    source = _ext.metal_source("softcap", refused.value.kernel).splitlines()
    assert said["source_lines"] == {"7": source[6]}
    assert said["detail"].endswith("program_source:7:3: error: no such thing")


def test_the_workbench_stands_in_for_a_gpu(tmp_path: Path) -> None:
    words = ("--quick", "--device", "workbench", "--op", "softcap", "--op", "copy_pages")
    done = run(*words, "--output", str(tmp_path / "out.json"))
    found = json.loads((tmp_path / "out.json").read_text())
    assert done.exit_code == 0 and found["compared_with"] == "processor kernels"
    assert [row["verdict"] for row in found["ops"]] == ["ok", "ok"]
    for row in found["ops"]:
        assert row["compile"]["threads"] == 1024 and "times" not in row
        assert row["max_error"] == 0 or _ext.instruction_set() == "portable"


def test_the_text_of_a_mac(quick: dict[str, Any]) -> None:
    whole = json.loads(json.dumps(quick["printed"]))
    whole["machine"] |= {
        "gpu": "Apple M4 Max",
        "architecture": "applegpu_g16s",
        "memory_bytes": 64e9,
        "working_set_bytes": 51e9,
        "wired_limit_mb": "0",
        "wired": "nothing is wired until a pair is loaded",
    }
    (line,) = [line for line in report.lines(whole) if line.startswith("memory: ")]
    for words in ("51.0 GB working set", "wired limit the system's", "applegpu_g16s"):
        assert words in line


def test_figures_of_a_gpu_stand_beside_its_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    from pyengine.bench import bandwidth

    monkeypatch.setattr(bandwidth, "gpu_cores", lambda: 40)
    one = {"gb_s": 273.0, "clock": "gpu", "us": 450.0, "mlx_us": 900.0}
    found: dict[str, Any] = {"machine": {"chip": "Apple M4 Max"}, "ops": [{"times": [one]}]}
    doctor._compare_with_bandwidth(found)
    assert found["machine"]["bandwidth_gb_s"] == 546 and one["of_bandwidth"] == 0.5
    assert report._time({"times": [one]}) == "450 us, 273.0 GB/s (50%), MLX 900 us [gpu]"
