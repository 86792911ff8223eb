"""The launches of every op beside its arrays: each is bound by its place alone."""

from __future__ import annotations

import importlib
import math
import re

import mlx.core as mx
import pytest
from draw import HOUSE
from fuzz_ops import flat, random_call

from pyengine import _ext, ops
from pyengine.ops import dispatch
from workbench.library import METAL

# Of each op the largest calls that its kernel takes: rows, a row, or what a threadgroup keeps
LIMITS = [
    pytest.param(op, limit, call, id=f"{op} of {what}")
    for op in dispatch.OPS
    for what, (limit, call) in importlib.import_module(f"test_{op}").LIMITS.items()
]


def results(op: str) -> list[list[mx.array]]:
    """Of random calls, those that are not refused; lazy."""
    kept = []
    for seed in range(40):
        call = random_call(op, (9, seed))
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
        if launches is None:  # past a limit
            assert importlib.import_module(f"test_{op}").LIMITS
            continue
        if not launches:  # nothing to compute or to write
            assert inputs[0].size == 0 or all(a.size == 0 for a in outs)
            continue
        launched += 1
        assert {launches[0].library} <= set(dispatch.OPS)
        read, written = _ext.launch_arguments(launches)
        assert all(is_that(b, a) for b, a in zip(read, inputs, strict=True))
        assert all(is_that(b, a) for b, a in zip(written, outs, strict=True))
        for launch in launches:
            assert min(*launch.grid, *launch.threadgroup) > 0
    assert launched > 5


# Where neither a random call nor one at a limit has as many threads as a kernel may have
WIDE = {
    "embed": lambda: ops.embed(mx.zeros(1, mx.int32), [mx.zeros((2, 1024))]),
    "block_attention": lambda: ops.block_attention(
        mx.zeros((16, 4, 512)),
        mx.zeros((1, 1, 64, 512)),
        mx.zeros((1, 1, 64, 512)),
        mx.array([0]),
        mx.array([[0]]),
        [16],
    ),
}


def threads_of_kernels(library: str) -> dict[str, int]:
    """The attribute of each kernel in a file."""
    text = (METAL / f"{library}.metal").read_text()
    attribute = r"\[\[kernel, max_total_threads_per_threadgroup\((\d+)\)\]\] void\s+(\w+)\("
    kernels = {name: int(threads) for threads, name in re.findall(attribute, text)}
    assert len(kernels) == len(re.findall(r"\[\[kernel|^kernel", text, re.MULTILINE))
    return kernels


@pytest.mark.parametrize("op", dispatch.OPS)
def test_kernels_are_compiled_for_the_threads_of_their_launches(op):
    """No launch has more, and some launch has as many: registers are shared out by that number."""
    limits = importlib.import_module(f"test_{op}").LIMITS.values()
    calls = [flat(call(limit)) for limit, call in limits]
    calls += [[WIDE[op]()]] if op in WIDE else []
    most: dict[str, int] = {}
    for outs in results(op) + calls:
        for launch in _ext.launches_of(outs)[0] or []:
            kernels = threads_of_kernels(launch.library)
            name = max((k for k in kernels if launch.kernel.startswith(k)), key=len)
            threads = math.prod(launch.threadgroup)
            assert threads <= kernels[name], launch.kernel
            most[name] = max(most.get(name, 0), threads)
    assert most == {name: threads_of_kernels(op).get(name, most[name]) for name in most}


def test_every_kernel_says_its_threads():
    assert all(threads_of_kernels(path.stem) for path in METAL.glob("*.metal"))


@pytest.mark.parametrize("op, limit, call", LIMITS)
def test_a_limit_is_one_for_gpu_and_workbench(op, limit, call, monkeypatch, tmp_path):
    """Past it a GPU runs other nodes and the workbench the processor's kernel."""
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
    launches, inputs = _ext.launches_of(ops.glu(gate, gate * 2))
    assert launches and launches[0].kernel == "glu_float32"
    with pytest.raises(ValueError, match="but got one of Multiply"):  # a node, still
        _ext.launches_of(inputs[1])
