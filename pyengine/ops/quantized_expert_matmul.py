from collections.abc import Iterator

import mlx.core as mx

from pyengine import _ext

from .dispatch import run
from .example import MOST, Call, Results, first, normal, of_sums, quantized
from .glu import glu
from .quantized_gated_matmul import Matrix, gate_error, quantized_gated_matmul_reference
from .quantized_matmul import product_error, quantized_matmul_reference
from .sizes import Shape, Sizes, packed, scaled


def quantized_expert_matmul(
    x: mx.array,
    stack: Matrix,
    ids: mx.array,
    group_size: int = 64,
    bits: int = 8,
    *,
    up: Matrix | None = None,
    out_dtype: mx.Dtype | None = None,
) -> mx.array:
    """Multiply each token's row by the matrices of its own experts.

    ``out[t, u] = x[t] @ stack[ids[t, u]].T``, or with ``up`` the gated form ``gelu_tanh(x[t] @
    stack[id].T) * (x[t] @ up[id].T)``; products as in ``quantized_matmul``, the gate as in
    ``quantized_gated_matmul``, bit for bit. Rows are grouped by expert where they are: for 16
    tokens an expert's weights are read once however many chose it, and those of the others not at
    all. On a GPU MLX's ``gather_qmm``, which is not row-stable, serves more than 128 tokens or 32
    experts of a token. The row of an id outside of 0 to X - 1 is NaN; nothing is read for it.

    Args:
        x: ``[T, K]``, or ``[T, U, K]`` with one row for each expert of a token; float32, float16 or
            bfloat16; K is a multiple of the group size.
        stack: Weights uint32 ``[X, N, K * bits / 32]``, scales and biases ``[X, N, K / g]``
            of the dtype of ``x``, g the group size.
        ids: int32 ``[T, U]``.
        group_size: 32, 64 or 128 weights share a scale and a bias.
        bits: 8, 6 or 4 per weight.
        up: A second stack of the same shape.
        out_dtype: float32 or the dtype of ``x``, which is the only one with ``up``; None is the
            dtype of ``x``.

    Returns:
        ``[T, U, N]``.

    Raises:
        ValueError: A shape, dtype or limit above does not hold.
    """
    second = [] if up is None else list(up)
    out = _ext.quantized_expert_matmul(x, list(stack), second, ids, group_size, bits, out_dtype)
    args = (x, stack, ids, group_size, bits)
    options = {"up": up, "out_dtype": out_dtype}
    return run(out, quantized_expert_matmul_reference, *args, otherwise=_prefill, **options)


def _prefill(
    x: mx.array,
    stack: Matrix,
    ids: mx.array,
    group_size: int,
    bits: int,
    *,
    up: Matrix | None,
    out_dtype: mx.Dtype | None,
) -> mx.array:
    """MLX's own kernel."""
    dtype = out_dtype or x.dtype
    known = (ids >= 0) & (ids < stack[0].shape[0])
    rows = (x[:, None, None] if x.ndim == 2 else x[:, :, None]).astype(dtype)

    def served(matrix: Matrix) -> mx.array:
        w, scales, biases = matrix
        y = mx.gather_qmm(
            rows,
            w,
            scales.astype(dtype),
            biases.astype(dtype),
            rhs_indices=mx.where(known, ids, 0),
            transpose=True,
            group_size=group_size,
            bits=bits,
        )
        return mx.where(known[..., None], y.squeeze(2), mx.nan)

    return served(stack) if up is None else glu(served(stack), served(up))


def quantized_expert_matmul_reference(
    x: mx.array,
    stack: Matrix,
    ids: mx.array,
    group_size: int = 64,
    bits: int = 8,
    *,
    up: Matrix | None = None,
    out_dtype: mx.Dtype | None = None,
) -> mx.array:
    """The same in plain MLX: every expert sees every row, or a few rows fetch their experts."""
    T, U = ids.shape
    X, N = stack[0].shape[:2]
    rows = mx.broadcast_to(x[:, None] if x.ndim == 2 else x, (T, U, x.shape[-1]))

    def times(rows: mx.array, expert: mx.array | int) -> mx.array:
        w, scales, biases = (a[expert] for a in stack)
        if up is None:
            return quantized_matmul_reference(
                rows, w, scales, biases, group_size, bits, out_dtype=out_dtype
            )
        second = (up[0][expert], up[1][expert], up[2][expert])
        return quantized_gated_matmul_reference(rows, (w, scales, biases), second, group_size, bits)

    if 0 < T * U < X:
        known = (ids >= 0) & (ids < X)
        safe = mx.where(known, ids, 0)
        parts = [times(rows[t, u][None], safe[t, u]) for t in range(T) for u in range(U)]
        out = mx.concatenate(parts).reshape(T, U, N)
        return mx.where(known[..., None], out, mx.nan)
    out = mx.full((T, U, N), mx.nan, out_dtype or x.dtype)
    for expert in range(X):
        out = mx.where((ids == expert)[..., None], times(rows, expert), out)
    return out


def shapes(sizes: Sizes) -> Iterator[Shape]:
    for packing in sizes.quantized:
        for X, U, true, K, form, dtype in sizes.stacks:
            if K % packing[0] == 0:
                matrices = 2 * X if form == "gated" else X
                N = sizes.fitted(true, K, packing, matrices=matrices, least=32)
                settings = {"X": X, "U": U, "N": N, "K": K, "form": form}
                yield settings | packed(packing, dtype), scaled("N", true, N)


def example(X: int, U: int, N: int, K: int, form: str, group: int, bits: int, dtype: str) -> Call:
    """Of rows that each expert has for itself ("own rows"), of one row for all of a token's ("one
    row"), or that gated."""
    gated = form == "gated"
    x = normal(1, *((MOST, U, K) if form == "own rows" else (MOST, K)), dtype=dtype)
    stack = quantized(2, X, N, K, group=group, bits=bits, dtype=dtype)
    up = quantized(3, X, N, K, group=group, bits=bits, dtype=dtype) if gated else None
    ids = mx.sort((mx.arange(MOST)[:, None] * 5 + mx.arange(U) * 3) % X, axis=1)
    ids = ids.astype(mx.int32)
    out_dtype = None if gated else mx.float32

    def slack(results: Results) -> Results:
        """Expert by expert, for the rows that chose it."""
        import numpy as np  # not where the package is imported

        (out,) = results
        parts = mx.zeros(out.shape)
        for expert in np.unique(np.array(ids)).tolist():
            own = stack[0][expert], stack[1][expert], stack[2][expert]
            rows = x[:, None] if x.ndim == 2 else x
            if up is None:
                (part,) = of_sums(results, [product_error(rows, own, group, bits)])
            else:
                second = up[0][expert], up[1][expert], up[2][expert]
                part = gate_error(out, rows, own, second, (group, bits))
            parts = mx.where((ids == expert)[..., None], part, parts)
            mx.eval(parts)
        return [parts]

    def run(b: int, e: int) -> Results:
        rows = x[b:e], stack, ids[b:e]
        return [quantized_expert_matmul(*rows, group, bits, up=up, out_dtype=out_dtype)]

    return Call(run, first, slack, same_bits=False)
