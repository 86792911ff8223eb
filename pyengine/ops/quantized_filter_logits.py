import math
from collections.abc import Iterator
from typing import Any

import mlx.core as mx

from pyengine import _ext

from .dispatch import run
from .example import DTYPES, MOST, Call, Results, first, of_candidates, quantized
from .filter_logits import (
    EXAMPLES,
    Edits,
    Filtered,
    Setting,
    filter_logits,
    filter_logits_reference,
    settings_of,
)
from .quantized_matmul import quantized_matmul, quantized_matmul_reference
from .sizes import Shape, Sizes, packed, scaled
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
    temperature: Setting = 1.0,
    top_k: Setting = 64,
    top_p: Setting = 1.0,
    min_p: Setting = 0.0,
    owner: mx.array | None = None,
    width: int | None = None,
    mask: mx.array | None = None,
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
        x: ``[R, E]``, float32, float16 or bfloat16; any strides; E is a multiple of
            ``group_size``.
        w: uint32 ``[V, E * bits / 32]``, as ``mx.quantize`` packs it.
        scales: ``[V, E / group_size]``, dtype of ``x``.
        biases: ``[V, E / group_size]``, dtype of ``x``.
        group_size: 32, 64 or 128 weights share a scale and a bias.
        bits: 8, 6 or 4 per weight.
        softcap: Bends the logits, above 0; None is off.
        temperature: This and what follows as :func:`filter_logits`.
        top_k: 1 or more; as a number also 0 where the temperature is 0.
        top_p: For a sequence or for all.
        min_p: For a sequence or for all.
        owner: Sequence of each row, int32 ``[R]``; None: all are the first one's.
        width: The largest ``top_k``, 1 to 256.
        mask: The tokens that stay in each row.
        edits: Sparse changes of the capped logits; an id outside of 0 to V - 1 changes nothing.

    Returns:
        As :func:`filter_logits`.

    Raises:
        ValueError: A shape, dtype or limit above does not hold.
    """
    args = (x, w, scales, biases, group_size, bits)
    rows, given = x.shape[0] if x.ndim else 0, (temperature, top_k, top_p, min_p)
    settings = settings_of("quantized_filter_logits", rows, *given, owner, width, edits)
    out = _ext.quantized_filter_logits(*args, softcap, *settings, mask, *(edits or ()))
    options = {"softcap": softcap, **settings._asdict(), "mask": mask, "edits": edits}
    reference = quantized_filter_logits_reference
    return Filtered(*run(out, reference, *args, otherwise=_one_by_one, **options))


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
    **settings: Any,
) -> Filtered:
    """The same in plain MLX; ``settings`` as :func:`filter_logits_reference`."""
    logits = quantized_matmul_reference(
        x, w, scales, biases, group_size, bits, out_dtype=mx.float32
    )
    if softcap is not None:
        logits = softcap_reference(logits, softcap)
    return filter_logits_reference(logits, **settings)


def shapes(sizes: Sizes) -> Iterator[Shape]:
    for packing in sizes.quantized:
        for true, K, cap, filters in sizes.lm_heads:
            V = sizes.fitted(true, K, packing, least=512)
            for name in filters:
                settings = {"V": V, "K": K, "softcap": cap, "filter": name}
                yield settings | packed(packing, sizes.dtype), scaled("V", true, V)


def example(
    V: int, K: int, softcap: float | None, filter: str, group: int, bits: int, dtype: str
) -> Call:
    """Of whole numbers and powers of two, so that the sums are the same in every order."""
    whole = mx.random.randint(-4, 5, (MOST, K), key=mx.random.key(1))
    x = whole.astype(DTYPES[dtype])
    w, scales, _ = quantized(2, V, K, group=group, bits=bits, dtype=dtype)
    # Logits of a standard deviation near 8
    unit = 2.0 ** round(math.log2(8 / (2.58 * 0.289 * 2**bits * math.sqrt(K))))
    scales = mx.full(scales.shape, unit, scales.dtype)
    head = (w, scales, scales * -(2.0 ** (bits - 1)))
    settings = {"softcap": softcap, **EXAMPLES[filter]}

    def run(b: int, e: int) -> Results:
        return list(quantized_filter_logits(x[b:e], *head, group, bits, **settings))

    return Call(run, first, of_candidates, weights=head)
