import math
from collections.abc import Iterator, Sequence

import mlx.core as mx

from pyengine import _ext

from .dispatch import run
from .example import MOST, Call, first, normal, quantized
from .quantized_matmul import dequantized
from .sizes import Shape, Sizes, packed, scaled


def embed(
    ids: mx.array,
    table: Sequence[mx.array],
    group_size: int = 64,
    bits: int = 8,
    *,
    scale: float = 1.0,
    out_dtype: mx.Dtype | None = None,
) -> mx.array:
    """Look rows of a table up by token id, dequantise and scale them.

    ``out[t] = (q[ids[t]] * scales[ids[t]] + biases[ids[t]]) * scale``, or ``w[ids[t]] * scale`` of
    a table of floats: each step in float32 and rounded, the result rounded once more to its dtype.
    A row of an id outside 0 to V - 1 is NaN, which no logits made of it can hide; nothing is read
    outside of the table.

    Args:
        ids: int32, any shape and strides.
        table: ``(w,)``, float32, float16 or bfloat16 ``[V, E]``; or ``(w, scales, biases)`` as
            ``mx.quantize`` packs them: uint32 ``[V, E * bits / 32]`` and twice
            ``[V, E / group_size]`` in one of those dtypes.
        group_size: 32, 64 or 128 weights share a scale and a bias; of a quantised table.
        bits: 8, 6 or 4 per weight; of a quantised table.
        scale: Multiplies the rows.
        out_dtype: float32 or the dtype of the table's floats, which is the default.

    Returns:
        ``[..., E]``, with the leading dimensions of ``ids``.

    Raises:
        ValueError: A shape, dtype or limit above does not hold.
    """
    out = _ext.embed(ids, table, group_size, bits, scale, out_dtype)
    args = (ids, table, group_size, bits)
    return run(out, embed_reference, *args, scale=scale, out_dtype=out_dtype)


ELEMENTWISE = True  # the reference has no reduction


def embed_reference(
    ids: mx.array,
    table: Sequence[mx.array],
    group_size: int = 64,
    bits: int = 8,
    *,
    scale: float = 1.0,
    out_dtype: mx.Dtype | None = None,
) -> mx.array:
    """The same in plain MLX, equal bit for bit."""
    V, dtype = table[0].shape[0], table[-1].dtype
    known = (ids >= 0) & (ids < V)
    places = mx.where(known, ids, 0).reshape(-1)  # a scalar too: dequantize wants rows
    w, *factors = (mx.take(a, places, axis=0) for a in table)
    if factors:
        scales, biases = factors
        w = dequantized(w, scales, biases, group_size, bits)
    rows = (w.astype(mx.float32) * scale).reshape(*ids.shape, w.shape[-1])
    return mx.where(known[..., None], rows, mx.nan).astype(out_dtype or dtype)


def shapes(sizes: Sizes) -> Iterator[Shape]:
    for true, E in sizes.tables:
        for packing in sizes.packings:
            V = sizes.fitted(true, E, packing)
            # 16 bits: a table of floats
            yield {"V": V, "E": E, **packed(packing or (64, 16), sizes.dtype)}, scaled("V", true, V)


def example(V: int, E: int, group: int, bits: int, dtype: str) -> Call:
    ids = mx.random.randint(0, V, (MOST,), key=mx.random.key(1)).astype(mx.int32)
    table: Sequence[mx.array] = [normal(2, V, E, dtype=dtype)]
    if bits < 16:
        table = quantized(2, V, E, group=group, bits=bits, dtype=dtype)
    packing = (group, min(bits, 8))
    return Call(
        lambda b, e: [embed(ids[b:e], table, *packing, scale=math.sqrt(E))],
        first,
        exact_definition=True,
    )
