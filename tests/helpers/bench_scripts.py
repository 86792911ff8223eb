"""bench/count.py and sized_calls.py, imported for their tests: their folder is no package."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

BENCH = Path(__file__).parents[2] / "bench"
sys.path.append(str(BENCH))

count = import_module("count")
sized_calls = import_module("sized_calls")
Row = dict[str, Any]


def rows_of(calls: Iterable[Any]) -> list[Row]:
    return [count.row(call) for call in calls]
