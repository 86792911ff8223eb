"""What ops tell a GPU's command encoder, read from the notes of one that has no GPU."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest

from pyengine import _ext, ops


@pytest.fixture
def rehearsal() -> Iterator[None]:
    _ext.rehearse(True, notes=True)
    yield
    _ext.rehearse(False)


def geglu() -> mx.array:
    return ops.geglu(mx.ones((3, 5)), mx.ones((3, 5)))


def merge(top_k: int) -> _ext.Launch:
    """The second launch of a filter over the whole vocabulary."""
    launches = _ext.launches_of(ops.filter_logits(mx.zeros((1, 262144)), top_k=top_k))[0]
    assert launches and launches[1].kernel == "merge_candidates"
    return launches[1]


def test_what_a_device_would_drop_is_a_sentence():
    launch = merge(64)
    threads = launch.threadgroup[0]

    def refusal(max_threads: int = 1024, static: int = 512, limit: int = 32768) -> str:
        return _ext.launch_refusal("filter_logits", launch, max_threads, static, limit)

    assert refusal() == refusal(max_threads=threads) == refusal(static=32768) == ""
    assert refusal(max_threads=threads - 32) == (
        f"[filter_logits] a threadgroup of merge_candidates must be at most {threads - 32} threads "
        f"on this GPU but got {threads}."
    )
    assert refusal(static=32769) == (
        "[filter_logits] threadgroup memory of merge_candidates must be at most 32768 bytes on "
        "this GPU but got 32769."
    )


def test_memory_of_arguments_counts_too():
    x, w = mx.zeros((6, 256)), mx.zeros((64, 256))
    (launch,) = _ext.launches_of(ops.dense_matmul(x, w))[0]
    own = sum(size for _, size in launch.threadgroup_memory)
    assert own > 0
    assert _ext.launch_refusal("dense_matmul", launch, 1024, 100, own + 100) == ""
    assert f"got {own + 100}." in _ext.launch_refusal("dense_matmul", launch, 1024, 100, own + 99)


def test_a_launch_past_a_pipelines_limit_raises():
    _ext.rehearse(True, max_threads=128)
    try:
        with pytest.raises(RuntimeError) as error:
            mx.eval(geglu())
    finally:
        _ext.rehearse(False)
    assert str(error.value) == (
        "[geglu] a threadgroup of geglu_float32 must be at most 128 threads on this GPU but got "
        "256."
    )


@pytest.mark.usefixtures("rehearsal")
def test_calls_of_an_op_in_order():
    gate, up = mx.ones((3, 5)), mx.ones((3, 5))
    mx.eval(gate, up)
    mx.eval(ops.geglu(gate, up))
    calls = _ext.rehearsed_calls()
    what = [(name, index) for name, index, _ in calls]
    assert what == [("input", 0), ("input", 1), ("output", 2), ("bytes", 3), ("geglu_float32", -1)]
    places = [np.array(a, copy=False).__array_interface__["data"][0] for a in (gate, up)]
    assert [place for *_, place in calls[:2]] == places
    assert _ext.rehearsed_launches() == 1


def test_poisoned_results_are_computed_all_the_same():
    expected = geglu()
    mx.eval(expected)
    _ext.poison_outputs(True)
    try:
        assert mx.array_equal(geglu(), expected)
        _ext.rehearse(True)  # nothing computes
        result = geglu()
        mx.eval(result)
    finally:
        _ext.rehearse(False)
        _ext.poison_outputs(False)
    assert np.all(np.array(result).view(np.uint8) == 0xAA)


@pytest.mark.skipif(mx.metal.is_available(), reason="has Metal")
def test_nothing_is_compiled_without_metal():
    (launch,) = _ext.launches_of(geglu())[0]
    with pytest.raises(RuntimeError) as error:
        _ext.compile_launch(launch)
    assert str(error.value) == "[compile_launch] the extension was built without Metal."
