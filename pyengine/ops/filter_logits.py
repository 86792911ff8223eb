from typing import NamedTuple

import mlx.core as mx

from pyengine import _ext

from .dispatch import run

MAX_TOP_K = 256


class Edits(NamedTuple):
    """Changes to single logits z before all else: ``(z / f if z > 0 else z * f) + delta``.

    An id may stand several times if it says the same each time. None may overflow.
    """

    ids: mx.array  # int32 [L], fastest when nearly sorted
    factors: mx.array  # f, float32 [T, L]; 1 is none
    deltas: mx.array  # float32 [T, L]; -inf takes the token away


class Filtered(NamedTuple):
    """Candidates best first, and what was wrong with the logits."""

    ids: mx.array
    probs: mx.array
    flags: mx.array


def filter_logits(
    logits: mx.array,
    *,
    temperature: float = 1.0,
    top_k: int = 64,
    top_p: float = 1.0,
    min_p: float = 0.0,
    edits: Edits | None = None,
) -> Filtered:
    """Turn rows of logits into the candidates that are sampled from, best first.

    Edit; divide by the temperature; keep the ``top_k`` best; softmax; keep the smallest prefix
    whose preceding mass is below ``top_p``; drop what is below ``min_p`` times the best;
    renormalise. Higher logits come first, equal ones by lower id; mass is summed in that order in
    float32. On a GPU plain MLX serves all V candidates (``top_k`` 0), and more than 262144 logits
    with 256 candidates (or a like product): the same candidates, mass in an order of MLX's own.

    Args:
        logits: ``[T, V]`` float32; any strides.
        temperature: 0 keeps the best candidate alone.
        top_k: 1 to 256 candidates a row, or 0 for all V, which sorts the row.
        top_p: Above 0; 1.0 is off.
        min_p: 0 or more and below 1; 0.0 is off.
        edits: Sparse changes of the logits; an id outside of 0 to V - 1 changes nothing.

    Returns:
        ids int32 ``[T, n]`` and probabilities float32 ``[T, n]``, n the smaller of ``top_k`` and V;
        what was cut has probability 0. flags int32 ``[T]``: 0 when every logit is finite, 1 when
        some are -inf, 2 when one is NaN or +inf or no candidate is left.

    Raises:
        ValueError: A shape, dtype or limit above does not hold.
    """
    out = _ext.filter_logits(logits, temperature, top_k, top_p, min_p, *(edits or ()))
    ids, probs, flags = run(
        out,
        filter_logits_reference,
        logits,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        edits=edits,
    )
    return Filtered(ids, probs, flags)


def filter_logits_reference(
    logits: mx.array,
    *,
    temperature: float = 1.0,
    top_k: int = 64,
    top_p: float = 1.0,
    min_p: float = 0.0,
    edits: Edits | None = None,
) -> Filtered:
    """The same in plain MLX."""
    vocab = logits.shape[-1]
    finite = mx.isfinite(logits).all(axis=-1)
    broken = (mx.isnan(logits) | (logits == mx.inf)).any(axis=-1)
    if edits is not None:
        # A column more takes the edits of ids outside of the vocabulary
        known = (edits.ids >= 0) & (edits.ids < vocab)
        ids = mx.broadcast_to(mx.where(known, edits.ids, vocab), edits.factors.shape)
        padded = mx.pad(logits, [(0, 0), (0, 1)])
        z = mx.take_along_axis(padded, ids, axis=-1)
        z = mx.where(z > 0, z / edits.factors, z * edits.factors) + edits.deltas
        logits = mx.put_along_axis(padded, ids, z, axis=-1)[:, :vocab]
    if temperature == 0:
        temperature, top_k = 1.0, 1
    logits = logits / temperature
    ids = _best_first(logits, min(top_k or vocab, vocab))
    kept = mx.take_along_axis(logits, ids, axis=-1)
    flags = mx.where(broken | ~mx.isfinite(kept[:, 0]), 2, mx.where(finite, 0, 1))
    weight = mx.exp(kept - kept[:, :1])
    probs = weight / mx.cumsum(weight, axis=-1)[:, -1:]
    if top_p < 1:
        preceding = mx.cumsum(probs, axis=-1, inclusive=False)
        probs = mx.where(preceding < top_p, probs, 0)
    if min_p > 0:
        probs = mx.where(probs >= min_p * probs[:, :1], probs, 0)
    return Filtered(ids, probs / mx.cumsum(probs, axis=-1)[:, -1:], flags.astype(mx.int32))


def _best_first(logits: mx.array, count: int) -> mx.array:
    """Ids of the ``count`` best logits, ties by lower id: int32 ``[T, count]``.

    Logit and id are packed into one integer, so no two keys are equal and the answer does not
    depend on how the sort treats ties.
    """
    vocab = logits.shape[-1]
    bits = (logits + 0.0).view(mx.uint32)  # + 0.0: -0 and 0 are the same logit
    falling = mx.where(bits >> 31, bits, bits ^ 0x7FFFFFFF)
    keys = (falling.astype(mx.uint64) << 32) | mx.arange(vocab, dtype=mx.uint64)
    if count < vocab:
        keys = mx.partition(keys, count, axis=-1)[:, :count]
    return (mx.sort(keys, axis=-1) & 0xFFFFFFFF).astype(mx.int32)
