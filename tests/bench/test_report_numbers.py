"""Published numbers: machine, versions, commit and pair that a report says its figures are of."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

import pyengine
from pyengine.bench import report
from pyengine.bench.suite import Case
from pyengine.sampling.settings import Sampling

CPUINFO = """processor\t: 0
vendor_id\t: Maker
model name\t: Chip 9: the fast one
flags\t\t: a b

processor\t: 1
model name\t: another
"""


def quantized(bits: int, group: int, **overrides: Any) -> Any:
    return SimpleNamespace(bits=bits, group_size=group, overrides=overrides)


def model(mode: Any, **more: Any) -> Any:
    return SimpleNamespace(config=SimpleNamespace(quantization=mode), **more)


def pair_of(**changes: Any) -> Any:
    fields: dict[str, Any] = {
        "name": "a pair",
        "path": Path("some/where"),
        "verified": True,
        "embedded": False,
        "target": model(quantized(4, 32, mlp="8 bits"), dtype=mx.bfloat16),
        "assistant": model(quantized(6, 128), position="n-2"),
        "dflash": None,
        "manifest": {"name": "a pair", "benchmark": {"best_block_size": 5}},
        "generation": SimpleNamespace(suppress_tokens=(9, 3)),
    }
    return SimpleNamespace(**{**fields, **changes})


def asked(monkeypatch: pytest.MonkeyPatch, answers: dict[str, str | None]) -> list[list[str]]:
    """Other programs answer by the last word of their call but options; None: they fail."""
    calls: list[list[str]] = []

    def run(command: Any, **_: Any) -> Any:
        calls.append(list(command))
        said = next((a for word, a in answers.items() if word in command), None)
        return SimpleNamespace(
            returncode=0 if said is not None else 1, stdout="noise" if said is None else said
        )

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_every_field_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"SC_PAGE_SIZE": 16384, "SC_PHYS_PAGES": 2_000_000}
    monkeypatch.setattr(report, "now", lambda: "then")
    monkeypatch.setattr(report, "_chip", lambda: "Chip 9")
    monkeypatch.setattr(report, "_model", lambda: "Mac99,9")
    monkeypatch.setattr(report, "_commit", lambda: "abc123")
    monkeypatch.setattr(mx, "default_device", lambda: "Device(gpu, 3)")
    monkeypatch.setattr("platform.machine", lambda: "arm65")
    monkeypatch.setattr("platform.platform", lambda: "system-7")
    monkeypatch.setattr("platform.python_version", lambda: "7.8.9")
    monkeypatch.setattr("os.cpu_count", lambda: 11)
    monkeypatch.setattr("os.sysconf", values.__getitem__)
    monkeypatch.setattr("os.getloadavg", lambda: (0.25, 2.5, 3.5))
    monkeypatch.setattr("importlib.metadata.version", {"mlx": "4.5.6"}.__getitem__)
    monkeypatch.setattr(pyengine, "__version__", "1.2.3")
    assert report.environment() == {
        "started_at": "then",
        "machine": {
            "chip": "Chip 9",
            "model": "Mac99,9",
            "device": "Device(gpu, 3)",
            "architecture": "arm65",
            "os": "system-7",
            "cores": 11,
            "memory_bytes": 32_768_000_000,
            "load_average": [0.25, 2.5, 3.5],
        },
        "versions": {"pyengine": "1.2.3", "mlx": "4.5.6", "python": "7.8.9"},
        "commit": "abc123",
    }


def test_the_chip_by_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = asked(monkeypatch, {"machdep.cpu.brand_string": " Apple M9 \n"})
    monkeypatch.setattr("platform.processor", lambda: "architecture alone")
    files = {Path("/proc/cpuinfo"): CPUINFO}
    monkeypatch.setattr(Path, "read_text", lambda self: files[self])
    monkeypatch.setattr("platform.system", lambda: "Linux")
    assert report._chip() == "Chip 9: the fast one" and calls == []
    files[Path("/proc/cpuinfo")] = "processor\t: 0\n"
    assert report._chip() == "architecture alone"

    def absent(self: Path) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", absent)
    assert report._chip() == "architecture alone"
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    assert report._chip() == "Apple M9"
    assert calls == [["sysctl", "-n", "machdep.cpu.brand_string"]]
    asked(monkeypatch, {"machdep.cpu.brand_string": None})
    assert report._chip() == "architecture alone"


def test_a_mac_says_which_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = asked(monkeypatch, {"hw.model": "Mac99,9\n"})
    monkeypatch.setattr("platform.system", lambda: "Linux")
    assert report._model() is None and calls == []
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    assert report._model() == "Mac99,9" and calls == [["sysctl", "-n", "hw.model"]]


@pytest.mark.parametrize(
    ("head", "status", "commit"),
    [
        ("abc\n", "", "abc"),
        ("abc\n", " M file\n", "abc with local changes"),
        ("abc\n", None, "abc, local changes unknown"),
        (None, "", None),
        (None, " M file\n", None),
    ],
)
def test_the_commit_and_whether_it_is_that(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    head: str | None,
    status: str | None,
    commit: str | None,
) -> None:
    calls = asked(monkeypatch, {"rev-parse": head, "status": status})
    monkeypatch.setattr(report, "__file__", str(tmp_path / "pyengine" / "bench" / "report.py"))
    assert report._commit() is None and calls == []  # an installed package has none
    (tmp_path / ".git").mkdir()
    assert report._commit() == commit
    at = ["git", "-C", str(tmp_path)]
    assert calls == [
        [*at, "rev-parse", "HEAD"],
        [*at, "status", "--porcelain", "--untracked-files=no"],
    ]


def test_a_machine_without_git_has_no_commit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for error in (FileNotFoundError(), subprocess.TimeoutExpired("git", 10)):

        def run(*_: Any, _error: Exception = error, **kw: Any) -> Any:
            raise _error

        monkeypatch.setattr(subprocess, "run", run)
        monkeypatch.setattr(report, "__file__", str(tmp_path / "pyengine" / "bench" / "report.py"))
        (tmp_path / ".git").mkdir(exist_ok=True)
        assert report._commit() is None


def test_what_other_programs_say(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Their words without the line's end; of one that fails, lasts or is not there, none."""
    say = "import sys; print(' 1.2 '); print('noise', file=sys.stderr); sys.exit"
    assert report.ask(sys.executable, "-c", f"{say}(0)") == "1.2"
    assert report.ask(sys.executable, "-c", f"{say}(3)") is None
    assert report.ask("/no/such/program") is None
    assert capfd.readouterr() == ("", "")
    given: dict[str, Any] = {}

    def lasts(*_: Any, **kw: Any) -> Any:
        given.update(kw)
        raise subprocess.TimeoutExpired("git", kw["timeout"])

    monkeypatch.setattr(subprocess, "run", lasts)
    assert report.ask("git") is None and given["timeout"] == 10


