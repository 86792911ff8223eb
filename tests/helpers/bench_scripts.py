"""bench/count.py, whose folder is no package, and the sizes of the ops' benches that it counts."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

BENCH = Path(__file__).parents[2] / "bench"
sys.path.append(str(BENCH))

bench = import_module("count")
counted = import_module("counted")
Row = dict[str, Any]


def rows_of(calls: Iterable[Any]) -> list[Row]:
    return [bench.row(call) for call in calls]
