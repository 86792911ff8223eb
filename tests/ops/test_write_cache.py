"""write_cache: kernel against reference, aliasing, ring wrap, errors."""

import threading

import mlx.core as mx
import numpy as np
import pytest
from draw import Call, Draw, exact

from pyengine.ops import write_cache, write_cache_reference

DTYPES = [mx.float32, mx.float16, mx.bfloat16]


def normal(seed: int, *shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32)).astype(dtype)


def fresh(*shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    """A cache of its own memory whose old content shows."""
    cache = normal(0, *shape, dtype=dtype) * 1
    mx.eval(cache)
    return cache


def address(x: mx.array) -> int:
    mx.eval(x)
    return np.from_dlpack(x).__array_interface__["data"][0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 7, 16), (2, 3, 35, 32), (1, 2, 64, 5)])
def test_matches_reference(shape, dtype):
    B, K, C, D = shape
    for offset in (0, 1, C - 1, C, 3 * C + 2, 1_000_003):
        for T in (1, 2, C - 1, C):
            new = normal(T, B, T, K, D, dtype=dtype)
            expected = write_cache_reference(fresh(*shape, dtype=dtype), new, mx.array(offset))
            out = write_cache(fresh(*shape, dtype=dtype), new, mx.array(offset))
            assert out.dtype == dtype and mx.array_equal(out, expected)


def test_slots_by_hand():
    cache = mx.zeros((1, 1, 4, 1))
    new = mx.array([10.0, 11.0, 12.0]).reshape(1, 3, 1, 1)
    assert write_cache(cache, new, mx.array(6)).flatten().tolist() == [12, 0, 10, 11]


@pytest.mark.parametrize("view", [lambda x: x[:, ::2], lambda x: x[:, :3, :, ::-1]])
def test_strided_new(view):
    new = view(normal(1, 2, 6, 3, 16))
    out = write_cache(fresh(2, 3, 5, 16), new, mx.array(4))
    assert mx.array_equal(out, write_cache_reference(fresh(2, 3, 5, 16), new, mx.array(4)))
    swapped = normal(2, 2, 3, 4, 16).transpose(0, 2, 1, 3)  # [B, K, T, D] seen as [B, T, K, D]
    out = write_cache(fresh(2, 3, 5, 16), swapped, mx.array(3))
    assert mx.array_equal(out, write_cache_reference(fresh(2, 3, 5, 16), swapped, mx.array(3)))


def test_writes_in_place_while_older_handles_live():
    cache = fresh(1, 2, 40, 16)
    where, handles = address(cache), [cache]
    for step in range(100):
        handles.append(write_cache(handles[-1], normal(step, 1, 3, 2, 16), mx.array(3 * step)))
        # A read that is still queued when the next write is built: donation would copy here.
        read = handles[-1].sum()
        if step % 10 == 0:
            mx.eval(read, handles[-1])
    assert address(handles[-1]) == where
    assert all(mx.array_equal(handle, handles[-1]) for handle in handles)


def test_memory_does_not_grow():
    cache = fresh(1, 4, 4096, 64)  # 4 MiB
    write = mx.compile(lambda cache, new, offset: write_cache(cache, new, offset))
    new, kept = normal(1, 1, 2, 4, 64), []
    mx.eval(new)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for step in range(50):
        cache = (
            write(cache, new, mx.array(step))
            if step % 2
            else write_cache(cache, new, mx.array(step))
        )
        kept.append(cache)
        mx.eval(cache)
    assert mx.get_peak_memory() - before < 1 << 20


def test_lazy_chain_keeps_order():
    """A write that depends on a read of the older version runs after it, evaluated all at once."""
    cache, offset, sums = mx.zeros((1, 1, 8, 4)), mx.array(0), []
    for step in range(20):
        cache = write_cache(cache, mx.full((1, 1, 1, 4), step + 1.0), offset)
        sums.append(cache.sum())
        offset = offset + 1 + (0 * sums[-1]).astype(mx.int32)
    mx.eval(cache, *sums)
    expected = [4.0 * sum(range(max(1, n - 7), n + 1)) for n in range(1, 21)]
    assert [s.item() for s in sums] == expected


