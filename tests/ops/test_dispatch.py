"""Which implementation runs: the switch, and what status says of it."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from draw import HOUSE
from fuzz_ops import flat, random_call

from pyengine import _ext, ops
from pyengine.ops import dispatch

# Nodes of MLX that may add in an order of their own
REDUCTIONS = {"ArgReduce", "CumSum", "GatherQMM", "Matmul", "Max", "QuantizedMatmul"}
REDUCTIONS |= {"Softmax", "Sum"}
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


# What MLX has a kernel of its own for, and says so in the graph on a processor too
KERNELS = {
    "dense_matmul": "Matmul",
    "quantized_expert_matmul": "GatherQMM",
    "quantized_filter_logits": "QuantizedMatmul",
    "quantized_gated_matmul": "QuantizedMatmul",
    "quantized_matmul": "QuantizedMatmul",
    "quantized_matmuls": "QuantizedMatmul",
}


@pytest.fixture
def native() -> Iterator[None]:
    """Our kernels again, all of them."""
    yield
    ops.use("native")
    dispatch.set_aside(())


@pytest.mark.parametrize("op", NAMES)
def test_mlx_runs_its_own_kernels(op: str, tmp_path: Path, native: None) -> None:
    ops.use("mlx")
    nodes = operations(op, tmp_path / "graph")
    assert nodes and not nodes & set(NAMES), nodes & set(NAMES)
    assert KERNELS.get(op, nodes.copy().pop()) in nodes
    (row,) = [row for row in ops.status() if row["op"] == op]
    assert row["kernel"] == "MLX" and row["row_stable"] == (not nodes & REDUCTIONS)
    assert not dispatch.exact()


def settled(tree: Any) -> Any:
    """Arguments evaluated and contiguous. MLX's matmul of strided arrays on a processor writes, now
    and then, to a copy that is freed already: seen in the heap, not in a result."""
    if isinstance(tree, mx.array):
        tree = mx.contiguous(tree)
        mx.eval(tree)
    return [settled(a) for a in tree] if isinstance(tree, (list, tuple)) else tree


@pytest.mark.parametrize("op", NAMES)
def test_mlx_gives_what_the_definition_gives(op: str, native: None) -> None:
    compared = 0
    for seed in range(30):
        call = random_call(op, seed)
        args, results = settled(call.args), []
        for name in ("reference", "mlx"):
            ops.use(name)  # type: ignore[arg-type]
            try:
                results.append(flat(getattr(ops, op)(*args, **call.options)))
            except ValueError as error:
                assert HOUSE.match(str(error))
        if len(results) < 2 or call.alike is None:
            continue
        compared += 1
        assert [(a.shape, a.dtype) for a in results[0]] == [(a.shape, a.dtype) for a in results[1]]
        assert call.alike(results[1], results[0]), seed
    assert compared > 5


def test_what_is_set_aside_runs_mlx_alone(tmp_path: Path, native: None) -> None:
    dispatch.set_aside(["quantized_matmul", "of another version"])
    kernels = {row["op"]: (row["kernel"], row["row_stable"]) for row in ops.status()}
    assert kernels.pop("quantized_matmul") == ("MLX", False)
    assert set(kernels.values()) == {(f"SIMD ({_ext.instruction_set()})", True)}
    assert not dispatch.exact() and dispatch.in_place()
    assert "QuantizedMatmul" in operations("quantized_matmul", tmp_path / "aside")
    assert "quantized_gated_matmul" in operations("quantized_gated_matmul", tmp_path / "native")
    dispatch.set_aside(["copy_pages"])
    assert not dispatch.in_place() and "copy_pages" not in operations("copy_pages", tmp_path / "c")
    ops.use("reference")
    assert dispatch.runs("copy_pages") == "reference"


def test_the_environment_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = dispatch._from_environment
    for name, runs in (("", "native"), ("native", "native"), ("mlx", "mlx")):
        monkeypatch.setenv("PYENGINE_OPS", name)
        assert chosen() == runs
    monkeypatch.setenv("PYENGINE_OPS", "workbench")
    with pytest.raises(ValueError) as error:
        chosen()
    rule = "PYENGINE_OPS must be one of native, mlx, reference"
    assert str(error.value) == f"[use] {rule} but got 'workbench'."
    words = [sys.executable, "-m", "pyengine", "generate", "x"]
    env = {**os.environ, "PYENGINE_OPS": "fast"}
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == f"pyengine: [use] {rule} but got 'fast'.\n"


def test_the_environment_chooses_an_instruction_set() -> None:
    script = "from pyengine import ops; print(ops.status()[0]['kernel'])"
    offered = _ext.instruction_sets()
    for name in ("", *offered):
        env = {**os.environ, "PYENGINE_INSTRUCTIONS": name}
        told = subprocess.check_output([sys.executable, "-c", script], env=env, text=True)
        assert told == f"SIMD ({name or offered[-1]})\n"
    words = [sys.executable, "-m", "pyengine", "generate", "x"]
    env = {**os.environ, "PYENGINE_INSTRUCTIONS": "z80"}
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    rule = f"PYENGINE_INSTRUCTIONS must be one of {', '.join(offered)} but got 'z80'."
    assert done.returncode == 2 and done.stderr == f"pyengine: [use] {rule}\n"


def test_the_environment_chooses_the_number_of_threads() -> None:
    script = "from pyengine import _ext, ops; print(_ext.threads())"
    for number in ("1", "3", "256"):
        env = {**os.environ, "PYENGINE_THREADS": number}
        assert subprocess.check_output([sys.executable, "-c", script], env=env) == (
            f"{number}\n".encode()
        )
    words = [sys.executable, "-m", "pyengine", "generate", "x"]
    for number in ("0", "257", "-1", "1.5", "two", "9" * 5000):
        env = {**os.environ, "PYENGINE_THREADS": number}
        done = subprocess.run(words, env=env, capture_output=True, text=True)
        rule = "pyengine: [use] PYENGINE_THREADS must be a number between 1 and 256 but got "
        assert done.returncode == 2 and done.stderr.startswith(rule)
        assert done.stderr.count("\n") == 1


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
    names = "native, mlx, reference, workbench"
    assert str(error.value) == f"[use] implementation must be one of {names} but got 'fast'."
    assert ops.status()[0]["kernel"].startswith("SIMD")
