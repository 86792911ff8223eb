"""filter_logits on Metal, in the workbench: the processor's bits, however hard the logits."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from launched import launched, launches_of
from test_filter_logits import TOLERANCE, random_edits, random_logits, random_mask

import workbench
from pyengine import _ext, ops
from pyengine.ops.filter_logits import Edits, Filtered

SLICE = 4096
BROKEN = (np.nan, -np.nan, np.inf)  # the second sorts below all logits
FUSED = _ext.instruction_set() != "portable"  # which has no fused multiply-add, and another exp


def metal(
    logits: mx.array,
    *,
    temperature: float = 1.0,
    top_k: int = 64,
    top_p: float = 1.0,
    min_p: float = 0.0,
    mask: mx.array | None = None,
    edits: Edits | None = None,
    **options: Any,
) -> tuple[Filtered, Any]:
    """What the two launches make of it, and their report."""
    settings: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    result = ops.filter_logits(logits, min_p=min_p, mask=mask, edits=edits, **settings)
    outputs, report = launched(result, **options)
    return Filtered(*outputs), report


def shifted(logits: mx.array) -> mx.array:
    """The same in memory that starts 4 bytes past a multiple of 16."""
    moved = mx.concatenate([mx.zeros(1), logits.reshape(-1)])[1:].reshape(logits.shape)
    mx.eval(moved)
    return moved


def assert_same_bits(out: Filtered, expected: Filtered) -> None:
    """A broken row (flag 2) has ids in range and no other promise."""
    assert out.flags.tolist() == expected.flags.tolist()
    sound = np.array(out.flags) < 2
    assert np.array_equal(np.array(out.ids)[sound], np.array(expected.ids)[sound])
    a, b = (np.array(x.probs)[sound] for x in (out, expected))
    if FUSED:
        a, b = a.view(np.uint32), b.view(np.uint32)
        assert np.array_equal(a, b)
    assert np.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE)


CASES = [
    (1, 1, 1, 0),
    (3, 7, 5, 2),
    (2, 300, 300, 0),
    (2, SLICE - 1, 64, 40),
    (2, SLICE, 256, 0),
    (1, SLICE + 1, 64, 0),
    (2, 2 * SLICE + 132, 1, 500),
    (2, 3 * SLICE + 2, 33, 9),
]


@pytest.mark.parametrize("T, V, top_k, edited", CASES)
@pytest.mark.parametrize("distinct", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_no_fault_and_the_processors_bits(T, V, top_k, edited, distinct, masked):
    """Equal logits are what sends a slice the long way round."""
    logits = random_logits(V, T, V) if distinct else mx.round(random_logits(V, T, V) / 4)
    kw: dict[str, Any] = {"temperature": 0.8, "top_k": min(top_k, 256), "top_p": 0.95}
    if edited:
        kw["edits"] = random_edits(np.random.default_rng(V), T, V, edited)
    if masked:
        kw["mask"] = random_mask(np.random.default_rng(V), T, V)
    out, _ = metal(logits, mode="check", **kw)
    assert_same_bits(out, ops.filter_logits(logits, **kw))
    for options in (
        {"mode": "check", "order": "reverse"},
        {"mode": "check", "order": "random"},
        {"contract": "fast"},
        {"logits": shifted(logits)},
    ):
        again, _ = metal(**({"logits": logits} | kw | options))
        assert all(np.array_equal(*map(np.array, pair)) for pair in zip(out, again, strict=True))


@pytest.mark.parametrize("top_k", [1, 8])
def test_flags(top_k):
    """Whatever is no number is seen in every place, though no edit leaves it."""
    V, places = 2 * SLICE + 4, (0, SLICE - 1, SLICE, 2 * SLICE + 3)
    for value, flag in [*((x, 2) for x in BROKEN), (-np.inf, 1), (3e38, 0), (-3e38, 0)]:
        logits = np.array(random_logits(1, len(places) + 1, V))
        logits[range(len(places)), places] = value
        out, _ = metal(mx.array(logits), top_k=top_k)
        assert out.flags.tolist() == [flag] * len(places) + [0], value
        assert mx.all((out.ids >= 0) & (out.ids < V))
        away = Edits(mx.array(places)[None], mx.ones((5, 4)), mx.full((5, 4), -np.inf))
        out, _ = metal(mx.array(logits), top_k=top_k, edits=away)
        assert out.flags.tolist() == [flag] * len(places) + [0], value
    nothing, _ = metal(mx.full((1, 5), -np.inf), top_k=top_k)
    assert nothing.flags.tolist() == [2]


def test_what_lies_on_a_border_of_top_p_and_min_p():
    """A mass before of exactly top_p is enough; min_p times the best itself is not too little."""
    out, _ = metal(mx.zeros((1, 4)), top_p=0.5)
    assert out.probs.tolist() == [[0.5, 0.5, 0.0, 0.0]]
    logits = mx.array([[0.0, -1.5]])
    best, other = np.array(metal(logits)[0].probs)[0]
    share = next(s for s in np.nextafter(other / best, [0, 2, other / best], dtype=np.float32)
                 if s * best == other)  # fmt: skip
    assert metal(logits, min_p=float(share))[0].probs[0, 1].item() == other
    more = np.float32(share * np.float32(1.0001))
    assert metal(logits, min_p=float(more))[0].probs.tolist() == [[1.0, 0.0]]


def hard_rows(rng: np.random.Generator, T: int, V: int) -> np.ndarray:
    """Rows of every kind side by side, and in some of them something that is no number.

    Nothing is so large that an edit makes it infinite: with a delta of -inf it would be NaN.
    """
    rows = rng.normal(0, rng.choice([0.1, 3.0, 30.0], (T, 1)), (T, V))
    kind = rng.integers(0, 8, T)
    rows[kind == 0] = np.round(rows[kind == 0])
    rows[kind == 1] = rows[kind == 1, :1]
    rows[kind == 2] = np.where(np.arange(V) == rng.integers(0, V), -3.0, -np.inf)
    rows[kind == 3] = np.sign(rows[kind == 3]) * 0.0  # 0 and -0
    rows[kind == 4] = np.where(rng.random((np.sum(kind == 4), V)) < 0.9, -np.inf, rows[kind == 4])
    rows[kind == 5] = np.sort(rows[kind == 5])
    rows[kind == 6] *= 1e36
    for row in np.flatnonzero(rng.random(T) < 0.15):
        rows[row, rng.integers(V)] = rng.choice([*BROKEN, -np.inf, 1e38, -1e38])
    return rows.astype(np.float32)


def hard_edits(rng: np.random.Generator, T: int, V: int) -> Edits:
    """Random ones, at the borders of slices too; or, in some rows, all logits but one away."""
    if rng.random() < 0.3 and V < 2 * SLICE:
        deltas = np.where(rng.random((T, 1)) < 0.5, -np.inf, 0.0) * np.ones((T, V))
        deltas[np.arange(T), rng.integers(0, V, T)] = 0
        ids = mx.arange(V, dtype=mx.int32)[None]
        return Edits(ids, mx.ones((T, V)), mx.array(deltas.astype(np.float32)))
    edits = random_edits(rng, T, V, int(rng.choice([1, 30, 300])))
    borders = [0, V - 1, *(i for i in (SLICE - 1, SLICE) if i < V)]
    ids = np.concatenate([np.array(edits.ids)[0], borders]).astype(np.int32)
    order = rng.permutation(ids.size)
    _, first = np.unique(ids, return_index=True)
    wide = []
    for x in (edits.factors, edits.deltas):
        values = np.concatenate([np.array(x), rng.choice([0.5, 1.0], (T, len(borders)))], axis=1)
        said = dict(zip(ids[first].tolist(), first.tolist(), strict=True))
        wide.append(values[:, [said[i] for i in ids.tolist()]][:, order].astype(np.float32))
    return Edits(mx.array(ids[order])[None], *map(mx.array, wide))


def fuzz(cases: int, T: int, seed: int) -> int:
    """So many rows, T a launch, in all three implementations; returns those that were sound."""
    rng = np.random.default_rng(seed)
    sound = 0
    for i in range(-(-cases // T)):
        V = int(rng.choice([1, 2, 7, 33, 130, 400, 1021, SLICE - 1, SLICE, SLICE + 1, 9001]))
        V = 262144 if i % 40 == 39 else V
        rows = T if V < 5000 else 4
        logits = mx.array(hard_rows(rng, rows, V))
        kw: dict[str, Any] = {
            "temperature": float(rng.choice([0.0, 0.3, 1.0, 2.5])),
            "top_k": int(rng.choice([1, 5, 64, 256])),
            # Few values: a cut that falls within rounding of a border may go either way
            "top_p": float(rng.choice([1.0, 0.951, 0.517, 1e-6])),
            "min_p": float(rng.choice([0.0, 0.0517])),
        }
        if rng.random() < 0.4:
            kw["edits"] = hard_edits(rng, rows, V)
        if rng.random() < 0.3:
            kw["mask"] = random_mask(rng, rows, V)
        out, _ = metal(logits, **kw)
        assert_same_bits(out, ops.filter_logits(logits, **kw))
        assert mx.all((out.ids >= 0) & (out.ids < V))
        expected = ops.filter_logits_reference(logits, **kw)
        assert out.flags.tolist() == expected.flags.tolist()
        good = np.array(out.flags) < 2
        a, b = ([np.array(x)[good] for x in y[:2]] for y in (out, expected))
        assert np.array_equal(a[0], b[0]), kw
        assert np.allclose(a[1], b[1], rtol=TOLERANCE, atol=TOLERANCE), kw
        sound += int(good.sum())
    return sound


def test_fuzzed():
    assert fuzz(1000, 25, seed=1) > 500


@pytest.mark.long
def test_fuzzed_ten_thousand_times():
    assert fuzz(16_000, 25, seed=2) >= 10_000


def test_rows_are_stable():
    logits = random_logits(9, 16, SLICE + 5)
    together, _ = metal(logits, top_p=0.9)
    for t in (0, 7, 15):
        alone, _ = metal(logits[t : t + 1], top_p=0.9)
        for a, b in zip(together, alone, strict=True):
            assert np.array_equal(np.array(a[t : t + 1]), np.array(b))


def of_one(rows: int, top_k: int, top_p: float, min_p: float) -> dict[str, np.ndarray]:
    """What a launch is told of the settings of one sequence."""
    settings = {"top_k": np.int32(top_k), "top_p": np.float32(top_p), "min_p": np.float32(min_p)}
    arrays = {name: np.array([value]) for name, value in settings.items()}
    return {"owner": np.zeros(rows, np.int32), **arrays}


def test_merging_takes_candidates_of_any_slices():
    """Lists of any logits, with empty places behind: what an LM head that filters hands over."""
    rng = np.random.default_rng(3)
    V, count, slices = 1000, 20, 50
    logits = random_logits(4, 1, V)
    bits = np.array(logits[0] + 0.0).view(np.uint32)
    keys = np.where(bits >> 31, bits, bits ^ 0x7FFFFFFF).astype(np.uint64)
    entries = rng.permutation((keys << np.uint64(32)) | np.arange(V, dtype=np.uint64))
    lists = np.full((1, slices, count), 2**64 - 1, np.uint64)
    for place, entry in zip(rng.permutation(slices * count), entries, strict=False):
        lists.reshape(-1)[place] = entry
    lists.sort(axis=-1)
    flags = np.zeros((1, slices), np.uint32)
    flags[0, 33] = 1
    wide = mx.zeros((1, slices * SLICE))
    merge = launches_of(ops.filter_logits(wide, top_k=count, top_p=0.9, min_p=0.01))[1]
    state = {"candidates": lists, "slice_flags": flags, **of_one(1, count, 0.9, 0.01)}
    outputs, _ = workbench.run(merge, state, mode="check", order="random")
    expected = ops.filter_logits(logits, top_k=count, top_p=0.9, min_p=0.01)
    out = Filtered(*(mx.array(outputs[name]) for name in Filtered._fields))
    assert_same_bits(out, expected._replace(flags=mx.array([1])))


@pytest.mark.parametrize("T", [1, 6])
@pytest.mark.parametrize("distinct", [False, True])
def test_logits_are_read_once(T, distinct):
    logits = random_logits(5, T, 16 * SLICE)
    logits = logits if distinct else mx.zeros_like(logits)
    _, report = metal(logits, mode="count")
    assert report.traffic["logits"].device_read_bytes <= 1.02 * logits.nbytes
    assert report.traffic["logits"].read_lines * 64 == logits.nbytes  # whole lines
    # Written once, 64 of 4096 in 8 bytes; read at most twice
    assert report.traffic["candidates"].written_bytes * 32 == logits.nbytes
    assert report.traffic["candidates"].device_read_bytes * 16 <= logits.nbytes
    assert report.threadgroup_bytes <= 13 * 1024


def test_a_mask_is_read_once():
    """A bit beside each logit: a 32nd of their bytes."""
    logits = random_logits(5, 3, 16 * SLICE)
    mask = random_mask(np.random.default_rng(5), 3, 16 * SLICE)
    _, report = metal(logits, mask=mask, mode="count")
    assert report.traffic["mask"].group_read_sectors * 32 == mask.nbytes == logits.nbytes // 32
    assert report.traffic["logits"].device_read_bytes <= 1.02 * logits.nbytes


def test_edits_cost_what_they_change():
    """An edited logit is read again, and the ids by every slice."""
    edits = random_edits(np.random.default_rng(6), 2, 16 * SLICE, 64)
    logits = random_logits(6, 2, 16 * SLICE)
    _, report = metal(logits, edits=edits, mode="count")
    assert report.traffic["logits"].device_read_bytes <= 1.02 * logits.nbytes
    assert report.traffic["edit_ids"].group_read_sectors <= 2 * 16 * 9
    assert report.threadgroup_bytes <= 24 * 1024


def test_switch_runs_it(monkeypatch):
    ran = []
    run = ops.workbench.run
    monkeypatch.setattr(
        ops.workbench, "run", lambda launches, *rest: ran.append(launches) or run(launches, *rest)
    )
    logits = random_logits(7, 2, 500)
    ops.use("workbench")
    try:
        out = ops.filter_logits(logits, top_p=0.9)
        empty = Edits(mx.zeros((1, 0), mx.int32), mx.ones((2, 0)), mx.zeros((2, 0)))
        same = ops.filter_logits(logits, top_p=0.9, edits=empty)
        assert ops.filter_logits(logits[:0]).ids.shape == (0, 64)
        ops.filter_logits(logits, top_k=0)  # all candidates: the processor's kernel
    finally:
        ops.use("native")
    kernels = [[launch.kernel for launch in launches] for launches in ran]
    assert kernels == [["filter_logits", "merge_candidates"]] * 2
    for got in (out, same):
        assert_same_bits(got, ops.filter_logits(logits, top_p=0.9))


def test_lists_lie_between_the_launches():
    """What eval_gpu and the workbench are given, and what the first launch leaves the second."""
    edits = Edits(mx.zeros((1, 3), mx.int32), mx.ones((2, 3)), mx.zeros((2, 3)))
    launches = launches_of(ops.filter_logits(mx.zeros((2, 5000)), edits=edits))
    read, written = _ext.launch_arguments(launches)
    state = ["owner", "temperature"]
    settings = ["top_k", "top_p", "min_p"]
    edited = ["logits", *state, "edit_ids", "factors", "deltas", *settings]
    assert [b.name for b in read] == edited
    assert [b.name for b in written] == ["ids", "probs", "flags"]
    read, written = _ext.launch_arguments(launches[:1])
    assert [b.name for b in written] == ["candidates", "slice_flags"]
    assert read[0].alignment == 16
    twice = _ext.launch_arguments(launches + launches)[0]
    assert [b.name for b in twice] == edited
    for logits in (mx.zeros((2, 5001)), shifted(mx.zeros((2, 5000)))):
        ragged = launches_of(ops.filter_logits(logits))
        read = _ext.launch_arguments(ragged)[0]
        assert [b.name for b in read] == ["logits", *state, *settings]
        assert read[0].alignment == 1


def test_limits():
    """256 candidates of 262144 logits are all that a row's lists may hold."""
    for V, top_k, fits in (
        (262144, 256, True),
        (262145, 256, False),
        (2**20, 64, True),
        (5000, 0, False),
    ):
        launches, _ = _ext.launches_of(ops.filter_logits(mx.zeros((1, V)), top_k=top_k))
        assert (launches is not None) is fits
    launches = launches_of(ops.filter_logits(mx.zeros((6, 262144)), top_k=256))
    assert [tuple(launch.grid) for launch in launches] == [(64, 6, 1), (6, 1, 1)]
    assert [tuple(launch.threadgroup) for launch in launches] == [(256, 1, 1), (512, 1, 1)]


