"""The one small array that the host reads of a round: packed here, and unpacked."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from pyengine.sampling.sampler import Logprob


class NonFinite(RuntimeError):
    """The target gave logits that are NaN or infinite; ``dtype`` is that of its activations."""

    def __init__(self, what: str, dtype: mx.Dtype) -> None:
        why = "are the weights damaged?"
        if dtype == mx.float16:
            why = "float16 ends at 65504: load the pair with dtype bfloat16 or float32."
        super().__init__(f"[{what}] logits must be finite but got NaN or infinity; {why}")


class Report(NamedTuple):
    """What a round of k drafts came to for a sequence.

    Packed, int32, for all sequences in this order: ``accepted`` of each, the next token of each,
    flags of the target's k + 1 rows, the k drafts, their k flags, and k + 1 rows of ``1 + 2 * n``
    of those that ask for logprobs.
    """

    accepted: int
    tokens: list[int]  # those committed: accepted drafts, and the token that follows them
    finite: bool
    logprobs: list[Logprob] | None  # of the tokens

    @staticmethod
    def pack(
        accepted: mx.array,
        tokens: mx.array,
        p_flags: mx.array,
        drafts: mx.array,
        q_flags: Sequence[mx.array],
        logprobs: Sequence[mx.array],
    ) -> mx.array:
        """The array; ``q_flags`` in parts, none where there are no drafts."""
        parts = [accepted, tokens, p_flags]
        if q_flags:
            parts += [drafts, *q_flags]
        return mx.concatenate([*parts, *(values.flatten() for values in logprobs)])

    @classmethod
    def unpack(cls, row: list[int], ks: Sequence[int], ns: Sequence[int | None]) -> list[Report]:
        """Of what :meth:`pack` made; ``ns`` is each one's number of logprobs, None for none."""
        Q, found = len(ks), []
        flag = 2 * Q  # where the next sequence's flags begin, and so on
        draft = flag + Q + sum(ks)
        guess = draft + sum(ks)
        value = guess + sum(ks)
        for i, (k, n) in enumerate(zip(ks, ns, strict=True)):
            flags, drafts = row[flag : flag + k + 1], row[draft : draft + k]
            guesses, values = row[guess : guess + k], row[value:]
            found.append(cls._of(row[i], row[Q + i], flags, drafts, guesses, values, n))
            flag, draft, guess = flag + k + 1, draft + k, guess + k
            value += 0 if n is None else (k + 1) * (1 + 2 * n)
        return found

    @classmethod
    def _of(
        cls,
        accepted: int,
        token: int,
        ours: list[int],
        drafts: list[int],
        guesses: list[int],
        values: list[int],
        n: int | None,
    ) -> Report:
        tokens = [*drafts[:accepted], token]
        # A drafter may leave tokens out (-inf, flag 1); a target may not
        finite = not any(ours) and not any(flags >> 1 for flags in guesses)
        if n is None:
            return cls(accepted, tokens, finite, None)
        width = 1 + 2 * n
        found = []
        for i, token in enumerate(tokens):
            own, *best = values[i * width : (i + 1) * width]
            floats = struct.unpack(f"{1 + n}f", struct.pack(f"{1 + n}i", own, *best[n:]))
            found.append(Logprob(token, floats[0], list(zip(best[:n], floats[1:], strict=True))))
        return cls(accepted, tokens, finite, found)
