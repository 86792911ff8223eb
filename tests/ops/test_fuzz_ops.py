"""A few random calls of every op; many under sanitizers: `.ci/sanitize.sh`."""

import mlx.core as mx
import pytest
from draw import HOUSE
from fuzz_ops import random_call, run

from pyengine import ops

CALLS_OF_AN_OP = 40


@pytest.mark.parametrize("op", ops.dispatch.OPS)
def test_an_op_refuses_a_call_or_is_its_reference(op):
    met = {run(op, (2026, number)) for number in range(CALLS_OF_AN_OP)}
    assert "refused" in met
    assert met & {"equal", "ran"}


def test_the_calls_hold_what_they_shall():
    """Offsets, ids and scalars of every kind: what a generator no longer makes is not tested."""
    found = [random_call("prepare_qkv", (1, n)).args[8:11] for n in range(200)]
    for arrays in zip(*found, strict=True):  # positions, owners, tables
        assert {a.dtype for a in arrays} == {mx.int32}
        values = [a for a in arrays if a.size]
        assert min(a.min().item() for a in values) == -(2**31)
        assert max(a.max().item() for a in values) > 2**30
    # Some of these calls have a result, which no other row's place decides
    late = [n for n in range(200) if run("copy_pages", (4, n)) == "equal"]
    pages = [a for n in late for a in random_call("copy_pages", (4, n)).args[1:] if a.size]
    assert min(a.min().item() for a in pages) < -(2**30)
    assert max(a.max().item() for a in pages) > 2**30
    ids = [random_call("embed", (2, n)).args[0] for n in range(100)]
    assert any((a < 0).any().item() for a in ids if a.size)
    scalars = {random_call("route_experts", (3, n)).args[2] for n in range(400)}
    assert min(scalars) < -(2**31) and max(scalars) > 2**32


@pytest.mark.parametrize(
    "call",
    [
        lambda n: ops.route_experts(mx.zeros((1, 2)), mx.zeros(2), n),
        lambda n: ops.filter_logits(mx.zeros((1, 4)), top_k=n),
        lambda n: ops.random_uniform(mx.zeros((1, 4), mx.uint32), (0, n)),
        lambda n: ops.quantized_matmul(
            mx.zeros((1, 64)), *mx.quantize(mx.zeros((8, 64)), 64, 8), n
        ),
        lambda n: ops.embed(mx.array([0]), mx.quantize(mx.zeros((8, 64)), 64, 8), 64, n),
    ],
)
@pytest.mark.parametrize("number", [-1, 2**32, 2**40, -(2**63), 2**63, 10**30])
def test_an_integer_of_any_size_is_refused_in_one_sentence(call, number):
    with pytest.raises(ValueError) as error:
        call(number)
    assert HOUSE.match(str(error.value))
    if -(2**63) < number < 2**63 - 1:
        assert f"but got {number}." in str(error.value)
