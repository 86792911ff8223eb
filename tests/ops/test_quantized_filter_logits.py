"""quantized_filter_logits: the bits of the three ops it stands for, without their logits."""

import threading
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from draw import Call, Draw, exact
from test_filter_logits import edits, filter_settings, mask, random_mask

from pyengine import _ext, ops
from pyengine.ops import quantized_filter_logits, quantized_filter_logits_reference
from pyengine.ops.filter_logits import Edits, Filtered

DTYPES = [mx.float32, mx.float16, mx.bfloat16]
# Settings that cut in every way; the border of a candidate list falls anywhere
SETTINGS: list[dict[str, Any]] = [
    {},
    {"softcap": 30.0, "top_p": 0.95},
    {"softcap": 2.0, "temperature": 0.6, "top_k": 7, "min_p": 0.05},
    {"top_k": 256, "temperature": 1.7},
    {"softcap": 30.0, "temperature": 0.0, "top_k": 0},
    {"top_k": 1, "top_p": 0.1},
]


def normal(seed: int, *shape: int, dtype: mx.Dtype = mx.float32, scale: float = 1.0) -> mx.array:
    values = np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)
    return mx.array(values).astype(dtype)


def head(seed, V, E, group_size=64, bits=8, dtype=mx.float32) -> tuple[mx.array, ...]:
    return tuple(mx.quantize(normal(seed, V, E, dtype=dtype), group_size, bits))


def composed(x, w, scales, biases, group_size=64, bits=8, *, softcap=None, **settings) -> Filtered:
    logits = ops.quantized_matmul(x, w, scales, biases, group_size, bits, out_dtype=mx.float32)
    if softcap is not None:
        logits = ops.softcap(logits, softcap)
    return ops.filter_logits(logits, **settings)


def same(a: Filtered, b: Filtered) -> bool:
    """Equal bits; NaN too."""
    return all(
        x.shape == y.shape
        and x.dtype == y.dtype
        and np.array_equal(np.array(x.view(mx.uint32)), np.array(y.view(mx.uint32)))
        for x, y in zip(a, b, strict=True)
    )


def assert_same(x, q, group_size=64, bits=8, **settings) -> Filtered:
    out = quantized_filter_logits(x, *q, group_size, bits, **settings)
    assert same(out, composed(x, *q, group_size, bits, **settings)), settings
    return out


def random_edits(seed: int, rows: int, vocab: int, count: int) -> Edits:
    """Sorted ids, some again at the end as a block's drafts do, and tokens taken away."""
    rng = np.random.default_rng(seed)
    ids = np.sort(rng.choice(vocab, min(count, vocab), replace=False))
    factors = rng.choice([1.0, 1.3, 0.7], (rows, ids.size))
    deltas = np.where(rng.random(factors.shape) < 0.2, -np.inf, rng.normal(0, 20, factors.shape))
    deltas[:, 0] = 0.5  # a token that stays
    again = rng.integers(0, ids.size, 3)
    wide = [np.concatenate([x, x[:, again]], axis=1) for x in (factors, deltas)]
    both = np.concatenate([ids, ids[again]]).astype(np.int32)
    return Edits(mx.array(both)[None], *(mx.array(x.astype(np.float32)) for x in wide))