def whole_vocabulary(kind: str, rng: np.random.Generator) -> mx.array:
    """16 rows whose candidates come from all slices, from few of them, or are mostly equal."""
    logits = rng.normal(0, 3, (16, 262144)).astype(np.float32)
    if kind == "one slice":
        logits[:, 7 * SLICE : 8 * SLICE] += 30
    elif kind == "equal":
        logits = np.round(logits)
    return mx.array(logits)


@pytest.mark.parametrize("top_k", [64, 256])
@pytest.mark.parametrize("kind", ["random", "one slice", "equal"])
def test_rows_of_the_whole_vocabulary(top_k, kind):
    logits = whole_vocabulary(kind, np.random.default_rng(top_k))
    out, _ = metal(logits, top_k=top_k, top_p=0.95)
    assert_same_bits(out, ops.filter_logits(logits, top_k=top_k, top_p=0.95))


def test_lists_are_in_order():
    """What merging relies on."""
    logits = random_logits(8, 2, 2 * SLICE + 9)
    launches, inputs = _ext.launches_of(ops.filter_logits(logits, top_k=33))
    assert launches
    names = ("logits", "owner", "temperature")
    given = zip(names, inputs, strict=False)
    outputs, _ = workbench.run(launches[0], {name: np.array(a) for name, a in given})
    assert np.all(np.diff(outputs["candidates"].astype(object)) >= 0)


