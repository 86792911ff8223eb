"""Positions and ids that there are not: refused where the host knows them; where the device alone
does, one rule for all implementations, and no memory but the op's own."""

import mlx.core as mx
import numpy as np
import pytest
from one_text import accept_alone
from test_norm_rope import bits, normal
from test_prepare_qkv import arguments, composed
from test_write_cache import fresh

from pyengine import ops
from pyengine.ops.filter_logits import Edits

WRONG = [-(2**31), -(2**31) + 3, -7, -1, 2**30, 2**31 - 2, 2**31 - 1]


def unseen(value: int) -> mx.array:
    """A number that the host does not know yet."""
    return mx.array(value) + mx.array(0)


def slots(offset: int, T: int, C: int) -> np.ndarray:
    return (offset + np.arange(T)) % C


@pytest.mark.parametrize("T, C", [(1, 5), (3, 7), (7, 7)])
@pytest.mark.parametrize("offset", WRONG)
def test_write_cache_stays_in_the_cache(offset, T, C):
    new = normal(1, 2, T, 3, 16)
    out = np.array(ops.write_cache(fresh(2, 3, C, 16), new, unseen(offset)))
    want = np.array(fresh(2, 3, C, 16))
    want[:, :, slots(offset, T, C)] = np.array(new).transpose(0, 2, 1, 3)
    assert np.array_equal(out, want)
    plain = ops.write_cache_reference(fresh(2, 3, C, 16), new, unseen(offset))
    assert np.array_equal(np.array(plain), want)


@pytest.mark.parametrize("T, C", [(1, 5), (3, 7), (7, 7)])
@pytest.mark.parametrize("offset", WRONG)
def test_prepare_qkv_writes_where_write_cache_does(offset, T, C):
    shape = (T, 2, 3, C, 16)
    given = [arguments(*shape) | {"offset": unseen(offset)} for _ in "ab"]
    before = np.array(given[0]["keys"])
    outs = [f(**a) for f, a in zip((ops.prepare_qkv, composed), given, strict=True)]
    for got, want in zip(*outs, strict=True):
        assert np.array_equal(bits(got), bits(want))
    changed = (np.array(outs[0][1]) != before).any(axis=(0, 1, 3))
    assert set(np.flatnonzero(changed)) == set(slots(offset, T, C))


@pytest.mark.parametrize("implementation", ["native", "reference", "workbench"])
def test_block_attention_sees_nothing_at_wrong_positions(implementation):
    q, k = normal(1, 1, 3, 4, 16), normal(2, 1, 2, 20, 16)
    cases = [(offset, window) for offset in WRONG for window in (None, 5)]
    cases += [(18, None), (500, 19)]  # the cache no longer holds all they see
    ops.use(implementation)
    try:
        for offset, window in cases:
            for start in (None, unseen(-(2**31)), unseen(2**31 - 1)):
                out = ops.block_attention(q, k, k, unseen(offset), window=window, start=start)
                assert np.isnan(np.array(out)).all(), (offset, window)
        for offset, window in ((17, None), (500, 18), (2**30 - 3, 18)):  # and these are right
            out = ops.block_attention(q, k, k, unseen(offset), window=window)
            assert np.isfinite(np.array(out)).all()
    finally:
        ops.use("native")


@pytest.mark.parametrize("start", [*WRONG, -3, 4])
def test_block_attention_takes_any_start(start):
    q, k = normal(3, 1, 3, 4, 16), normal(4, 1, 2, 23, 16)
    turned = mx.array((np.arange(23) + start) % 23)
    want = bits(ops.block_attention(q, k, k, mx.array(1000), window=20))
    for f in (ops.block_attention, ops.block_attention_reference):
        out = f(
            q, k[:, :, turned], k[:, :, turned], mx.array(1000), window=20, start=mx.array(start)
        )
        if f is ops.block_attention:
            assert np.array_equal(bits(out), want)
        else:
            assert mx.allclose(out, mx.array(want.view(np.float32)), atol=1e-5)


@pytest.mark.parametrize("offset", [-1, -(2**31), 2**30 - 2, 2**31 - 1])
def test_an_offset_that_the_host_knows_is_refused(offset):
    T, known = 3, mx.array(offset)
    x, k, inv_freq = normal(5, 1, T, 4, 16), normal(6, 1, 2, 20, 16), normal(7, 8)
    calls = {
        "write_cache": lambda: ops.write_cache(k, normal(8, 1, T, 2, 16), known),
        "prepare_qkv": lambda: ops.prepare_qkv(**arguments(T, 2, 1, 9, 16) | {"offset": known}),
        "norm_rope": lambda: ops.norm_rope(x, normal(9, 16), known, inv_freq),
        "block_attention": lambda: ops.block_attention(x, k, k, known),
    }
    for op, call in calls.items():
        with pytest.raises(ValueError) as error:
            call()
        text = f"[{op}] offset must be from 0 to 1073741821 but got {offset}."
        assert str(error.value) == text


def test_wrong_numbers_of_the_device_do_not_wear_mlx_out():
    """Tasks that throw do: after some hundred MLX waits for ever."""
    q, k = normal(10, 1, 2, 2, 16), normal(11, 1, 1, 20, 16)
    stack = [a.reshape(2, 8, -1) for a in mx.quantize(normal(12, 16, 64), 64, 8)]
    for _ in range(300):
        mx.eval(ops.block_attention(q, k, k, unseen(-1)))
        mx.eval(ops.quantized_expert_matmul(normal(13, 1, 64), stack, mx.array([[-1, 2]])))
    assert np.isfinite(np.array(ops.block_attention(q, k, k, unseen(0)))).all()


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
