"""bench/peers: verdicts, figures and tables by hand; runs of stand-ins and of pyengine itself."""

from __future__ import annotations

import json
import os
import select
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import pyengine
from pyengine import _ext

PEERS = Path(__file__).parents[2] / "bench" / "peers"
sys.path.insert(0, str(PEERS))  # its files import each other as those of a script do
import compare_matmul  # noqa: E402
import install  # noqa: E402
import report  # noqa: E402
import run  # noqa: E402
import weights  # noqa: E402
import worker  # noqa: E402

STOP = [1, 9]


# What a worker measures


def test_text_ends_at_a_stop_token_or_the_budget_and_is_timed_from_its_first_token() -> None:
    stamped = [(12.0, [5]), (13.0, [6, 7]), (15.0, [8, 1, 4]), (99.0, [3])]
    assert worker.text_of(stamped, 10.0, 50, STOP) == worker.Text([5, 6, 7, 8, 1], 2.0, 3.0)
    assert worker.text_of(stamped, 10.0, 2, STOP) == worker.Text([5, 6], 2.0, 1.0)
    assert worker.text_of(stamped, 10.0, 1, STOP) == worker.Text([5], 2.0, 0.0)


def test_nothing_more_is_asked_for_than_the_budget() -> None:
    def pieces() -> Any:
        yield [5]
        yield [6, 7]
        raise AssertionError("asked for more")

    assert worker.timed(pieces(), 3, STOP).tokens == [5, 6, 7]


@pytest.mark.parametrize(
    "tokens, own",
    [([5, 6], [5, 6]), ([5, 9, 6, 1], [5]), ([1], []), ([], [])],
)
def test_a_stop_token_is_not_of_the_text(tokens: list[int], own: list[int]) -> None:
    assert worker.until_stop(tokens, STOP) == own


def test_peak_memory_of_this_process() -> None:
    before = worker.peak_bytes("self")
    assert before is not None and before > 20e6
    held = np.ones(before // 4)  # twice as many bytes
    after = worker.peak_bytes("self")
    assert after is not None and after > 2 * before and held[0] == 1


class Scripted(worker.InProcess):
    """An engine whose text is the prompt's first token, counted up; the long prompt takes 2 s."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def versions(self) -> dict[str, str]:
        return {"scripted": "1"}

    def write(self, prompt: list[int], tokens: int) -> worker.Text:
        self.calls.append(("write", prompt, tokens))
        return worker.Text([prompt[0] + i for i in range(tokens)], 2.0, 0.5)

    def ready_for(self, streams: int) -> None:
        self.calls.append(("ready", streams))

    def write_together(self, prompts: list[list[int]], tokens: int) -> list[list[int]]:
        self.calls.append(("together", prompts, tokens))
        return [[prompt[0] + i for i in range(tokens)] for prompt in prompts]


def job(**changes: Any) -> Any:
    found = {
        "target": "",
        "assistant": "",
        "plain_target": "",
        "plain_assistant": "",
        "home": "",
        "prompts": [[20], [7]],
        "long_prompt": [3] * 64,
        "tokens": 4,
        "stop": STOP,
        "drafts": 0,
        "streams": [1, 3],
        "threads": 1,
    }
    return worker.Job(**{**found, **changes})


def test_a_run_warms_up_and_gives_prompts_again_where_streams_are_more() -> None:
    engine = Scripted()
    outcome = worker.run(engine, job())
    assert [text["tokens"] for text in outcome["texts"]] == [[20, 21, 22, 23], [7, 8, 9, 10]]
    assert [text["text"] for text in outcome["texts"]] == [[20, 21, 22, 23], [7, 8]]
    assert outcome["long_first_s"] == 2.0 and outcome["processor_s"] >= 0
    assert [load["streams"] for load in outcome["together"]] == [1, 3]
    assert outcome["together"][1]["texts"] == [[20, 21, 22, 23], [7, 8], [20, 21, 22, 23]]
    few = worker.WARM_UP_TOKENS
    assert engine.calls == [
        ("write", [20], few),
        ("write", [20], 4),
        ("write", [7], 4),
        ("write", [3] * 64, 1),
        ("write", [3] * 64, 1),
        ("ready", 1),
        ("together", [[20]], few),
        ("together", [[20]], 4),
        ("ready", 3),
        ("together", [[20], [7], [20]], few),
        ("together", [[20], [7], [20]], 4),
    ]


def test_pyengine_writes_the_same_with_drafts_and_among_others() -> None:
    """Through the worker's process, as in a real run."""
    pair = pyengine.load()
    prompts, long_prompt = run.prompts(pair, 64)
    found = [
        run.one_run(
            install.PEERS[0],
            job(
                target=str(pair.target_path),
                assistant=str(pair.target_path.with_name("assistant")),
                prompts=prompts[:2],
                long_prompt=long_prompt,
                tokens=12,
                drafts=drafts,
                streams=[2],
            ),
            Path(),
            600,
        )
        for drafts in (0, 3)
    ]
    assert [outcome.get("error") for outcome in found] == [None, None]
    plain, drafted = found
    assert report.texts(plain) == report.texts(drafted) == drafted["together"][0]["texts"]
    assert [len(text) for text in report.texts(plain)] == [12, 12]
    assert plain["versions"]["pyengine"] == pyengine.__version__


# Runs of workers


def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str) -> None:
    script = tmp_path / "stand_in.py"
    script.write_text(source)
    monkeypatch.setattr(run, "WORKER", script)


