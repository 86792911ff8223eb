"""copy_pages: kernel against reference and by hand, aliasing, pages there are not, errors."""

import threading

import mlx.core as mx
import numpy as np
import pytest
from draw import INT32, Call, Draw, exact

from pyengine import _ext, ops
from pyengine.ops import copy_pages

DTYPES = [mx.float32, mx.float16, mx.bfloat16]
POISON = -1  # every bit set: a NaN of any dtype


def normal(seed: int, *shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32)).astype(dtype)


def fresh(*shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    """An arena of its own memory whose old content shows."""
    arena = normal(0, *shape, dtype=dtype) * 1
    mx.eval(arena)
    return arena


def poisoned(*shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    """An arena of NaN."""
    word = mx.int32 if dtype == mx.float32 else mx.int16
    arena = mx.contiguous(mx.full(shape, POISON, word).view(dtype))
    mx.eval(arena)
    return arena


def bits(x: mx.array) -> np.ndarray:
    return np.array(mx.contiguous(x).view(mx.uint32 if x.dtype == mx.float32 else mx.uint16))


def address(x: mx.array) -> int:
    mx.eval(x)
    return np.from_dlpack(x.view(mx.uint8)).__array_interface__["data"][0]


def int32(values: object) -> mx.array:
    return mx.array(np.array(values, dtype=np.int64).astype(np.int32))


def by_hand(arena: mx.array, sources: list[int], targets: list[int]) -> np.ndarray:
    """Bits of the arena afterwards."""
    before = bits(arena)
    after, P = before.copy(), len(before)
    for source, target in zip(sources, targets, strict=True):
        if 0 <= source < P and 0 <= target < P:
            after[target] = before[source]
    return after


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 1, 64, 2), (7, 3, 64, 34), (9, 2, 64, 256), (5, 1, 64, 7)])
@pytest.mark.parametrize("implementation", ["native", "reference", "workbench"])
def test_pages_by_hand(shape, dtype, implementation):
    rng = np.random.default_rng(3)
    ops.use(implementation)
    try:
        for n in (0, 1, shape[0] // 2):
            pages = rng.permutation(shape[0]).tolist()
            sources, targets = pages[:n], pages[n : 2 * n]
            if n > 1:
                sources[1] = sources[0]  # one page to two
            arena = fresh(*shape, dtype=dtype)
            want = by_hand(arena, sources, targets)
            out = copy_pages(arena, int32(sources), int32(targets))
            assert out.dtype == dtype and np.array_equal(bits(out), want)
    finally:
        ops.use("native")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("implementation", ["native", "reference", "workbench"])
def test_nan_travels_and_nothing_else_is_touched(dtype, implementation):
    arena = poisoned(6, 2, 64, 4, dtype=dtype)
    arena[3] = normal(1, 2, 64, 4, dtype=dtype)
    arena = mx.contiguous(arena)
    mx.eval(arena)
    want = by_hand(arena, [3, 0], [5, 1])
    ops.use(implementation)
    try:
        out = copy_pages(arena, int32([3, 0]), int32([5, 1]))
        mx.eval(out)
    finally:
        ops.use("native")
    assert np.array_equal(bits(out), want)


@pytest.mark.parametrize("implementation", ["native", "reference", "workbench"])
def test_pages_that_there_are_not_are_left_out(implementation):
    """Whatever the device says: no byte of another's, and the rest of the pairs is copied."""
    P = 5
    wrong = [*INT32, P, P + 1, -P]
    sources = [*wrong, *[0] * len(wrong), *wrong, 4, 1]
    targets = [*[1] * len(wrong), *wrong, *wrong[::-1], 2, 1]  # page 1 to itself
    arena = fresh(P, 2, 64, 6)
    want = by_hand(arena, sources, targets)
    assert np.array_equal(want[2], bits(arena)[4]) and np.array_equal(want[1], bits(arena)[1])
    ops.use(implementation)
    try:
        out = copy_pages(arena, int32(sources), int32(targets) + int32(0))
        mx.eval(out)
    finally:
        ops.use("native")
    assert np.array_equal(bits(out), want)


def test_strided_pages():
    arena = fresh(8, 1, 64, 4)
    want = by_hand(arena, [6, 4, 2], [1, 3, 5])
    pages = mx.arange(9)[::-1]  # 8 7 6 5 4 3 2 1 0
    sources, targets = pages[2::2][:3], mx.arange(12).reshape(6, 2)[:3, 1]
    out = copy_pages(arena, sources, targets)
    assert np.array_equal(bits(out), want)


def test_writes_in_place_while_older_handles_live():
    arena = fresh(12, 2, 64, 16)
    where, handles = address(arena), [arena]
    for step in range(100):
        pair = int32([step % 12]), int32([(step + 5) % 12])
        handles.append(copy_pages(handles[-1], *pair))
        # A read that is still queued when the next write is built: donation would copy here
        read = handles[-1].sum()
        if step % 10 == 0:
            mx.eval(read, handles[-1])
    assert address(handles[-1]) == where
    assert all(mx.array_equal(handle, handles[-1]) for handle in handles)


def test_memory_does_not_grow():
    arena = fresh(64, 4, 64, 64)  # 4 MiB
    copy = mx.compile(lambda arena, s, t: copy_pages(arena, s, t))
    kept, pair = [], (int32([3, 4]), int32([5, 6]))
    mx.eval(pair)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for step in range(50):
        arena = copy(arena, *pair) if step % 2 else copy_pages(arena, *pair)
        kept.append(arena)
        mx.eval(arena)
    assert mx.get_peak_memory() - before < 1 << 20


def test_lazy_chain_keeps_order():
    """A write that depends on a read of the older version runs after it, evaluated all at once."""
    arena = mx.contiguous(mx.broadcast_to(mx.arange(8.0)[:, None, None, None], (8, 1, 64, 1)))
    mx.eval(arena)
    source, firsts = mx.array([0]), []
    for step in range(1, 8):
        arena = copy_pages(arena, source, int32([step]))
        firsts.append(arena[:, 0, 0, 0] + 0)  # no view
        # The page that was written is the next one's source
        source = int32([step]) + (0 * firsts[-1].sum()).astype(mx.int32)
    mx.eval(arena, *firsts)
    for step, found in enumerate(firsts, 1):
        assert found.tolist() == [*[0] * (step + 1), *range(step + 1, 8)]


def test_equal_copies_are_not_merged():
    @mx.compile
    def twice(a, b, sources, targets):
        return copy_pages(a, sources, targets), copy_pages(b, sources, targets)

    a, b = twice(fresh(2, 1, 64, 2), fresh(2, 1, 64, 2), mx.array([0]), mx.array([1]))
    assert address(a) != address(b)
    assert mx.array_equal(a[0], a[1]) and mx.array_equal(a, b)


def test_two_threads():
    found = {}

    def run(name: int) -> None:
        with mx.stream(mx.new_stream(mx.cpu)):
            arena = mx.full((16, 2, 64, 8), float(name))
            arena[0] = 100.0 + name
            arena = mx.contiguous(arena)
            mx.eval(arena)
            for step in range(200):
                page = step % 15
                arena = copy_pages(arena, int32([page]), int32([page + 1]))
                if step % 20 == 0:
                    mx.eval(arena)
            found[name] = np.array(arena)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all((found[i] == 100 + i).all() for i in range(2))


@pytest.mark.parametrize("shape", [(0, 2, 64, 4), (3, 0, 64, 4), (3, 2, 64, 0)])
@pytest.mark.parametrize("implementation", ["native", "mlx", "reference", "workbench"])
def test_an_arena_of_nothing(shape, implementation):
    ops.use(implementation)
    try:
        out = copy_pages(mx.zeros(shape), mx.array([0, 1]), mx.array([1, 2]))
        assert out.shape == shape and out.size == 0
        mx.eval(out)
    finally:
        ops.use("native")


def test_refuses_a_strided_arena():
    arena = mx.zeros((4, 2, 64, 16))[::2]
    with pytest.raises(RuntimeError, match=r"\[copy_pages\] arena must be contiguous but got a s"):
        mx.eval(copy_pages(arena, mx.array([0]), mx.array([1])))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"arena": mx.zeros((4, 1, 64, 2), mx.uint8)}, r"arena must be float32, .* got uint8\."),
        ({"arena": mx.zeros((1, 64, 2))}, r"arena must have shape \[P, K, 64, D\] .* \[1, 64, 2\]"),
        ({"arena": mx.zeros((4, 1, 63, 2))}, r"arena must have shape .* got \[4, 1, 63, 2\]\."),
        ({"sources": mx.array(0)}, r"sources must have shape \[n\] but got \[\]\."),
        ({"sources": mx.zeros(2)}, r"sources must be int32 but got float32\."),
        ({"targets": mx.zeros(2, mx.uint32)}, r"targets must be int32 but got uint32\."),
        ({"targets": mx.array([1])}, r"targets must have shape \[2\] but got \[1\]\."),
    ],
)
@pytest.mark.parametrize("implementation", ["native", "reference"])
def test_what_is_refused(changes, message, implementation):
    given = {"arena": mx.zeros((4, 1, 64, 2)), "sources": mx.array([0, 1])}
    given |= {"targets": mx.array([2, 3])}
    ops.use(implementation)
    try:
        with pytest.raises(ValueError, match=r"^\[copy_pages\] " + message):
            copy_pages(**given | changes)
    finally:
        ops.use("native")


