"""The launches of every op beside its arrays: each is bound by its place alone."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest
from fuzz_ops import CALLS, HOUSE, Draw, flat

from pyengine import _ext, ops
from pyengine.ops import dispatch

# Of a call of any size the largest that a kernel takes: rows, a row, or what a threadgroup keeps
LIMITS: dict[str, tuple[int, Callable[[int], Any]]] = {
    "accept_block": (128, lambda n: ops.accept_block(*drafts(n), rule="block", vocab=9)),
    "block_attention": (
        128,
        lambda n: ops.block_attention(*3 * [mx.zeros((1, n, n, 16))], mx.array(0)),
    ),
    "dense_matmul": (128, lambda n: ops.dense_matmul(mx.zeros((n, 64)), mx.zeros((32, 64)))),
    "filter_logits of candidates": (256, lambda n: ops.filter_logits(mx.zeros((1, n)), top_k=0)),
    "filter_logits of lists": (
        64 * 4096,
        lambda n: ops.filter_logits(mx.zeros((1, n)), top_k=256),
    ),
    "quantized_expert_matmul of tokens": (128, lambda n: experts(n, 2)),
    "quantized_expert_matmul of slots": (32, lambda n: experts(2, n)),
    "quantized_filter_logits": (
        9,
        lambda n: ops.quantized_filter_logits(mx.zeros((n, 64)), *matrix(300), top_k=256),
    ),
    "quantized_gated_matmul": (
        128,
        lambda n: ops.quantized_gated_matmul(mx.zeros((n, 64)), matrix(), matrix()),
    ),
    "quantized_matmul": (128, lambda n: ops.quantized_matmul(mx.zeros((n, 64)), *matrix())),
    "quantized_matmuls": (
        128,
        lambda n: ops.quantized_matmuls(mx.zeros((n, 64)), [matrix()] * 2),
    ),
    "residual_norm": (
        16384,
        lambda n: ops.residual_norm(*2 * [mx.zeros((1, n))], mx.ones(n)),
    ),
    "rms_norm": (16384, lambda n: ops.rms_norm(mx.zeros((1, n)))),
    "route_experts": (32, lambda n: ops.route_experts(mx.zeros((1, 64)), mx.zeros(64), n)),
}


def matrix(N: int = 32) -> tuple[mx.array, mx.array, mx.array]:
    w, scales, biases = mx.quantize(mx.zeros((N, 64)), 64, 8)
    return w, scales, biases


def experts(T: int, U: int) -> mx.array:
    w, scales, biases = (a[None] for a in matrix())
    ids = mx.zeros((T, U), mx.int32)
    return ops.quantized_expert_matmul(mx.zeros((T, 64)), (w, scales, biases), ids)


def drafts(k: int) -> list[mx.array]:
    """The arrays of accept_block: all rows have one candidate, which is every draft."""
    ids, probs = mx.zeros((k + 1, 1), mx.int32), mx.ones((k + 1, 1))
    position, seed = mx.array(5), mx.array(1, dtype=mx.uint32)
    return [ids, probs, ids[1:], probs[1:], ids[1:, 0], position, seed]


def results(op: str) -> list[list[mx.array]]:
    """Of random calls, those that are not refused; lazy."""
    kept = []
    for seed in range(40):
        call = CALLS[op](Draw((9, seed)))
        try:
            kept.append(flat(getattr(ops, op)(*call.args, **call.options)))
        except ValueError as error:
            assert HOUSE.match(str(error))
    return kept


def is_that(buffer: _ext.Buffer, a: mx.array) -> bool:
    dtype = str(a.dtype).removeprefix("mlx.core.")
    return (buffer.dtype, math.prod(buffer.shape)) == (dtype, a.size)


@pytest.mark.parametrize("op", dispatch.OPS)
def test_buffers_are_the_arrays_in_order(op):
    launched = 0
    for outs in results(op):
        launches, inputs = _ext.launches_of(outs)
        if not launches:  # nothing to compute or to write, or past a limit
            assert launches is None or inputs[0].size == 0 or all(a.size == 0 for a in outs)
            continue
        launched += 1
        assert {launches[0].library} <= set(dispatch.OPS)
        read, written = _ext.launch_arguments(launches)
        assert all(is_that(b, a) for b, a in zip(read, inputs, strict=True))
        assert all(is_that(b, a) for b, a in zip(written, outs, strict=True))
        for launch in launches:
            assert min(*launch.grid, *launch.threadgroup) > 0
    assert launched > 5


@pytest.mark.parametrize("name", LIMITS)
def test_a_limit_is_one_for_gpu_and_workbench(name, monkeypatch, tmp_path):
    """Past it a GPU runs other nodes and the workbench the processor's kernel."""
    op, (limit, call) = name.split()[0], LIMITS[name]
    assert _ext.launches_of(flat(call(limit)))[0]
    expected = flat(call(limit + 1))
    assert _ext.launches_of(expected)[0] is None
    monkeypatch.setattr(ops.workbench, "run", None)  # whoever calls it fails
    ops.use("workbench")
    try:
        pairs = zip(flat(call(limit + 1)), expected, strict=True)
        assert all(mx.array_equal(a, b) for a, b in pairs)
    finally:
        ops.use("native")
    monkeypatch.setattr(dispatch.mx, "default_device", lambda: mx.gpu)
    mx.export_to_dot(str(tmp_path / "graph"), *flat(call(limit + 1)))
    nodes = re.findall(r'label ="(\w+)', (tmp_path / "graph").read_text())
    assert nodes and op not in nodes


def test_what_is_no_lazy_result_is_refused():
    text = "[launches_of] result must be lazy and made by an op of pyengine but got "
    x = mx.zeros(4)
    for given, got in ((x + 1, "one of Add."), ([], "an evaluated array."), (x, None)):
        mx.eval(x)
        with pytest.raises(ValueError) as error:
            _ext.launches_of(given)
        assert str(error.value) == text + (got or "an evaluated array.")


def test_inputs_are_not_evaluated():
    gate = mx.zeros((2, 3)) + 1
    launches, inputs = _ext.launches_of(ops.geglu(gate, gate * 2))
    assert launches and launches[0].kernel == "geglu_float32"
    with pytest.raises(ValueError, match="but got one of Multiply"):  # a node, still
        _ext.launches_of(inputs[1])
