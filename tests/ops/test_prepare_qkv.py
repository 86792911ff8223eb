"""prepare_qkv: the bits of the ops it stands for, pages by hand, ragged calls against single ones,
what stays untouched, aliasing, errors."""

from itertools import accumulate

import mlx.core as mx
import numpy as np
import pytest
from draw import INT32, Call, Draw, near_sum
from test_copy_pages import address, fresh, int32, poisoned
from test_norm_rope import (
    assert_close,
    bits,
    frequencies,
    fused,
    normal,
    proportional,
    sliding,
    turns_alike,
)

from pyengine import _ext, ops
from pyengine.ops import prepare_qkv, prepare_qkv_reference

DTYPES = [mx.float32, mx.float16, mx.bfloat16]
PAGE = 64
EDGES = (0, 1, 62, 63, 64, 65, 127, 128, 511, 512, 513, 1000)
# Lengths of sequences before the call, and rows of each in it
PIECES = [
    ([0], [1]),
    ([63], [2]),
    ([60, 0, 64], [5, 1, 3]),
    ([513, 511, 5, 0], [4, 1, 1, 40]),
]
SHAPES = [(2, 1, 32), (4, 2, 64), (1, 1, 6), (8, 4, 512), (3, 3, 16)]  # H, K, D


def pages_needed(length: int, count: int, window: int | None) -> range:
    """Pages of a sequence that its rows of this call write, or see."""
    first = 0 if window is None else max(0, length - (window - 1))
    return range(first // PAGE, (length + count - 1) // PAGE + 1)


def paged(
    lengths: list[int],
    counts: list[int],
    *,
    window: int | None = None,
    spare: int = 3,
    seed: int = 0,
    N: int | None = None,
) -> tuple[dict[str, mx.array], int]:
    """Positions, owners and tables of a call, and how many pages there are: each page is one
    sequence's, their order is random, some are nobody's. What a table does not need is -1."""
    needed = [pages_needed(n, T, window) for n, T in zip(lengths, counts, strict=True)]
    N = N or 1 << (max(len(own) for own in needed) - 1).bit_length()
    P = sum(len(own) for own in needed) + spare
    order = iter(np.random.default_rng(seed).permutation(P))
    tables = np.full((len(lengths), N), -1)
    for s, own in enumerate(needed):
        for j in own:
            tables[s, j % N] = next(order)
    positions = [n + t for n, T in zip(lengths, counts, strict=True) for t in range(T)]
    owners = np.repeat(np.arange(len(counts)), counts)
    given = {"positions": positions, "owners": owners, "tables": tables}
    return {name: int32(a) for name, a in given.items()}, P


def arguments(
    lengths: list[int],
    counts: list[int],
    H: int,
    K: int,
    D: int,
    dtype: mx.Dtype = mx.float32,
    same: bool = False,
    poison: bool = False,
    **options: int | None,
) -> dict[str, mx.array]:
    R, (where, P) = sum(counts), paged(lengths, counts, **options)
    k = normal(2, R, K * D, dtype=dtype)
    arena = poisoned if poison else fresh
    return {
        "q": normal(1, R, H * D, dtype=dtype),
        "k": k,
        "v": k if same else normal(3, R, K * D, dtype=dtype),
        "q_norm": normal(4, D, dtype=dtype),
        "k_norm": normal(5, D, dtype=dtype),
        "inv_freq": sliding(D),
        "keys": arena(P, K, PAGE, D, dtype=dtype),
        "values": arena(P, K, PAGE, D, dtype=dtype),
        **where,
    }


def place(given: dict[str, mx.array], r: int) -> tuple[int, int] | None:
    """Page and place of row r by the docstring; None where there is none."""
    position, owner = given["positions"][r].item(), given["owners"][r].item()
    (Q, N), P = given["tables"].shape, given["keys"].shape[0]
    if position < 0 or not 0 <= owner < Q or not N:
        return None
    page = given["tables"][owner, position // 64 % N].item()
    return (page, position % 64) if 0 <= page < P else None


def composed(given: dict[str, mx.array]) -> list[np.ndarray]:
    """Bits of all results, of the separate ops and written down row by row."""
    R, D = given["q"].shape[0], given["q_norm"].size
    q, k, v = (given[name].reshape(R, -1, D) for name in "qkv")
    rest = given["positions"], given["inv_freq"]
    k, v = ops.norm_rope(k, given["k_norm"], *rest), ops.rms_norm(v, None, 1e-6)
    arenas = []
    for new, name in ((k, "keys"), (v, "values")):
        arena, rows = bits(given[name]).copy(), bits(new)
        for r in range(R):
            if at := place(given, r):
                arena[at[0], :, at[1]] = rows[r]
        arenas.append(arena)
    return [bits(ops.norm_rope(q, given["q_norm"], *rest)), *arenas]


def assert_bits(outs: tuple[mx.array, ...], want: list[np.ndarray]) -> None:
    for got, expected in zip(outs, want, strict=True):
        assert np.array_equal(bits(got), expected)


def using(implementation: str, given: dict[str, mx.array]) -> tuple[mx.array, ...]:
    ops.use(implementation)
    try:
        outs = prepare_qkv(**given)
        mx.eval(outs)
    finally:
        ops.use("native")
    return outs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("same", [False, True])
def test_bits_of_the_separate_ops_and_nothing_else_is_written(shape, dtype, same):
    """An arena of NaN keeps them in all other places and pages."""
    for lengths, counts in PIECES:
        for poison in (False, True):
            given = arguments(lengths, counts, *shape, dtype=dtype, same=same, poison=poison)
            want = composed(given)
            outs = prepare_qkv(**given)
            assert [a.dtype for a in outs] == 3 * [dtype]
            assert outs[0].shape == (sum(counts), shape[0], shape[2])
            assert_bits(outs, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape, dtype):
    for lengths, counts in PIECES:
        for inv_freq in (sliding(shape[-1]), proportional(shape[-1])):
            a, b = (
                arguments(lengths, counts, *shape, dtype=dtype) | {"inv_freq": inv_freq}
                for _ in "ab"
            )
            for got, want in zip(prepare_qkv(**a), prepare_qkv_reference(**b), strict=True):
                assert_close(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("implementation", ["native", "reference", "workbench"])
def test_values_as_they_are(dtype, implementation):
    """Without their norm: the very bits; queries and keys are as with it."""
    for shape in ((2, 1, 32), (4, 2, 64), (1, 1, 6)):
        given = arguments([60, 3], [6, 2], *shape, dtype=dtype)
        normed = [bits(a).copy() for a in using(implementation, given)]
        given = arguments([60, 3], [6, 2], *shape, dtype=dtype)
        want = bits(given["values"]).copy()
        rows = bits(given["v"].reshape(8, shape[1], shape[2]))
        for r in range(8):
            page, at = place(given, r)
            want[page, :, at] = rows[r]
        outs = using(implementation, given | {"norm_values": False})
        assert_bits(outs, [*normed[:2], want])
        assert not np.array_equal(normed[2], want)


def pieces(seed: int, Q: int, rows: int) -> tuple[list[int], list[int]]:
    rng = np.random.default_rng(seed)
    lengths = [int(rng.choice(EDGES)) for _ in range(Q)]
    return lengths, [int(rng.integers(1, rows + 1)) for _ in range(Q)]


def assert_rows_of_single_calls(
    given: dict[str, mx.array], counts: list[int], implementation: str = "native"
) -> None:
    """A ragged call, against one call per piece, and against one per row, on the same arenas."""
    before = {name: bits(given[name]).copy() for name in ("keys", "values")}
    dtype = given["q"].dtype
    ends = list(accumulate(counts))
    spans = [(end - T, end) for end, T in zip(ends, counts, strict=True)]
    kinds = [spans, [(r, r + 1) for r in range(ends[-1])]]
    whole = [bits(a) for a in using(implementation, given)]
    for parts in kinds:
        arenas = {
            name: mx.array(a).view(dtype) for name, a in before.items()
        }  # an arena of their own
        mx.eval(arenas)
        rows = []
        for begin, end in parts:
            own = {name: given[name][begin:end] for name in ("q", "k", "v", "positions", "owners")}
            q, keys, values = using(implementation, given | arenas | own)
            arenas = {"keys": keys, "values": values}
            rows.append(bits(q))
        assert np.array_equal(np.concatenate(rows), whole[0])
        for name, a in zip(("keys", "values"), whole[1:], strict=True):
            assert np.array_equal(bits(arenas[name]), a), name


@pytest.mark.parametrize("seed", range(12))
def test_ragged_is_single_calls(seed):
    lengths, counts = pieces(seed, 1 + seed % 6, 40)
    H, K, D = SHAPES[seed % len(SHAPES)]
    dtype = DTYPES[seed % 3]
    options = {"window": (None, 128, 512)[seed // 3 % 3], "seed": seed}
    given = arguments(lengths, counts, H, K, D, dtype=dtype, poison=True, **options)
    assert_rows_of_single_calls(given, counts)


@pytest.mark.parametrize("seed", range(3))
def test_ragged_is_single_calls_on_metal(seed):
    lengths, counts = pieces(20 + seed, 3, 3)
    given = arguments(lengths, counts, 2, 1, 34, dtype=DTYPES[seed], window=128, seed=seed)
    want = composed(given)
    assert_rows_of_single_calls(given, counts, "workbench")
    if fused("workbench"):
        assert_bits(using("workbench", given), want)


@pytest.mark.parametrize("implementation", ["reference", "workbench"])
def test_the_other_implementations_touch_nothing_else(implementation):
    lengths, counts = [63, 0, 130], [2, 1, 3]
    given = arguments(lengths, counts, 2, 2, 16, dtype=mx.bfloat16, poison=True)
    before = bits(given["keys"]).copy()
    at = {place(given, r) for r in range(sum(counts))}
    assert len(at) == 6 and None not in at
    for out in using(implementation, given)[1:]:
        changed = {tuple(x) for x in np.argwhere((bits(out) != before).any(axis=(1, 3)))}
        assert changed == at
    assert np.array_equal(bits(given["keys"]), before)  # as a copy


@pytest.mark.parametrize("threads", range(1, 9))
def test_threads_change_nothing(threads):
    """300 rows of 8 heads are work for several."""
    lengths, counts = [0, 500, 63], [200, 60, 40]
    given = arguments(lengths, counts, 4, 2, 64, dtype=mx.bfloat16, poison=True)
    want = composed(given)
    before = _ext.threads()
    _ext.set_threads(threads)
    try:
        assert_bits(prepare_qkv(**given), want)
    finally:
        _ext.set_threads(before)


def test_shared_pages_stay_as_they_are():
    """Two sequences that share what lies before position 64: each writes pages of its own."""
    lengths, counts = [70, 90], [3, 5]
    given = arguments(lengths, counts, 2, 1, 16, spare=0)
    tables = np.array(given["tables"])
    tables[1, 0] = tables[0, 0]
    given["tables"] = int32(tables)
    before = bits(given["keys"]).copy()
    want = composed(given)
    outs = prepare_qkv(**given)
    assert_bits(outs, want)
    shared = tables[0, 0]
    assert np.array_equal(bits(outs[1])[shared], before[shared])


def test_tables_are_rings_of_pages():
    """Position p is in entry p // 64 % N: of a window's pages N are enough."""
    given = arguments([64 * 1000 + 62], [3], 2, 1, 16, window=128)
    assert given["tables"].shape == (1, 4)
    pages = given["tables"][0].tolist()
    _, keys, _ = prepare_qkv(**given)
    old = bits(fresh(*given["keys"].shape))
    changed = np.argwhere((bits(keys) != old).any(axis=(1, 3))).tolist()
    assert pages[1000 % 4] != pages[1001 % 4]
    want = [[pages[0], 62], [pages[0], 63], [pages[1], 0]]
    assert sorted(changed) == sorted(want)


@pytest.mark.parametrize("implementation", ["native", "reference", "workbench"])
def test_rows_without_a_place_are_written_nowhere(implementation):
    """Negative positions, owners that are none, pages that are none: queries are made all the
    same, and rows that have a place go there."""
    given = arguments([60, 3], [8, 2], 3, 2, 16, dtype=mx.bfloat16)
    P = given["keys"].shape[0]
    want = composed(given)
    for name, wrong in (
        ("positions", [value for value in INT32 if value < 0]),
        ("owners", [*INT32, 2, 3]),
        ("tables", [*INT32, P, P + 1]),
    ):
        for value in wrong:
            own = arguments([60, 3], [8, 2], 3, 2, 16, dtype=mx.bfloat16)
            if name == "tables":
                page = own["tables"][0, 1].item()
                own["tables"] = mx.where(own["tables"] == page, value, own["tables"])
                hit = range(4, 8)  # positions 64 to 67
            else:
                hit = range(3, 9, 2)
                own[name][mx.array([*hit])] = value
            want = composed(own)
            missing = [r for r in range(10) if place(own, r) is None]
            assert missing == [*hit], (name, value)
            if name == "positions":  # no angle to compare
                own["inv_freq"] = 0 * own["inv_freq"]
                want = composed(own)
            outs = using(implementation, own)
            if implementation == "native" or (implementation == "workbench" and fused("workbench")):
                assert_bits(outs, want)
            else:
                for got, expected in zip(outs, want, strict=True):
                    assert_close(got, mx.array(expected).view(mx.bfloat16))


@pytest.mark.parametrize("shape", [(0, 2), (2, 0), (0, 0)])
@pytest.mark.parametrize("implementation", ["native", "reference", "workbench"])
def test_no_tables_and_no_pages(shape, implementation):
    """Queries are made; there is nowhere to write."""
    given = arguments([5], [2], 2, 1, 8)
    want = composed(given)
    own = given | {"tables": mx.zeros(shape, mx.int32)}
    out, keys, _ = using(implementation, own)
    assert mx.allclose(out, mx.array(want[0]).view(mx.float32), atol=1e-5)
    assert mx.array_equal(keys, fresh(*keys.shape))
    own = given | {name: mx.zeros((0, 1, 64, 8)) for name in ("keys", "values")}
    out, keys, values = using(implementation, own)
    assert mx.allclose(out, mx.array(want[0]).view(mx.float32), atol=1e-5)
    assert keys.shape == values.shape == (0, 1, 64, 8)


def test_strided_inputs():
    def given() -> dict[str, mx.array]:
        return arguments([60, 3], [6, 2], 2, 1, 32)

    want = prepare_qkv(**given())
    own = given()
    for name in ("q", "k", "v", "tables"):
        own[name] = mx.contiguous(own[name].T).T
        mx.eval(own[name])
    for name in ("positions", "owners"):
        own[name] = mx.contiguous(mx.repeat(own[name], 2))[::2]
        mx.eval(own[name])
    for got, expected in zip(prepare_qkv(**own), want, strict=True):
        assert np.array_equal(bits(got), bits(expected))


def test_arenas_are_written_in_place_while_older_handles_live():
    given = arguments([0], [1], 2, 2, 16, N=4, spare=4)
    given["tables"] = int32([[1, 3, 2, 4]])
    where = {name: address(given[name]) for name in ("keys", "values")}
    handles = [(given["keys"], given["values"])]
    for step in range(100):
        own = {"positions": mx.array([3 * step]), "q": normal(step, 1, 32)}
        out, keys, values = prepare_qkv(
            **given | own | dict(zip(("keys", "values"), handles[-1], strict=True))
        )
        handles.append((keys, values))
        # A read that is still queued when the next write is built: donation would copy here
        read = keys.sum()
        if step % 10 == 0:
            mx.eval(out, keys, values, read)
    assert [address(a) for a in handles[-1]] == list(where.values())
    for pair in handles:
        assert all(mx.array_equal(a, b) for a, b in zip(pair, handles[-1], strict=True))


def test_lazy_chain_keeps_order():
    """A write that depends on a read of the older version runs after it, evaluated all at once."""
    given = arguments([0], [1], 1, 1, 4, spare=0) | {"inv_freq": mx.zeros(2)}
    given |= {name: mx.zeros((1, 1, 64, 4)) for name in ("keys", "values")}
    mx.eval(given["keys"], given["values"])
    ones, sums = mx.ones((1, 4)), []
    given |= {name: mx.ones(4) for name in ("q_norm", "k_norm")}
    for step in range(20):
        positions = mx.array([step])
        if sums:
            positions = positions + (0 * sums[-1]).astype(mx.int32)
        own = {"positions": positions, "q": ones, "k": ones, "v": ones}
        _, given["keys"], given["values"] = prepare_qkv(**given | own)
        sums.append(given["values"].sum())
    mx.eval(*sums)
    assert [round(s.item(), 3) for s in sums] == [4.0 * n for n in range(1, 21)]


def test_equal_writes_are_not_merged():
    one, other = (arguments([5], [1], 1, 1, 4) for _ in "ab")
    rest = {name: a for name, a in one.items() if name not in ("keys", "values")}

    @mx.compile
    def twice(a, b, c, d):
        first = prepare_qkv(**rest | {"keys": a, "values": b})
        second = prepare_qkv(**rest | {"keys": c, "values": d})
        return [*first[1:], *second[1:]]

    outs = twice(one["keys"], one["values"], other["keys"], other["values"])
    assert len({address(a) for a in outs}) == 4
    assert mx.array_equal(outs[0], outs[2]) and mx.array_equal(outs[1], outs[3])


def test_no_rows_leave_the_arenas_alone():
    given = arguments([3], [1], 2, 1, 8)
    rows = {name: given[name][:0] for name in ("q", "k", "v", "positions", "owners")}
    before = bits(given["keys"]).copy()
    out, keys, _ = prepare_qkv(**given | rows)
    assert out.shape == (0, 2, 8) and np.array_equal(bits(keys), before)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"q": mx.zeros((3, 4, 8))}, r"q must have shape \[R, H \* D\] but got \[3, 4, 8\]"),
        ({"q": mx.zeros((3, 12))}, r"q must have shape \[R, H \* D\] but got \[3, 12\]"),
        (
            {"q": mx.zeros((3, 16), mx.int32)},
            "q must be float32, float16 or bfloat16 but got int32",
        ),
        ({"k": mx.zeros((2, 8))}, r"k must have shape \[3, 8\] but got \[2, 8\]"),
        ({"v": mx.zeros((3, 16))}, r"v must have shape \[3, 8\] but got \[3, 16\]"),
        ({"v": mx.zeros((3, 8), mx.float16)}, "v must have the dtype of q but got float16"),
        ({"q_norm": mx.zeros(4)}, r"q_norm must have shape \[8\] but got \[4\]"),
        ({"k_norm": mx.zeros(8, mx.bfloat16)}, "k_norm must have the dtype of q but got bfloat16"),
        ({"inv_freq": mx.zeros(8)}, r"inv_freq must have shape \[4\] but got \[8\]"),
        ({"inv_freq": mx.zeros(4, mx.float16)}, "inv_freq must be float32 but got float16"),
        (
            {"keys": mx.zeros((1, 64, 8))},
            r"keys must have shape \[P, K, 64, D\] but got \[1, 64, 8",
        ),
        ({"keys": mx.zeros((4, 1, 32, 8))}, r"keys must have shape \[P, K, 64, D\] but got"),
        ({"values": mx.zeros((5, 1, 64, 8))}, r"values must have shape \[4, 1, 64, 8\] but got"),
        ({"keys": mx.zeros((4, 1, 64, 7))}, "D must be even and at most 1024 but got 7"),
        ({"keys": mx.zeros((4, 1, 64, 1026))}, "D must be even and at most 1024 but got 1026"),
        ({"positions": mx.array([0, 1])}, r"positions must have shape \[3\] but got \[2\]"),
        ({"positions": mx.zeros(3)}, "positions must be int32 but got float32"),
        ({"owners": mx.array([[0, 1, 2]])}, r"owners must have shape \[3\] but got \[1, 3\]"),
        ({"owners": mx.zeros(3, mx.uint32)}, "owners must be int32 but got uint32"),
        ({"tables": mx.array([0])}, r"tables must have shape \[Q, N\] but got \[1\]"),
        ({"tables": mx.zeros((1, 1), mx.int64)}, "tables must be int32 but got int64"),
        ({"eps": 0.0}, "eps must be positive but got 0"),
    ],
)
@pytest.mark.parametrize("implementation", ["native", "reference"])
def test_what_is_refused(changes, message, implementation):
    ops.use(implementation)
    try:
        with pytest.raises(ValueError, match=r"^\[prepare_qkv\] " + message):
            prepare_qkv(**arguments([5], [3], 2, 1, 8) | changes)
    finally:
        ops.use("native")


@pytest.mark.parametrize("name", ["keys", "values"])
def test_a_strided_arena_is_refused_when_evaluated(name):
    given = arguments([5], [1], 1, 1, 8)
    P = given[name].shape[0]
    given[name] = mx.zeros((P, 1, 64, 16))[..., ::2]
    mx.eval(given[name])
    with pytest.raises(RuntimeError, match="keys and values must be contiguous but got a strided"):
        mx.eval(prepare_qkv(**given))


def random_call(d: Draw) -> Call:
    """No two rows go to the same place: by positions that differ, or pages that nobody shares."""
    H, K, D = d.size(1, 2, 4), d.size(1, 2, 3), d.size(2, 6, 16, 34, 64, 256)
    Q, N, P, dtype = d.size(1, 2, 5), d.size(1, 2, 4, 5), d.size(1, 3, 30), d.dtype()
    R = d.size(1, 2, 9, 33)
    pages = d.rng.permutation(P)
    tables = np.append(pages, np.full(max(Q * N - P, 0), -1))[: Q * N].reshape(Q, N)
    if d.chance(0.3):
        wrong = d.rng.choice([*INT32, P, -P], (Q, N))
        tables = np.where(d.rng.random((Q, N)) < 0.3, wrong, tables)
    positions = d.positions(R, 64 * N)
    owners = d.ids((R,), Q)
    tables = d.laid_out(mx.array(tables.astype(np.int32)))
    q, k = d.array(R, H * D, dtype=dtype), d.array(R, K * D, dtype=dtype)
    v = k if d.chance(0.2) else d.array(R, K * D, dtype=dtype)
    weights = d.array(D, dtype=dtype), d.array(D, dtype=dtype)
    arenas = [d.cache(P, K, 64, D, dtype=dtype) for _ in range(2)]
    # Angles are 0 where they would be too large to compare: places still are
    inv_freq = frequencies(d, D)
    if not turns_alike(np.array(positions)):
        inv_freq = inv_freq * 0
    slots = d.positions(R, 64 * N) if d.chance(0.3) else positions
    where = {"positions": slots, "owners": owners, "tables": tables, "keys": arenas[0]}
    alike = near_sum
    if slots.shape == owners.shape == (R,):
        at = [place(where, r) for r in range(R)]
        at = [one for one in at if one is not None]
        alike = near_sum if len(set(at)) == len(at) else None
    args = (q, k, v, *weights, inv_freq, *arenas, positions, owners, tables)
    options = {} if slots is positions else {"slots": slots}
    return Call((*args, d.number(1e-6, 1.0)), options, alike, written=(6, 7))


LIMITS = {}  # the Metal kernel takes every call

# What bench/bench_prepare_qkv.py has to say that its SMALL call moves: 48 heads of queries and 24
# of keys and values, 512 bytes each, in and out; two weights, 128 frequencies, position and owner
# of 6 rows, an entry of two tables
BENCH_BYTES = 2 * (48 + 24) * 512 + 2 * 512 + 512 + 2 * 24 + 2 * 4
