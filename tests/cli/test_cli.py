"""The command line: output, exit codes, help, interruption. A scripted pair answers."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from text_fakes import script_pair, write_tokenizers
from typer.testing import CliRunner

import pyengine
from pyengine import cli
from pyengine.cli import options
from pyengine.cli.bench import read_blocks
from pyengine.text.tokenizer import Tokenizer, load_tokenizer

STORY = "the quick brown fox jumps over a lazy dog; caf\u00e9 \U0001f642 done"
HERE = Path(__file__).parents[1] / "helpers"
FULL = Path("/dev/full")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizers(directory)
    return directory


@pytest.fixture(scope="session")
def tok(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


@pytest.fixture
def pair(tok: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The pair every command gets; ``pair.asked`` is what it asked for."""
    made = script_pair(tok, STORY, asked=[])

    def load_pair(*arguments: Any) -> Any:
        made.asked = list(arguments)
        return made

    monkeypatch.setattr(cli.common, "load_pair", load_pair)
    return made


def words(text: str) -> list[str]:
    return text.split()


def run(*arguments: str, stdin: str | bytes | None = None) -> Any:
    return CliRunner().invoke(cli.app, list(arguments), input=stdin)


def plain(text: str) -> str:
    """Without colours, which some CI machines force."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_generate_prints_the_text_alone(pair: Any) -> None:
    done = run("generate", "fox")
    assert (done.exit_code, done.stdout, done.stderr) == (0, STORY + "\n", "")
    assert pair.target.prompt == pair.tokenizer.encode_chat([{"role": "user", "content": "fox"}])


@pytest.mark.parametrize("arguments", [("generate",), ("generate", "-")])
def test_generate_reads_standard_input(pair: Any, arguments: tuple[str, ...]) -> None:
    assert run(*arguments, stdin="fox\n").stdout == STORY + "\n"
    assert pair.target.prompt == pair.tokenizer.encode_chat([{"role": "user", "content": "fox\n"}])


def test_generate_options_reach_the_engine(pair: Any) -> None:
    done = run(
        *words("generate fox --json --max-tokens 9 --block-size 3 --system Brief. --stop jum"),
        *words("--temperature 0.5 --top-p 0.9 --top-k 5 --min-p 0.1 --seed 7 --verify block"),
        *words("--target a --assistant b --dtype float32 --position n-2 --ops reference"),
    )
    result = json.loads(done.stdout)
    assert result["finish_reason"] in ("stop", "length") and STORY.startswith(result["text"])
    assert result["stats"]["block_size"] == 3
    assert pair.tokenizer.decode(pair.target.prompt).startswith("system\nBrief.\nuser\nfox")
    assert pair.asked == [
        "a",
        "b",
        None,
        options.Dtype.float32,
        options.Position.before_last,
        options.Ops.reference,
        None,
    ]
    run("generate", "fox", *words("--target a --dflash c --drafter dflash+lookup"))
    assert (pair.asked[0], pair.asked[-1]) == ("a", "c")
    assert run("generate", "fox", "--stop", "jumps", "--stop", "own").stdout == "the quick br\n"
    run("generate", "fox", "--raw")
    assert pair.target.prompt == pair.tokenizer.encode("fox", bos=True)


def test_penalties_and_bias_reach_the_engine(pair: Any, tok: Tokenizer) -> None:
    """On a script of one word said over and over, each setting is seen in the text."""
    fox = tok.encode(" fox")
    pair.target.script[:] = fox * 30
    whole = tok.decode(fox * 30)

    def said(*arguments: str) -> str:
        settings = ["--temperature", "0", "--max-tokens", "30", "--block-size", "3"]
        return run("generate", "dog", *settings, *arguments).stdout.rstrip("\n")

    assert said() == whole
    other = ["--logit-bias", f"{tok.encode('dog')[0]}=20"]  # a second best, whatever is said
    assert said(*other) == whole != said(*other, "--repetition-penalty=4")
    for penalty in ("presence-penalty=99", "frequency-penalty=99"):
        assert said(f"--{penalty}") != whole
    assert said("--frequency-penalty=7") != whole == said("--presence-penalty=7")
    assert said(f"--logit-bias={fox[0]}=-50") == whole
    assert said(f"--logit-bias={fox[0]}=-99") != whole
    two = [f"--logit-bias={token}=99" for token in tok.encode("ab")]
    assert said(*two).startswith(tok.decode(tok.encode("ab")[:1]))


def test_logprobs_are_in_the_json(pair: Any, tok: Tokenizer) -> None:
    done = run(*words("generate fox --json --logprobs 2 --max-tokens 9 --block-size 4"))
    result = json.loads(done.stdout)
    rows = result["logprobs"]
    assert [row["token"] for row in rows] == result["tokens"]
    assert [row["text"] for row in rows] == [tok.decode([t]) for t in result["tokens"]]
    for row in rows:
        best, second = row["top"]
        assert best == {k: row[k] for k in ("token", "text", "logprob")}
        assert best["logprob"] > -0.01 and second["logprob"] < -50
    assert "logprobs" not in json.loads(run("generate", "fox", "--json").stdout)


def test_thoughts_go_to_standard_error(pair: Any, tok: Tokenizer) -> None:
    pair.target.script[:0] = tok.encode("<|channel>thought\nwhy not<channel|>")
    done = run("generate", "fox")
    assert (done.stdout, done.stderr) == (STORY + "\n", "")
    done = run("generate", "fox", "--think")
    assert (done.stdout, done.stderr) == (STORY + "\n", "why not\n")
    assert tok.decode(pair.target.prompt).startswith("system\nthink\nuser\nfox")
    done = run("generate", "fox", "--think", "--json")
    result = json.loads(done.stdout)
    assert (result["text"], result["thinking"], done.stderr) == (STORY, "why not", "")
    # Before the answer, while it is still thinking
    count = len(tok.encode("<|channel>thought\nwhy"))
    done = run(*words(f"generate fox --think --block-size 1 --max-tokens {count}"))
    said = f"why\nThe answer was cut at {count} tokens; a larger --max-tokens lifts that.\n"
    assert (done.stdout, done.stderr) == ("\n", said)


def test_stats_go_to_standard_error(pair: Any) -> None:
    done = run("generate", "fox", "--stats")
    assert done.stdout == STORY + "\n"
    for word in ("finish", "stop", "tok/s", "block size", "rounds", "acceptance", "peak memory"):
        assert word in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", ""], "[generate] prompt must not be empty."),
        (["generate", "fox", "--max-tokens", "0"], "[generate] max_tokens must be at least 1"),
        (["bench", "gemma-mtp", "--verify", "x"], "[bench] verify must be of residual, block"),
        (["generate", "fox", "--block-size", "200"], "[generate] block_size must be 1 to 128"),
        (["generate", "fox", "--temperature", "-1"], "[sampling] temperature must be 0 or more"),
        (["generate", "fox", "--raw", "--system", "x"], "[generate] --system must go with the"),
        (["generate", "fox", "--raw", "--think"], "[generate] --think must go with the template"),
        (["generate", "fox", "--logprobs", "2"], "[generate] --logprobs must go with --json"),
        (["generate", "fox", "--json", "--logprobs", "999"], "[sampling] logprobs must be 0 to"),
        (["generate", "fox", "--logit-bias", "5"], "[generate] --logit-bias must be ID=BIAS"),
        (["generate", "fox", "--logit-bias", "a=1"], "[generate] --logit-bias must be ID=BIAS"),
        (["generate", "fox", "--logit-bias", "5=inf"], "[generate] --logit-bias must be ID=BIAS"),
        (["generate", "fox", "--logit-bias", "4000=1"], "[generate] suppress_tokens and logit_bi"),
        (["generate", "fox", "--repetition-penalty", "0"], "[sampling] repetition_penalty must be"),
        (["generate", "fox", "--presence-penalty", "nan"], "[sampling] presence_penalty must be"),
        (["bench", "gemma-mtp"], "[bench] the pair must be one of the five published geometries"),
        (
            ["bench", "gemma-mtp", "--draft-block-sizes", "2,x"],
            "[bench] --block-sizes must be whole numbers like 2,4,6 but got '2,x'.",
        ),
        (["bench", "gemma-mtp", "--draft-block-sizes", "1"], "[bench] block sizes must be 2 to"),
        (["bench", "gemma-mtp", "--prompt-suite", "absent"], "[suite] absent cannot be read"),
        (["bench", "gemma-mtp", "--seed", str(2**32 - 1)], "[bench] seed must be at most 429496"),
        (["bench", "gemma-mtp", "--output", "no/where"], "[bench] output must lie in a folder"),
    ],
)
def test_user_errors_are_one_sentence_and_exit_2(
    pair: Any, arguments: list[str], message: str
) -> None:
    done = run(*arguments)
    assert done.exit_code == 2 and done.stdout == ""
    assert done.stderr.startswith(f"pyengine: {message}") and done.stderr.count("\n") == 1


def test_missing_folders_are_user_errors(tmp_path: Path) -> None:
    for option in ("--bundle", "--target"):
        done = run("generate", "fox", option, str(tmp_path / "absent"))
        assert done.exit_code == 2 and "must be a folder but got" in done.stderr


def test_wrong_options_exit_2() -> None:
    for arguments in (["generate", "--no-such"], ["generate", "a", "--top-k", "x"], ["nothing"]):
        assert run(*arguments).exit_code == 2


def test_input_that_is_not_text(pair: Any) -> None:
    done = run("generate", stdin=b"\xff\xfe\xff")
    assert done.exit_code == 2 and "standard input must be UTF-8 text" in done.stderr


def test_a_failing_machine_exits_1_and_keeps_the_text(pair: Any) -> None:
    calls = []

    def fail(rows: int) -> None:
        calls.append(rows)
        if len(calls) == 4:
            raise RuntimeError("[decode] logits must be finite but got NaN or infinity.")

    pair.target.before_call = fail
    done = run("generate", "fox", "--block-size", "1")
    assert done.exit_code == 1 and STORY.startswith(done.stdout.rstrip("\n"))
    assert len(done.stdout) > 4
    assert done.stderr == "pyengine: [decode] logits must be finite but got NaN or infinity.\n"


def test_a_failure_before_the_first_token_prints_nothing(pair: Any) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("[prefill] the machine failed.")

    pair.target.prefill = fail
    done = run("generate", "fox", "--json", "--stats")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == "pyengine: [prefill] the machine failed.\n"


def test_a_bug_shows_its_trace(pair: Any) -> None:
    def fail(rows: int) -> None:
        raise ValueError("no sentence of ours")

    pair.target.before_call = fail
    done = run("generate", "fox")
    assert isinstance(done.exception, ValueError) and "sentence" in str(done.exception)


def test_bench_prints_tables_and_json_last(pair: Any, tmp_path: Path) -> None:
    suite, out = tmp_path / "suite.jsonl", tmp_path / "report.json"
    rows = [
        {"id": f"case-{i}", "category": "chat", "prompt": "fox", "max_tokens": 12} for i in (1, 2)
    ]
    suite.write_text("\n".join(map(json.dumps, rows)))
    done = run(
        *words("bench gemma-mtp --allow-unverified-gemma --json --repeats 2 --max-tokens 10"),
        *words("--verify block"),
        *("--draft-block-sizes", "2,3", "--prompt-suite", str(suite), "--output", str(out)),
    )
    assert done.exit_code == 0, done.stderr
    for word in ("mlx", "case-1", "case-2", "all 2 prompts", "speedup_vs_ar", "round cost"):
        assert word in done.stdout
    last, whole = json.loads(done.stdout.splitlines()[-1]), json.loads(out.read_text())
    assert last == {key: value for key, value in whole.items() if key != "rows"}
    assert len(whole["rows"]) == 6 and [s["block_size"] for s in whole["summary"]] == [1, 2, 3]
    assert whole["sampler"]["temperature"] == 1.0 and whole["sampler"]["top_k"] == 64
    assert whole["settings"]["draft_block_sizes"] == [2, 3]
    assert whole["settings"]["verify"] == ["block"] and whole["summary"][2]["verify"] == "block"
    assert (
        "[1/15] case-1, block 2 block, warm-up" in done.stderr and f"Report: {out}" in done.stderr
    )


def test_embedded_and_verified_pairs_need_no_permission(pair: Any) -> None:
    quick = words("bench gemma-mtp --repeats 1 --max-tokens 4 --draft-block-sizes 2")
    for name in ("embedded", "verified"):
        pair.embedded = pair.verified = False
        setattr(pair, name, True)
        done = run(*quick)
        assert done.exit_code == 0 and "flappy_html5_canvas" in done.stdout


COMMANDS = (
    "generate,chat,convert,inspect,doctor,serve,bench,bench gemma-mtp,bench sweep,bench model,"
    "bench card"
)


@pytest.mark.parametrize("command", [[], *(words.split() for words in COMMANDS.split(","))])
def test_help_has_examples(command: list[str]) -> None:
    done = run(*command, "--help")
    assert done.exit_code == 0
    _, _, examples = plain(done.stdout).partition("Examples:")
    words_of_it = " ".join(examples.split())
    assert " ".join(["pyengine", *command]) in words_of_it
    assert "Exit codes: 0 done, 1 the machine or a run failed, 2 an argument" in words_of_it


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from pyengine.__main__ import main; main()", *arguments]


def test_the_installed_command_answers_at_once() -> None:
    kw = {"capture_output": True, "text": True, "timeout": 60, "cwd": HERE}  # not the checkout
    done = subprocess.run(command("--version"), **kw)
    assert (done.returncode, done.stdout) == (0, f"pyengine {pyengine.__version__}\n")
    probe = (
        "import sys, pyengine.__main__, pyengine.cli\n"
        "print({'mlx', 'numpy', 'jinja2', 'tokenizers', 'sentencepiece'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", probe], **kw)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize(
    "wrong",
    [
        *("--temperature -1", "--top-k 300", "--seed -1", "--max-tokens 0", "--block-size 129"),
        *("--stop=", "--logit-bias x", "--logprobs 2", "--frequency-penalty 1e10"),
    ],
)
def test_what_no_pair_can_do_is_told_before_the_weights_are_read(pair: Any, wrong: str) -> None:
    for command in ("generate fox", "chat"):
        done = run(*words(f"{command} {wrong}"), stdin="fox\n")
        assert done.exit_code == 2 and done.stderr.startswith("pyengine: ["), done.stderr
    assert run("generate", "").exit_code == 2
    assert pair.asked == []


# As the installed script begins; SIGINT comes, or MLX is another, while the command is imported
BEGIN = """
import importlib.metadata, os, signal, sys
class Late:
    def find_spec(name, *_):
        if name == "typer" and "{what}" == "interrupted":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Late)
