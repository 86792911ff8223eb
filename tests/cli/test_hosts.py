"""--hostfile: a command on several hosts, here twice on this one."""

from __future__ import annotations

import json
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


@pytest.mark.ranks
def test_the_answer_is_written_once_and_is_that_of_one_host(tmp_path: Path) -> None:
    file = tmp_path / "hosts.json"
    file.write_text(json.dumps(2 * [{"ssh": "127.0.0.1", "ips": ["127.0.0.1"]}]))
    shared, alone = run(*GENERATE, "--hostfile", str(file)), run(*GENERATE)
    assert (shared.returncode, alone.returncode) == (0, 0), shared.stderr
    assert json.loads(shared.stdout)["text"] == json.loads(alone.stdout)["text"]


@pytest.mark.ranks
def test_a_command_that_fails_fails_everywhere(tmp_path: Path) -> None:
    file = tmp_path / "hosts.json"
    file.write_text(json.dumps(2 * [{"ssh": "127.0.0.1", "ips": ["127.0.0.1"]}]))
    done = run("generate", "x", "--temperature", "-1", "--hostfile", str(file))
    assert done.returncode == 2 and done.stdout == ""
    assert "[sampling] temperature must be 0 or more but got -1.0." in done.stderr


def test_how_a_run_ended() -> None:
    assert code_of([0, 0]) == code_of([]) == 0
    assert code_of([2, -15]) == code_of([-15, 2]) == code_of([0, 2]) == 2
    assert code_of([0, -9]) == 1


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
