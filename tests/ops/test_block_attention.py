"""block_attention: kernel against reference, pages, windows, row-stability, errors.

All calls have NaN where no row of a piece sees: in free pages, beyond lengths, before windows.
"""

import threading
from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np
import pytest
from draw import Call, Draw, near_sum
from pieces import Paged, Piece, paged, piece, random_pieces

from pyengine import _ext
from pyengine.model.memory import TILES_IN_FLIGHT
from pyengine.ops import block_attention, block_attention_reference, dispatch
from pyengine.ops.prepare_qkv import PAGE

# Outputs are means of values of size 1. Both sides work in float32 (sums of up to D products and of
# up to 1500 weights in different orders) and round once.
TOLERANCE = {mx.float32: 1e-5, mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}
DTYPES = list(TOLERANCE)


def bits(x: mx.array) -> np.ndarray:
    return np.array(mx.contiguous(x).view(mx.uint32 if x.dtype == mx.float32 else mx.uint16))


def assert_close(out: mx.array, expected: mx.array) -> None:
    assert out.dtype == expected.dtype and out.shape == expected.shape
    a, b = (np.array(x.astype(mx.float32)) for x in (out, expected))
    np.testing.assert_allclose(a, b, rtol=TOLERANCE[out.dtype], atol=TOLERANCE[out.dtype])


def assert_right(call: Paged, **options) -> None:
    assert_close(block_attention(*call, **options), block_attention_reference(*call, **options))


def alone(
    pieces: Sequence[Piece], window: int | None = None, *, dtype: mx.Dtype = mx.float32, **options
) -> np.ndarray:
    """The rows of each in a call and an arena of their own."""
    calls = [paged([p], window, dtype=dtype) for p in pieces]
    return np.concatenate([bits(block_attention(*c, window=window, **options)) for c in calls])


@pytest.fixture
def threads() -> Iterator[None]:
    before = _ext.threads()
    yield
    _ext.set_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seen", [1, 31, 32, 33, 63, 64, 65, 511, 512, 513, 1100])
def test_lengths(seen, dtype):
    """One position against `seen` keys, itself the last."""
    p = piece(1, 1, seen - 1, 4, 2, 32)
    assert_right(paged([p], dtype=dtype), scale=0.3)
    assert_right(paged([p], dtype=dtype, room=3), scale=0.3)


@pytest.mark.parametrize("G", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("T", [1, 2, 5, 15, 16, 17, 40])
def test_rows_and_groups(T, G):
    pieces = [piece(4, T, 90, 3 * G, 3, 16), piece(7, 2, 30, 3 * G, 3, 16)]
    for window in (None, 1, 2, 64, 70):
        assert_right(paged(pieces, window), window=window)


@pytest.mark.parametrize("D", [16, 32, 48, 80, 256, 512])
@pytest.mark.parametrize("dtype", DTYPES)
def test_head_widths(D, dtype):
    p = piece(7, 6, 190, 8, 2, D)
    assert_right(paged([p], dtype=dtype), scale=D**-0.5)
    assert_right(paged([p], 100, dtype=dtype), scale=D**-0.5, window=100)


@pytest.mark.parametrize("window", [1, 5, 33, 256])
def test_windows(window):
    """Positions past several windows, in tables as short as a piece of 5 allows."""
    for length in (0, 1, window - 1, window, 63, 64, 3 * window + 2, 10 * window + 7):
        p = piece(10, 5, length, 4, 2, 32)
        for room in (0, 1, 3):
            assert_right(paged([p], window, room=room), window=window)


def test_random_calls():
    rng = np.random.default_rng(13)
    for seed in range(25):
        K, G, Q = (int(rng.integers(1, n)) for n in (4, 9, 5))
        window = None if rng.random() < 0.4 else int(rng.integers(1, 200))
        pieces = random_pieces(rng, Q, 40, K, G, int(rng.choice([16, 32, 64])))
        call = paged(pieces, window, seed=seed, room=int(rng.integers(0, 9)))
        assert_right(call, scale=0.3, window=window)


def test_by_hand():
    """Window 2: equal scores, so each row is the mean of the newest two values."""
    k = np.random.default_rng(17).normal(size=(1, 68, 16)).astype(np.float32)
    v = np.arange(68, dtype=np.float32)[:, None] * np.ones((1, 68, 16), np.float32)
    late = Piece(np.zeros((3, 1, 16), np.float32), k, v)
    first = Piece(np.zeros((3, 1, 16), np.float32), k[:, :3], v[:, :3])
    out = block_attention(*paged([late, first], 2), window=2)
    assert out[:, 0, 0].tolist() == [64.5, 65.5, 66.5, 0, 0.5, 1.5]
    out = block_attention(*paged([first, late]))
    assert out[:3, 0, 0].tolist() == [0, 0.5, 1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 100])
