"""What is known of the rounds of each pair, for as long as the process has it."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any
from weakref import WeakKeyDictionary

import mlx.core as mx

from pyengine.drafters.drafter import Drafter, TargetLike
from pyengine.engine.controller import Acceptance, Known
from pyengine.ops import dispatch

ROWS_PER_READING = 16  # of the weights, on a GPU

_known: WeakKeyDictionary[TargetLike, dict[Any, Known]] = WeakKeyDictionary()


def known_of(target: TargetLike, drafter: type[Drafter | None], guided: bool = False) -> Known:
    """Of rounds with drafters of that kind, on the device and the ops that run now; of those that
    grammars guide, whose drafts cost more and are kept less often, apart."""
    return _kept(target, (drafter, guided))


def looked_up(target: TargetLike, long: bool) -> Acceptance:
    """Of what lookup finds behind matches that are long, or not, in texts of a mix."""
    return _kept(target, ("lookup", long)).acceptance


def _kept(target: TargetLike, what: Hashable) -> Known:
    gpu = mx.default_device() == mx.gpu
    kinds = _known.setdefault(target, {})
    key = what, gpu, dispatch.chosen()
    return kinds.setdefault(key, Known(ROWS_PER_READING if gpu else 1))
