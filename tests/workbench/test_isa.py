"""What a GPU compiler makes of kernels: the compiled code computes, and its counts are right."""

import json
import re

import mlx.core as mx
import numpy as np
import pytest
from snippets import launch

import workbench
from pyengine import _ext, ops
from pyengine.ops.workbench import named
from workbench.__main__ import main
from workbench.isa import machine
from workbench.isa.calls import matmul_calls
from workbench.isa.compile import program_of, registers_of
from workbench.isa.program import Instruction, Program
from workbench.isa.rows import KINDS, cycles, kinds_of, matmul_row, rows_of
from workbench.launch import DTYPES

# Upper bounds, of loads in flight lower ones: kernel, bits, M -> registers, spills, loads in
# flight, instructions per byte, cycles per byte. docs/isa.md has the numbers as they are.
BOUNDS = {
    ("quantized_matmul", 8, 6): (104, 0, 4, 10.0, 12.0),
    ("quantized_matmul", 4, 1): (104, 0, 4, 9.1, 10.9),
    ("dense_matmul", 16, 6): (98, 0, 4, 4.4, 5.3),
}

# The same of kernels that are no matmuls, without the cycles
OTHER_BOUNDS = {
    "block_attention_scores": (104, 24, 2, 14.8),
    "block_attention_values": (124, 0, 2, 20.4),
    "block_attention_fold": (64, 0, 1, 11.5),
    "rms_norm": (64, 0, 16, 5.5),
    "filter_logits": (64, 0, 4, 17.7),
}


def run(one, arrays, group=(0, 0, 0), watched=()):
    """One threadgroup of a launch: its counts, and its memory afterwards."""
    buffers = []
    for buffer in one.buffers:
        if buffer.role == "bytes":
            buffers.append(np.frombuffer(buffer.data, np.uint8))
        else:
            zeros = np.zeros(buffer.shape, DTYPES[buffer.dtype])
            buffers.append(np.ascontiguousarray(arrays.get(buffer.name, zeros)))
    about = {"threadgroup": tuple(one.threadgroup), "groups": tuple(one.grid), "watched": watched}
    return machine.run(program_of(one), buffers, group=group, **about)


def compiled(body, **about):
    one = launch(body, threads=32, n=32, **about)
    a = np.arange(1, 33, dtype=np.float32)
    counts, memory = run(one, {"a": a})
    return counts, memory.buffer(1).view(np.float32), a


def random(seed, *shape, dtype=mx.bfloat16):
    return mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32)).astype(dtype)


CALLS = {
    "quantized_matmul": lambda: ops.quantized_matmul(
        random(0, 3, 192), *mx.quantize(random(1, 30, 192), 64, 6), 64, 6
    ),
    "dense_matmul": lambda: ops.dense_matmul(random(0, 2, 100), random(1, 31, 100)),
    "rms_norm": lambda: ops.rms_norm(random(0, 1, 1536), random(1, 1536)),
    "glu": lambda: ops.glu(random(0, 1, 200), random(1, 1, 200)),
    "filter_logits": lambda: ops.filter_logits(random(0, 1, 600, dtype=mx.float32), top_k=20),
    "block_attention": lambda: ops.block_attention(
        random(0, 2, 4, 64),
        *(random(s, 2, 2, 64, 64) for s in (1, 2)),
        mx.array([70]),
        mx.array([[1, 0]]),
        [2],
    ),
}


@pytest.mark.parametrize("op", CALLS)
def test_the_compiled_code_computes_the_bits_of_the_kernel(op):
    """All threadgroups of all launches write what the kernel writes in the workbench."""
    launches, inputs = _ext.launches_of(CALLS[op]())
    arrays = named(launches, inputs)
    for i, one in enumerate(launches):
        expected, _ = workbench.run(launches[: i + 1], arrays)
        wrote = set()
        for group in np.ndindex(*one.grid):
            _, memory = run(one, arrays, group)
            for n, buffer in enumerate(one.buffers):
                if buffer.role in ("out", "inout"):
                    written = memory.written[memory.starts[n] : memory.ends[n]]
                    right = np.ascontiguousarray(expected[buffer.name]).reshape(-1).view(np.uint8)
                    assert np.array_equal(memory.buffer(n)[written], right[written])
                    wrote |= {buffer.name} if written.any() else set()
        assert wrote == {b.name for b in one.buffers if b.role in ("out", "inout")}
        arrays |= expected


def test_every_lane_is_counted_by_kind():
    body = "float x = a[i]; for (int k = 0; k < 5; ++k) { x = fma(x / 64, x, a[k]); } o[i] = x;"
    counts, o, a = compiled(body)
    found = kinds_of(counts.executed)
    assert found["fma"] == 5 and found["store"] == 1
    x = a.astype(np.float64)
    for k in range(5):
        x = (x / 64 * x + a[k]).astype(np.float32).astype(np.float64)
    assert np.array_equal(o, x.astype(np.float32))


