"""move_rows: kernel against reference and by hand, pages there are not, aliasing, errors."""

import mlx.core as mx
import numpy as np
import pytest
from draw import INT32, Call, Draw, exact
from test_copy_pages import address, bits, fresh, int32

from pyengine import _ext, ops
from pyengine.ops import move_rows

DTYPES = [mx.float32, mx.float16, mx.bfloat16]


def by_hand(arena, lengths, tables, rows, kept) -> np.ndarray:
    """Bits of the arena afterwards, by the docstring."""
    after, (P, N) = bits(arena).copy(), (arena.shape[0], len(tables[0]))
    for length, table, line, count in zip(lengths, tables, rows, kept, strict=True):
        for j, row in list(enumerate(line))[: max(count, 0)]:
            ends = []
            for position in (length + row, length + j):
                page = table[position // 64 % N]
                valid = length >= 0 and row >= 0 and position < 2**30 and 0 <= page < P
                ends.append((page, position % 64) if valid else None)
            if None not in ends:
                (source, old), (target, new) = ends
                after[target, :, new] = after[source, :, old]
    return after


def using(implementation, keys, values, *where):
    ops.use(implementation)
    try:
        out = move_rows(keys, values, *(int32(a) for a in where))
        mx.eval(out)
    finally:
        ops.use("native")
    return out


def random_paths(rng, Q: int, A: int) -> list[list[int]]:
    return [sorted(rng.choice(40, A, replace=False).tolist()) for _ in range(Q)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (2, 34), (3, 256)])
@pytest.mark.parametrize("implementation", ["native", "reference", "workbench"])
def test_rows_by_hand(shape, dtype, implementation):
    """Across ends of pages and of tables, some of each path, and none."""
    rng = np.random.default_rng(3)
    for lengths in ([0, 40, 62], [63, 126, 1000]):
        keys, values = fresh(7, shape[0], 64, shape[1], dtype=dtype), None
        values = keys + 1
        mx.eval(values)
        tables = rng.permutation(6).reshape(3, 2).tolist()
        rows, kept = random_paths(rng, 3, 9), [9, 4, 0]
        where = lengths, tables, rows, kept
        want = [by_hand(a, *where) for a in (keys, values)]
        before = bits(keys).copy()
        out = using(implementation, keys, values, *where)
        for got, expected in zip(out, want, strict=True):
            assert got.dtype == dtype and np.array_equal(bits(got), expected)
        assert not np.array_equal(want[0], before)


@pytest.mark.parametrize("implementation", ["native", "reference", "workbench"])
def test_a_chain_stays(implementation):
    keys = fresh(2, 1, 64, 4)
    before = bits(keys).copy()
    out = using(implementation, keys, keys + 0, [50], [[1, 0]], [list(range(16))], [16])
    assert all(np.array_equal(bits(a), before) for a in out)


@pytest.mark.parametrize("implementation", ["native", "reference", "workbench"])
def test_what_there_is_not_is_left_out(implementation):
    """Whatever the device says: no byte of another's, and the rest is moved."""
    keys = fresh(4, 2, 64, 4)
    values = keys * 2
    mx.eval(values)
    far = 2**30 - 3
    lengths = [*INT32, far, 20, 0, 60]
    Q = len(lengths)
    tables = [[3, 3] for _ in range(Q)]
    tables[-1], tables[-2], tables[-3] = [1, 9], [-1, 2], [0, 2]
    rows = [[5, 6, 7, 8] for _ in range(Q)]
    rows[-1] = [1, 3, 4, 5]  # of 60: 64 and 65 are in no page
    rows[-3] = [2**31 - 1, -1, -(2**31), 7]
    kept = [4] * (Q - 3) + [4, 2**31 - 1, 4]
    where = lengths, tables, rows, kept
    want = [by_hand(a, *where) for a in (keys, values)]
    assert np.array_equal(want[0][0, :, 23], bits(keys)[0, :, 27])
    out = using(implementation, keys, values, *where)
    for got, expected in zip(out, want, strict=True):
        assert np.array_equal(bits(got), expected)


def test_writes_in_place_while_older_handles_live():
    keys, values = fresh(4, 2, 64, 16), fresh(4, 2, 64, 16)
    where, handles = address(keys), [keys]
    for step in range(50):
        at = int32([step % 40]), int32([[2, 1]]), int32([[1, 2, 5]]), int32([3])
        read = handles[-1].sum()  # still queued when the next write is built
        keys, values = move_rows(handles[-1], values, *at)
        handles.append(keys)
        if step % 10 == 0:
            mx.eval(read, keys, values)
    assert address(handles[-1]) == where
    assert all(mx.array_equal(handle, handles[-1]) for handle in handles)


@pytest.mark.parametrize("shape", [(0, 2, 64, 4), (3, 0, 64, 4), (3, 2, 64, 0)])
@pytest.mark.parametrize("implementation", ["native", "mlx", "reference", "workbench"])
def test_arenas_of_nothing(shape, implementation):
    arena = mx.zeros(shape)
    out = using(implementation, arena, arena, [0], [[0]], [[1, 2]], [2])
    assert [a.shape for a in out] == [shape, shape]
    arena = mx.ones((2, 1, 64, 2))
    for tables, rows in (([[]], [[1]]), ([[0]], [[]])):
        out = using(implementation, arena, arena, [0], tables, rows, [1])
        assert all(mx.array_equal(a, arena) for a in out)


