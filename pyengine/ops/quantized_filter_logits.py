from typing import Any

import mlx.core as mx

from pyengine import _ext

from .dispatch import run
from .filter_logits import Edits, Filtered, filter_logits, filter_logits_reference
from .quantized_matmul import quantized_matmul, quantized_matmul_reference
from .softcap import softcap as cap_logits
from .softcap import softcap_reference


def quantized_filter_logits(
    x: mx.array,
    w: mx.array,
    scales: mx.array,
    biases: mx.array,
    group_size: int = 64,
    bits: int = 8,
    *,
    softcap: float | None = None,
    temperature: float = 1.0,
    top_k: int = 64,
    top_p: float = 1.0,
    min_p: float = 0.0,
    edits: Edits | None = None,
) -> Filtered:
    """Multiply rows by a vocabulary matrix and keep the candidates alone: no logits are stored.

    Bit for bit ``filter_logits(softcap(quantized_matmul(x, w, ...), cap), ...)`` with float32
    logits; without the softcap where that is None. Each thread keeps the best candidates of the
    columns it works on; what is best is a total order, so it does not matter which these are. Each
    weight is read once for up to 16 rows; more run as slices of 16. On a GPU the three ops run one
    after the other where the lists of that many candidates and rows do not fit in a threadgroup's
    memory.

    Args:
        x: ``[T, E]``, float32, float16 or bfloat16; any strides; E is a multiple of
            ``group_size``.
        w: uint32 ``[V, E * bits / 32]``, as ``mx.quantize`` packs it.
        scales: ``[V, E / group_size]``, dtype of ``x``.
        biases: ``[V, E / group_size]``, dtype of ``x``.
        group_size: 32, 64 or 128 weights share a scale and a bias.
        bits: 8, 6 or 4 per weight.
        softcap: Bends the logits, above 0; None is off.
        temperature: 0 keeps the best candidate alone.
        top_k: 1 to 256 candidates a row; also 0 where the temperature is 0.
        top_p: As :func:`filter_logits`.
        min_p: As :func:`filter_logits`.
        edits: Sparse changes of the capped logits; an id outside of 0 to V - 1 changes nothing.

    Returns:
        As :func:`filter_logits`.

    Raises:
        ValueError: A shape, dtype or limit above does not hold.
    """
    args = (x, w, scales, biases, group_size, bits)
    settings = (softcap, temperature, top_k, top_p, min_p)
    outs = _ext.quantized_filter_logits(*args, *settings, *(edits or ()))
    options = {
        "softcap": softcap,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "edits": edits,
    }
    reference = quantized_filter_logits_reference
    return Filtered(*run(outs, reference, *args, otherwise=_one_by_one, **options))


def _one_by_one(
    x: mx.array,
    w: mx.array,
    scales: mx.array,
    biases: mx.array,
    group_size: int,
    bits: int,
    *,
    softcap: float | None,
    **settings: Any,
) -> Filtered:
    logits = quantized_matmul(x, w, scales, biases, group_size, bits, out_dtype=mx.float32)
    if softcap is not None:
        logits = cap_logits(logits, softcap)
    return filter_logits(logits, **settings)


def quantized_filter_logits_reference(
    x: mx.array,
    w: mx.array,
    scales: mx.array,
    biases: mx.array,
    group_size: int = 64,
    bits: int = 8,
    *,
    softcap: float | None = None,
    temperature: float = 1.0,
    top_k: int = 64,
    top_p: float = 1.0,
    min_p: float = 0.0,
    edits: Edits | None = None,
) -> Filtered:
    """The same in plain MLX."""
    logits = quantized_matmul_reference(
        x, w, scales, biases, group_size, bits, out_dtype=mx.float32
    )
    if softcap is not None:
        logits = softcap_reference(logits, softcap)
    return filter_logits_reference(
        logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, edits=edits
    )