def test_loads_before_a_wait_and_loads_that_wait_for_each_other():
    together = "o[i] = a[i] + a[31 - i];"
    one = launch(together, threads=32, n=32)
    assert run(one, {"a": np.ones(32, np.float32)}, watched=[0])[0].in_flight == [2]
    chain = "uint at = uint(a[i]) % 8; at = uint(a[at]) % 8; o[i] = a[at];"
    one = launch(chain, threads=32, n=32)
    assert run(one, {"a": np.ones(32, np.float32)}, watched=[0])[0].in_flight == [1, 1, 1]


def test_a_value_without_a_register_is_a_spill():
    # All 160 are wanted again once their sum is known
    body = """float x[160], sum = 0;
#pragma unroll
    for (int k = 0; k < 160; ++k) { x[k] = a[k * 31 + i]; sum = fma(sum, x[k], n); }
#pragma unroll
    for (int k = 0; k < 160; ++k) { o[k * 31 + i] = x[k] * sum; }"""
    assert program_of(launch(body)).scratch_bytes > 0
    assert program_of(launch("o[i] = a[i];")).scratch_bytes == 0


def test_registers_are_those_that_m1_has():
    assert [registers_of(n) for n in (32, 256, 512, 1024)] == [128, 128, 104, 52]


def test_an_access_outside_of_all_buffers_is_an_error():
    with pytest.raises(IndexError, match=r"^\[isa\] 4 bytes at 0x\w+ are in no buffer$"):
        compiled("o[i] = a[i + 1];")


def test_an_instruction_that_is_not_known_is_named():
    program = program_of(launch("o[i] = a[i];"))
    surprise = Instruction("v_surprise_f32", ("v0", "v1"), {})
    about = {"group": (0, 0, 0), "threadgroup": (32, 1, 1), "groups": (1, 1, 1), "watched": []}
    with pytest.raises(NotImplementedError) as refused:
        machine.run(Program((surprise,), 1, 0, program.about), [], **about)
    text = "[isa] instruction must be one known here but got v_surprise_f32 v0, v1."
    assert str(refused.value) == text


def test_cycles_are_those_of_the_slower_pipe():
    assert cycles({"fma": 10.0}) == pytest.approx(12.0)  # issue
    assert cycles({"fma": 3.0, "convert": 1.0, "shift": 1.0}) == pytest.approx(8.0)


@pytest.mark.parametrize("kernel, bits, M", BOUNDS)
def test_kernels_keep_to_their_bounds(kernel, bits, M):
    row = matmul_row(matmul_calls(21504)[kernel], M, bits)
    assert row
    registers, spills, loads, instructions, most = BOUNDS[kernel, bits, M]
    assert row.registers <= registers and row.spills <= spills
    assert row.loads_in_flight >= loads
    assert row.instructions_per_byte <= instructions and row.cycles_per_byte <= most
    assert sum(row.by_kind.values()) == pytest.approx(row.instructions_per_byte, abs=0.02)
    wanted = M / 2 if kernel == "dense_matmul" else (M + 1) * 8 / bits
    assert row.by_kind["fma"] >= wanted


@pytest.mark.parametrize("op", ["block_attention", "rms_norm", "filter_logits"])
def test_other_kernels_keep_to_their_bounds(op):
    rows = {row.kernel: row for row in rows_of(op)}
    assert any(kernel in OTHER_BOUNDS for kernel in rows)
    for kernel in OTHER_BOUNDS.keys() & rows.keys():
        registers, spills, loads, instructions = OTHER_BOUNDS[kernel]
        row = rows[kernel]
        assert row.registers <= registers and row.spills <= spills, kernel
        assert row.loads_in_flight >= loads, kernel
        assert row.instructions_per_byte <= instructions, kernel


def test_the_command_prints_rows_and_json(capsys):
    given = ["isa", "--kernel", "softcap", "weigh"]
    assert main([*given, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["kernel"] for row in rows] == ["softcap", "weigh_experts"]
    kinds = {kind for kind, _ in KINDS}
    assert all(set(row["by_kind"]) <= kinds and row["bits"] is None for row in rows)
    assert main(given) == 0
    said = capsys.readouterr().out
    assert "not what a Mac does" in said and re.search(r"^softcap +6 +\d+ +0 ", said, re.MULTILINE)
    assert main(["isa", "--kernel", "nothing"]) == 2
    assert capsys.readouterr().err == "[isa] kernel must start an op's name but got nothing.\n"
