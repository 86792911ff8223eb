"""draw_token and random_uniform on Metal, in the workbench: the same numbers, the same tokens."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from launched import launched
from one_text import draw_rows
from test_draw_token import rows
from test_random_uniform import KNOWN, counters

import workbench
from pyengine import ops
from pyengine.ops.draw_token import exponential

SEED = mx.array(2**32 - 5, dtype=mx.uint32)


def numbers(x: mx.array, key: tuple[int, int], **options: Any) -> np.ndarray:
    (out,), _ = launched(ops.random_uniform(x, key), **options)
    return np.array(out)


def draw(
    ids: mx.array,
    probs: mx.array,
    position: int,
    seed: mx.array,
    *,
    index: int = 0,
    shared: bool,
    **options: Any,
) -> np.ndarray:
    result = draw_rows(ids, probs, mx.array(position), seed, index=index, shared=shared)
    (out,), _ = launched(result, **options)
    return np.array(out)


@pytest.mark.parametrize(("counter", "key", "word"), KNOWN)
def test_known_answers(counter, key, word):
    out = numbers(mx.array(np.array([counter], np.uint32)), key, mode="check")
    assert out.tolist() == [(word >> 8) * 2.0**-24]


def test_random_uniform_is_the_processors():
    x = counters(1, 1000)
    expected = np.array(ops.random_uniform(x, (7, 3)))
    for options in ({"mode": "check", "order": "random"}, {"contract": "fast"}):
        assert np.array_equal(numbers(x, (7, 3), **options), expected)
    ops.use("workbench")
    try:
        out = ops.random_uniform(x.reshape(10, 100, 4), (7, 3))
        assert ops.random_uniform(x[:0], (7, 3)).shape == (0,)
    finally:
        ops.use("native")
    assert np.array_equal(np.array(out), expected.reshape(10, 100))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("n", [1, 31, 32, 33, 256, 3000])
def test_no_fault_and_the_processors_tokens(n, shared):
    """Under contraction too: a fused product in the logarithm would decide some race otherwise."""
    ids, probs = rows(n, 4, n)
    kw: dict[str, Any] = {"index": 3, "shared": shared}
    expected = np.array(draw_rows(ids, probs, mx.array(70), SEED, **kw))
    for options in (
        {"mode": "check"},
        {"mode": "check", "order": "reverse"},
        {"mode": "check", "order": "random"},
        {"contract": "fast"},
    ):
        assert np.array_equal(draw(ids, probs, 70, SEED, **kw, **options), expected)


EXPONENTIAL = """
#include "rng.h"
kernel void apply(
    const device float* u [[buffer(0)]],
    device float* out [[buffer(1)]],
    constant uint& count [[buffer(2)]],
    constant float& minus_zero [[buffer(3)]],
    uint i [[thread_position_in_grid]]) {
  if (i < count) {
    out[i] = pyengine::exponential(u[i], minus_zero);
  }
}
"""


@pytest.mark.parametrize("contract", ["off", "fast"])
def test_times_of_a_race_are_the_references(contract, tmp_path):
    """Bit for bit, under any contraction; both ends of the grid included."""
    words = np.random.default_rng(0).integers(0, 2**24, 20_000)
    words[:4] = 0, 1, 2**24 - 2, 2**24 - 1
    u = (words * 2.0**-24).astype(np.float32)
    (tmp_path / "apply.metal").write_text(EXPONENTIAL)
    launch = workbench.Launch(
        library=str(tmp_path / "apply.metal"),
        kernel="apply",
        grid=((u.size + 255) // 256, 1, 1),
        threadgroup=(256, 1, 1),
        buffers=(
            workbench.Buffer("u", "in", u.shape, "float32"),
            workbench.Buffer("out", "out", u.shape, "float32"),
            workbench.Buffer("count", "bytes", data=u.size.to_bytes(4, "little")),
            workbench.Buffer("minus_zero", "bytes", data=np.float32(-0.0).tobytes()),
        ),
    )
    outputs, _ = workbench.run(launch, {"u": u}, contract=contract)
    expected = np.array(exponential(mx.array(u)))
    assert np.array_equal(outputs["out"].view(np.uint32), expected.view(np.uint32))


def test_hard_rows():
    """Only one is possible; none is; a mass of the smallest float; a row of NaN."""
    table = np.zeros((5, 40), np.float32)
    table[0, 33] = 1
    table[2, 7] = 2.0**-149
    table[3] = np.nan
    table[4, :] = np.where(np.arange(40) % 2, 1e30, 1e-30)
    ids = mx.array(np.random.default_rng(1).permutation(200).reshape(5, 40).astype(np.int32))
    for position in range(30):
        for shared in (True, False):
            out = draw(ids, mx.array(table), position, SEED, shared=shared)
            expected = draw_rows(ids, mx.array(table), mx.array(position), SEED, shared=shared)
            assert out.tolist() == expected.tolist()


def fuzz(cases: int, T: int, seed: int) -> None:
    """So many rows, T a launch, drawn both ways in all three implementations."""
    rng = np.random.default_rng(seed)
    for i in range(-(-cases // T)):
        n = int(rng.choice([1, 2, 5, 31, 32, 33, 64, 200, 256]))
        ids, probs = rows(int(rng.integers(2**31)), T, n)
        scale = rng.choice([1.0, 1.0, 1e-30, 3e4], (T, 1)).astype(np.float32)
        hot = rng.random((T, 1)) < 0.1
        probs = mx.array(np.where(hot, np.eye(n, dtype=np.float32)[rng.integers(0, n, T)],
                                  np.array(probs) * scale))  # fmt: skip
        position, index = int(rng.integers(2**20)), int(rng.integers(100))
        word = mx.array(int(rng.integers(2**32)), dtype=mx.uint32)
        args = (ids, probs, mx.array(position), word)
        for shared in (True, False):
            kw: dict[str, Any] = {"index": index, "shared": shared}
            out = draw(ids, probs, position, word, **kw).tolist()
            assert out == draw_rows(*args, **kw).tolist(), (i, kw)
            assert out == draw_rows(*args, **kw, op=ops.draw_token_reference).tolist(), (i, kw)


def test_fuzzed():
    fuzz(2000, 50, seed=1)


@pytest.mark.long
def test_fuzzed_ten_thousand_times():
    fuzz(10_000, 50, seed=2)


def test_switch_runs_it(monkeypatch):
    ran = []
    run = ops.workbench.run
    monkeypatch.setattr(
        ops.workbench, "run", lambda made, *rest: ran.append(made[0].kernel) or run(made, *rest)
    )
    ids, probs = rows(3, 2, 8)
    ops.use("workbench")
    try:
        out = draw_rows(ids, probs, mx.array(4), SEED, index=2, shared=True)
        draw_rows(ids[:, ::2], probs[:, ::2], mx.array(4), SEED, shared=False)
        draw_rows(ids[:0], probs[:0], mx.array(4), SEED, shared=False)
    finally:
        ops.use("native")
    assert ran == ["draw_token"] * 2
    expected = draw_rows(ids, probs, mx.array(4), SEED, index=2, shared=True)
    assert out.tolist() == expected.tolist()
