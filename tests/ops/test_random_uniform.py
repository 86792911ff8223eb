"""random_uniform: published answers, kernel against reference bit for bit, errors."""

import mlx.core as mx
import numpy as np
import pytest
from draw import Call, Draw, exact

from pyengine.ops import random_uniform, random_uniform_reference

# Counter, key and first output word, from Random123's published known answers (kat_vectors,
# philox4x32 with 10 rounds).
KNOWN = [
    ((0x00000000,) * 4, (0x00000000,) * 2, 0x6627E8D5),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, 0x408F276D),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        0xD16CFE09,
    ),
]


def counters(seed: int, *shape: int) -> mx.array:
    values = np.random.default_rng(seed).integers(0, 2**32, (*shape, 4), dtype=np.uint32)
    return mx.array(values)


@pytest.mark.parametrize("op", [random_uniform, random_uniform_reference])
@pytest.mark.parametrize(("counter", "key", "word"), KNOWN)
def test_known_answers(op, counter, key, word):
    out = op(mx.array(np.array(counter, dtype=np.uint32)), key)
    assert out.dtype == mx.float32 and out.shape == ()
    assert out.item() == (word >> 8) * 2.0**-24


@pytest.mark.parametrize("shape", [(1,), (17,), (3, 5), (2, 0), (20_001,)])
def test_matches_reference_bit_for_bit(shape):
    x, key = counters(1, *shape), (0xDEADBEEF, 7)
    assert np.array_equal(
        np.array(random_uniform(x, key)), np.array(random_uniform_reference(x, key))
    )


def test_every_word_of_counter_and_key_matters():
    base = mx.zeros((1, 4), dtype=mx.uint32)
    seen = {random_uniform(base, (0, 0)).item()}
    for word in range(4):
        seen.add(random_uniform(base + mx.eye(4, dtype=mx.uint32)[word], (0, 0)).item())
    seen.update(random_uniform(base, key).item() for key in ((1, 0), (0, 1)))
    assert len(seen) == 7


def test_uniform_in_unit_interval():
    n = 100_000
    index = mx.arange(n, dtype=mx.uint32)[:, None]
    zeros = mx.zeros((n, 3), dtype=mx.uint32)
    u = np.array(random_uniform(mx.concatenate([index, zeros], axis=1), (1, 2)))
    assert u.min() >= 0 and u.max() < 1
    assert np.array_equal(u * 2**24, np.floor(u * 2**24))
    cells = np.histogram(u, bins=64, range=(0, 1))[0]
    chi2 = ((cells - n / 64) ** 2 / (n / 64)).sum()
    assert 25 < chi2 < 115  # 63 degrees of freedom: about one in 10**5 lies outside


def test_strided():
    x = counters(2, 8, 6)
    for view in (x[::2], x.transpose(1, 0, 2), x[..., ::-1]):
        out = random_uniform(view, (3, 4))
        assert mx.array_equal(out, random_uniform(mx.contiguous(view), (3, 4)))


def test_errors():
    x = counters(3, 2)
    with pytest.raises(ValueError, match=r"\[random_uniform\] counters must .* but got int32\."):
        random_uniform(x.astype(mx.int32), (0, 0))
    with pytest.raises(ValueError, match=r"\[random_uniform\] counters must .* got \[2, 3\]\."):
        random_uniform(x[:, :3], (0, 0))
    with pytest.raises(ValueError, match=r"\[random_uniform\] key must .* but got -1\."):
        random_uniform(x, (-1, 0))
    with pytest.raises(ValueError, match=r"\[random_uniform\] key must .* but got 4294967296\."):
        random_uniform(x, (0, 2**32))


def random_call(d: Draw) -> Call:
    shape = d.pick(((4,), (0, 4), (7, 4), (2, 3, 4), (3,), ()))
    counters = mx.array(d.rng.integers(0, 2**32, shape, dtype=np.uint32))
    key = d.integer(0, 5, 2**32 - 1), d.integer(0, 5, 2**32 - 1)
    return Call((d.laid_out(counters), key), {}, exact)


LIMITS = {}  # the Metal kernel takes every call

# What bench/bench_random_uniform.py has to say that its SMALL call moves: 1024 counters of four
# words, and a number each
BENCH_BYTES = 1024 * (16 + 4)
