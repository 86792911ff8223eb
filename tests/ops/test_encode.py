"""What ops tell a GPU's command encoder, read from the notes of one that has no GPU."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from tiny_pairs import tiny_pair

import workbench
from pyengine import _ext, ops
from pyengine.model.head import whole
from pyengine.ops.workbench import named

LAUNCH = ("kernel", "constants", "grid", "threadgroup", "buffers", "threadgroup_memory")


@pytest.fixture
def rehearsal() -> Iterator[None]:
    _ext.rehearse(True, notes=True)
    yield
    _ext.rehearse(False)


def place(a: mx.array) -> int:
    """Where an evaluated array lies in memory."""
    address: int = np.array(a, copy=False).__array_interface__["data"][0]
    return address


def glu() -> mx.array:
    return ops.glu(mx.ones((3, 5)), mx.ones((3, 5)))


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
            mx.eval(glu())
    finally:
        _ext.rehearse(False)
    assert str(error.value) == (
        "[glu] a threadgroup of glu_float32 must be at most 128 threads on this GPU but got 256."
    )


@pytest.mark.usefixtures("rehearsal")
def test_calls_of_an_op_in_order():
    gate, up = mx.ones((3, 5)), mx.ones((3, 5))
    mx.eval(gate, up)
    mx.eval(ops.glu(gate, up))
    calls = _ext.rehearsed_calls()
    what = [(name, index) for name, index, _ in calls]
    assert what == [("input", 0), ("input", 1), ("output", 2), ("bytes", 3), ("glu_float32", -1)]
    assert [at for *_, at in calls[:2]] == [place(gate), place(up)]
    assert _ext.rehearsed_launches() == 1


def test_poisoned_results_are_computed_all_the_same():
    expected = glu()
    mx.eval(expected)
    _ext.poison_outputs(True)
    try:
        assert mx.array_equal(glu(), expected)
        _ext.rehearse(True)  # nothing computes
        result = glu()
        mx.eval(result)
    finally:
        _ext.rehearse(False)
        _ext.poison_outputs(False)
    assert np.all(np.array(result).view(np.uint8) == 0xAA)


@pytest.mark.skipif(mx.metal.is_available(), reason="has Metal")
def test_nothing_is_compiled_without_metal():
    (launch,) = _ext.launches_of(glu())[0]
    with pytest.raises(RuntimeError) as error:
        _ext.compile_launch(launch)
    assert str(error.value) == "[compile_launch] the extension was built without Metal."


def attention(k: mx.array, v: mx.array) -> mx.array:
    lengths, tables = mx.array([0]), mx.array([[0]])
    mx.eval(lengths, tables)
    return ops.block_attention(mx.ones((2, 2, 16)), k, v, lengths, tables, [2])


@pytest.mark.usefixtures("rehearsal")
def test_keys_and_values_are_in_use_until_they_are_read():
    k, v = mx.ones((1, 1, 64, 16)), mx.ones((1, 1, 64, 16))
    mx.eval(k, v)
    mx.eval(attention(k, v))
    calls = _ext.rehearsed_calls()
    for a in (k, v):
        reads = [i for i, (what, _, at) in enumerate(calls) if (what, at) == ("input", place(a))]
        assert len(reads) == 1
        assert calls[reads[0] + 1] == ("register", -1, place(a))
    assert sum(what == "register" for what, *_ in calls) == 2


def prepared(keys: mx.array, values: mx.array) -> list[mx.array]:
    q, k, ones, none = mx.ones((2, 32)), mx.ones((2, 16)), mx.ones(16), mx.array([0, 1])
    where = keys, values, none, none, mx.array([[0], [1]])
    return list(ops.prepare_qkv(q, k, k, ones, ones, mx.ones(8), *where))


@pytest.mark.usefixtures("rehearsal")
def test_arenas_that_are_written_in_place_are_outputs():
    """So whoever reads them next waits, and so do they for whoever registered its reads."""
    keys, values = (mx.ones((2, 1, 64, 16)) + i for i in range(2))
    mx.eval(keys, values)
    _, *after = prepared(keys, values)
    mx.eval(after)
    copied = ops.copy_pages(after[0], mx.array([0]), mx.array([1]))
    mx.eval(copied)
    outputs = {place(a) for a in (keys, values)}
    calls = [call for call in _ext.rehearsed_calls() if call[2] in outputs]
    assert calls == [
        ("output", 10, place(keys)),
        ("output", 11, place(values)),
        ("output", 2, place(keys)),
    ]


@pytest.mark.usefixtures("rehearsal")
def test_two_verify_calls_without_evaluation_between():
    """Whoever writes keys or values has a fence to wait for: that of the last that read them."""
    target = tiny_pair("dense31").target
    cache = target.new_cache()
    cache.reserve(6)
    caches = {place(a) for a in cache.arrays if a.ndim == 4}
    ids = mx.array([1, 2, 3])
    mx.eval(ids)
    _ext.rehearse(True, notes=True)
    results = []
    for _ in range(2):
        logits, _ = target.forward([ids], [cache])
        results.append(whole(logits))
    mx.eval(results, cache.arrays)
    calls = _ext.rehearsed_calls()
    written = dict.fromkeys(caches, 0)
    for i, (what, _, at) in enumerate(calls):
        if at in caches and what == "input":
            assert calls[i + 1] == ("register", -1, at)
        if at in caches and what == "output":
            written[at] += 1
            reads = [w for w, _, where in calls[:i] if where == at and w == "input"]
            assert len(reads) == written[at] - 1  # behind those of the calls before it
    assert set(written.values()) == {2}


@pytest.mark.usefixtures("rehearsal")
def test_a_strided_input_is_copied_and_state_is_not():
    wide = mx.ones((3, 10))
    mx.eval(wide)
    graph = ops.glu(wide[:, ::2], wide[:, 5:])
    mx.eval(graph)
    what = [name for name, *_ in _ext.rehearsed_calls()]
    assert what == ["copy", "copy", "input", "input", "output", "bytes", "glu_float32"]
    strided = mx.ones((1, 128, 1, 16)).swapaxes(1, 2)[:, :, ::2]
    with pytest.raises(RuntimeError) as error:
        mx.eval(attention(strided, strided))
    assert str(error.value) == (
        "[block_attention] keys must be contiguous on a GPU but got a strided view; pass "
        "mx.contiguous of it."
    )


@pytest.mark.usefixtures("rehearsal")
def test_a_misaligned_input_is_refused():
    x = mx.ones(4 * 64 + 1)[1:].reshape(4, 64)
    w = mx.ones((32, 64))
    with pytest.raises(RuntimeError, match=r"\[dense_matmul\] x must start on 16 bytes but starts"):
        mx.eval(ops.dense_matmul(x, w))
    arena = mx.ones(2 * 64 * 16 + 1)[1:].reshape(2, 1, 64, 16)
    with pytest.raises(RuntimeError, match=r"\[copy_pages\] arena must start on 16 bytes but sta"):
        mx.eval(ops.copy_pages(arena, mx.array([0]), mx.array([1])))
    with pytest.raises(RuntimeError, match=r"\[prepare_qkv\] keys must start on 8 bytes"):
        mx.eval(prepared(arena, mx.ones(arena.shape)))


def test_a_node_that_is_evaluated_again_follows_its_inputs():
    """Launches are kept for the next time; aligned logits have others than those that are not."""
    logits = mx.random.normal((1, 4097), key=mx.random.key(0))
    mx.eval(logits)
    filtered = _ext.Recorded(lambda arrays: list(ops.filter_logits(arrays[0], top_k=3)))
    _ext.rehearse(True)
    try:
        for start in (0, 1, 0):
            mx.eval(filtered([logits[:, start : start + 4096]]))
        assert filtered.tapes == 1 and _ext.rehearsed_launches() == 3 * 2
    finally:
        _ext.rehearse(False)


def test_no_node_is_there_for_contiguity():
    """Inputs that are lazy, which nobody knows to be contiguous."""
    x = mx.ones((3, 64)) + 1
    _ext.rehearse(True)
    try:
        played = _ext.Recorded(lambda arrays: [ops.rms_norm(ops.softcap(arrays[0], 30.0))])
        played([x])
        assert played.nodes == ["softcap", "rms_norm"]
    finally:
        _ext.rehearse(False)


def test_what_is_compiled_has_one_instantiation_and_a_name_of_its_own():
    names = {_ext.compiled_name(*known) for known in _ext.metal_kernels()}
    assert len(names) == len(_ext.metal_kernels()) > 80
    for library, kernel in _ext.metal_kernels():
        text = _ext.metal_source(library, kernel)
        assert text.count(f'"{kernel}"') == 1
        ending = rf"""(namespace pyengine \{{
INSTANTIATE\(\s*"{kernel}",[^;]*\)
\}} // namespace pyengine
)?"""
        assert re.search(r"\n\} // namespace pyengine\n" + ending + r"\Z", text)


def test_what_is_compiled_runs(tmp_path):
    """The text that a Mac would be given, in the workbench."""
    x = mx.random.normal((3, 40), key=mx.random.key(1))
    (launch,), inputs = _ext.launches_of(ops.rms_norm(x))
    path = tmp_path / "rms_norm.metal"
    path.write_text(_ext.metal_source(launch.library, launch.kernel))
    given = SimpleNamespace(**{name: getattr(launch, name) for name in LAUNCH})
    given.library = str(path)
    outputs, _ = workbench.run(given, named([launch], inputs))
    assert np.array_equal(outputs["out"], np.array(ops.rms_norm(x)))
