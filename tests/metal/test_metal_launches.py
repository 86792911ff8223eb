"""The launches of every op beside its arrays: each is bound by its place alone."""

from __future__ import annotations

import math

import mlx.core as mx
import pytest
from fuzz_ops import CALLS, HOUSE, Draw, flat

from pyengine import _ext, ops
from pyengine.ops import dispatch

CONVERTED = {"accept_block", "block_attention", "draw_token", "embed", "filter_logits", "geglu"}
CONVERTED |= {"norm_rope", "prepare_qkv", "quantized_matmul", "random_uniform", "residual_norm"}
CONVERTED |= {"rms_norm", "softcap", "write_cache"}
# Too large for any kernel: rows, or a row
BEYOND = {
    "accept_block": lambda: ops.accept_block(*drafts(129), rule="block", vocab=9)[0],
    "block_attention": lambda: ops.block_attention(*3 * [mx.zeros((1, 129, 129, 16))], mx.array(0)),
    "filter_logits": lambda: ops.filter_logits(mx.zeros((1, 300)), top_k=0).probs,
    "quantized_matmul": lambda: ops.quantized_matmul(mx.zeros((129, 64)), *matrix()),
    "residual_norm": lambda: ops.residual_norm(*2 * [mx.zeros((1, 16385))], mx.ones(16385))[0],
    "rms_norm": lambda: ops.rms_norm(mx.zeros((1, 16385))),
}


def matrix() -> tuple[mx.array, ...]:
    return mx.quantize(mx.zeros((32, 64)), 64, 8)


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


@pytest.mark.parametrize("op", sorted(CONVERTED))
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


@pytest.mark.parametrize("op", BEYOND)
def test_a_limit_is_one_for_gpu_and_workbench(op, monkeypatch):
    """Past it a GPU runs plain MLX and the workbench the processor's kernel."""
    assert _ext.launches_of(BEYOND[op]())[0] is None
    expected = BEYOND[op]()
    monkeypatch.setattr(ops.workbench, "run", None)  # whoever calls it fails
    ops.use("workbench")
    try:
        assert mx.array_equal(BEYOND[op](), expected)
    finally:
        ops.use("native")
    monkeypatch.setattr(dispatch.mx, "default_device", lambda: mx.gpu)
    with pytest.raises(ValueError) as error:  # no node of ours
        _ext.launches_of(BEYOND[op]())
    assert "must be lazy and made by an op of pyengine but got one of " in str(error.value)


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