@pytest.mark.parametrize("top_k, slices, T", [(1, 512, 16), (64, 256, 16), (256, 64, 8)])
def test_lists_of_a_whole_heads_slices(top_k, slices, T):
    """What quantized_filter_logits hands over, at most rows; some logits are equal."""
    V = 262144
    logits = whole_vocabulary("random", np.random.default_rng(slices))[:T]
    logits[:, 1000:1064] = 40.0
    w, factors = mx.zeros((V, 16), mx.uint32), mx.zeros((V, 1))
    x = mx.zeros((T, 64))
    head = ops.quantized_filter_logits(x, w, factors, factors, top_k=top_k, top_p=0.9)
    merge = launches_of(head)[1]
    assert merge.buffers[0].shape == [T, slices, top_k] and merge.threadgroup[0] <= 512
    bits = np.array(logits + 0.0).view(np.uint32)
    keys = np.where(bits >> 31, bits, bits ^ 0x7FFFFFFF).astype(np.uint64)
    entries = (keys << np.uint64(32)) | np.arange(V, dtype=np.uint64)
    lists = np.sort(entries.reshape(T, slices, -1), axis=-1)[..., :top_k].copy()
    flags = np.zeros((T, slices), np.uint32)
    state = {"candidates": lists, "slice_flags": flags, **of_one(T, top_k, 0.9, 0.0)}
    outputs, _ = workbench.run(merge, state)
    out = Filtered(*(mx.array(outputs[name]) for name in Filtered._fields))
    assert_same_bits(out, ops.filter_logits(logits, top_k=top_k, top_p=0.9))