def test_equal_writes_are_not_merged():
    @mx.compile
    def twice(a, b, new, offset):
        return write_cache(a, new, offset), write_cache(b, new, offset)

    a, b = twice(fresh(1, 1, 4, 2), fresh(1, 1, 4, 2), mx.ones((1, 1, 1, 2)), mx.array(2))
    assert address(a) != address(b)
    assert a[0, 0, 2].tolist() == b[0, 0, 2].tolist() == [1, 1]


def test_two_threads():
    found = {}

    def run(name: int) -> None:
        with mx.stream(mx.new_stream(mx.cpu)):
            cache = mx.zeros((1, 2, 16, 32))
            for step in range(200):
                new = mx.full((1, 1, 2, 32), float(1000 * name + step))
                cache = write_cache(cache, new, mx.array(step))
                if step % 20 == 0:
                    mx.eval(cache)
            found[name] = np.array(cache[0, :, :, 0])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    slots = 184 + (np.arange(16) - 184) % 16
    assert all(np.array_equal(found[i], np.tile(1000 * i + slots, (2, 1))) for i in range(2))


def test_refuses_a_strided_cache():
    cache = mx.zeros((1, 2, 8, 16))[:, :, ::2]
    with pytest.raises(RuntimeError, match=r"\[write_cache\] cache must be contiguous"):
        mx.eval(write_cache(cache, normal(1, 1, 1, 2, 16), mx.array(0)))


def test_errors():
    cache, new, offset = mx.zeros((1, 2, 8, 16)), normal(1, 1, 3, 2, 16), mx.array(0)
    with pytest.raises(ValueError, match=r"\[write_cache\] cache must .* but got uint8\."):
        write_cache(cache.astype(mx.uint8), new, offset)
    with pytest.raises(ValueError, match=r"\[write_cache\] cache must .* but got \[2, 8, 16\]\."):
        write_cache(cache[0], new, offset)
    with pytest.raises(ValueError, match=r"\[write_cache\] new must .* but got \[3, 2, 16\]\."):
        write_cache(cache, new[0], offset)
    with pytest.raises(ValueError, match=r"\[write_cache\] new must .* but got \[1, 3, 1, 16\]\."):
        write_cache(cache, new[:, :, :1], offset)
    with pytest.raises(ValueError, match=r"\[write_cache\] new must .* but got bfloat16\."):
        write_cache(cache, new.astype(mx.bfloat16), offset)
    with pytest.raises(ValueError, match=r"\[write_cache\] T must be at most .* 2 but got 3\."):
        write_cache(cache[:, :, :2], new, offset)
    with pytest.raises(ValueError, match=r"\[write_cache\] offset must .* but got \[1\]\."):
        write_cache(cache, new, offset[None])
    with pytest.raises(ValueError, match=r"\[write_cache\] offset must .* but got uint32\."):
        write_cache(cache, new, offset.astype(mx.uint32))


def random_call(d: Draw) -> Call:
    B, K, C = d.size(1, 2), d.size(1, 2, 3), d.size(1, 2, 7, 33)
    D, T, dtype = d.size(1, 3, 16, 65), d.pick((0, 1, 2, max(C - 1, 0), C, C + 1)), d.dtype()
    cache, new = d.cache(B, K, C, D, dtype=dtype), d.array(B, T, K, D, dtype=dtype)
    return Call((cache, new, d.whole(d.offset(3 * C))), {}, exact, written=(0,))


LIMITS = {}  # the Metal kernel takes every call

# What bench/bench_write_cache.py has to say that its SMALL call moves: 12 heads of 512 bytes in and
# out, and the offset
BENCH_BYTES = 2 * 12 * 512 + 4
