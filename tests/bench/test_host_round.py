"""bench/host_round.py: rounds of the published pairs' graphs, encoded for no device."""

from __future__ import annotations

import importlib
from pathlib import Path

import mlx.core as mx
import pytest

from pyengine import ops

BENCH = Path(__file__).parents[2] / "bench"


@pytest.mark.parametrize("name, layers", [("31B", 60), ("26B-A4B", 30)])
def test_a_round_of_a_published_graph(name, layers, monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    row = importlib.import_module("host_round").measured(name, block_size=2, rounds=2)
    assert 10 * layers < row.launches < 25 * layers
    assert row.contiguous == 0 and row.ms > 0
    assert mx.all(ops.softcap(mx.zeros(3), 30.0) == 0)  # computed again
