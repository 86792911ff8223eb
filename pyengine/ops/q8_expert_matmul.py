import mlx.core as mx

from pyengine import _ext

from . import workbench
from .geglu import geglu
from .q8_gated_matmul import Matrix, q8_gated_matmul_reference
from .q8_matmul import q8_matmul_reference
from .switch import chosen, too_wide


def q8_expert_matmul(
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
    stack[id].T) * (x[t] @ up[id].T)``; products as in ``q8_matmul``, the gate as in
    ``q8_gated_matmul``, bit for bit. Rows are grouped by expert where they are: for 16 tokens an
    expert's weights are read once however many chose it, and those of the others not at all. On a
    GPU MLX's ``gather_qmm``, which is not row-stable, serves more than 128 tokens.

    Args:
        x: ``[T, K]``, or ``[T, U, K]`` with one row for each expert of a token; float32, float16 or
            bfloat16; K is a multiple of the group size.
        stack: Weights uint32 ``[X, N, K * bits / 32]``, scales and biases ``[X, N, K / g]``
            of the dtype of ``x``, g the group size.
        ids: int32 ``[T, U]``, from 0 to X - 1.
        group_size: 32, 64 or 128 weights share a scale and a bias.
        bits: 8, 6 or 4 per weight.
        up: A second stack of the same shape.
        out_dtype: float32 or the dtype of ``x``, which is the only one with ``up``; None is the
            dtype of ``x``.

    Returns:
        ``[T, U, N]``.

    Raises:
        ValueError: A shape, dtype or limit above does not hold.
        RuntimeError: An id is out of range (when evaluated, on the processor).
    """
    second = [] if up is None else list(up)
    out = _ext.q8_expert_matmul(x, list(stack), second, ids, group_size, bits, out_dtype)  # checks
    implementation = chosen("q8_expert_matmul")
    if implementation == "reference":
        return q8_expert_matmul_reference(
            x, stack, ids, group_size, bits, up=up, out_dtype=out_dtype
        )
    T, U, N = out.shape
    if implementation == "workbench" and out.size > 0:
        X, K, alone = stack[0].shape[0], x.shape[-1], x.ndim == 2
        launch = _ext.q8_expert_matmul_launch(
            T, U, X, N, K, up is not None, alone, x.dtype, out.dtype, group_size, bits
        )
        return workbench.run(launch, x, *stack, *(up or stack), ids)[0]
    if implementation != "mlx" and not too_wide(out[:, 0]):
        return out
    rows = x.reshape(T, -1, 1, x.shape[-1]).astype(out.dtype)

    def served(matrix: Matrix) -> mx.array:
        w, scales, biases = matrix
        y = mx.gather_qmm(
            rows,
            w,
            scales.astype(out.dtype),
            biases.astype(out.dtype),
            rhs_indices=ids,
            transpose=True,
            group_size=group_size,
            bits=bits,
        )
        return y.squeeze(2)

    return served(stack) if up is None else geglu(served(stack), served(up))


def q8_expert_matmul_reference(
    x: mx.array,
    stack: Matrix,
    ids: mx.array,
    group_size: int = 64,
    bits: int = 8,
    *,
    up: Matrix | None = None,
    out_dtype: mx.Dtype | None = None,
) -> mx.array:
    """The same in plain MLX: every expert sees every row."""
    T, U = ids.shape
    X, N = stack[0].shape[:2]
    rows = mx.broadcast_to(x.reshape(T, -1, x.shape[-1]), (T, U, x.shape[-1]))
    out = mx.zeros((T, U, N), out_dtype or x.dtype)
    for expert in range(X):
        w, scales, biases = (a[expert] for a in stack)
        if up is None:
            y = q8_matmul_reference(rows, w, scales, biases, group_size, bits, out_dtype=out_dtype)
        else:
            second = (up[0][expert], up[1][expert], up[2][expert])
            y = q8_gated_matmul_reference(rows, (w, scales, biases), second, group_size, bits)
        out = mx.where((ids == expert)[..., None], y, out)
    return out
