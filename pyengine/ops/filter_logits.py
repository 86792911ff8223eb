from collections.abc import Iterator
from typing import Any, NamedTuple

import mlx.core as mx

from pyengine import _ext

from .dispatch import run
from .example import MOST, Call, first, normal, of_candidates
from .sizes import Shape, Sizes

MAX_TOP_K = 256


Setting = float | mx.array  # one number for all sequences, or an entry for each of Q


class Edits(NamedTuple):
    """Changes to single logits z before all else: ``(z / f if z > 0 else z * f) + delta``.

    An id may stand several times if it says the same each time. None may overflow.
    """

    ids: mx.array  # int32 [Q, L], a list per sequence; fastest when nearly sorted
    factors: mx.array  # f, float32 [R, L]; 1 is none
    deltas: mx.array  # float32 [R, L]; -inf takes the token away


class Filtered(NamedTuple):
    """Candidates best first, and what was wrong with the logits."""

    ids: mx.array
    probs: mx.array
    flags: mx.array


def filter_logits(
    logits: mx.array,
    *,
    temperature: Setting = 1.0,
    top_k: Setting = 64,
    top_p: Setting = 1.0,
    min_p: Setting = 0.0,
    owner: mx.array | None = None,
    width: int | None = None,
    mask: mx.array | None = None,
    edits: Edits | None = None,
) -> Filtered:
    """Turn rows of logits into the candidates that are sampled from, best first.

    Edit; take away what the mask does not have; divide by the temperature; keep the ``top_k`` best;
    softmax; keep the smallest prefix whose preceding mass is below ``top_p``; drop what is below
    ``min_p`` times the best; renormalise. Higher logits come first, equal ones by lower id; mass is
    summed in that order in float32. Rows of several sequences are filtered in one call, each by the
    settings of its own. On a GPU plain MLX serves all V candidates (``width`` 0), and more than
    262144 logits with 256 candidates (or a like product): the same candidates, mass in an order of
    MLX's own.

    Args:
        logits: ``[R, V]`` float32; any strides.
        temperature: Above 0, float32 ``[Q]``; or one number for all, where 0 keeps the best
            candidate alone.
        top_k: Candidates of a row, at most ``width``, int32 ``[Q]``, or one number for all; 0 where
            ``width`` is 0: all V.
        top_p: Above 0, float32 ``[Q]`` or a number; 1.0 is off.
        min_p: 0 or more and below 1, float32 ``[Q]`` or a number; 0.0 is off.
        owner: Sequence of each row, int32 ``[R]``; None: all are the first one's.
        width: The largest ``top_k``, 1 to 256; 0 keeps all V, which sorts the rows. It follows from
            a ``top_k`` that is a number.
        mask: The tokens that stay in each row, uint32 ``[R, ceil(V / 32)]``: token t where bit
            ``t % 32`` of number ``t // 32`` is set; the others' logits are -inf. None: all.
        edits: Sparse changes of the logits; an id outside of 0 to V - 1 changes nothing.

    Returns:
        ids int32 ``[R, n]`` and probabilities float32 ``[R, n]``, n the smaller of ``width`` and V;
        what was cut has probability 0, and past the row's own ``top_k`` stand id -1 and
        probability 0. flags int32 ``[R]``: 0 when every logit as given is finite, 1 when some are
        -inf, 2 when one is NaN or +inf or no candidate is left.

    Raises:
        ValueError: A shape, dtype or limit above does not hold, as far as the host knows the
            values.
    """
    rows, given = logits.shape[0] if logits.ndim else 0, (temperature, top_k, top_p, min_p)
    settings = settings_of("filter_logits", rows, *given, owner, width, edits)
    out = _ext.filter_logits(logits, *settings, mask, *(edits or ()))
    options = {**settings._asdict(), "mask": mask, "edits": edits}
    return Filtered(*run(out, filter_logits_reference, logits, **options))


class Settings(NamedTuple):
    """What the kernels are told: the four settings of each sequence, whose the rows are, n."""

    temperature: mx.array
    top_k: mx.array
    top_p: mx.array
    min_p: mx.array
    owner: mx.array
    width: int