@pytest.mark.parametrize("name", ["keys", "values"])
def test_refuses_a_strided_arena(name):
    given = {"keys": mx.zeros((2, 1, 64, 4)), "values": mx.zeros((2, 1, 64, 4))}
    given[name] = mx.zeros((4, 1, 64, 4))[::2]
    where = int32([0]), int32([[0]]), int32([[1]]), int32([1])
    with pytest.raises(RuntimeError, match=r"\[move_rows\] keys and values must be contiguous but"):
        mx.eval(move_rows(given["keys"], given["values"], *where))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"keys": mx.zeros((2, 1, 64, 2), mx.uint8)}, r"keys must be float32, .* got uint8\."),
        ({"keys": mx.zeros((1, 64, 2))}, r"keys must have shape \[P, K, 64, D\] .* \[1, 64, 2\]"),
        ({"keys": mx.zeros((2, 1, 64, 3))}, r"D must be even but got 3\."),
        ({"values": mx.zeros((3, 1, 64, 2))}, r"values must have shape \[2, 1, 64, 2\] but got .*"),
        ({"values": mx.zeros((2, 1, 64, 2), mx.float16)}, r"values must have the dtype of keys .*"),
        ({"rows": mx.zeros(2, mx.int32)}, r"rows must have shape \[Q, A\] but got \[2\]\."),
        ({"rows": mx.zeros((1, 2))}, r"rows must be int32 but got float32\."),
        ({"lengths": mx.array([1, 2])}, r"lengths must have shape \[1\] but got \[2\]\."),
        ({"lengths": mx.zeros(1)}, r"lengths must be int32 but got float32\."),
        ({"tables": mx.array([1])}, r"tables must have shape \[Q, N\] but got \[1\]\."),
        ({"tables": mx.zeros((2, 1), mx.int32)}, r"tables must have shape \[1, 1\] .*"),
        ({"kept": mx.array(1)}, r"kept must have shape \[1\] but got \[\]\."),
        ({"kept": mx.zeros(1, mx.uint32)}, r"kept must be int32 but got uint32\."),
    ],
)
@pytest.mark.parametrize("implementation", ["native", "reference"])
def test_what_is_refused(changes, message, implementation):
    given = {"keys": mx.zeros((2, 1, 64, 2)), "values": mx.zeros((2, 1, 64, 2))}
    given |= {"lengths": mx.array([3]), "tables": mx.array([[0, 1]])}
    given |= {"rows": mx.array([[0, 2]]), "kept": mx.array([2])}
    ops.use(implementation)
    try:
        with pytest.raises(ValueError, match=r"^\[move_rows\] " + message):
            move_rows(**given | changes)
    finally:
        ops.use("native")


def test_a_gpu_moves_4_bytes_a_thread_of_any_dtype():
    for dtype, words in ((mx.float32, 6), (mx.bfloat16, 3)):
        arena = mx.zeros((5, 2, 64, 6), dtype)
        where = int32([1, 2]), int32([[0], [1]]), int32([[0, 3], [0, 2]]), int32([2, 2])
        out = move_rows(arena, arena, *where)
        (launch,), _ = _ext.launches_of(list(out))
        assert launch.kernel == "move_rows" and launch.grid == [1, 2, 1]
        buffers = {b.name: b for b in launch.buffers}
        assert buffers["keys"].role == "inout" and buffers["keys"].alignment == 4
        assert int.from_bytes(buffers["words"].data, "little") == words


def random_call(d: Draw) -> Call:
    """No two sequences have a page in common."""
    P, K, D, dtype = d.size(1, 2, 9), d.size(1, 2), d.size(2, 6, 16, 16, 3), d.dtype()
    Q, N, A = d.size(1, 2, 4), d.size(1, 2, 3), d.size(1, 3, 16)
    keys, values = (d.cache(P, K, 64, D, dtype=dtype) for _ in range(2))
    pages = np.append(d.rng.permutation(P), np.full(max(Q * N - P, 0), -1))
    tables = pages[: Q * N].reshape(Q, N)
    if d.chance(0.3):
        wrong = d.rng.choice([*INT32, P, -P], (Q, N))
        tables = np.where(d.rng.random((Q, N)) < 0.3, wrong, tables)
    rows = np.sort(d.rng.integers(0, 40, (Q, A)), axis=1)
    if d.chance(0.3):
        rows = np.where(d.rng.random((Q, A)) < 0.3, d.rng.choice(INT32, (Q, A)), rows)
    kept = d.rng.integers(-1, A + 2, Q)
    lengths = [d.offset(64 * N) for _ in range(Q)]
    where = (d.laid_out(int32(a)) for a in (lengths, tables, rows))
    return Call((keys, values, *where, int32(kept)), {}, exact, written=(0, 1))


LIMITS = {}  # the Metal kernel takes every call

# What bench/bench_move_rows.py has to say that its SMALL call moves: keys and values of 3 rows of 2
# heads of 512 bytes, in and out; of two sequences a length, a count, 4 rows and an entry of a table
BENCH_BYTES = 2 * 2 * 3 * 2 * 512 + 4 * (2 + 2 + 2 * 4 + 2)
