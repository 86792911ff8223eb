"""Positions, pages and ids that there are not: one rule for all implementations, and no memory but
the op's own."""

import mlx.core as mx
import numpy as np
import pytest
from one_text import accept_alone
from test_norm_rope import normal

from pyengine import ops
from pyengine.ops.filter_logits import Edits

WRONG = [-(2**31), -(2**31) + 3, -7, -1, 2**30, 2**31 - 2, 2**31 - 1]


def unseen(value: int) -> mx.array:
    """A number that the host does not know yet."""
    return mx.array(value) + mx.array(0)


@pytest.mark.parametrize("implementation", ["native", "reference", "workbench"])
def test_norm_rope_takes_any_position(implementation):
    """Where nothing turns, a row is its norm whatever its position says."""
    x, weight = normal(2, len(WRONG), 2, 16), normal(3, 16)
    want = ops.rms_norm_reference(x, weight)
    ops.use(implementation)
    try:
        out = ops.norm_rope(x, weight, mx.array(WRONG) + mx.array(0), mx.zeros(8))
        assert mx.allclose(out, want, rtol=1e-5, atol=1e-5)
    finally:
        ops.use("native")


@pytest.mark.parametrize("implementation", ["native", "mlx", "reference", "workbench"])
def test_block_attention_sees_nothing_at_wrong_positions(implementation):
    """A piece whose positions there are not, or whose table is too short for what it sees, is NaN;
    the piece beside it is as ever."""
    q, keys = normal(1, 5, 4, 16), normal(2, 3, 2, 64, 16)
    beside = ops.block_attention(q[3:], keys, keys, mx.array([9]), mx.array([[2, 1]]), [2])
    tables = mx.array([[0, 1], [2, 1]]) + mx.array(0)
    cases = [(length, window) for length in WRONG for window in (None, 5, 2**31 - 1)]
    cases += [(126, None), (500, 118), (2**30 - 2, 5)]
    right = [(125, None), (500, 117), (2**30 - 3, 18)]
    ops.use(implementation)
    try:
        for length, window in cases + right:
            lengths = mx.array([length, 9]) + mx.array(0)
            out = ops.block_attention(q, keys, keys, lengths, tables, [3, 2], window=window)
            nan = np.isnan(np.array(out[:3]))
            assert nan.all() if (length, window) in cases else not nan.any(), (length, window)
            if window != 5:
                assert mx.allclose(out[3:], beside, atol=1e-5)
    finally:
        ops.use("native")


@pytest.mark.parametrize("implementation", ["native", "mlx", "reference", "workbench"])
@pytest.mark.parametrize("page", [-(2**31), -1, 3, 2**31 - 1])
def test_block_attention_of_a_page_there_is_not(implementation, page):
    """NaN is a whole piece that sees it with any of its rows, and no other."""
    q, keys = normal(3, 40, 2, 16), normal(4, 3, 1, 64, 16)
    tables = mx.array([[1, 2, page, 0], [page, 0, 1, page]]) + mx.array(0)
    # Positions of the first piece, and whether it sees page 2 of its sequence
    cases = [(100, 28, False), (100, 29, True), (128, 1, True), (210, 20, True), (211, 20, False)]
    ops.use(implementation)
    try:
        for length, T, sees in cases:
            lengths = mx.array([length, 64]) + mx.array(0)
            counts = [T, 40 - T]
            out = ops.block_attention(q, keys, keys, lengths, tables, counts, window=20)
            nan = np.isnan(np.array(out)).reshape(40, -1)
            assert nan[:T].all() if sees else not nan[:T].any(), (length, T)
            assert nan[T:].all()  # sees the last 19 positions of its sequence's page 0
            lengths = mx.array([length, 84]) + mx.array(0)
            out = ops.block_attention(q, keys, keys, lengths, tables, counts, window=20)
            assert not np.isnan(np.array(out[T:])).any()
    finally:
        ops.use("native")


def test_wrong_numbers_of_the_device_do_not_wear_mlx_out():
    """Tasks that throw do: after some hundred MLX waits for ever."""
    q, k, table = normal(10, 2, 2, 16), normal(11, 1, 1, 64, 16), mx.array([[0]])
    stack = [a.reshape(2, 8, -1) for a in mx.quantize(normal(12, 16, 64), 64, 8)]
    for _ in range(300):
        mx.eval(ops.block_attention(q, k, k, unseen(-1)[None], table, [2]))
        mx.eval(ops.quantized_expert_matmul(normal(13, 1, 64), stack, mx.array([[-1, 2]])))
    out = ops.block_attention(q, k, k, unseen(0)[None], table, [2])
    assert np.isfinite(np.array(out)).all()