def test_row_stable(window, dtype, threads):
    """Bits of a row: alone or in a piece of 40, in any pages, whoever shares the work."""
    T = 40
    p = piece(18, T, 600, 6, 2, 64)
    options = {"scale": 0.2, "window": window}
    whole = bits(block_attention(*paged([p], window, dtype=dtype), **options))
    for t in range(T):
        row = block_attention(*paged([p.part(t, t + 1)], window, dtype=dtype), **options)
        assert np.array_equal(bits(row)[0], whole[t]), t
    for begin, end in ((3, 5), (7, 23), (20, 39)):
        some = block_attention(*paged([p.part(begin, end)], window, dtype=dtype), **options)
        assert np.array_equal(bits(some), whole[begin:end])
    for count in (1, 2, 3, 5):
        _ext.set_threads(count)
        call = paged([p], window, dtype=dtype, seed=count, spare=count, room=count % 3)
        assert np.array_equal(bits(block_attention(*call, **options)), whole)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 1, 65, 400])
def test_pieces_are_calls_of_their_own(window, dtype, threads):
    """Ragged rows, random pages, tables that are too long: bit for bit what each piece gives."""
    rng = np.random.default_rng(window or 0)
    for count in range(1, 9):
        _ext.set_threads(count)
        pieces = random_pieces(rng, int(rng.integers(2, 9)), 40, 2, int(rng.integers(1, 4)), 32)
        want = alone(pieces, window, dtype=dtype, scale=0.3)
        room = int(rng.integers(0, 7))
        call = paged(pieces, window, dtype=dtype, seed=count, room=room)
        out = block_attention(*call, scale=0.3, window=window)
        assert np.array_equal(bits(out), want)


def test_pieces_share_pages():
    """Three sequences that begin alike, whose first pages are one sequence's."""
    T, common, K, D = 3, 2 * PAGE, 2, 16
    first = piece(20, T, 300, 4, K, D)
    pieces = [first]
    for seed in (30, 40):
        other = piece(seed, T, 150 + seed, 4, K, D)
        k, v = (
            np.concatenate([a[:, :common], b[:, common:]], 1)
            for a, b in ((first.k, other.k), (first.v, other.v))
        )
        pieces.append(other._replace(k=k, v=v))
    call = paged(pieces)
    tables = np.array(call.tables)
    tables[1:, :2] = tables[0, :2]
    out = block_attention(*call._replace(tables=mx.array(tables)))
    assert np.array_equal(bits(out), alone(pieces))


@pytest.mark.parametrize("window", [None, 90])
def test_what_nobody_sees_may_be_anything(window):
    pieces = [piece(50 + T, T, length, 4, 2, 32) for T, length in ((3, 200), (17, 63), (1, 64))]
    want = bits(block_attention(*paged(pieces, window), window=window))
    for junk in (float("inf"), -float("inf"), 1e30, 0.0):
        out = block_attention(*paged(pieces, window, junk=junk), window=window)
        assert np.array_equal(bits(out), want)


def test_a_piece_of_nan_leaves_the_others_alone():
    """Other sequences' keys and values, and later rows' own, change no bit of a row."""
    pieces = [piece(60 + T, T, length, 2, 1, 32) for T, length in ((8, 60), (20, 130), (2, 5))]
    want = bits(block_attention(*paged(pieces)))
    spoilt = pieces[1]._replace(k=pieces[1].k * np.nan, v=pieces[1].v * np.nan)
    out = bits(block_attention(*paged([pieces[0], spoilt, pieces[2]])))
    assert np.array_equal(out[:8], want[:8]) and np.array_equal(out[28:], want[28:])
    for junk in (float("nan"), float("inf"), 1e30):
        k, v = (a.copy() for a in (pieces[0].k, pieces[0].v))
        k[:, 63:], v[:, 63:] = junk, junk
        late = pieces[0]._replace(k=k, v=v)
        out = bits(block_attention(*paged([late, *pieces[1:]])))
        assert np.array_equal(out[:3], want[:3]) and np.array_equal(out[8:], want[8:])