def settings_of(
    op: str,
    rows: int,
    temperature: Setting,
    top_k: Setting,
    top_p: Setting,
    min_p: Setting,
    owner: mx.array | None,
    width: int | None,
    edits: Edits | None,
) -> Settings:
    """Numbers as arrays ``[Q]``.

    Raises:
        ValueError: A ``top_k`` that is an array comes without ``width``.
    """
    if not isinstance(top_k, mx.array):
        if isinstance(temperature, (int, float)) and temperature == 0 and 0 <= top_k <= MAX_TOP_K:
            temperature, top_k = 1.0, 1
        width = int(top_k) if width is None else width
    elif width is None:
        raise ValueError(
            "[filter_logits] width must be given where top_k is an array but got None."
        )
    given = (temperature, top_k, top_p, min_p, *(edits or ())[:1])
    Q = next((a.shape[0] for a in given if isinstance(a, mx.array) and a.ndim), 1)

    def each(setting: Setting, dtype: mx.Dtype) -> mx.array:
        return setting if isinstance(setting, mx.array) else mx.array([setting] * Q, dtype=dtype)

    if not isinstance(top_k, mx.array):
        top_k = min(max(int(top_k), 0), MAX_TOP_K)  # width has the number as it came
    return Settings(
        each(temperature, mx.float32),
        each(top_k, mx.int32),
        each(top_p, mx.float32),
        each(min_p, mx.float32),
        mx.zeros(rows, dtype=mx.int32) if owner is None else owner,
        width,
    )


def filter_logits_reference(
    logits: mx.array,
    *,
    temperature: Setting = 1.0,
    top_k: Setting = 64,
    top_p: Setting = 1.0,
    min_p: Setting = 0.0,
    owner: mx.array | None = None,
    width: int | None = None,
    mask: mx.array | None = None,
    edits: Edits | None = None,
) -> Filtered:
    """The same in plain MLX."""
    rows, vocab = logits.shape
    given = (temperature, top_k, top_p, min_p)
    *settings, owner, width = settings_of("filter_logits", rows, *given, owner, width, edits)
    finite = mx.isfinite(logits).all(axis=-1)
    broken = (mx.isnan(logits) | (logits == mx.inf)).any(axis=-1)
    temperature, top_k, top_p, min_p = (mx.take(each, owner)[:, None] for each in settings)
    if edits is not None:
        # A column more takes the edits of ids outside of the vocabulary
        known = (edits.ids >= 0) & (edits.ids < vocab)
        ids = mx.take(mx.where(known, edits.ids, vocab), owner, axis=0)
        padded = mx.pad(logits, [(0, 0), (0, 1)])
        z = mx.take_along_axis(padded, ids, axis=-1)
        z = mx.where(z > 0, z / edits.factors, z * edits.factors) + edits.deltas
        logits = mx.put_along_axis(padded, ids, z, axis=-1)[:, :vocab]
    if mask is not None:
        bits = (mask[:, :, None] >> mx.arange(32, dtype=mx.uint32)) & 1
        logits = mx.where(bits.reshape(rows, -1)[:, :vocab] == 1, logits, -mx.inf)
    logits = logits / temperature
    ids = _best_first(logits, min(width or vocab, vocab))
    own = (mx.arange(ids.shape[1]) < top_k) | (top_k == 0)  # the row's own candidates
    kept = mx.take_along_axis(logits, ids, axis=-1)
    flags = mx.where(broken | ~mx.isfinite(kept[:, 0]), 2, mx.where(finite, 0, 1))
    weight = mx.where(own, mx.exp(kept - kept[:, :1]), 0)
    probs = weight / mx.cumsum(weight, axis=-1)[:, -1:]
    preceding = mx.cumsum(probs, axis=-1, inclusive=False)
    probs = mx.where((top_p >= 1) | (preceding < top_p), probs, 0)
    probs = mx.where(probs >= min_p * probs[:, :1], probs, 0)
    probs = mx.where(own, probs / mx.cumsum(probs, axis=-1)[:, -1:], 0)
    return Filtered(mx.where(own, ids, -1), probs, flags.astype(mx.int32))


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


EXAMPLES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "64": {"temperature": 1.0, "top_k": 64, "top_p": 0.95},
    "256": {"temperature": 1.3, "top_k": 256, "min_p": 0.05},
}


def shapes(sizes: Sizes) -> Iterator[Shape]:
    for V, _ in sizes.vocabularies:
        for name in EXAMPLES:
            yield {"V": V, "filter": name}, {}


def example(V: int, filter: str) -> Call:
    logits = normal(1, MOST, V, scale=4.0)
    return Call(
        lambda b, e: list(filter_logits(logits[b:e], **EXAMPLES[filter])), first, of_candidates
    )
