from collections.abc import Iterator, Sequence

import mlx.core as mx

from pyengine import _ext

from .dispatch import run
from .example import MOST, Call, Results, first, normal, of_sums, quantized
from .quantized_gated_matmul import Matrix
from .quantized_matmul import product_error, quantized_matmul, quantized_matmul_reference
from .sizes import Settings, Shape, Sizes, packed, scaled


def quantized_matmuls(
    x: mx.array,
    matrices: Sequence[Matrix],
    group_size: int = 64,
    bits: int = 8,
) -> list[mx.array]:
    """Multiply the same rows by two or three matrices in one launch: an attention's q, k and v.

    ``out[i] = x @ matrices[i].T``, each the bits of ``quantized_matmul``. On the processor x is
    unpacked once for all of them, and their columns are shared out among the threads together. On a
    GPU ``quantized_matmul`` serves more than 128 rows.

    Args:
        x: ``[..., K]``, float32, float16 or bfloat16; K is a multiple of the group size.
        matrices: Two or three: weights uint32 ``[N_i, K * bits / 32]``, scales and biases
            ``[N_i, K / group_size]`` of the dtype of ``x``, as ``mx.quantize`` gives them.
        group_size: 32, 64 or 128 weights share a scale and a bias.
        bits: 8, 6 or 4 per weight.

    Returns:
        ``[..., N_i]`` for each, dtype of ``x``.

    Raises:
        ValueError: A shape, dtype or limit above does not hold.
    """
    packed = [list(matrix) for matrix in matrices]
    outs = _ext.quantized_matmuls(x, packed, group_size, bits)
    args = (x, matrices, group_size, bits)
    return run(outs, quantized_matmuls_reference, *args, otherwise=_one_by_one)


def _one_by_one(
    x: mx.array, matrices: Sequence[Matrix], group_size: int, bits: int
) -> list[mx.array]:
    return [quantized_matmul(x, *matrix, group_size, bits) for matrix in matrices]


def quantized_matmuls_reference(
    x: mx.array,
    matrices: Sequence[Matrix],
    group_size: int = 64,
    bits: int = 8,
) -> list[mx.array]:
    """The same in plain MLX."""
    return [quantized_matmul_reference(x, *matrix, group_size, bits) for matrix in matrices]


def shapes(sizes: Sizes) -> Iterator[Shape]:
    for packing in sizes.quantized:
        for K, true in sizes.together:
            share = sizes.fitted(sum(true), K, packing) / sum(true)
            columns = true if share == 1 else [max(64, int(n * share) // 64 * 64) for n in true]
            settings: Settings = {"K": K, "columns": columns, **packed(packing, sizes.dtype)}
            yield settings, scaled("columns", sum(true), sum(columns))


def example(K: int, columns: Sequence[int], group: int, bits: int, dtype: str) -> Call:
    x = normal(1, MOST, K, dtype=dtype)
    matrices = [
        quantized(2 + i, N, K, group=group, bits=bits, dtype=dtype) for i, N in enumerate(columns)
    ]

    def slack(results: Results) -> Results:
        return of_sums(results, [product_error(x, w, group, bits) for w in matrices])

    return Call(
        lambda b, e: quantized_matmuls(x[b:e], matrices, group, bits),
        first,
        slack,
        same_bits=False,
        weights=[a for w in matrices for a in w],
    )
