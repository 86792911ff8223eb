"""The one small array that the host reads of a round: packed here, and unpacked."""

from __future__ import annotations

import struct
from typing import NamedTuple

import mlx.core as mx

from pyengine.ops.filter_logits import Filtered
from pyengine.sampling.sampler import Logprob


class NonFinite(RuntimeError):
    """The target gave logits that are NaN or infinite; ``dtype`` is that of its activations."""

    def __init__(self, what: str, dtype: mx.Dtype) -> None:
        why = "are the weights damaged?"
        if dtype == mx.float16:
            why = "float16 ends at 65504: load the pair with dtype bfloat16 or float32."
        super().__init__(f"[{what}] logits must be finite but got NaN or infinity; {why}")


class Report(NamedTuple):
    """What a round of k drafts came to.

    Packed, int32, in this order: ``accepted``, the next token, flags of the target's k + 1 rows,
    the k drafts, their k flags, and k + 1 rows of ``1 + 2 * n`` where logprobs are asked for.
    """

    accepted: int
    tokens: list[int]  # those committed: accepted drafts, and the token that follows them
    finite: bool
    logprobs: list[Logprob] | None  # of the tokens

    @staticmethod
    def length(k: int, n: int | None) -> int:
        """Numbers of what :meth:`pack` makes."""
        return 3 * k + 3 + (0 if n is None else (k + 1) * (1 + 2 * n))

    @staticmethod
    def pack(
        accepted: mx.array,
        token: mx.array,
        p: Filtered,
        drafts: mx.array,
        q: Filtered | None,
        logprobs: mx.array | None,
    ) -> mx.array:
        """The array; ``q`` is None where there are no drafts."""
        parts = [accepted[None], token, p.flags]
        if q is not None:
            parts += [drafts, q.flags]
        if logprobs is not None:
            parts.append(logprobs.flatten())
        return mx.concatenate(parts)

    @classmethod
    def unpack(cls, row: list[int], k: int, n: int | None) -> Report:
        """Of what :meth:`pack` made; ``n`` is the settings' number of logprobs."""
        accepted, token, *row = row
        ours, drafts, guesses, rest = _split(row, k + 1, k, k)
        tokens = [*drafts[:accepted], token]
        # A drafter may leave tokens out (-inf, flag 1); a target may not
        finite = not any(ours) and not any(flags >> 1 for flags in guesses)
        if n is None:
            return cls(accepted, tokens, finite, None)
        width = 1 + 2 * n
        found = []
        for i, token in enumerate(tokens):
            own, *best = rest[i * width : (i + 1) * width]
            values = struct.unpack(f"{1 + n}f", struct.pack(f"{1 + n}i", own, *best[n:]))
            found.append(Logprob(token, values[0], list(zip(best[:n], values[1:], strict=True))))
        return cls(accepted, tokens, finite, found)


def _split(row: list[int], *lengths: int) -> list[list[int]]:
    """Parts of these lengths, and the rest."""
    parts = []
    for length in lengths:
        parts.append(row[:length])
        row = row[length:]
    return [*parts, row]
