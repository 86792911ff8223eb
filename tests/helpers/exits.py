"""Certificates of early exits, as a calibration of the embedded pair would give them."""

from __future__ import annotations

from typing import Any

from pyengine.checkpoint.certificate import Certificate, Trial, bound
from pyengine.risk import p_value
from pyengine.sampling.settings import Sampling
from pyengine.task import embedded_pair

N, DELTA = 40, 0.1


def trial(threshold: float, total: float) -> Trial:
    return Trial(threshold, total, p_value(total, N, DELTA, True), 8.5)


def passed(**changes: Any) -> Certificate:
    """One that passed down to .5, of greedy answers of 24 tokens."""
    own: dict[str, Any] = {
        **bound(embedded_pair()),
        "prompts": "0" * 64,
        "sampling": Sampling(temperature=0.0),
        "max_tokens": 24,
        "layer": 6,
        "decay": 4.0,
        "n": N,
        "delta": DELTA,
        "epsilon": 0.05,
        "metric": "differs",
        "tested": (trial(0.9, 0), trial(0.5, 0), trial(0.1, 7)),
    }
    return Certificate(**{**own, **changes})
