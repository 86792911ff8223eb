"""Which implementation runs: the switch, and what status says of it."""

import re
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from draw import HOUSE
from fuzz_ops import flat, random_call

from pyengine import _ext, ops
from pyengine.ops import dispatch

# Nodes of MLX that may add in an order of their own
REDUCTIONS = {"ArgReduce", "CumSum", "Matmul", "Max", "QuantizedMatmul", "Softmax", "Sum"}
NAMES = [name for name in ops.__all__ if name + "_reference" in ops.__all__]


def test_status_names_every_op() -> None:
    rows = ops.status()
    assert [row["op"] for row in rows] == sorted(NAMES)
    kernel = f"SIMD ({_ext.instruction_set()})"
    assert all(row["kernel"] == kernel and row["row_stable"] is True for row in rows)


def operations(op: str, path: Path) -> set[str]:
    """Names in the graph of a random call of an op, the first that is not refused."""
    for seed in range(50):
        call = random_call(op, seed)
        try:
            out = flat(getattr(ops, op)(*call.args, **call.options))
        except ValueError as error:
            assert HOUSE.match(str(error))
            continue
        if call.alike is not None and all(a.size for a in out):
            mx.export_to_dot(str(path), *out)
            return set(re.findall(r'label ="(\w+)', path.read_text()))
    raise AssertionError("every call was refused")


@pytest.mark.parametrize("op", NAMES)
def test_an_op_runs_what_is_chosen(op: str, tmp_path: Path) -> None:
    """Its own node in the graph, or nodes of MLX alone."""
    assert op in operations(op, tmp_path / "native")
    ops.use("reference")
    try:
        plain = operations(op, tmp_path / "plain")
        (stable,) = [row["row_stable"] for row in ops.status() if row["op"] == op]
    finally:
        ops.use("native")
    assert plain and not plain & set(NAMES), plain & set(NAMES)
    assert stable == (not plain & REDUCTIONS)


def test_results_of_another_dtype_or_shape_are_other_nodes() -> None:
    """mx.compile makes one of equivalent nodes, and does not look at what they give."""
    x, w = mx.random.normal((2, 64)).astype(mx.bfloat16), mx.ones((300, 64), mx.bfloat16)
    packed = mx.quantize(w, 64, 8)

    def sums(x: mx.array) -> list[mx.array]:
        both = (None, mx.float32)
        outs = [ops.dense_matmul(x, w, out_dtype=dtype) for dtype in both]
        outs += [ops.quantized_matmul(x, *packed, out_dtype=dtype) for dtype in both]
        outs += [ops.quantized_filter_logits(x, *packed, top_k=k).ids for k in (3, 200)]
        return [out.sum(axis=1) for out in outs]

    for plain, compiled in zip(sums(x), mx.compile(sums)(x), strict=True):
        assert plain.dtype == compiled.dtype and mx.array_equal(plain, compiled)


def test_use_switches_every_op() -> None:
    ops.use("reference")
    try:
        rows = ops.status()
    finally:
        ops.use("native")
    assert {row["kernel"] for row in rows} == {"reference"}
    assert {row["row_stable"] for row in rows} == {True, False}


def test_a_gpu_runs_metal_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU here: the answer to "which device" is replaced, what follows from it is real."""
    monkeypatch.setattr(dispatch.mx, "default_device", lambda: mx.gpu)
    for row in ops.status():
        assert (row["kernel"], row["device"], row["row_stable"]) == ("Metal", "gpu", True)


def test_every_metal_kernel_has_its_source_in_the_extension() -> None:
    kernels = _ext.metal_kernels()
    assert {library for library, _ in kernels} == {*dispatch.OPS, "merge_candidates"}
    for library, kernel in kernels:
        source = _ext.metal_source(library, kernel)
        assert re.search(rf"\[\[kernel\b.*\]\] void\s+{library}", source)
        assert '#include "' not in source and source.isascii()


def test_workbench_needs_a_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "workbench", None)  # as if there were none
    with pytest.raises(RuntimeError, match=r"\[use\] the workbench needs a checkout"):
        ops.use("workbench")
    assert ops.status()[0]["kernel"].startswith("SIMD")


def test_unknown_implementation_is_refused() -> None:
    with pytest.raises(ValueError) as error:
        ops.use("fast")  # type: ignore[arg-type]
    names = "native, reference, workbench"
    assert str(error.value) == f"[use] implementation must be one of {names} but got 'fast'."
    assert ops.status()[0]["kernel"].startswith("SIMD")
