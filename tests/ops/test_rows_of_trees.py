"""Rows of trees: what attention makes of a node has the bits of the plain step behind its path, and
kept rows end where plain steps would have written them."""

import mlx.core as mx
import numpy as np
import pytest
from pieces import paged, piece
from test_block_attention import alone, assert_close, bits
from test_prepare_qkv import arguments as qkv_arguments
from trees import Lines, arrays, random_trees, step, steps

from pyengine import _ext, ops
from pyengine.ops import block_attention, block_attention_reference, move_rows, prepare_qkv

DTYPES = [mx.float32, mx.float16, mx.bfloat16]
WINDOWS = [None, 1, 3, 64, 70, 512]


def plain(pieces, trees, window, dtype, scale=0.3):
    calls = steps(pieces, trees, window, dtype)
    return np.concatenate(
        [bits(block_attention(*call, scale=scale, window=window)) for call in calls]
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", WINDOWS)
def test_a_node_is_the_step_behind_its_path(window, dtype):
    rng = np.random.default_rng(window or 0)
    branches = 0
    for seed in range(12):
        K, G = int(rng.integers(1, 3)), int(rng.integers(1, 6))
        pieces, trees = random_trees(rng, int(rng.integers(1, 5)), K, G, 32)
        call = paged(pieces, window, dtype=dtype, seed=seed, room=seed % 3)
        lines = arrays(trees, rng, room=seed % 2)
        out = bits(block_attention(*call, scale=0.3, window=window, **lines))
        assert np.array_equal(out, plain(pieces, trees, window, dtype))
        # As a chain these rows are others
        branches += not np.array_equal(out, bits(block_attention(*call, scale=0.3, window=window)))
    assert branches > 6 or window == 1


@pytest.mark.parametrize("instruction_set", _ext.instruction_sets())
def test_instruction_sets(instruction_set):
    rng = np.random.default_rng(5)
    before = _ext.instruction_set()
    _ext.use_instruction_set(instruction_set)
    try:
        for window in (None, 40):
            pieces, trees = random_trees(rng, 3, 1, 4, 80)
            lines = arrays(trees, rng)
            call = paged(pieces, window)
            out = block_attention(*call, scale=0.3, window=window, **lines)
            assert np.array_equal(bits(out), plain(pieces, trees, window, mx.float32))
    finally:
        _ext.use_instruction_set(before)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads(threads):
    """One head of many spans, which threads share."""
    rng = np.random.default_rng(6)
    tree, p = Lines.random(rng, 16), piece(6, 16, 8700, 8, 1, 64)
    before = _ext.threads()
    _ext.set_threads(threads)
    try:
        out = bits(block_attention(*paged([p]), scale=0.3, **arrays([tree], rng)))
        assert np.array_equal(out, plain([p], [tree], None, mx.float32))
    finally:
        _ext.set_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_chain_is_the_call_without_a_tree(dtype):
    rng = np.random.default_rng(7)
    for window in WINDOWS:
        pieces, _ = random_trees(rng, 4, 2, 2, 32)
        call = paged(pieces, window, dtype=dtype)
        lines = arrays([Lines.chain(p.rows) for p in pieces], rng)
        for f in (block_attention, block_attention_reference):
            chain, tree = (f(*call, window=window, **more) for more in ({}, lines))
            if f is block_attention:
                assert np.array_equal(bits(chain), bits(tree))
            else:
                assert_close(tree, chain)


def test_matches_reference():
    rng = np.random.default_rng(8)
    for seed in range(10):
        window = None if seed % 2 else int(rng.integers(1, 200))
        pieces, trees = random_trees(rng, 3, 2, 2, 32)
        call, lines = paged(pieces, window, room=seed % 3), arrays(trees, rng, seed % 2)
        options = {"scale": 0.3, "window": window, **lines}
        assert_close(block_attention(*call, **options), block_attention_reference(*call, **options))


def test_others_change_nothing():
    """Nodes that are no ancestors may be NaN, and so may other pieces."""
    rng = np.random.default_rng(9)
    tree, p = Lines.random(rng, 12), piece(9, 12, 60, 4, 2, 32)
    lines = arrays([tree], rng)
    want = bits(block_attention(*paged([p]), **lines))
    for row in range(12):
        others = [60 + r for r in range(12) if r not in tree.paths[row]]
        k, v = p.k.copy(), p.v.copy()
        k[:, others], v[:, others] = np.nan, np.nan
        out = bits(block_attention(*paged([p._replace(k=k, v=v)]), **lines))
        assert np.array_equal(out[row], want[row])


def wrong_lines(tree: Lines) -> list[dict[str, tuple[int, int]]]:
    """Entries that no tree of 5 rows has."""
    deep = tree.depths.index(max(tree.depths))
    found = [{"depths": (deep, value)} for value in (-1, 5, 2**31 - 1, -(2**31))]
    return found + [{"ancestors": (deep, value)} for value in (-1, 5, 2**31 - 1, -(2**31))]


@pytest.mark.parametrize("implementation", ["native", "reference", "workbench"])
@pytest.mark.parametrize("change", range(8))
def test_wrong_numbers_are_nan_in_their_piece(change, implementation):
    rng = np.random.default_rng(10)
    tree = Lines.of([0, 1, 1, 2])
    pieces = [piece(40 + i, 5, 62, 2, 1, 16) for i in range(3)]
    right = arrays(3 * [tree], rng)
    [(name, (row, value))] = wrong_lines(tree)[change].items()
    changed = np.array(right[name])
    changed[5 + row if name == "depths" else (5 + row, 1)] = value
    ops.use(implementation)
    try:
        want = block_attention(*paged(pieces), **right)
        out = block_attention(*paged(pieces), **right | {name: mx.array(changed)})
        mx.eval(want, out)
    finally:
        ops.use("native")
    assert np.isnan(np.array(out[5:10])).all()
    assert np.array_equal(bits(out[:5]), bits(want[:5]))
    assert np.array_equal(bits(out[10:]), bits(want[10:]))


def test_errors():
    call = paged([piece(40, 3, 6, 2, 1, 16)])
    lines = arrays([Lines.chain(3)], np.random.default_rng(0))

    def refused(pattern, call=call, **changed):
        with pytest.raises(ValueError, match=r"\[block_attention\] " + pattern):
            block_attention(*call, **lines | changed)

    refused(r"depths must stand beside ancestors but got None\.", depths=None)
    refused(r"ancestors must stand beside depths but got None\.", ancestors=None)
    refused(r"depths must have shape \[3\] but got \[2\]\.", depths=lines["depths"][:2])
    refused(r"depths must be int32 but got float32\.", depths=mx.zeros(3))
    refused(r"ancestors must have shape \[R, A\] but got \[3\]\.", ancestors=mx.zeros(3, mx.int32))
    refused(r"ancestors must have shape \[R, A\] .*", ancestors=mx.zeros((3, 0), mx.int32))
    refused(r"ancestors must have shape \[3, 2\] .*", ancestors=mx.zeros((2, 2), mx.int32))
    refused(r"ancestors must be int32 but got float32\.", ancestors=mx.zeros((3, 2)))
    long = paged([piece(40, 17, 6, 2, 1, 16)])
    more = arrays([Lines.chain(17)], np.random.default_rng(0))
    refused(r"counts must be at most 16 each with ancestors but got \[17\]\.", long, **more)


def test_kept_rows_end_where_plain_steps_write_them():
    """prepare_qkv writes a tree by slots and turns it by depth; of the rows that are kept the
    arenas then hold what prepare_qkv writes of the path alone."""
    rng = np.random.default_rng(11)
    for seed in range(12):
        lengths = [int(rng.choice([0, 50, 60, 63, 64, 125])) for _ in range(2)]
        trees = [Lines.random(rng, 9), Lines.random(rng, 16)]
        paths = [tree.paths[int(rng.integers(len(tree.depths)))] for tree in trees]
        given = qkv_arguments(lengths, [9, 16], 2, 2, 32, DTYPES[seed % 3], poison=True, seed=seed)
        slots = given.pop("positions")
        depths = mx.array([depth for tree in trees for depth in tree.depths], dtype=mx.int32)
        first = mx.array(9 * [lengths[0]] + 16 * [lengths[1]], dtype=mx.int32)
        copies = {name: given[name] * 1 for name in ("keys", "values")}
        mx.eval(copies)
        q, keys, values = prepare_qkv(**given, positions=first + depths, slots=slots)
        rows = np.full((2, 17), -7)
        for line, path in zip(rows, paths, strict=True):
            line[: len(path)] = path
        where = mx.array(lengths), given["tables"], mx.array(rows.astype(np.int32))
        keys, values = move_rows(keys, values, *where, mx.array([len(path) for path in paths]))
        # By plain steps
        at = [*paths[0], *(9 + row for row in paths[1])]
        own = {name: given[name][mx.array(at)] for name in ("q", "k", "v", "owners")}
        places = [n + j for n, path in zip(lengths, paths, strict=True) for j in range(len(path))]
        want = prepare_qkv(**given | copies | own, positions=mx.array(places))
        assert np.array_equal(bits(q)[at], bits(want[0]))
        for s, (length, path) in enumerate(zip(lengths, paths, strict=True)):
            for position in range(length, length + len(path)):
                page = given["tables"][s, position // 64].item()
                for got, expected in ((keys, want[1]), (values, want[2])):
                    a, b = (bits(x)[page, :, position % 64] for x in (got, expected))
                    assert np.array_equal(a, b)


def test_a_moved_path_is_the_text_of_plain_steps():
    """After the move the next step's output has the bits of one behind the path."""
    rng = np.random.default_rng(12)
    for window in (None, 30):
        tree, p = Lines.random(rng, 14), piece(12, 14, 58, 4, 2, 32)
        row = tree.depths.index(max(tree.depths))
        path = tree.paths[row]
        call = paged([p], window)
        rows = mx.array([path], dtype=mx.int32)
        kept = mx.array([len(path)], dtype=mx.int32)
        keys, values = move_rows(*call[1:5], rows, kept)
        moved = call._replace(
            q=call.q[row : row + 1], keys=keys, values=values, counts=[1],
            lengths=mx.array([58 + len(path) - 1]),
        )  # fmt: skip
        out = bits(block_attention(*moved, window=window))
        assert np.array_equal(out, alone([step(p, tree, row)], window))
