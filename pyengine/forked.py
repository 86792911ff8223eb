"""A forked process has none of MLX's threads, and whatever it evaluates would wait for them for
ever. Importing the package and forking before anything is evaluated is fine."""

import os

import mlx.core as mx

_lost = False  # the threads, in this process
_used = False  # MLX, in this process or the one it was forked from


def check(op: str) -> None:
    """Refuse to evaluate where it would hang.

    Raises:
        RuntimeError: This process was forked after MLX was used.
    """
    if _lost:
        raise RuntimeError(
            f"[{op}] a process must not be forked from one that has used MLX but this one was and "
            "lacks its threads; start it with multiprocessing's spawn, or load the pair only in it."
        )


def _look() -> None:
    global _used
    # Counts that no use of MLX leaves at 0
    _used = _lost or mx.get_active_memory() + mx.get_cache_memory() + mx.get_peak_memory() > 0


def _lose() -> None:
    global _lost
    _lost = _used


os.register_at_fork(before=_look, after_in_child=_lose)