@pytest.mark.parametrize("implementation", ["native", "reference", "workbench"])
@pytest.mark.parametrize("gated", [False, True])
def test_an_id_of_no_expert_gives_nan(implementation, gated):
    x = normal(14, 18, 64)
    stack = [a.reshape(3, 21, -1) for a in mx.quantize(normal(15, 63, 64), 64, 8)]
    ids = np.random.default_rng(16).integers(0, 3, (18, 2)).astype(np.int32)
    wrong = {(0, 0): -1, (3, 1): 3, (16, 0): 2**31 - 1, (17, 1): -(2**31)}
    for at, value in wrong.items():
        ids[at] = value
    ops.use(implementation)
    try:
        out = ops.quantized_expert_matmul(x, stack, mx.array(ids), up=stack if gated else None)
        nan = np.isnan(np.array(out))
    finally:
        ops.use("native")
    for at in np.ndindex(18, 2):
        assert nan[at].all() if at in wrong else not nan[at].any(), at


@pytest.mark.parametrize("implementation", ["native", "reference", "workbench"])
@pytest.mark.parametrize("vocab", [50, 300])
@pytest.mark.parametrize("head", [False, True])
def test_an_edit_outside_of_the_vocabulary_changes_nothing(implementation, vocab, head):
    outside = [-(2**31), -(2**31) + 1, -1, -vocab, vocab, vocab + 1, 2**31 - 1]
    ids = mx.array([*outside, 3, vocab - 1])
    rows = 2
    edits, inside = last_wins(ids, rows), last_wins(ids[len(outside) :], rows)
    matrix = mx.quantize(normal(17, vocab, 64), 64, 8)
    x = normal(18, rows, 64)
    logits = normal(19, rows, vocab)
    ops.use(implementation)
    try:
        outs = [
            ops.quantized_filter_logits(x, *matrix, top_k=9, edits=e)
            if head
            else ops.filter_logits(logits, top_k=9, edits=e)
            for e in (edits, inside)
        ]
    finally:
        ops.use("native")
    assert (outs[0].ids[:, 0] == vocab - 1).all()
    for a, b in zip(*outs, strict=True):
        assert np.array_equal(np.array(a), np.array(b))


def last_wins(ids: mx.array, rows: int) -> Edits:
    deltas = mx.zeros((rows, ids.size)).at[:, -1].add(100.0)
    return Edits(ids[None], mx.ones((rows, ids.size)), deltas)


@pytest.mark.parametrize("rule", ["residual", "block", "coupled"])
@pytest.mark.parametrize("m", [4, 300])
def test_candidates_outside_of_the_vocabulary_decide_alike(rule, m):
    rng = np.random.default_rng(20)
    wrong = np.array([-(2**31), -1, 400, 2**31 - 1])
    for seed in range(20):
        p_ids, q_ids = (np.stack([rng.permutation(400)[:m] for _ in range(3)]) for _ in "pq")
        p_ids[:, :4], q_ids[:, :4] = wrong, wrong[::-1]
        p, q = (rng.dirichlet(np.ones(m), 3).astype(np.float32) for _ in "pq")
        drafts = np.array([rng.choice(q_ids[i]) for i in range(2)])
        arrays = [mx.array(a) for a in (p_ids, p, q_ids[:2], q[:2], drafts)]
        arrays = [a.astype(mx.int32) if a.dtype == mx.int64 else a for a in arrays]
        args = [*arrays, mx.array(-5), mx.array(seed, mx.uint32)]
        outs = []
        for implementation in ("native", "reference", "workbench"):
            ops.use(implementation)
            try:
                out = accept_alone(*args, rule=rule, vocab=400)
            finally:
                ops.use("native")
            outs.append([np.array(a).tolist() for a in out])
        assert outs[0] == outs[1] == outs[2]


def test_a_vocabulary_has_a_limit():
    ids, probs = mx.zeros((2, 1), mx.int32), mx.ones((2, 1))
    rest = (ids[:1], probs[:1], ids[0], mx.array(0), mx.array(0, mx.uint32))
    for vocab in (2**21 + 1, 2**31, 2**70):
        with pytest.raises(
            ValueError, match=r"^\[accept_block\] vocab must be positive and at most"
        ):
            accept_alone(ids, probs, *rest, rule="block", vocab=vocab)
    mx.eval(accept_alone(ids, probs, *rest, rule="block", vocab=2**21))