@pytest.mark.parametrize("instruction_set", _ext.instruction_sets())
def test_instruction_sets(instruction_set):
    call = paged([piece(24, 9, 290, 4, 1, 80)])
    before = _ext.instruction_set()
    _ext.use_instruction_set(instruction_set)
    try:
        out = block_attention(*call, scale=0.1)
        assert_close(out, block_attention_reference(*call, scale=0.1))
    finally:
        _ext.use_instruction_set(before)
    if instruction_set != "portable" and before != "portable":
        assert np.array_equal(bits(out), bits(block_attention(*call, scale=0.1)))


@pytest.mark.parametrize("others", [0, 3])
def test_one_long_sequence(others, threads):
    """One head, alone and among short sequences: threads share its spans, and the bits stay."""
    pieces = [piece(27, 2, 8990, 8, 1, 64), *(piece(i, 2, 40 * i, 8, 1, 64) for i in range(others))]
    call = paged(pieces[::-1])
    _ext.set_threads(1)
    want = block_attention(*call, scale=0.2)
    mx.eval(want)
    for count in (2, 3, 7):
        _ext.set_threads(count)
        assert np.array_equal(bits(block_attention(*call, scale=0.2)), bits(want))
    assert_close(want, block_attention_reference(*call, scale=0.2))


def test_extreme_scores():
    p = piece(30, 3, 190, 2, 1, 64)
    call = paged([p._replace(q=40 * p.q)])
    out, expected = (np.array(f(*call)) for f in (block_attention, block_attention_reference))
    # Scores near 1000: their own rounding, 3e-5, is the error of the weights
    np.testing.assert_allclose(out, expected, rtol=3e-4, atol=3e-4)
    p.v[:, 100:] = np.nan
    assert np.isnan(np.array(block_attention(*paged([p])))).all()


def test_strided():
    pieces = [piece(33, 6, 100, 4, 2, 32), piece(36, 5, 70, 4, 2, 32)]
    call = paged(pieces, 20, dtype=mx.bfloat16)
    want = bits(block_attention(*call, window=20))

    def doubled(a: mx.array, axis: int) -> mx.array:
        wide = mx.contiguous(mx.repeat(a, 2, axis=axis))
        mx.eval(wide)
        return wide[(*(slice(None),) * axis, slice(None, None, 2))]

    def turned(a: mx.array) -> mx.array:
        moved = mx.contiguous(a.swapaxes(1, 2))
        mx.eval(moved)
        return moved.swapaxes(1, 2)

    for axis in range(4):
        strided = call._replace(
            q=doubled(call.q, axis % 3),
            keys=doubled(call.keys, axis),
            values=turned(call.values),
            lengths=doubled(call.lengths, 0),
            tables=doubled(call.tables, axis % 2),
        )
        assert np.array_equal(bits(block_attention(*strided, window=20)), want)


def test_two_threads(threads):
    _ext.set_threads(2)
    call = paged([piece(36, 16, 680, 8, 4, 64), piece(39, 3, 100, 8, 4, 64)])
    expected, found = bits(block_attention(*call)), {}

    def run(name: int) -> None:
        with mx.stream(mx.new_stream(mx.cpu)):
            found[name] = [bits(block_attention(*call)) for _ in range(8)]

    workers = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(np.array_equal(out, expected) for i in range(2) for out in found[i])


@pytest.mark.parametrize("f", [block_attention, block_attention_reference])
def test_nothing_to_see(f):
    """No rows; an arena or tables of no pages."""
    call = paged([piece(39, 4, 9, 2, 1, 16)])
    for empty in (call._replace(tables=mx.zeros((1, 0), mx.int32)), no_pages(call)):
        assert np.isnan(np.array(f(*empty))).all()
    none = [mx.zeros((0, *a.shape[1:]), a.dtype) for a in (call.q, call.lengths, call.tables)]
    assert f(none[0], call.keys, call.values, *none[1:], []).shape == (0, 2, 16)


def no_pages(call: Paged) -> Paged:
    return call._replace(keys=call.keys[:0], values=call.values[:0])


