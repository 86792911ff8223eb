"""--hostfile: a command on several hosts, here twice on this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pyengine.cli import hosts
from pyengine.ranks.launch import code_of

GENERATE = ("generate", "Write a page", "--max-tokens", "12", "--temperature", "0", "--json")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pyengine", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def launched(file: Path, program: str) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "pyengine.ranks.launch", "--hostfile", str(file), "--python", sys.executable]
    return subprocess.run(
        [sys.executable, *launcher, "--", "-c", program],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.parametrize("code", [255, 127])
@pytest.mark.parametrize("words", [("generate", "x"), ("doctor",)], ids=["generate", "doctor"])
def test_a_host_that_ssh_does_not_reach_is_named(
    tmp_path: Path, words: tuple[str, ...], code: int
) -> None:
    """By one sentence, whoever else is on the list."""
    ssh, file = tmp_path / "ssh", tmp_path / "hosts.json"
    ssh.write_text(f"#!/bin/sh\nexit {code}\n")
    ssh.chmod(0o755)
    names = ("127.0.0.1", "studio-2.local")
    file.write_text(json.dumps([{"ssh": name, "ips": ["127.0.0.1"]} for name in names]))
    done = subprocess.run(
        [sys.executable, "-m", "pyengine", *words, "--hostfile", str(file)],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    said = f"ssh must reach 'studio-2.local' and ask for nothing but ended with code {code}."
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1] == f"pyengine: [ranks] {said}"  # MLX's ring may have begun
    assert "Traceback" not in done.stderr


@pytest.mark.ranks
def test_the_answer_is_written_once_and_is_that_of_one_host(tmp_path: Path) -> None:
    file = tmp_path / "hosts.json"
    file.write_text(json.dumps(2 * [{"ssh": "127.0.0.1", "ips": ["127.0.0.1"]}]))
    shared, alone = run(*GENERATE, "--hostfile", str(file)), run(*GENERATE)
    assert (shared.returncode, alone.returncode) == (0, 0), shared.stderr
    assert json.loads(shared.stdout)["text"] == json.loads(alone.stdout)["text"]


ONCE = {
    "a setting": (
        ("--temperature", "-1"),
        "[sampling] temperature must be 0 or more but got -1.0.",
    ),
    "an option's form": (("--max-tokens", "abc"), "Invalid value for '--max-tokens'"),
    "a bundle": (("--bundle", "/nowhere"), "[load] bundle must be a folder but got /nowhere."),
}


@pytest.mark.ranks
@pytest.mark.parametrize("what", ONCE)
def test_what_all_refuse_is_said_once(what: str, tmp_path: Path) -> None:
    words, said = ONCE[what]
    file = tmp_path / "hosts.json"
    file.write_text(json.dumps(2 * [{"ssh": "127.0.0.1", "ips": ["127.0.0.1"]}]))
    done = run("generate", "x", "--hostfile", str(file), *words)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count(said) == 1
    if said.startswith("["):
        assert done.stderr == f"pyengine: {said}\n"


@pytest.mark.ranks
def test_help_is_printed_once(tmp_path: Path) -> None:
    file = tmp_path / "hosts.json"
    file.write_text(json.dumps(2 * [{"ssh": "127.0.0.1", "ips": ["127.0.0.1"]}]))
    done = run("generate", "--hostfile", str(file), "--help")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.count("Usage: ") == 1


@pytest.mark.ranks
@pytest.mark.parametrize("rank", [0, 1])
def test_what_one_host_lacks_is_said_once(rank: int, tmp_path: Path) -> None:
    """Its pair is missing there alone."""
    file = tmp_path / "hosts.json"
    file.write_text(json.dumps(2 * [{"ssh": "127.0.0.1", "ips": ["127.0.0.1"]}]))
    program = (
        "import os, sys; from pyengine.__main__ import main; "
        f"sys.argv[1:] = ['generate', 'x', '--max-tokens', '4'] + {['--bundle', '/nowhere']!r} "
        f"* (os.environ['MLX_RANK'] == '{rank}'); main()"
    )
    done = launched(file, program)
    assert done.returncode == 2 and done.stdout == ""
    named = "" if rank == 0 else "[ranks] rank 1 of 2: "
    assert done.stderr == f"pyengine: {named}[load] bundle must be a folder but got /nowhere.\n"


def test_how_a_run_ended() -> None:
    assert code_of([0, 0]) == code_of([]) == 0
    assert code_of([2, -15]) == code_of([-15, 2]) == code_of([0, 2]) == 2
    assert code_of([0, -9]) == 1


def test_a_process_that_does_not_end_is_killed(tmp_path: Path) -> None:
    """The first has failed, the other stands still and takes no signal but that."""
    file = tmp_path / "hosts.json"
    file.write_text(json.dumps(2 * [{"ssh": "127.0.0.1", "ips": ["127.0.0.1"]}]))
    program = (
        "import os, signal, sys; "
        "os.environ['MLX_RANK'] == '1' and os.kill(os.getpid(), signal.SIGSTOP); sys.exit(3)"
    )
    done = launched(file, program)
    assert (done.returncode, done.stdout, done.stderr) == (3, "", "")


@pytest.mark.parametrize(
    "content, said",
    [
        ('{"hosts": ', "must be JSON but is not"),
        ("[]", "must list two hosts or more"),
        ('[{"ssh": "a", "ips": ["1"]}]', "must list two hosts or more"),
        ('[{"ssh": "a"}, {"ssh": "b"}]', "must list two hosts or more"),
        ("7", "must list two hosts or more"),
        ("\xff", "cannot be read: it is no text"),
        (None, "cannot be read: No such file or directory"),
    ],
)
def test_a_file_that_is_none_is_one_sentence(content: Any, said: str, tmp_path: Path) -> None:
    file = tmp_path / "hosts.json"
    if content is not None:
        file.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"^\[ranks\] ") as error:
        hosts.check(file)
    assert said in str(error.value)


def test_refused_before_anything_starts() -> None:
    done = run("generate", "x", "--hostfile", "/nowhere.json")
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr
        == "pyengine: [ranks] /nowhere.json cannot be read: No such file or directory.\n"
    )


def test_the_option_is_taken_out() -> None:
    given = ["generate", "--hostfile", "a", "x", "--hostfile=b", "--seed", "1"]
    assert hosts.without_option(given) == ["generate", "x", "--seed", "1"]
