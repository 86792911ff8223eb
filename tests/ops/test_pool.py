"""Threads that share a kernel: how many there are, who runs which piece, and late workers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyengine import _ext

SMALL, LARGE = 1 << 15, 1 << 20  # multiply-adds: the fewest that are shared, and those that stay so
ALONE = 4096  # small jobs behind a late worker


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Four of them, and no worker that was late before."""
    before = _ext.threads()
    _ext.set_threads(4)
    forget()
    yield
    forget()
    _ext.set_threads(before)


def forget() -> None:
    for _ in range(ALONE):
        _ext.threads_for(SMALL)


def no_clock() -> int:
    raise AssertionError("nobody is late here")


@pytest.mark.parametrize(
    ("limit", "count"),
    [
        ("100000 100000\n", 1),
        ("150000 100000\n", 2),  # a part of a core is worth a thread
        ("50000 100000\n", 1),
        ("1600000 50000\n", 32),
        ("6300001 100000\n", 64),
        ("99999999999999999999 1\n", 64),  # more than the machine has
        ("0 100000\n", 1),
        ("max 100000\n", 64),
        ("", 64),
        ("100000", 64),
        ("100000 0\n", 64),
        ("0 0\n", 64),
        ("100000 -1\n", 64),
        ("one two\n", 64),
    ],
)
def test_cores_that_a_container_leaves(limit: str, count: int) -> None:
    assert _ext.processors(limit, 64) == count


def in_a_container(limit: str, folder: Path) -> int:
    """The threads of a process that sees this `cpu.max`, in a mount namespace of its own."""
    (folder / "cpu.max").write_text(limit)
    script = f"""
mount --bind {folder} /sys/fs/cgroup &&
exec {sys.executable} -c 'from pyengine import _ext; print(_ext.threads())'
"""
    words = ["unshare", "--map-root-user", "--mount", "sh", "-c", script]
    return int(subprocess.check_output(words))


def lacking() -> str | None:
    """What this machine lacks for it; None if nothing."""
    if not Path("/sys/fs/cgroup").is_dir() or shutil.which("unshare") is None:
        return "there are no cgroups, or there is no unshare (util-linux)"
    mount = "mount --bind /tmp /sys/fs/cgroup"
    words = ["unshare", "--map-root-user", "--mount", "sh", "-c", mount]
    made = subprocess.run(words, capture_output=True, text=True)
    return f"mount namespaces are not allowed: {made.stderr.strip()}" if made.returncode else None


def test_the_limit_of_a_container_counts(tmp_path: Path) -> None:
    if reason := lacking():
        pytest.skip(f"needs a mount namespace: {reason}")
    assert in_a_container("100000 100000\n", tmp_path) == 1
    cores = len(os.sched_getaffinity(0))
    assert in_a_container("max 100000\n", tmp_path) == min(cores, 256)


@pytest.mark.parametrize("count", [1, 3])
def test_each_piece_is_run_once_by_as_many_threads_as_are_set(count: int) -> None:
    _ext.set_threads(count)
    taken: list[tuple[int, int]] = []
    together = threading.Barrier(count)

    def piece(number: int) -> None:
        taken.append((number, threading.get_ident()))
        if number < count:  # as many are at work at once
            together.wait(60)

    _ext.run_pieces(40, piece, lambda: 0)
    assert sorted(number for number, _ in taken) == list(range(40))
    found = {thread for _, thread in taken}
    assert len(found) == count and threading.get_ident() in found


def test_surplus_threads_take_no_wake_up_of_others() -> None:
    """A job of fewer threads than the one before is shared at once."""
    for count in (12, 2, 12, 2):
        _ext.set_threads(count)
        together = threading.Barrier(count)
        _ext.run_pieces(count, lambda _, together=together: together.wait(60), lambda: 0)
        assert not together.broken


def test_who_finds_the_pool_taken_works_alone() -> None:
    inner: list[tuple[int, bool]] = []

    def outer(number: int) -> None:
        own = threading.get_ident()

        def piece(number: int) -> None:
            inner.append((number, threading.get_ident() == own))

        if number == 0:
            _ext.run_pieces(5, piece, no_clock)

    _ext.run_pieces(2, outer, lambda: 0)
    assert inner == [(number, True) for number in range(5)]


def test_threads_by_the_size_of_a_job() -> None:
    sizes = (0, SMALL - 1, SMALL, 3 << 14, (4 << 14) - 1, 4 << 14, LARGE, 1 << 40)
    assert [_ext.threads_for(work) for work in sizes] == [1, 1, 2, 3, 3, 4, 4, 4]


def keep_waiting(microseconds: int) -> None:
    """A job whose worker is at its piece until the caller has begun to wait for it."""
    caller, both, waits = threading.get_ident(), threading.Barrier(2), threading.Event()
    times = iter((1_000, 1_000 + microseconds))

    def piece(number: int) -> None:
        both.wait(60)  # one piece each
        if threading.get_ident() != caller:
            assert waits.wait(60)

    def clock() -> int:
        waits.set()
        return next(times)

    _ext.set_threads(2)
    _ext.run_pieces(2, piece, clock)
    assert next(times, None) is None  # both were asked for
    _ext.set_threads(4)


def jobs_alone(work: int = SMALL) -> int:
    """How many of the next jobs one thread does."""
    counted = [_ext.threads_for(work) for _ in range(2 * ALONE)]
    alone = counted.count(1)
    assert counted == [1] * alone + [min(4, work >> 14)] * (2 * ALONE - alone)
    return alone


@pytest.mark.parametrize("work", [SMALL, LARGE - 1])
def test_small_jobs_are_done_alone_for_a_while_behind_a_late_worker(work: int) -> None:
    keep_waiting(200)
    assert jobs_alone(work) == 0
    keep_waiting(201)
    assert jobs_alone(work) == ALONE


def test_other_jobs_neither_are_done_alone_nor_count() -> None:
    keep_waiting(201)
    for _ in range(ALONE):
        assert _ext.threads_for(LARGE) == 4  # a thread that comes back late has enough left to do
        assert _ext.threads_for(SMALL - 1) == 1  # always
    assert jobs_alone() == ALONE


def test_a_worker_that_is_late_again_counts_anew() -> None:
    for _ in range(2):
        keep_waiting(1_000_000)
        assert [_ext.threads_for(SMALL) for _ in range(100)] == [1] * 100
    assert jobs_alone() == ALONE - 100


def test_an_error_of_a_piece_leaves_the_pool_to_the_next_job() -> None:
    def fails(number: int) -> None:
        raise ValueError(f"piece {number}")

    with pytest.raises(ValueError, match="piece"):
        _ext.run_pieces(3, fails, lambda: 0)
    test_each_piece_is_run_once_by_as_many_threads_as_are_set(3)
