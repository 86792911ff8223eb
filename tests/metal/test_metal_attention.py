"""block_attention on Metal, in the workbench: the processor's bits, its edges, faults, traffic."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from launched import launched, launches_of
from matmuls import bits_of
from pieces import Paged, paged, piece, random_pieces, seen_pages, unseen

from pyengine import _ext, ops
from pyengine.ops import block_attention, block_attention_reference

# As in tests/ops/test_block_attention.py
TOLERANCE = {mx.float32: 1e-5, mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}
# What lies between the launches has room for every span that some length could need
BETWEEN = {"scores", "sums", "states"}


def metal(call: Paged, *, scale: float = 1.0, window: int | None = None, **how: Any):
    """The output of the launches, and their report."""
    (out,), report = launched(block_attention(*unseen(call), scale=scale, window=window), **how)
    return out, report


def assert_right(out: mx.array, call: Paged, **options: Any) -> None:
    """Near the definition, and the processor's bits where it has fused multiply-adds too."""
    expected = block_attention_reference(*call, **options)
    assert out.dtype == expected.dtype and out.shape == expected.shape
    a, b = (np.array(x.astype(mx.float32)) for x in (out, expected))
    np.testing.assert_allclose(a, b, rtol=TOLERANCE[out.dtype], atol=TOLERANCE[out.dtype])
    if _ext.instruction_set() != "portable":
        assert np.array_equal(bits_of(out), bits_of(block_attention(*call, **options)))


# Rows and lengths of pieces, H, K, D, window. Gemma 4's head geometries, with fewer key heads;
# widths that end inside a tile of 64 elements and a slice of 128 columns; lengths about chunks of
# 64 and spans of 512; more than 64 rows, in equal tiles and unequal ones; slices; pieces of one
# size and of many.
CASES = {
    "31b-sliding": ([(6, 900)], 4, 2, 256, 200),
    "31b-full": ([(6, 1030)], 8, 1, 512, None),
    "e4b-sliding": ([(1, 700)], 8, 2, 256, 512),
    "12b-full": ([(5, 520)], 16, 1, 512, None),
    "26b-full": ([(16, 130)], 16, 2, 512, None),
    "one-key": ([(1, 0)], 3, 3, 16, None),
    "begin": ([(4, 0), (4, 1)], 4, 2, 48, None),
    "begin-of-window": ([(4, 30)], 2, 1, 80, 64),
    "chunk": ([(1, 63)], 2, 1, 144, None),
    "chunk-and-one": ([(1, 64)], 2, 1, 32, None),
    "span": ([(2, 510)], 2, 1, 16, None),
    "span-and-one": ([(3, 511)], 2, 1, 16, None),
    "many-spans": ([(2, 5100), (3, 40)], 2, 1, 16, None),
    "window-over-spans": ([(16, 1530)], 1, 1, 16, 520),
    "window-of-one": ([(16, 77)], 4, 1, 16, 1),
    "odd-rows": ([(7, 70)], 11, 1, 32, 50),
    "slices": ([(21, 60)], 4, 2, 64, None),
    "slices-of-a-window": ([(33, 300), (2, 5)], 2, 1, 16, 40),
    "streams": ([(5, 300), (5, 64), (5, 0), (5, 513)], 8, 2, 32, None),
    "ragged": ([(6, 100), (1, 700), (40, 130), (3, 0)], 8, 1, 32, 300),
    "tiles-of-some": ([(16, 40), (1, 600), (17, 3)], 10, 1, 16, None),
}


def case(name: str, dtype: mx.Dtype, seed: int = 1) -> tuple[Paged, int | None]:
    pieces, *sizes, window = CASES[name]
    made = [piece(seed + 3 * i, T, length, *sizes) for i, (T, length) in enumerate(pieces)]
    return paged(made, window, dtype=dtype, seed=seed, room=len(name) % 3), window


@pytest.mark.parametrize("name", CASES)
def test_the_processors_bits(name):
    D = CASES[name][3]
    for dtype in (mx.bfloat16,) if D == 512 else (mx.bfloat16, mx.float32):
        call, window = case(name, dtype)
        options = {"scale": 2 * D**-0.5, "window": window}
        assert_right(metal(call, **options)[0], call, **options)


@pytest.mark.parametrize("name", ["e4b-sliding", "odd-rows", "window-over-spans", "ragged"])
def test_float16(name):
    call, window = case(name, mx.float16, 4)
    assert_right(metal(call, scale=0.2, window=window)[0], call, scale=0.2, window=window)