def test_every_field_of_a_pair() -> None:
    assert report.describe_pair(pair_of()) == {
        "name": "a pair",
        "path": "some/where",
        "verified": True,
        "embedded": False,
        "dtype": "bfloat16",
        "position": "n-2",
        "quantization": {
            "target": {"bits": 4, "group_size": 32, "overrides": {"mlp": "8 bits"}},
            "assistant": {"bits": 6, "group_size": 128, "overrides": {}},
            "dflash": None,
        },
        "manifest": {"name": "a pair", "benchmark": {"best_block_size": 5}},
    }
    bare = pair_of(verified=False, embedded=True, target=model(None, dtype=mx.float32))
    assert report.describe_pair(bare)["quantization"]["target"] is None
    assert report.describe_pair(bare)["dtype"] == "float32"
    said = report.describe_pair(bare)
    assert (said["verified"], said["embedded"]) == (False, True)
    third = report.describe_pair(pair_of(dflash=model(quantized(8, 64))))
    assert third["quantization"]["dflash"] == {"bits": 8, "group_size": 64, "overrides": {}}
    alone = report.describe_pair(pair_of(assistant=None))
    assert alone["position"] is alone["quantization"]["assistant"] is None


def test_every_field_of_a_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report.ops, "status", lambda: [{"op": "one"}])
    sampling = Sampling(
        0.5, 0.75, 3, 0.125, 7, (5,), 1.5, 2.5, 3.5, {4: -1.5}, verify="block", logprobs=2
    )
    cases = [Case("a", "chat", "fox", 3), Case("b", "code", "the", 4)]
    run_on = {"started_at": "then", "machine": {"chip": "x"}, "versions": {}, "commit": None}
    rows, summary, settings = [{"row": 1}], [{"sum": 2}], {"repeats": 3}
    for said, complete in (((), True), ((True,), True), ((False,), False)):
        made = report.make_report(
            run_on, pair_of(), cases, rows, summary, settings, sampling, *said
        )
        assert made == {
            "bench": "gemma-mtp",
            "report_version": 1,
            "started_at": "then",
            "machine": {"chip": "x"},
            "versions": {},
            "commit": None,
            "pair": report.describe_pair(pair_of()),
            "ops": [{"op": "one"}],
            "sampler": {
                "temperature": 0.5,
                "top_p": 0.75,
                "top_k": 3,
                "min_p": 0.125,
                "seed": 7,
                "suppress_tokens": [3, 5, 9],
                "repetition_penalty": 1.5,
                "presence_penalty": 2.5,
                "frequency_penalty": 3.5,
                "logit_bias": {"4": -1.5},
                "verify": "block",
                "logprobs": 2,
            },
            "settings": {"repeats": 3},
            "complete": complete,
            "prompts": [
                {"id": "a", "category": "chat", "sha256": cases[0].sha256},
                {"id": "b", "category": "code", "sha256": cases[1].sha256},
            ],
            "summary": [{"sum": 2}],
            "rows": [{"row": 1}],
        }


def test_every_line_of_the_heading() -> None:
    run_on = {
        "machine": {
            "chip": "Chip 9",
            "device": "Device(gpu, 3)",
            "architecture": "arm65",
            "os": "system-7",
            "cores": 11,
            "memory_bytes": 24 * 2**30,
            "load_average": [1.5, 7.0, 8.0],
        },
        "versions": {"pyengine": "1.2.3", "mlx": "4.5.6", "python": "7.8.9"},
        "commit": None,
    }
    assert report.heading(run_on, pair_of()) == [
        "Chip 9, 11 cores, 24 GiB, system-7",
        "pyengine 1.2.3 at no checkout, mlx 4.5.6 on Device(gpu, 3), python 7.8.9",
        "a pair, verified geometry, load average 1.50",
    ]
    run_on["commit"] = "abc123"
    said = report.heading(run_on, pair_of(verified=False))
    assert said[1].startswith("pyengine 1.2.3 at abc123, ")
    assert said[2] == "a pair, unverified geometry, load average 1.50"
