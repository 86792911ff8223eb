"""No rank holds what it does not use: bytes of the arrays that it keeps, and resident memory."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import wide
from groups import FIXTURES

from pyengine.checkpoint.config_json import read_target_config
from pyengine.checkpoint.inspect import inspect
from pyengine.checkpoint.weights import load_target_weights
from pyengine.ranks.split import shares

ROOT = Path(__file__).parents[2]
NANO = ROOT / "pyengine/nano/target"


def bench() -> ModuleType:
    """bench/ranks.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("bench_ranks", ROOT / "bench/ranks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("name", ["dense31", "uni12", "moe26", "e2b", "embedded"])
def test_arrays_that_a_rank_keeps_are_what_inspect_tells(name: str, size: int) -> None:
    folder = NANO if name == "embedded" else FIXTURES / name / "target"
    config = read_target_config(folder)
    told = inspect(folder, ranks=size)["ranks"]
    for rank in range(size):
        own = load_target_weights(folder, config, part=shares(config, rank, size).part)
        arrays = [a for matrix in own.matrices.values() for a in matrix.arrays]
        assert sum(a.nbytes for a in [*arrays, *own.vectors.values()]) == told[rank]["weights"]


@pytest.mark.ranks
@pytest.mark.skipif(sys.platform != "linux", reason="weights are mapped on Linux alone")
def test_resident_memory_of_a_rank_is_that_of_its_share(tmp_path: Path) -> None:
    """At most what is told, and half of what it has no use for."""
    wide.write(tmp_path)
    command = [sys.executable, str(ROOT / "bench/ranks.py"), "--json", "--memory"]
    done = subprocess.run(
        [*command, str(tmp_path / "target")],
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    rows = json.loads(done.stdout)
    whole = rows[0]["weights"]
    assert [own["rank"] for own in rows] == [0, 0, 1, 0, 1, 2, 3]
    assert rows[0]["resident"] > 0.9 * whole > 2e8
    for own in rows[1:]:
        assert own["resident"] < own["weights"] + (whole - own["weights"]) / 2, rows
        assert own["resident"] > 0.9 * own["weights"], rows
    assert bench().memory_table(rows)[2].startswith("| 1 | 0 | 305 | ")