def test_random_calls():
    rng = np.random.default_rng(13)
    for seed in range(20):
        K, G, Q = (int(rng.integers(1, n)) for n in (3, 9, 5))
        window = None if rng.random() < 0.3 else int(rng.integers(1, 200))
        pieces = random_pieces(rng, Q, 19, K, G, int(rng.choice([16, 32, 176])))
        call = paged(pieces, window, seed=seed, room=int(rng.integers(0, 5)))
        options = {"scale": 0.3, "window": window}
        assert_right(metal(call, **options)[0], call, **options)


@pytest.mark.parametrize("window", [None, 100])
def test_rows_are_stable(window):
    """A row's bits are those of the row alone: in pieces and slices, other pages and tables."""
    T = 22
    p = piece(7, T, 500, 6, 2, 64)
    options = {"scale": 0.2, "window": window}

    def bits(*pieces: Any, **how: Any) -> np.ndarray:
        call = paged(pieces, window, dtype=mx.bfloat16, **how)
        return bits_of(metal(call, **options)[0])

    whole = np.concatenate([bits(p.part(t, t + 1)) for t in range(T)])
    for begin, end in ((0, T), (3, 5), (6, 22), (2, 20), *((0, n) for n in range(2, 17))):
        assert np.array_equal(bits(p.part(begin, end)), whole[begin:end]), (begin, end)
    for seed in (1, 2):
        assert np.array_equal(bits(p, seed=seed, spare=5, room=40), whole)
    # One key head beside others, and a piece beside others
    few = p._replace(q=p.q[:, :3], k=p.k[:1], v=p.v[:1])
    assert np.array_equal(bits(few), whole[:, :3])
    beside = bits(piece(8, 17, 70, 6, 2, 64), p, piece(9, 1, 900, 6, 2, 64))
    assert np.array_equal(beside[17 : 17 + T], whole)


def test_hidden_places_may_hold_anything():
    """Before the window, behind the piece, in free pages; and later rows of the piece itself."""
    T, window, length = 7, 90, 200
    p = piece(10, T, length, 4, 2, 32)
    expected = bits_of(metal(paged([p], window), window=window)[0])
    for junk in (float("nan"), float("inf"), -1e38):
        out = metal(paged([p], window, junk=junk), window=window)[0]
        assert np.array_equal(bits_of(out), expected)
        for t in range(T):  # what rows t and earlier do not see; and what later rows do not
            late, early = (p._replace(k=p.k.copy(), v=p.v.copy()) for _ in range(2))
            for a, b in zip(late[1:], early[1:], strict=True):
                a[:, length + t + 1 :] = junk
                b[:, : length + t - window + 1] = junk
            out = bits_of(metal(paged([late], window), window=window)[0])
            assert np.array_equal(out[: t + 1], expected[: t + 1])
            out = bits_of(metal(paged([early], window), window=window)[0])
            assert np.array_equal(out[t:], expected[t:])


def test_extreme_scores_and_nan():
    p = piece(15, 3, 590, 2, 1, 64)
    call = paged([p._replace(q=40 * p.q)])
    assert np.array_equal(bits_of(metal(call)[0]), bits_of(block_attention(*call)))
    spoilt = p._replace(v=p.v.copy())
    spoilt.v[:, 100] = np.nan
    assert np.isnan(np.array(metal(paged([spoilt]))[0])).all()
    spoilt = p._replace(k=p.k.copy())
    spoilt.k[:, 591] = np.nan  # row 1 on
    out = np.array(metal(paged([spoilt]))[0])
    assert np.isfinite(out[0]).all() and np.isnan(out[1:]).all()


# Rows and lengths of pieces, H, K, D, window, dtype
CHECKED = {
    "window": ([(5, 1000)], 6, 2, 144, 100, mx.bfloat16),
    "spans": ([(3, 650)], 2, 1, 16, None, mx.bfloat16),
    "tiles": ([(5, 70), (1, 3)], 16, 1, 16, None, mx.bfloat16),
    "two": ([(2, 530), (2, 100)], 3, 1, 80, 130, mx.float32),
    "slices": ([(19, 300), (3, 20)], 2, 1, 16, 40, mx.float32),
}


def only_between(report: Any) -> bool:
    """Only spans that nobody needs stay unwritten."""
    return all(f.kind == "unwritten-output" and f.buffer in BETWEEN for f in report.findings)


@pytest.mark.parametrize("name", CHECKED)
def test_no_fault(name):
    """In every order of lanes, which change no bit."""
    shapes, *sizes, window, dtype = CHECKED[name]
    pieces = [piece(20 + i, *shape, *sizes) for i, shape in enumerate(shapes)]
    call = paged(pieces, window, dtype=dtype, room=1)
    options = {"scale": 0.3, "window": window}
    for order in ("forward", "reverse", "random"):
        out, report = metal(call, **options, mode="check", order=order, raising=False)
        assert only_between(report), "\n".join(map(str, report.findings))
        assert_right(out, call, **options)
        assert report.threadgroup_bytes <= 32768