if "{what}" == "mismatched":
    importlib.metadata.version = lambda name: "0.1"
from pyengine.__main__ import main
main()
"""


@pytest.mark.parametrize(
    ("what", "code", "said"),
    [
        ("interrupted", 130, ""),
        ("mismatched", 1, "pyengine: [pyengine] mlx must be 0.32.4 but got 0.1. Run: pip install "),
    ],
)
def test_an_end_while_starting_is_no_trace(tmp_path: Path, what: str, code: int, said: str) -> None:
    script = tmp_path / "pyengine"
    script.write_text(BEGIN.format(what=what))
    done = subprocess.run(
        [sys.executable, script, "--version"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert done.returncode == code and done.stderr.startswith(said), done.stderr
    assert done.stderr.count("\n") == bool(said)


def test_closed_and_foreign_streams() -> None:
    kw: Any = {"capture_output": True, "timeout": 60, "cwd": HERE}
    closed = ["sh", "-c", 'exec "$@" <&- >&-', "sh", *command("chat")]
    done = subprocess.run(closed, **kw)
    assert (done.returncode, done.stderr) == (0, b"")
    # In this locale Python would read bytes that are no text as if they were
    env = {**os.environ, "LC_ALL": "C.UTF-8", "PYTHONUTF8": "1"}
    done = subprocess.run(command("generate"), input=b"fox \xff", env=env, **kw)
    assert done.returncode == 2 and b"standard input must be UTF-8 text but" in done.stderr
    nano = str(Path(pyengine.__file__).parent / "nano")
    env.pop("PYTHONUNBUFFERED", None)  # what is held back would be tried once more at the end
    for words_of_it in (["inspect", nano, "--json"], ["--help"]) if FULL.exists() else ():
        with FULL.open("w") as full:
            kw = {"stdout": full, "stderr": subprocess.PIPE, "timeout": 60, "cwd": HERE}
            done = subprocess.run(command(*words_of_it), env=env, **kw)
        said = (
            "pyengine: [file] standard output must be usable but is not: No space left on device."
        )
        assert (done.returncode, done.stderr.decode()) == (2, said + "\n")


def test_terminals_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    for columns, width in (("0", 80), ("1", 80), ("40", 40), ("200", 200)):
        monkeypatch.setenv("COLUMNS", columns)
        assert cli.common.console(sys.stdout).width == width
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    for term, moves in (("xterm", True), ("dumb", False)):
        monkeypatch.setenv("TERM", term)
        assert cli.common.moves() is moves


HELD = """
import sys, threading
sys.path.insert(0, {here!r})
from pathlib import Path
from text_fakes import script_pair
from pyengine import cli
from pyengine.__main__ import main
from pyengine.cli import options
from pyengine.text.tokenizer import load_tokenizer
pair = script_pair(load_tokenizer(Path({folder!r})), {story!r} * 99, held_after=20)
cli.common.load_pair = lambda *arguments: pair
# What is said on standard input lets it go on
go_on = lambda: sys.stdin.readline() and pair.target.go_on.set()
threading.Thread(target=go_on, daemon=True).start()
main()
"""


def start(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    source = HELD.format(here=str(HERE), folder=str(folder), story=STORY)
    return subprocess.Popen(
        [sys.executable, "-c", source, "generate", "fox", "--max-tokens", "3000", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=HERE,
    )


def test_ctrl_c_keeps_the_text_and_exits_130(folder: Path) -> None:
    process = start(folder, "--stats")
    assert process.stdout is not None
    first = os.read(process.stdout.fileno(), 1)
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=60)
    text = (first + rest).decode()
    assert process.returncode == 130
    assert len(text) > 1 and text.endswith("\n") and (STORY * 99).startswith(text[:-1])
    assert b"unfinished" in err and err.endswith(b"Interrupted.\n") and b"Traceback" not in err


def test_a_reader_that_leaves_is_no_error_message(folder: Path) -> None:
    process = start(folder)
    assert process.stdin is not None
    assert process.stdout is not None and process.stderr is not None
    os.read(process.stdout.fileno(), 1)
    process.stdout.close()
    process.stdin.write(b"go on\n")
    process.stdin.close()
    err = process.stderr.read()
    assert process.wait(timeout=60) == 1 and err == b""


def test_a_block_size_is_a_number_or_auto() -> None:
    done = run("generate", "fox", "--block-size", "x")
    assert done.exit_code == 2 and "--block-size" in plain(done.stderr)
    for text, blocks in (("auto", ["auto"]), ("auto,1,4", ["auto", 1, 4]), ("2,auto", [2, "auto"])):
        assert read_blocks(text) == blocks
    with pytest.raises(ValueError, match=r"--block-sizes must be whole numbers like 2,4,6 but got"):
        read_blocks("auto,x")