def test_the_outcome_is_the_last_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = """
import json, sys
job = json.load(sys.stdin)
print("loading")
print(json.dumps({"name": sys.argv[1], "tokens": job["tokens"]}))
"""
    stand_in(monkeypatch, tmp_path, source)
    found = run.one_run(install.PEERS[0], job(), tmp_path, 60)
    assert found == {"name": "pyengine", "tokens": 4}


def test_a_worker_that_fails_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stand_in(monkeypatch, tmp_path, "raise ValueError('no such model')")
    found = run.one_run(install.PEERS[0], job(), tmp_path, 60)
    assert found == {"error": "ValueError: no such model"}


def test_a_worker_that_never_ends_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stand_in(monkeypatch, tmp_path, "import threading; threading.Event().wait()")
    assert run.one_run(install.PEERS[0], job(), tmp_path, 0.5) == {"error": "not done after 0 s"}


def test_a_worker_that_is_killed_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stand_in(monkeypatch, tmp_path, "import os; os.kill(os.getpid(), 9)")
    assert run.one_run(install.PEERS[0], job(), tmp_path, 60) == {"error": "ended by signal 9"}


def test_what_a_worker_started_ends_with_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The child holds a pipe open as long as it lives."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    child = f"import threading; held = open({str(pipe)!r}, 'w'); held.write('there'); held.flush();"
    source = f"""
import subprocess, sys
child = {child + " threading.Event().wait()"!r}
nothing = subprocess.DEVNULL
subprocess.Popen([sys.executable, "-c", child], stdout=nothing, stderr=nothing)
with open({str(pipe)!r}, "r") as own:
    own.read(1)
raise SystemExit("gone")
"""
    stand_in(monkeypatch, tmp_path, source)
    assert run.one_run(install.PEERS[0], job(), tmp_path, 60) == {"error": "gone"}
    poll = select.poll()
    poll.register(reader, select.POLLHUP)
    assert [event & select.POLLHUP for _, event in poll.poll(30_000)] == [select.POLLHUP]
    os.close(reader)


def test_everyone_is_first_in_turn() -> None:
    assert [run.order(3, turn) for turn in range(4)] == [
        [0, 1, 2],
        [1, 2, 0],
        [2, 0, 1],
        [0, 1, 2],
    ]


def test_prompts_differ_and_the_long_one_has_the_length_asked() -> None:
    prompts, long_prompt = run.prompts(pyengine.load(), 2000)
    assert len({tuple(prompt) for prompt in prompts}) == len(prompts) == 8
    assert len(long_prompt) == 2000


# What is installed


def test_a_peer_that_is_not_installed_is_named_with_what_installs_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compared = []
    monkeypatch.setattr(run, "compare", lambda *arguments: compared.append(arguments))
    monkeypatch.setattr(sys, "argv", ["run.py", "mlx-lm", "--folder", str(tmp_path)])
    run.main()
    [(_, chosen, missing)] = compared
    assert [peer.name for peer in chosen] == ["pyengine"]
    sentence = (
        "mlx-lm is not installed: python bench/peers/run.py --setup mlx-lm installs it (from PyPI, "
        "into an environment of its own)."
    )
    assert missing == [sentence]
    assert capsys.readouterr().err == sentence + "\n"
    (tmp_path / "mlx-lm").mkdir()
    (tmp_path / "mlx-lm" / "installed.txt").touch()
    run.main()
    assert [peer.name for peer in compared[1][1]] == ["pyengine", "mlx-lm"]
    assert compared[1][2] == []


def test_an_unknown_peer_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "vllm"])
    with pytest.raises(SystemExit) as refused:
        run.main()
    assert refused.value.code == 2
    assert "[peers] ENGINE must be of pyengine, mlx-lm, " in capsys.readouterr().err