@pytest.mark.parametrize(
    "length, window",
    [
        (62, None),
        (2000, 63),
        (-9, None),
        (-(2**31), 3),
        (2**30, 3),
        (2**31 - 1, 3),
        (-1, 2**31 - 1),
    ],
)
def test_wrong_positions_read_nothing(length, window):
    """Here three rows see two pages, and the table has one."""
    call = paged([piece(22, 3, 20, 2, 1, 16)], dtype=mx.bfloat16)
    call = call._replace(lengths=mx.array([length]))
    for mode in ("check", "count"):
        out, report = metal(call, window=window, mode=mode, raising=False)
        assert only_between(report)
        assert np.isnan(np.array(out.astype(mx.float32))).all()
        assert not any(
            report.traffic[n].read_bytes for n in ("keys", "values") if n in report.traffic
        )


@pytest.mark.parametrize("length", [0, 60, 128, 700, 2**30 - 3])
@pytest.mark.parametrize("window", [None, 2, 70])
def test_any_table_stays_in_bounds(length, window):
    """A piece that sees a page which there is not is NaN, and no other."""
    rng = np.random.default_rng(length % 1000)
    keys = mx.array(rng.normal(size=(3, 1, 64, 16)).astype(np.float32))
    q = mx.array(rng.normal(size=(8, 2, 16)).astype(np.float32))
    tables = rng.choice([0, 1, 2, 2, 1, 3, -1, 2**31 - 1, -(2**31)], (4, 3)).astype(np.int32)
    tables[0] = 0, 1, 2
    lengths = mx.array(np.array([length, 100, length, 63], np.int32))
    call = Paged(q, keys, keys, lengths, mx.array(tables), [3, 1, 3, 1])
    out, report = metal(call, window=window, mode="check", raising=False)
    assert only_between(report), "\n".join(map(str, report.findings))
    assert np.array_equal(bits_of(out), bits_of(block_attention(*call, window=window)))
    wrong = np.isnan(np.array(out)).any(axis=(1, 2))
    assert np.array_equal(wrong, np.repeat(pieces_that_miss_pages(call, window), call.counts))


def pieces_that_miss_pages(call: Paged, window: int | None) -> list[bool]:
    P, N = call.keys.shape[0], call.tables.shape[1]
    missing = []
    for length, table, T in zip(
        call.lengths.tolist(), call.tables.tolist(), call.counts, strict=True
    ):
        begin, end = seen_pages(length, T, window)
        pages = [table[j % N] for j in range(begin, min(end, begin + N))]
        missing.append(end - begin > N or not all(0 <= page < P for page in pages))
    return missing


def test_contraction_changes_nothing():
    call = paged([piece(23, 5, 1090, 4, 1, 80)])  # float32: a rounding would hide much
    plain, fused = (bits_of(metal(call, scale=0.3, contract=c)[0]) for c in ("off", "fast"))
    assert np.array_equal(plain, fused)


# H, K, D, length, window: 31B with an eighth and a half of its key heads, E2B as it is
GEOMETRIES = {
    "31b-sliding": (4, 2, 256, 1500, 1024),
    "31b-full": (16, 2, 512, 700, None),
    "e2b-sliding": (8, 1, 256, 900, 512),
    "e2b-full": (8, 1, 512, 700, None),
}