def test_a_gpu_copies_16_bytes_a_thread_of_any_dtype():
    for dtype, words in ((mx.float32, 64), (mx.bfloat16, 32)):
        copy = copy_pages(
            mx.zeros((5, 2, 64, 2), dtype), mx.zeros(3, mx.int32), mx.array([1, 2, 3])
        )
        (launch,), inputs = _ext.launches_of(copy)
        assert launch.kernel == "copy_pages" and launch.grid == [1, 3, 1]
        buffers = {b.name: b for b in launch.buffers}
        assert buffers["arena"].role == "inout" and buffers["arena"].alignment == 16
        assert int.from_bytes(buffers["words"].data, "little") == words
        assert [b.name for b in _ext.launch_arguments([launch])[0]] == [
            "sources",
            "targets",
            "arena",
        ]
        assert [a.shape for a in inputs] == [(3,), (3,), (5, 2, 64, 2)]


def random_call(d: Draw) -> Call:
    P, K, D, dtype = d.size(1, 2, 9), d.size(1, 2), d.size(1, 3, 16), d.dtype()
    place = 63 if d.chance(0.03) else 64
    arena = d.cache(P, K, place, D, dtype=dtype)
    pages = d.rng.permutation(P)
    n = P // 2
    sources, targets = pages[:n], pages[n : 2 * n]
    if d.chance(0.5):  # and pairs that are none
        more = d.rng.choice([*INT32, P, -P], n)
        sources, targets = np.append(sources, more), np.append(targets, more[::-1])
        if n and d.chance(0.5):
            sources[-1] = d.rng.integers(P)
    if d.chance(0.03):
        targets = targets[1:]
    pair = (d.laid_out(mx.array(a.astype(np.int32))) for a in (sources, targets))
    return Call((arena, *pair), {}, exact, written=(0,))


LIMITS = {}  # the Metal kernel takes every call

# What bench/bench_copy_pages.py has to say that its SMALL call moves: 2 pages of 2 heads of 64
# places of 512 bytes, in and out, and their numbers
BENCH_BYTES = 2 * 2 * 2 * 64 * 512 + 16