@pytest.fixture
def restore():
    """Threads and instruction set as they were."""
    threads, name = _ext.threads(), _ext.instruction_set()
    yield
    _ext.set_threads(threads)
    _ext.use_instruction_set(name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_equals_the_composition(group_size, bits, dtype):
    for i, (rows, V, groups) in enumerate([(1, 1, 1), (3, 7, 3), (4, 333, 2), (16, 1000, 3)]):
        x = normal(i, rows, groups * group_size, dtype=dtype)
        q = head(V, V, groups * group_size, group_size, bits, dtype)
        for settings in SETTINGS:
            assert_same(x, q, group_size, bits, **settings)


@pytest.mark.parametrize("rows", [*range(1, 18), 40])
def test_every_number_of_rows(rows):
    """Past 16 rows slices follow each other, each with its own rows of the edits."""
    x, q = normal(rows, rows, 128, dtype=mx.bfloat16), head(1, 1500, 128, dtype=mx.bfloat16)
    for settings in SETTINGS:
        edits = random_edits(rows, rows, 1500, 90)
        assert_same(x, q, edits=edits, **settings)
        for own in (None, edits):
            stays = random_mask(np.random.default_rng(rows), rows, 1500)
            assert_same(x, q, mask=stays, edits=own, **settings)


@pytest.mark.parametrize("V", [5, 16, 17, 300, 5000])
def test_edits(V):
    x, q = normal(V, 4, 128), head(V, V, 128)
    for seed, count in enumerate([1, 4, 40, 300]):
        edits = random_edits(seed, 4, V, count)
        for settings in SETTINGS:
            out = assert_same(x, q, edits=edits, **settings)
    plain = composed(x, *q)
    assert not same(out, plain)
    moved = Edits(mx.array([[V - 1]], mx.int32), mx.ones((4, 1)), mx.full((4, 1), 1e4))
    assert assert_same(x, q, edits=moved).ids[:, 0].tolist() == [V - 1] * 4


def test_matches_reference():
    x, q = normal(1, 5, 192), head(2, 700, 192, 32)
    edits = random_edits(3, 5, 700, 50)
    for settings in SETTINGS[:5]:
        settings = {
            **settings,
            "edits": edits,
            "mask": random_mask(np.random.default_rng(4), 5, 700),
        }
        out = quantized_filter_logits(x, *q, 32, **settings)
        want = quantized_filter_logits_reference(x, *q, 32, **settings)
        assert np.array_equal(np.array(out.ids), np.array(want.ids))
        # Logits of some 50, off by a few units in their last place
        assert np.allclose(np.array(out.probs), np.array(want.probs), rtol=1e-4, atol=1e-6)
        assert out.flags.tolist() == want.flags.tolist()


@pytest.mark.parametrize("seed", range(4))
def test_ties_go_to_the_lower_id(seed):
    """Equal rows of the head give equal logits, in other tiles and under other threads."""
    rng = np.random.default_rng(seed)
    pattern = mx.array(rng.integers(0, 9, 4000))
    x, q = normal(seed, 6, 64), tuple(a[pattern] for a in head(seed, 9, 64))
    mx.eval(q)
    logits = np.array(ops.quantized_matmul(x, *q))
    order = np.argsort(-logits, axis=-1, kind="stable")  # ties: the lower id first
    for top_k in (1, 5, 64, 255):
        out = assert_same(x, q, top_k=top_k)
        assert np.array_equal(np.array(out.ids), order[:, :top_k])
    assert len(np.unique(logits[0])) <= 9


def test_row_stable():
    x, q = normal(5, 21, 128, dtype=mx.bfloat16), head(6, 3000, 128, dtype=mx.bfloat16)
    edits = random_edits(7, 21, 3000, 60)
    settings = {"softcap": 30.0, "top_p": 0.9}
    together = quantized_filter_logits(x, *q, edits=edits, **settings)
    for t in range(21):
        own = Edits(edits.ids, edits.factors[t : t + 1], edits.deltas[t : t + 1])
        alone = quantized_filter_logits(x[t : t + 1], *q, edits=own, **settings)
        assert same(alone, Filtered(*(part[t : t + 1] for part in together)))


def test_threads_and_chance_change_nothing(restore):
    """Who works on which columns is chance; a hundred runs on many threads meet many chances."""
    x, q = normal(8, 5, 64), head(9, 20000, 64)
    spoilt = mx.concatenate([x, mx.full((1, 64), mx.nan)])
    edits = random_edits(10, 6, 20000, 200)
    want = composed(spoilt, *q, edits=edits)
    assert want.flags.tolist() == [0, 0, 0, 0, 0, 2]
    for threads in (1, 2, 3, 8):
        _ext.set_threads(threads)
        for _ in range(25):
            assert same(quantized_filter_logits(spoilt, *q, edits=edits), want)


def test_every_instruction_set(restore):
    x, q = normal(11, 3, 160), head(12, 900, 160, 32)
    for name in _ext.instruction_sets():
        _ext.use_instruction_set(name)
        stays = random_mask(np.random.default_rng(14), 3, 900)
        for own in (None, stays):
            edits = random_edits(13, 3, 900, 30)
            mx.eval(assert_same(x, q, 32, softcap=30.0, mask=own, edits=edits))


@pytest.mark.parametrize("where", [0, 15, 16, 299])
@pytest.mark.parametrize(("bias", "flag"), [(mx.nan, 2), (mx.inf, 2), (-mx.inf, 1), (3e38, 2)])
def test_flags(where, bias, flag):
    """A broken row of the head; the sum of 64 times 3e38 overflows."""
    q = list(head(14, 300, 64))
    q[2] = mx.where(mx.arange(300)[:, None] == where, bias, q[2])
    x = mx.abs(normal(15, 3, 64)) + 0.1
    for top_k in (1, 8, 256):
        assert assert_same(x, q, top_k=top_k).flags.tolist() == [flag] * 3
    taken = Edits(mx.array([[where]], mx.int32), mx.ones((3, 1)), mx.full((3, 1), -mx.inf))
    assert assert_same(x, q, edits=taken).flags.tolist() == [flag] * 3


def test_a_broken_row_leaves_the_others_alone():
    x, q = normal(16, 4, 64), head(17, 300, 64)
    clean = quantized_filter_logits(x, *q)
    x[2] = mx.nan
    out = assert_same(x, q)
    assert out.flags.tolist() == [0, 0, 2, 0]
    for t in (0, 1, 3):
        assert same(Filtered(*(p[t] for p in out)), Filtered(*(p[t] for p in clean)))


def test_strided_sliced_and_empty():
    q = head(18, 64, 128)
    base = normal(19, 6, 256)
    for x in (base[::2, ::2], base[:, 127::-1], normal(20, 128, 3).T):
        assert_same(x, q)
        assert same(quantized_filter_logits(x, *q), quantized_filter_logits(mx.contiguous(x), *q))
    for part in (slice(5, 20), slice(None, None, 2)):
        assert_same(base[:, :128], tuple(a[part] for a in q))
    factors = mx.ones((4, 6)).T
    edits = Edits(mx.arange(8)[None, ::2], factors, mx.full((12, 4), 0.5)[::2])
    assert_same(base[:, :128], q, edits=edits)
    out = quantized_filter_logits(base[:0, :128], *q, top_k=5)
    mx.eval(out)
    assert [a.shape for a in out] == [(0, 5), (0, 5), (0,)]


def test_inside_compile():
    x, q = normal(21, 3, 64), head(22, 500, 64)
    compiled = mx.compile(lambda x: list(quantized_filter_logits(x + 1, *q, softcap=9.0)))
    for _ in range(2):
        assert same(Filtered(*compiled(x)), composed(x + 1, *q, softcap=9.0))


def test_streams_share_the_pool():
    """Streams at once: one gets the pool, the others work alone, all are right."""
    x, q = normal(23, 4, 256), head(24, 3000, 256)
    want = composed(x, *q)
    mx.eval(x, q, want)
    wrong: list[int] = []

    def run() -> None:
        with mx.stream(mx.new_stream(mx.cpu)):
            for i in range(20):
                out = quantized_filter_logits(x, *q)
                mx.eval(out)
                if not same(out, want):
                    wrong.append(i)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_no_logits_are_made():
    """16 rows of 262144 logits are 16 MB; what the op needs at once is far below one row."""
    w = mx.random.randint(0, 2**31, (262144, 8), key=mx.random.key(0)).astype(mx.uint32)
    scales = mx.random.normal((262144, 1), key=mx.random.key(1)).astype(mx.bfloat16)
    q = (w, scales, scales * 0.5)
    x = normal(25, 16, 32, dtype=mx.bfloat16)
    mx.eval(x, q)

    def peak(call: Any) -> int:
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(call(x, *q, 32, softcap=30.0))
        return mx.get_peak_memory() - before

    assert peak(composed) > 16e6
    assert peak(quantized_filter_logits) < 1e5
    assert_same(x, q, 32, softcap=30.0)


def test_reference_can_be_chosen():
    x, q = normal(26, 2, 64), head(27, 300, 64)
    ops.use("reference")
    try:
        out = quantized_filter_logits(x, *q, softcap=5.0)
        with pytest.raises(ValueError, match=r"\[quantized_filter_logits\] bits must be 4, 6 or 8"):
            quantized_filter_logits(x, *q, bits=5)
    finally:
        ops.use("native")
    assert same(out, quantized_filter_logits_reference(x, *q, softcap=5.0))


X, Q = mx.zeros((2, 64)), head(0, 8, 64)
EDIT = (mx.zeros((1, 2), mx.int32), mx.ones((2, 2)), mx.zeros((2, 2)))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"x": X.astype(mx.int32)}, "x must be float32, float16 or bfloat16 but got int32."),
        ({"x": X[0]}, "x must have shape [R, E] but got [64]."),
        (
            {"x": mx.zeros((2, 96))},
            "the last dimension of x must be a multiple of group_size 64 but got 96.",
        ),
        ({"w": Q[0].astype(mx.int32)}, "w must be uint32 but got int32."),
        ({"w": Q[0][0]}, "w must have shape [N, K * bits / 32] but got [16]."),
        (
            {"w": Q[0][:0], "scales": Q[1][:0], "biases": Q[2][:0]},
            "w must have at least 1 row but got [0, 16].",
        ),
        ({"w": Q[0][:, :8]}, "w must have shape [8, 16] but got [8, 8]."),
        ({"scales": Q[1][:4]}, "scales must have shape [8, 1] but got [4, 1]."),
        ({"biases": Q[2].T}, "biases must have shape [8, 1] but got [1, 8]."),
        ({"biases": Q[2].astype(mx.float16)}, "biases must have the dtype of x but got float16."),
        ({"group_size": 16}, "group_size must be 32, 64 or 128 but got 16."),
        ({"bits": 3}, "bits must be 4, 6 or 8 but got 3."),
        ({"softcap": 0.0}, "softcap must be above 0 but got 0."),
        ({"temperature": -1.0}, "temperature must be above 0 but got -1."),
        ({"top_k": 0}, "top_k must be 1 to 256 but got 0."),
        ({"top_k": 257}, "top_k must be 1 to 256 but got 257."),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1 but got 1.5."),
        ({"min_p": -0.5}, "min_p must be 0 or more and below 1 but got -0.5."),
        (
            {"edits": Edits(EDIT[0].astype(mx.int64), *EDIT[1:])},
            "edit ids must be int32 but got int64.",
        ),
        (
            {"edits": Edits(EDIT[0], EDIT[1][:1], EDIT[2])},
            "edit factors must have shape [2, 2] but got [1, 2].",
        ),
        (
            {"edits": Edits(EDIT[0], EDIT[1], EDIT[2].astype(mx.float16))},
            "edit deltas must be float32 but got float16.",
        ),
    ],
)
def test_errors(change, text):
    arguments = {"x": X, "w": Q[0], "scales": Q[1], "biases": Q[2], **change}
    with pytest.raises(ValueError) as error:
        quantized_filter_logits(**arguments)
    assert str(error.value) == f"[quantized_filter_logits] {text}"


