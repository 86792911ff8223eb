"""How a process joins the others: the same versions, the same weights, its own share."""

from __future__ import annotations

import atexit
import hashlib
import os
import sys
from importlib import metadata
from typing import NoReturn

import mlx.core as mx

from pyengine import _ext
from pyengine.model.config import TargetConfig
from pyengine.model.linear import Weights
from pyengine.ranks.group import ENDED, Ranks
from pyengine.ranks.split import Shares
from pyengine.ranks.target import END, Follower, LeaderTarget, SharedTarget

begun = False  # whether this process has taken part in the group's first exchange


def begin(ranks: Ranks, fault: str = "") -> None:
    """The first exchange: where one rank cannot go on none does. Waits for the others.

    Args:
        ranks: The group.
        fault: What keeps this rank from it, as a sentence.

    Raises:
        ValueError: A rank cannot go on; the first of them is named.
    """
    global begun
    begun = True
    for rank, text in enumerate(ranks.said(fault)):
        if text:
            raise ValueError(f"[ranks] rank {rank} of {ranks.size}: {text}")


def check_same(ranks: Ranks, weights: str) -> None:
    """Refuse to share a target that is not the same everywhere. Waits for the others.

    Args:
        ranks: The group.
        weights: A hash of them, :func:`pyengine.checkpoint.safetensors.sampled`.

    Raises:
        ValueError: A rank has other weights, or another pyengine or MLX.
    """
    versions = [metadata.version("pyengine-mlx"), metadata.version("mlx"), _ext.built_from]
    own = {"versions of pyengine and MLX": " ".join(versions), "weights": weights}
    with ranks.waiting():
        for what, value in own.items():
            digest = hashlib.sha256(value.encode()).digest()
            every = ranks.gathered(mx.array(list(digest), dtype=mx.int32))
            mx.eval(every)
            for rank, other in enumerate(every):
                if not mx.array_equal(other, every[0]):
                    raise ValueError(
                        f"[ranks] {what} must be the same on every rank but got others on rank "
                        f"{rank} than on rank 0."
                    )


def share_target(
    config: TargetConfig, weights: Weights, shares: Shares, ranks: Ranks
) -> LeaderTarget:
    """Rank 0's target. On the other ranks this does not return: they follow until it ends."""
    if ranks.leads:
        atexit.register(_end, ranks)
        return LeaderTarget(config, weights, shares, ranks)
    follow(SharedTarget(config, weights, shares, ranks))


def follow(target: SharedTarget) -> NoReturn:
    """Do as rank 0 says; ends the process when it ends."""
    try:
        Follower(target).follow()
    except KeyboardInterrupt:
        code = 130
    except RuntimeError as error:
        ranks = target.ranks
        print(
            f"pyengine: [ranks] rank {ranks.rank} of {ranks.size} ends: {error}",
            file=sys.__stderr__,
        )
        code = ENDED
    else:
        code = 0
    if sys.__stderr__ is not None:
        sys.__stderr__.flush()
    os._exit(code)  # MLX's threads may wait for others that are gone


def _end(ranks: Ranks) -> None:
    if ranks.alone():
        return
    try:
        with ranks.waiting():
            mx.eval(ranks.tell(END, [], mx.zeros(1, mx.int32)))
    except RuntimeError:
        pass  # they are gone
