"""A process forked after MLX was used lacks its threads: one sentence in place of a hang. And what
threads of Python's cost."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

# Runs a call in a forked child, which is ended should it hang, and prints what became of it.
PREAMBLE = """
import os, signal
import pyengine
from pyengine.engine.score import prompt_logprobs, score

ASK = {"max_tokens": 6, "sampling": {"temperature": 0}}
IDS = [5, 6, 7]

def child(name, call):
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        try:
            call()
            print(name, "done", flush=True)
        except RuntimeError as error:
            print(name, error, flush=True)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    if status:
        print(name, "ended by signal", status, flush=True)
"""

REFUSED = (
    "a process must not be forked from one that has used MLX but this one was and lacks its "
    "threads; start it with multiprocessing's spawn, or load the pair only in it."
)

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")


def lines(script: str) -> list[str]:
    """What a fresh process prints."""
    code = PREAMBLE + textwrap.dedent(script)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def test_each_entry_point_says_so_in_the_child() -> None:
    found = lines("""
        pair = pyengine.load()
        prefix = pyengine.Prefix()
        pyengine.generate(IDS, pair=pair, prefix=prefix, **ASK)
        early = pyengine.stream(IDS, pair=pair, **ASK)
        midway = pyengine.stream(IDS, pair=pair, block_size=1, **ASK).steps()
        next(midway)
        child("generate", lambda: pyengine.generate(IDS, pair=pair, **ASK))
        child("generate", lambda: pyengine.generate(IDS, pair=pair, prefix=prefix, **ASK))
        child("generate", lambda: list(early))
        child("generate", lambda: list(midway))
        child("load", lambda: pyengine.load())
        child("score", lambda: score(pair, IDS, [8]))
        child("score", lambda: prompt_logprobs(pair, IDS, 1))
        child("logits", lambda: pair.logits(IDS))
        child("draft", lambda: pair.draft(IDS, 2))
        child("generate", lambda: child("generate", lambda: pyengine.stream(IDS, pair=pair)))
        pyengine.generate(IDS, pair=pair, **ASK)
        print("parent done")
    """)
    assert found.pop() == "parent done"
    assert found.pop() == "generate done"  # the child whose own child was told
    assert len(found) == 10
    for line in found:
        op = line.split()[0]
        assert line == f"{op} [{op}] {REFUSED}"


def test_use_of_mlx_alone_counts_and_an_import_does_not() -> None:
    """As a server does that imports its application, forks, and loads in each worker."""
    assert lines("""
        def answer():
            assert pyengine.generate(IDS, **ASK).tokens
        child("imported", answer)
        import mlx.core as mx
        mx.eval(mx.ones(4) + 1)
        child("used", answer)
    """) == [
        "imported done",
        f"used [generate] {REFUSED}",
    ]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc")
def test_a_thread_costs_no_more_than_the_docstring_says() -> None:
    """MLX makes a stream for each thread of Python's, and keeps it."""
    [line] = lines("""
        import threading
        pair = pyengine.load()
        def answer():
            pyengine.generate(IDS, pair=pair, **ASK)
        def size():
            pages = int(open("/proc/self/statm").read().split()[1])
            return len(os.listdir("/proc/self/task")), pages * os.sysconf("SC_PAGE_SIZE")
        def run(count):
            for _ in range(count):
                thread = threading.Thread(target=answer)
                thread.start()
                thread.join()
        run(60)  # by then the allocator has its share
        before = size()
        run(100)
        print(*(after - was for after, was in zip(size(), before)))
    """)
    threads, memory = map(int, line.split())
    assert threads <= 105 and memory < 100 * 350_000
