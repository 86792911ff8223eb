"""A target shared by processes of this machine: the text of one, memory, and what ends a group.

Processes of MLX's ring wait by spinning, so groups are slow beside anything else.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from groups import FIXTURES, SECONDS, changed_weights, finish, start

from pyengine.checkpoint.config_json import read_target_config
from pyengine.checkpoint.inspect import inspect
from pyengine.checkpoint.weights import load_target_weights
from pyengine.ranks.group import ENDED
from pyengine.ranks.launched import backend, follows, is_started
from pyengine.ranks.split import cut, lengths, shares

NANO = Path(__file__).parents[2] / "pyengine/nano"
FLAVOURS = ("dense31", "uni12", "moe26", "e2b")


def place_of(name: str) -> str:
    return name if name == "embedded" else str(FIXTURES / name)


@cache
def of_one(name: str) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        return ran(name, 1, Path(folder))[0]


def ran(name: str, size: int, folder: Path) -> list[dict[str, Any]]:
    """What each rank wrote: rank 0 its texts, the others nothing."""
    ended = finish(start(folder, size, place_of(name)), SECONDS)
    assert all(code == 0 for code, _, _ in ended), ended
    assert all(out == "" for _, out, _ in ended[1:])
    return [json.loads(ended[0][1])]


GROUPS = [
    *((name, 2) for name in [*FLAVOURS, "embedded"]),
    ("uni12", 4),
    ("embedded", 4),
    *(pytest.param(name, 4, marks=pytest.mark.long) for name in ("dense31", "moe26", "e2b")),
]


@pytest.mark.ranks
@pytest.mark.parametrize("name, size", GROUPS)
def test_texts_do_not_depend_on_drafts_and_logits_are_near_those_of_one(
    name: str, size: int, tmp_path: Path
) -> None:
    alone, [shared] = of_one(name), ran(name, size, tmp_path)
    texts = shared["texts"]
    assert texts["0.0 4"] == texts["0.0 1"] and texts["1.0 4"] == texts["1.0 1"]
    assert len(texts["1.0 4"]) == 24 and texts["0.0 1"] != texts["1.0 1"]
    expected, found = (np.array(own["logits"]) for own in (alone, shared))
    # One rounding of a stream to bfloat16, of parts that were added in another order
    assert np.abs(found - expected).max() <= 0.02 * np.abs(expected).max()
    assert alone["refused"] == [] and shared["refused"] == [
        f"[ranks] {setting} must not be given where ranks share the target."
        for setting in ("cache_dir", "early_exit")
    ]
    assert shared["again"][0] == texts["0.0 1"][:8]


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("name", FLAVOURS)
def test_shares_are_all_of_a_matrix_each_part_once(name: str, size: int) -> None:
    folder = FIXTURES / name / "target"
    config = read_target_config(folder)
    whole = load_target_weights(folder, config).matrices
    each = [shares(config, rank, size) for rank in range(size)]
    assert all(own.summed == each[0].summed for own in each)
    for path, matrix in whole.items():
        if "embed" in path or path not in each[0].cuts:
            continue
        axis = -2 if each[0].cuts[path].outputs else -1
        parts = [cut(matrix, own.cuts[path]).weight for own in each]
        assert sum(part.shape[axis] for part in parts) == matrix.weight.shape[axis], path
        # As many of each number: columns of query heads may come in another order
        joined = mx.concatenate(parts, axis=axis).astype(mx.float32)
        a, b = (np.sort(np.array(x), axis=None) for x in (joined, matrix.weight.astype(mx.float32)))
        assert np.array_equal(a, b), path
    assert sum(lengths(config.vocab_size, size)) == config.vocab_size
    assert [own.head[1] - own.head[0] for own in each] == lengths(config.vocab_size, size)


def test_quantised_matrices_are_cut_between_groups() -> None:
    config = read_target_config(NANO / "target")
    whole = load_target_weights(NANO / "target", config).matrices
    path, x = "layers.3.mlp.down_proj", mx.random.normal((5, 384)).astype(mx.bfloat16)
    parts, columns = [], []
    for rank in range(4):  # six groups of 64
        own = shares(config, rank, 4).cuts[path]
        [(begin, end)] = own.ranges
        columns.append(end - begin)
        parts.append(cut(whole[path], own)(x[:, begin:end], mx.float32))
    assert sorted(columns) == [64, 64, 128, 128]
    assert mx.allclose(sum(parts), whole[path](x, mx.float32), rtol=1e-4, atol=1e-4)


@pytest.mark.ranks
def test_inspect_tells_what_each_rank_keeps(tmp_path: Path) -> None:
    [own] = ran("embedded", 2, tmp_path)
    report = inspect(NANO, ranks=2)
    first, second = (rank["weights"] for rank in report["ranks"])
    assert second < first < report["memory"]["weights"]
    assert own["arrays"] < of_one("embedded")["arrays"]
    with pytest.raises(ValueError, match=r"\[inspect\] ranks must be from 1 to 64 but got 0\."):
        inspect(NANO, ranks=0)


def ready(folder: Path, **environment: str) -> list[subprocess.Popen[str]]:
    """A group of two whose rank 0 is about to do a last call."""
    started = start(folder, 2, place_of("dense31"), "wait", **environment)
    out = started[0].stdout
    assert out is not None and out.readline() == "ready\n"
    return started


ENDS: dict[str, tuple[int, Callable[[subprocess.Popen[str]], None], str]] = {
    "killed": (1, lambda process: process.kill(), "every rank must stay but one has ended"),
    "hangs": (
        1,
        lambda process: process.send_signal(signal.SIGSTOP),
        "every rank must answer within 30 s (PYENGINE_RANKS_TIMEOUT) but one does not",
    ),
    "first killed": (0, lambda process: process.kill(), "ends"),
}


@pytest.mark.ranks
@pytest.mark.parametrize("how", ENDS)
def test_a_rank_that_is_gone_ends_the_others_with_one_sentence(how: str, tmp_path: Path) -> None:
    gone, end, sentence = ENDS[how]
    started = ready(tmp_path, PYENGINE_RANKS_TIMEOUT="30")
    end(started[gone])
    other = started[1 - gone]
    try:
        _, err = other.communicate("\n", timeout=SECONDS)
    finally:
        for process in started:
            process.kill()
    said = [line for line in err.splitlines() if not line.startswith("[ring]")]
    assert other.returncode == ENDED and len(said) == 1 and sentence in said[0], err


@pytest.mark.ranks
def test_other_weights_are_refused_on_every_rank(tmp_path: Path) -> None:
    changed = tmp_path / "dense31"
    changed_weights(FIXTURES / "dense31", changed)
    program = (
        "import os, sys, runpy; sys.argv[1:] = [sys.argv[1 + int(os.environ['MLX_RANK'])]]; "
        f"sys.path.insert(0, {str(Path(__file__).parent)!r}); "
        "runpy.run_path(sys.path[0] + '/rank.py', run_name='__main__')"
    )
    arguments = (place_of("dense31"), str(changed))
    ended = finish(start(tmp_path, 2, *arguments, command=[sys.executable, "-c", program]), SECONDS)
    for code, out, err in ended:
        assert code == 1 and out == ""
        assert "weights must be the same on every rank but got others on rank 1" in err


def test_a_process_of_its_own_is_in_no_group() -> None:
    assert not is_started({}) and not is_started({"MLX_RANK": "0"})
    assert is_started({"MLX_RANK": "0", "MLX_HOSTFILE": "x"})
    assert is_started({"OMPI_COMM_WORLD_SIZE": "2"})
    assert not is_started({"OMPI_COMM_WORLD_SIZE": "1"})
    assert backend({"MLX_RANK": "0", "MLX_HOSTFILE": "x"}) == "ring" and backend({}) is None
    assert backend({"MLX_RANK": "1", "MLX_IBV_DEVICES": "x"}) == "jaccl"
    assert backend({"OMPI_COMM_WORLD_SIZE": "2"}) == "mpi"
    assert not follows({}) and not follows({"MLX_RANK": "0", "MLX_HOSTFILE": "x"})
    assert follows({"MLX_RANK": "1", "MLX_HOSTFILE": "x"})
    assert follows({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"})
