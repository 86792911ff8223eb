"""The routed experts of the 26B: which ones a row uses, and what they add."""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from pyengine import ops
from pyengine.model.linear import MLP, Linear

# Up to this many rows, routed experts that are not quantised are fetched row by row; beyond, every
# expert sees every row.
ROWS_BY_SLOT = 16


@dataclass(frozen=True)
class Experts:
    """The 26B's routed experts and their router; gate, up and down are stacks."""

    router: Linear
    router_norm: mx.array
    scales: mx.array
    gate: Linear
    up: Linear
    down: Linear
    pre_norm: mx.array
    dense_norm: mx.array
    routed_norm: mx.array
    # Of the routed sum, float32, where other processes have the rest of each expert
    total: Callable[[mx.array], mx.array] | None = None


def with_experts(
    experts: Experts, h: mx.array, dense: mx.array, num_used: int, eps: float
) -> mx.array:
    """The dense branch's output plus that of the routed experts, both normed. h is the stream."""
    ids, weights = _route(experts, h, num_used, eps)
    x = ops.rms_norm(h, experts.pre_norm, eps)
    if experts.gate.packed_like(experts.up) and experts.down.packed:
        run = _packed
    else:
        run = _by_slot if x.shape[0] <= ROWS_BY_SLOT else _by_expert
    routed = run(experts, x, ids, weights)
    if experts.total is not None:
        # One sum after the other, or processes that walk the graph otherwise would mix them up
        [routed] = mx.depends([routed], [dense])
        routed = experts.total(routed)
    routed = routed.astype(h.dtype)
    dense = ops.rms_norm(dense, experts.dense_norm, eps)
    return dense + ops.rms_norm(routed, experts.routed_norm, eps)


def _route(experts: Experts, h: mx.array, num_used: int, eps: float) -> tuple[mx.array, mx.array]:
    """The chosen experts [T, num_used] in ascending order, and their weights; all in float32."""
    x = ops.rms_norm(h.astype(mx.float32), experts.router_norm, eps)
    return ops.route_experts(experts.router(x), experts.scales, num_used)


def _packed(experts: Experts, x: mx.array, ids: mx.array, weights: mx.array) -> mx.array:
    """Weighted sum [T, E] over each row's own experts, slot by slot; quantised stacks."""
    gate, up, down = experts.gate.packed, experts.up.packed, experts.down.packed
    assert gate is not None and up is not None and down is not None
    packing = (experts.gate.group_size, experts.gate.bits)
    y = ops.quantized_expert_matmul(x, gate, ids, *packing, up=up)  # [T, num_used, F]
    packing = (experts.down.group_size, experts.down.bits)
    parts = ops.quantized_expert_matmul(y, down, ids, *packing, out_dtype=mx.float32)
    return ops.weigh_experts(parts, weights, mx.float32 if experts.total else x.dtype)


def _by_slot(experts: Experts, x: mx.array, ids: mx.array, weights: mx.array) -> mx.array:
    """Weighted sum [T, E], float32, over each row's own experts; reads only those."""
    gate, up, down = experts.gate, experts.up, experts.down
    rows = []
    for t in range(x.shape[0]):
        row = x[t : t + 1]
        y = ops.glu(gate.take(ids[t]).joined()(row), up.take(ids[t]).joined()(row))
        y = y.reshape(ids.shape[1], -1)
        mine = down.take(ids[t])
        total = None
        for slot in range(ids.shape[1]):
            part = mine.member(slot)(y[slot : slot + 1], mx.float32) * weights[t, slot]
            total = part if total is None else total + part
        assert total is not None
        rows.append(total)
    return mx.concatenate(rows)


def _by_expert(experts: Experts, x: mx.array, ids: mx.array, weights: mx.array) -> mx.array:
    """The same sum for many rows: each expert sees all of them and counts where it was chosen.

    Adding in the order of experts, zeros included, gives the bits of `_by_slot`.
    """
    total = mx.zeros(x.shape, mx.float32)
    for expert in range(experts.gate.weight.shape[0]):
        weight = mx.where(ids == expert, weights, 0.0)  # [T, num_used], at most one not zero
        mlp = MLP(*(stack.member(expert) for stack in (experts.gate, experts.up, experts.down)))
        y = mlp.down(ops.glu(mlp.gate(x), mlp.up(x)), mx.float32)
        total = total + y * weight.sum(axis=-1, keepdims=True)
    return total