@pytest.mark.parametrize("shapes", [[1], [6], [6, 1]])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_every_visible_byte_is_read_once(name, shapes):
    H, K, D, length, window = GEOMETRIES[name]
    pieces = [piece(26, T, length + T, H, K, D) for T in shapes]
    call = paged(pieces, window, dtype=mx.bfloat16)
    _, report = metal(call, window=window, mode="count", allow={"unwritten-output"})
    seen = [T + (length + T if window is None else window - 1) for T in shapes]
    for entry in (report.traffic["keys"], report.traffic["values"]):
        assert entry.read_bytes == entry.device_read_bytes == sum(seen) * K * D * 2
        assert entry.read_lines * 64 == entry.read_bytes
    traffic = report.traffic
    assert report.launches == 3 and report.threadgroup_bytes <= 32768
    # Scores: whole chunks, once written, and read once for every 128 columns
    chunks = sum((n + 127) * T * H * 4 for n, T in zip(seen, shapes, strict=True))
    assert traffic["scores"].written_bytes <= chunks
    assert traffic["scores"].read_bytes <= chunks * (D // 128)
    spans = sum(
        T * ((length + 2 * T - 1) // 512 - (length + 2 * T - n) // 512 + 1)
        for n, T in zip(seen, shapes, strict=True)
    )
    assert traffic["sums"].written_bytes == spans * H * D * 4
    assert traffic["sums"].device_read_bytes <= spans * H * D * 4
    # Lengths and tables: no more than there are, in each launch
    assert traffic["lengths"].distinct_read_sectors <= 3
    assert traffic["tables"].distinct_read_sectors <= 3 * (call.tables.nbytes / 32 + 1)


def test_more_rows_read_again():
    """16 positions of eight heads: two tiles of 64 rows, two reads."""
    call = paged([piece(29, 16, 84, 8, 1, 128)], dtype=mx.bfloat16)
    _, report = metal(call, mode="count", allow={"unwritten-output"})
    for entry in (report.traffic["keys"], report.traffic["values"]):
        # The first tile's rows end at position 91
        assert entry.read_bytes == (92 + 100) * 128 * 2


def launches(counts: list[int], N: int, H: int, K: int, **options: Any) -> list[Any]:
    q = mx.zeros((sum(counts), H, 512), mx.bfloat16)
    keys = mx.zeros((1, K, 64, 512), mx.bfloat16)
    Q = len(counts)
    tables, lengths = mx.zeros((Q, N), mx.int32), mx.zeros(Q, mx.int32)
    return launches_of(block_attention(q, keys, keys, lengths, tables, counts, **options))


def test_launches_are_data():
    scores, values, fold = launches([20], 47, 32, 4)
    assert [a.kernel for a in (scores, values, fold)] == [
        f"block_attention_{stage}_bfloat16" for stage in ("scores", "values", "fold")
    ]
    # 6 spans; two items, the larger of 128 rows in two tiles of 64
    assert (tuple(scores.grid), tuple(scores.threadgroup)) == ((6 * 16, 4, 4), (512, 1, 1))
    assert (tuple(values.grid), tuple(values.threadgroup)) == ((6 * 4, 4, 4), (256, 1, 1))
    assert (tuple(fold.grid), tuple(fold.threadgroup)) == ((128, 4, 2), (128, 1, 1))
    # 6 positions of a window of 1024: 1029 may touch four spans; 12 rows meet 64 keys
    one = launches([6], 32, 8, 4, window=1024)
    # A thread starts two loads of a tile: 76 rows and keys have 608
    assert tuple(one[0].grid) == (4 * 8, 4, 1) and tuple(one[0].threadgroup) == (320, 1, 1)
    assert tuple(one[1].grid) == (4 * 4, 4, 1) and tuple(one[1].threadgroup) == (128, 1, 1)
    assert launches([6], 32, 8, 4, window=1020)[0].grid[0] == 3 * 8
    assert launches([6], 9, 8, 4, window=2**31 - 1)[0].grid[0] == 2 * 8  # as of 9 pages
    few = launches([1], 47, 8, 4)  # 2 rows: most threads only load
    assert [tuple(a.threadgroup) for a in few] == [(288, 1, 1), (128, 1, 1), (128, 1, 1)]
    # No more launches for more pieces
    many = launches([6, 6, 1, 20], 32, 8, 4, window=1024)
    assert [a.grid[2] for a in many] == [5, 5, 5] and many[0].grid[:2] == [4 * 16, 4]
    # What eval_gpu and the op hand over, in this order
    read, written = _ext.launch_arguments(one)
    assert [b.name for b in read] == ["q", "keys", "lengths", "tables", "values"]
    assert [b.name for b in written] == ["out"]


def test_constants_fit_a_launch():
    """Metal takes 4096 bytes of them at most."""
    for launch in launches(128 * [1], 4, 8, 4):
        assert all(len(b.data) <= 4096 for b in launch.buffers if b.role == "bytes")
        assert launch.grid[2] == 128


def test_the_switch_runs_it(monkeypatch):
    ran = []
    run = ops.workbench.run
    monkeypatch.setattr(ops.workbench, "run", lambda *a: ran.append(len(a[0])) or run(*a))
    p = piece(33, 130, 5, 2, 1, 16)
    call = paged([p.part(0, 3), p.part(0, 40)], 70)
    strided = mx.contiguous(call.keys.swapaxes(2, 3)).swapaxes(2, 3)
    calls = [
        (call, 70, 3),
        (call._replace(keys=strided), 70, 3),
        (paged([p.part(0, 128)]), None, 3),
        (paged([p]), None, 0),  # prefill
        (call._replace(tables=mx.zeros((2, 0), mx.int32)), None, 0),
    ]
    expected = [bits_of(block_attention(*call, window=window)) for call, window, _ in calls]
    ops.use("workbench")
    try:
        for (call, window, number), right in zip(calls, expected, strict=True):
            ran.clear()
            out = bits_of(block_attention(*call, window=window))
            assert sum(ran) == number and np.array_equal(out, right)
    finally:
        ops.use("native")