def test_no_engine_is_given_more_threads_than_pyengine_takes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By either script, on a machine of 300 cores: what pyengine would take without being told."""
    (tmp_path / "llama.cpp").mkdir()
    (tmp_path / "llama.cpp" / "installed.txt").touch()
    monkeypatch.setattr(os, "cpu_count", lambda: 300)
    given = []
    for script, whole in ((run, []), (compare_matmul, ["--json"])):
        monkeypatch.setattr(script, "compare", lambda options, *_: given.append(options) or {})
        words = [f"{script.__name__}.py", "--folder", str(tmp_path), *whole]
        for chosen in ([], ["--threads", "256"]):
            monkeypatch.setattr(sys, "argv", [*words, *chosen])
            script.main()
        monkeypatch.setattr(sys, "argv", [*words, "--threads", "257"])
        with pytest.raises(SystemExit) as refused:
            script.main()
        assert refused.value.code == 2
        assert "--threads must be 1 to 256 but got 257." in capsys.readouterr().err
    assert [options.threads for options in given] == 2 * [_ext.threads(), 256]


def test_every_engine_has_its_file() -> None:
    files = {path.name for path in PEERS.glob("engine_*.py")}
    assert files == {
        f"engine_{peer.name.replace('-', '_').replace('.', '_')}.py" for peer in install.PEERS
    }


def test_llama_cpp_takes_an_assistant_as_wide_as_its_target(tmp_path: Path) -> None:
    source = tmp_path / "source.cpp"
    source.write_text("if (hparams.n_embd_out() == n_embd) {\n")
    for _ in range(2):  # a second setup finds it done
        install.accept_equal_widths(source)
        assert source.read_text() == "if (hparams.n_embd_out() == 0) {\n"
    source.write_text("if (n_embd) {\n")
    with pytest.raises(SystemExit, match="does not hold `hparams"):
        install.accept_equal_widths(source)


def test_last_line() -> None:
    assert install.last_line("a\n  b \n\n") == "b"
    assert install.last_line("\n") == "it said nothing"


# Weights


def test_plain_weights_are_what_the_bits_stand_for(tmp_path: Path) -> None:
    target = pyengine.load().target_path
    weights.write_plain(target, tmp_path / "target", target)
    packed = mx.load(str(target / "model.safetensors"))
    plain = mx.load(str(tmp_path / "target" / "model.safetensors"))
    assert set(plain) == {name for name in packed if not name.endswith((".scales", ".biases"))}
    assert {str(array.dtype) for array in plain.values()} == {"mlx.core.float32"}
    stem = "model.layers.3.mlp.down_proj"
    bits = np.array(packed[f"{stem}.weight"]).view(np.uint8).astype(np.float32)
    scales, biases = (
        np.repeat(np.array(packed[f"{stem}.{part}"].astype(mx.float32)), 64, axis=1)
        for part in ("scales", "biases")
    )
    found = np.array(plain[f"{stem}.weight"])
    np.testing.assert_allclose(found, bits * scales + biases, rtol=0, atol=1e-6)
    config = json.loads((tmp_path / "target" / "config.json").read_text())
    assert "quantization" not in config and "quantization_config" not in config
    assert (tmp_path / "target" / "tokenizer.json").exists()


# Verdicts and figures


def test_verdicts() -> None:
    assert report.equal_texts([[1, 2], [3]], [[1, 2], [4]]) == (1, 2)
    assert report.verdict([(2, 2), (2, 2)]) == "yes"
    assert report.verdict([(2, 2), (1, 2)]) == "3 of 4"
    assert report.verdict([]) == "-"


@pytest.mark.parametrize(
    "these, those, part",
    [
        ([[1, 2, 3, 4]], [[1, 2, 3, 4]], 1.0),
        ([[1, 2, 3, 4]], [[1, 2, 9, 4]], 0.5),  # equal again is not the same text
        ([[1, 2]], [[1, 2, 3, 4]], 0.5),
        ([[1, 2], [5, 6]], [[1, 2], [6, 6]], 0.5),
    ],
)
def test_common_tokens(these: list[list[int]], those: list[list[int]], part: float) -> None:
    assert report.common(these, those) == part


def outcome(texts: list[list[int]], decode_s: float, **changes: Any) -> dict[str, Any]:
    """Each text takes so long; two at once take a second."""
    found = {
        "versions": {"engine": "1"},
        "texts": [{"tokens": t, "text": t, "first_s": 0.1, "decode_s": decode_s} for t in texts],
        "processor_s": 0.3,
        "long_first_s": 2.0,
        "peak_bytes": 50_000_000,
        "together": [{"streams": 2, "seconds": 1.0, "texts": texts}],
    }
    return {**found, **changes}


A, B = [1, 2, 3], [4, 5, 6]
NAMES = [("pyengine", 0), ("other", 0), ("other", 3)]


def turns() -> list[dict[str, Any]]:
    return [
        {
            "pyengine 0": outcome([A, B], 0.1),
            "other 0": outcome([A, B], 0.2),
            "other 3": outcome([A, [4, 9, 6]], 0.05, together=[]),
        },
        {
            "pyengine 0": outcome([A, B], 0.1),
            "other 0": outcome([A, B], 0.4, together=[
                {"streams": 2, "seconds": 3.0, "texts": [A, [4]]}
            ]),
            "other 3": {"error": "it fell over"},
        },
    ]  # fmt: skip


def test_figures_by_hand() -> None:
    own, plain, drafted = report.rows(turns(), NAMES, "pyengine", 512)
    assert own["tok_s"] == pytest.approx(20)  # 2 x 2 tokens behind the first in 2 x 0.1 s
    assert own["over_ours"] == {"median": 1.0, "least": 1.0, "greatest": 1.0}
    assert own["processor_ms"] == pytest.approx(50)  # 0.3 s over 6 tokens
    assert own["prefill_tok_s"] == 256 and own["peak_bytes"] == 50_000_000
    assert plain["tok_s"] == pytest.approx(7.5)  # of 10 and 5
    assert plain["over_ours"] == pytest.approx({"median": 0.375, "least": 0.25, "greatest": 0.5})
    assert plain["as_ours"] == 1.0 and plain["as_plain"] == "yes"
    assert plain["together"] == [
        # 6 tokens in 1 s and 4 in 3 s; in the second turn a text ended early
        {"streams": 2, "tok_s": pytest.approx((6 + 4 / 3) / 2), "as_alone": "3 of 4"}
    ]
    assert drafted["error"] == "it fell over" and drafted["turns"] == 1
    assert drafted["tok_s"] == pytest.approx(40)
    assert drafted["over_plain"]["median"] == pytest.approx(4)
    assert drafted["as_plain"] == "1 of 2"
    assert drafted["as_ours"] == pytest.approx(4 / 6)
    assert drafted["over_ours"] is None  # pyengine has no such mode here
    assert drafted["together"] == []


def test_figures_of_what_never_ran() -> None:
    [row] = report.rows([{"other 0": {"error": "no"}}], [("other", 0)], "pyengine", 512)
    assert row == {"engine": "other", "drafts": 0, "error": "no"}


def test_tables_by_hand() -> None:
    settings = {"long_prompt": 512, "prompts": 2, "tokens": 3, "streams": [2]}
    run_on = {
        "machine": {"chip": "Chip", "cores": 2, "os": "Linux", "load_average": [3.25, 1, 1]},
        "started_at": "today",
        "commit": "abc",
    }
    chosen = [install.Peer("pyengine", (), "8 bits"), install.Peer("other", (), "Q8", lacks="It.")]
    found = run.make_report(turns(), NAMES, chosen, ["x is not installed."], settings, run_on)
    assert report.markdown(found).splitlines() == [
        "Chip, 2 cores, Linux; load average 3.2 at the start. today, commit abc. 2 turns; greedy, "
        "2 prompts, at most 3 tokens each; prefill of 512 tokens.",
        "",
        "| engine | mode | tok/s | over pyengine's | over its plain | processor ms per token | "
        "prefill tok/s | memory, MB | text as plain | tokens as pyengine's |",
        "| --- | --- | --: | --: | --: | --: | --: | --: | --: | --: |",
        "| pyengine | plain | 20 | 1.00 (1.00 to 1.00) |  | 50.00 | 256 | 50 |  | 100% |",
        "| other | plain | 8 | 0.38 (0.25 to 0.50) |  | 50.00 | 256 | 50 |  | 100% |",
        "| other | 3 drafts | 40 | - | 4.00 (4.00 to 4.00) | 50.00 | 256 | 50 | 1 of 2 | 67% |",
        "",
        "| engine | mode | 2 at once, tok/s | 2 over 2 | texts as alone |",
        "| --- | --- | --: | --: | --: |",
        "| pyengine | plain | 6 | 1.00 | yes |",
        "| other | plain | 4 | 1.00 | 3 of 4 |",
        "",
        "* pyengine (8 bits): engine 1",
        "* other (Q8): engine 1",
        "* x is not installed.",
        "* It.",
        "* other, 3 drafts, failed: it fell over",
    ]