def head_of_three_ops(
    x: mx.array, w: mx.array, scales: mx.array, biases: mx.array, *packing: int, **options: Any
) -> Any:
    """The ops it stands for: a sum of other order would choose other candidates."""
    softcap = options.pop("softcap")
    logits = ops.quantized_matmul(x, w, scales, biases, *packing, out_dtype=mx.float32)
    logits = logits if softcap is None else ops.softcap(logits, softcap)
    return ops.filter_logits(logits, **options)


def random_call(d: Draw) -> Call:
    group_size, bits = d.packing()
    dtype, E = d.dtype(), group_size * d.size(1, 2)
    T, V = d.size(1, 2, 17), d.size(1, 15, 16, 17, 100, 300)
    x = d.array(T, E, dtype=dtype)
    matrix = d.quantized(V, E, dtype=dtype, group_size=group_size, bits=bits)
    options = {
        **filter_settings(d, V),
        "mask": mask(d, T, V),
        "edits": edits(d, T, V),
        "softcap": None if d.chance(0.5) else d.number(30.0),
    }
    given = d.integer(group_size), d.integer(bits)
    return Call((x, *matrix, *given), options, exact, reference=head_of_three_ops)


def many_candidates(T: int) -> Filtered:
    matrix = mx.quantize(mx.zeros((300, 64)), 64, 8)
    return quantized_filter_logits(mx.zeros((T, 64)), *matrix, top_k=256)


# The largest call of a kind that the Metal kernel takes
LIMITS = {"rows with `top_k` 256": (9, many_candidates)}

# What bench/bench_quantized_filter_logits.py has to say that its SMALL call moves: 512 rows of 256
# weights with 4 scales and biases; 4 rows of x, of 64 candidates and a flag
BENCH_BYTES = 512 * (256 + 4 * 4) + 4 * (512 + 64 * 8 + 4)