def test_errors():
    call = paged([piece(40, 3, 6, 4, 2, 32), piece(43, 2, 3, 4, 2, 32)])

    def refused(pattern, window=None, **changed):
        with pytest.raises(ValueError, match=r"\[block_attention\] " + pattern):
            block_attention(*call._replace(**changed), window=window)

    q, k, lengths, tables = call.q, call.keys, call.lengths, call.tables
    refused(r"q must be .* but got int32\.", q=q.astype(mx.int32))
    refused(r"q must have .* \[R, H, D\] but got \[1, 5, 4, 32\]\.", q=q[None])
    refused(r"keys must have .* but got \[2, 64, 32\]\.", keys=k[0])
    refused(r"keys must have .* but got \[4, 2, 64, 16\]\.", keys=k[..., :16])
    refused(r"keys must have shape \[4, 2, 64, 32\] .* \[4, 2, 63, 32\]\.", keys=k[:, :, :63])
    refused(r"values must have .* but got \[3, 2, 64, 32\]\.", values=k[:3])
    refused(r"keys must have the dtype .* but got float16\.", keys=k.astype(mx.float16))
    refused(r"values must have the dtype .* but got bfloat16\.", values=k.astype(mx.bfloat16))
    refused(r"D must be .* at most 512 but got 24\.", q=q[..., :24], keys=k[..., :24])
    refused(r"D must be .* at most 512 but got 528\.", q=mx.zeros((5, 4, 528)))
    refused(r"H must be a multiple of K 2 but got 3\.", q=q[:, :3])
    refused(r"lengths must have shape \[2\] but got \[1\]\.", lengths=lengths[:1])
    refused(r"lengths must be int32 but got float32\.", lengths=lengths.astype(mx.float32))
    refused(r"tables must have shape \[Q, N\] but got \[1\]\.", tables=tables[0])
    refused(r"tables must have shape \[2, 1\] but got \[1, 1\]\.", tables=tables[:1])
    refused(r"tables must be int32 but got uint32\.", tables=tables.astype(mx.uint32))
    refused(r"counts must be R 5 together but got \[3, 3\]\.", counts=[3, 3])
    refused(r"counts must be at least 1 each but got \[5, 0\]\.", counts=[5, 0])
    refused(r"counts must be at least 1 each but got \[6, -1\]\.", counts=[6, -1])
    refused(r"counts must be R 5 together but got \[2147483647, 1\]\.", counts=[2**40, 1])
    refused(r"lengths must have shape \[1\] but got \[2\]\.", counts=[5])
    refused(r"window must be at least 1 and below 2\*\*31 but got 0\.", window=0)
    refused(r"window must be at least 1 and below 2\*\*31 but got 2147483648\.", window=2**31)


# As a GPU runs long pieces, forced here: rows, length, window, entries more than needed
LONG = [
    (512, 1024, None, 0),  # a chunk over tiles that end at 512, 1024, 1536
    (512, 1024, None, 8),  # and with a tile that nobody sees
    (512, 1024, 256, 3),  # a chunk and the window before it
    (512, 0, 256, 0),  # before which there is nothing
    (300, 350, 100, 5),
    (129, 0, None, 0),
]


@pytest.mark.parametrize("case", LONG)
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_pieces_by_tiles(case, dtype, monkeypatch):
    T, length, window, room = case
    call = paged([piece(3, T, length, 4, 2, 64)], window, dtype=dtype, room=room)
    expected = block_attention(*call, scale=0.3, window=window)
    monkeypatch.setattr(dispatch, "_gpu_rules", True)
    out = block_attention(*call, scale=0.3, window=window)
    assert not np.array_equal(bits(out), bits(expected))
    assert_close(out, expected)


@pytest.mark.parametrize("window", [None, 90])
def test_many_rows_of_short_and_long_pieces(window, monkeypatch):
    """Past 128 rows together, each by what its own width is for."""
    pieces = [piece(i, T, 40 * i, 4, 2, 32) for i, T in enumerate((100, 5, 130, 1))]
    call = paged(pieces, window)
    expected = block_attention(*call, window=window)
    monkeypatch.setattr(dispatch, "_gpu_rules", True)
    assert_close(block_attention(*call, window=window), expected)


def test_128_rows_are_the_kernels_on_a_gpu_too(monkeypatch):
    """Decoding after a prompt, and the end of a prompt, run nothing of MLX's."""
    p = piece(1, 129, 171, 4, 2, 32)
    expected = bits(block_attention(*paged([p])))
    monkeypatch.setattr(dispatch, "_gpu_rules", True)
    for T in (1, 16, 128):
        out = block_attention(*paged([p.part(0, T)]))
        assert np.array_equal(bits(out), expected[:T])
    halves = block_attention(*paged([p.part(0, 64), p.part(64, 128)]))
    assert np.array_equal(bits(halves), expected[:128])
    assert not np.array_equal(bits(block_attention(*paged([p]))), expected)


