from collections.abc import Iterator
from functools import partial

import mlx.core as mx

from pyengine import _ext

from .dense_matmul import product
from .dispatch import run
from .example import MOST, Call, absolute_sums, first, normal, of_sums, order_error, quantized
from .sizes import Shape, Sizes, packed, scaled

# Of bfloat16, csrc/cpu/planes.h: the sets that round its elements, by how many and how closely
PLANES = ("vnni", "amx")
CHUNK = 64
HALF_A_UNIT = 256 / 255 * 2.0**-15  # of the largest of a chunk


def quantized_matmul(
    x: mx.array,
    w: mx.array,
    scales: mx.array,
    biases: mx.array,
    group_size: int = 64,
    bits: int = 8,
    *,
    out_dtype: mx.Dtype | None = None,
) -> mx.array:
    """Multiply rows by a quantised matrix, reading each weight once for up to 16 rows.

    ``out[m, n] = sum over k of x[m, k] * (q[n, k] * scales[n, k / g] + biases[n, k / g])``, with
    ``g`` the group size and ``q`` the packed integers of MLX's affine quantisation. All of it in
    float32, in an order that depends on K alone, rounded once: before that, the result is within
    ``(K / 16 + 8) * 2**-24`` times the same sum with absolute values. Processors that multiply
    bytes, by VNNI or AMX, take a row of bfloat16 as whole numbers: each element within 2^-15 of
    the largest of its 64 (csrc/cpu/planes.h). More than 16 rows run as slices of 16. On a GPU MLX's
    ``quantized_matmul``, which is not row-stable, serves more than 128 rows: a prefill.

    Args:
        x: ``[..., K]``, float32, float16 or bfloat16; any strides; K is a multiple of ``g``.
        w: uint32 ``[N, K * bits / 32]``, as ``mx.quantize`` packs it.
        scales: ``[N, K / g]``, dtype of ``x``.
        biases: ``[N, K / g]``, dtype of ``x``.
        group_size: 32, 64 or 128 weights share a scale and a bias.
        bits: 8, 6 or 4 per weight.
        out_dtype: float32 or the dtype of ``x``; None is the dtype of ``x``.

    Returns:
        ``[..., N]``.

    Raises:
        ValueError: A shape, dtype or limit above does not hold.
    """
    out = _ext.quantized_matmul(x, w, scales, biases, group_size, bits, out_dtype)
    args = (x, w, scales, biases, group_size, bits)
    return run(out, quantized_matmul_reference, *args, otherwise=_prefill, out_dtype=out_dtype)


def _prefill(
    x: mx.array,
    w: mx.array,
    scales: mx.array,
    biases: mx.array,
    group_size: int,
    bits: int,
    *,
    out_dtype: mx.Dtype | None,
) -> mx.array:
    """MLX's own kernel. Logits in float32 are summed in float32, not widened afterwards."""
    x, scales, biases = (a.astype(out_dtype or x.dtype) for a in (x, scales, biases))
    return mx.quantized_matmul(x, w, scales, biases, True, group_size, bits)


def quantized_matmul_reference(
    x: mx.array,
    w: mx.array,
    scales: mx.array,
    biases: mx.array,
    group_size: int = 64,
    bits: int = 8,
    *,
    out_dtype: mx.Dtype | None = None,
) -> mx.array:
    """The same in plain MLX."""
    weights = dequantized(w, scales, biases, group_size, bits)  # [N, K]
    return product(x.astype(mx.float32), weights).astype(out_dtype or x.dtype)


def dequantized(
    w: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int
) -> mx.array:
    """Packed rows as float32; MLX refuses empty ones."""
    if w.size == 0:
        return mx.zeros((*w.shape[:-1], scales.shape[-1] * group_size))
    scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return mx.dequantize(w, scales, biases, group_size, bits)


def shapes(sizes: Sizes) -> Iterator[Shape]:
    for packing in sizes.quantized:
        for K, true in sizes.matrices:
            if K % packing[0] == 0:
                N = sizes.fitted(true, K, packing)
                settings = {"N": N, "K": K, "dtype": sizes.dtype}
                yield settings | packed(packing, sizes.dtype), scaled("N", true, N)


def example(N: int, K: int, group: int, bits: int, dtype: str) -> Call:
    x = normal(1, MOST, K, dtype=dtype)
    w = quantized(2, N, K, group=group, bits=bits, dtype=dtype)
    return Call(
        lambda b, e: [quantized_matmul(x[b:e], *w, group, bits)],
        first,
        lambda results: of_sums(results, [product_error(x, w, group, bits)]),
        same_bits=False,
        weights=w,
    )


def product_error(
    x: mx.array, w: tuple[mx.array, mx.array, mx.array], group_size: int, bits: int
) -> mx.array:
    """By how much sums of two kernels may be apart: by their orders and, where one of them
    multiplies whole numbers, by half a unit of each element of x (csrc/cpu/planes.h)."""
    plain = partial(dequantized, group_size=group_size, bits=bits)
    error = order_error(x.shape[-1]) * absolute_sums(x, w, plain)
    if x.dtype == mx.bfloat16 and _ext.instruction_set() in PLANES:
        error += HALF_A_UNIT * absolute_sums(largest_of_chunks(x), w, plain)
    return error


def largest_of_chunks(x: mx.array) -> mx.array:
    """The largest magnitude of each 64 elements of a row, in the place of each of them."""
    *rows, K = x.shape
    chunks = mx.pad(abs(x), [*[(0, 0)] * len(rows), (0, -K % CHUNK)]).reshape(*rows, -1, CHUNK)
    largest = mx.broadcast_to(chunks.max(axis=-1, keepdims=True), chunks.shape)
    return largest.reshape(*rows, -1)[..., :K]