def test_long_pieces_keep_a_tile_of_scores(monkeypatch):
    """Peak memory does not go with the number of keys, and is what model/memory.py counts."""
    monkeypatch.setattr(dispatch, "_gpu_rules", True)
    q, peaks = mx.random.normal((130, 4, 256)), []
    for N in (64, 128):
        keys = mx.random.normal((N, 2, PAGE, 256))
        tables, lengths = mx.arange(N, dtype=mx.int32)[None], mx.array([64 * N - 130])
        mx.eval(q, keys, tables)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(block_attention(q, keys, keys, lengths, tables, [130]))
        peaks.append(mx.get_peak_memory() - before)
    tile = 4 * (4 * 130 * (512 + 256) + 2 * 512 * 256)
    # Twice the keys; MLX may run a little further ahead of its results
    assert peaks[1] < 1.3 * peaks[0] and peaks[1] < 1.1 * TILES_IN_FLIGHT * tile


def test_a_longer_table_changes_no_tile(monkeypatch):
    """Whole tiles of nothing more leave a long piece's bits."""
    monkeypatch.setattr(dispatch, "_gpu_rules", True)
    p = piece(1, 512, 1024, 2, 1, 32)
    want = bits(block_attention(*paged([p])))
    for room in (8, 40):
        assert np.array_equal(bits(block_attention(*paged([p], room=room))), want)


def random_call(d: Draw) -> Call:
    K, G, Q, N, P = d.size(1, 2), d.size(1, 2, 5), d.size(1, 2, 4), d.size(1, 3, 4, 9), d.size(1, 7)
    counts = [d.integer(1, 2, 5, 17, 40) if d.chance(0.9) else 1 for _ in range(Q)]
    are_few = all(1 <= c <= 40 for c in counts)
    rows = sum(counts) if are_few else 3
    D, dtype = d.size(16, 32, 80, 256, 512, 24), d.dtype()
    H = K * G if d.chance(0.97) else K * G + 1
    q = d.array(rows, H, D, dtype=dtype)
    keys, values = (d.array(P, K, PAGE, D, dtype=dtype) for _ in range(2))
    window = None if d.chance(0.5) else d.integer(1, 3, 64, 130, 512)
    fitting = N * PAGE - 40 if window is None or window > N * PAGE - 104 else 10 * N * PAGE
    lengths = mx.array(np.array([d.offset(max(fitting, 0)) for _ in range(Q)], np.int32))
    tables = d.ids((Q, N), P)
    options = {"scale": d.pick((0.0, 0.1, -1.0)), "window": window}
    if d.chance(0.3) and are_few:
        A = d.size(1, 3, 16)
        if d.chance(0.9):
            counts = [min(count, 16) for count in counts]
            q = d.array(sum(counts), H, D, dtype=dtype)
        options |= {"depths": d.ids((sum(counts),), 2), "ancestors": d.ids((sum(counts), A), 2)}
    return Call((q, keys, values, d.laid_out(lengths), tables, counts), options, near_sum)


def rows_of_one_piece(n: int) -> mx.array:
    keys = mx.zeros((1, n, PAGE, 16))
    table = mx.zeros((1, 4), mx.int32)
    return block_attention(mx.zeros((n, n, 16)), keys, keys, mx.array([0]), table, [n])


def pieces_of_one_row(n: int) -> mx.array:
    keys, tables = mx.zeros((1, 1, PAGE, 16)), mx.zeros((n, 1), mx.int32)
    lengths = mx.zeros(n, mx.int32)
    return block_attention(mx.zeros((n, 1, 16)), keys, keys, lengths, tables, n * [1])


# The largest calls of a kind that the Metal kernel takes
LIMITS = {"rows": (128, rows_of_one_piece), "pieces": (128, pieces_of_one_row)}

# What bench/bench_block_attention.py has to say that its SMALL call moves: keys and values of four
# sequences' 260 places of 256, queries and results of 4 * 5 * 4; four lengths, tables of 5 pages
BENCH_BYTES = 4 * (2 * 260 * 512 + 2 * 20 * 512 + 4 + 4 * 5)
