"""Rounds without weights against rounds by hand: every draft, draw, decision and count of tokens.

Tables stand for target and assistant. The target's row depends on the position of its token, the
assistant's on the hidden row it starts from, so that a wrong position, commit or hidden row shows
in what is drafted; both see penalties that depend on all tokens before.
"""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
import rules_by_hand as hand
from models import decode
from rules_by_hand import Close, Settings
from text_fakes import LengthCache

from pyengine.engine.sequence import Round
from pyengine.model.target import Processed, Reader
from pyengine.ops.accept_block import RULES
from pyengine.sampling.settings import Sampling

pytestmark = pytest.mark.engine

VOCAB, TURN = 11, 7  # rows repeat after so many positions
PROMPT = [4, 9, 4]
HALF_RIGHT, RIGHT = 1.1, 0.0  # how far the assistant is off


class Tables:
    """Logits of the target by (position, token); of the assistant also by the token before."""

    def __init__(self, seed: int, off: float) -> None:
        rng = np.random.default_rng(seed)
        self.p = rng.normal(0, 1.6, (TURN, VOCAB, VOCAB)).astype(np.float32)
        error = rng.normal(0, off, (TURN, VOCAB, VOCAB, VOCAB)).astype(np.float32)
        self.q = self.p[:, None] + error  # [TURN, before, token, V]

    def target(self, text: list[int]) -> np.ndarray:
        return self.p[(len(text) - 1) % TURN, text[-1]]

    def guess(self, text: list[int], drafts: list[int]) -> np.ndarray:
        *_, before, last = text + drafts
        return self.q[(len(text) + len(drafts) - 1) % TURN, before, last]


class FakeTarget:
    """A hidden row is its token and position."""

    context = 10_000
    waiting = staticmethod(nullcontext)  # for nobody

    def __init__(self, tables: Tables) -> None:
        self.p = mx.array(tables.p)

    def embed(self, ids: mx.array) -> mx.array:
        return ids[:, None]

    def new_cache(self) -> LengthCache:
        return LengthCache()

    def prefill(
        self, ids: list[int], cache: LengthCache, *, reader: Reader | None = None
    ) -> tuple[mx.array, mx.array]:
        logits, hidden = self.forward([mx.array(ids, dtype=mx.int32)], [cache])
        cache.commit(mx.array(len(ids), mx.int32), cache.length_limit + len(ids))
        hidden = hidden[-1:]
        if reader is not None:
            reader.read([reader], [Processed(hidden, mx.array(0, mx.int32), cache)])
        return logits[-1], hidden

    def forward(
        self, ids: list[mx.array], caches: list[LengthCache], taps: tuple[int, ...] = ()
    ) -> tuple[mx.array, mx.array]:
        at = mx.concatenate(
            [cache.length + mx.arange(own.size) for own, cache in zip(ids, caches, strict=True)]
        ).astype(mx.int32)
        tokens = mx.concatenate(ids)
        return self.p[at % TURN, tokens], mx.stack([tokens, at], axis=-1)


class FakeAssistant:
    def __init__(self, tables: Tables) -> None:
        self.q = mx.array(tables.q)

    def forward(
        self, embedding: mx.array, hidden: mx.array, caches: list[LengthCache]
    ) -> tuple[mx.array, mx.array]:
        before, at, token = hidden[:, 0], hidden[:, 1] + 1, embedding[:, 0]
        return self.q[at % TURN, before, token], mx.stack([token, at], axis=-1)


SETTINGS = {
    "off": Sampling(1.0, top_p=1.0, top_k=0),
    "greedy": Sampling(0.0, top_p=1.0, top_k=0),
    "filters": Sampling(1.2, top_p=0.9, top_k=8, min_p=0.01),
    "repetition": Sampling(0.8, top_p=1.0, top_k=0, repetition_penalty=1.5),
    "presence": Sampling(1.0, top_p=1.0, top_k=0, presence_penalty=1.5),
    "frequency": Sampling(1.0, top_p=0.95, top_k=64, frequency_penalty=0.7),
    "bias": Sampling(
        0.9, top_p=1.0, top_k=5, logit_bias={2: 2.5, 7: -3.0, 5: 90.0}, suppress_tokens=(5, 1)
    ),
    "all": Sampling(
        0.7,
        top_p=0.95,
        top_k=9,
        min_p=0.005,
        repetition_penalty=1.2,
        presence_penalty=0.4,
        frequency_penalty=0.3,
        logit_bias={3: 1.0, 9: -1.0},
        suppress_tokens=(6,),
    ),
    "greedy, penalties": Sampling(0.0, top_p=1.0, top_k=0, presence_penalty=0.9,
                                  frequency_penalty=0.5, repetition_penalty=1.1),
}  # fmt: skip


def by_hand(s: Sampling) -> Settings:
    """The same settings, named for themselves so that none is passed over."""
    return Settings(
        temperature=s.temperature,
        top_k=s.top_k,
        top_p=s.top_p,
        min_p=s.min_p,
        repetition=s.repetition_penalty,
        presence=s.presence_penalty,
        frequency=s.frequency_penalty,
        bias=tuple(s.logit_bias.items()),
        suppress=s.suppress_tokens,
    )


def played(tables: Tables, s: Sampling, k: int, count: int) -> list[Round]:
    rounds = decode(
        FakeTarget(tables),  # type: ignore[arg-type]
        FakeAssistant(tables) if k else None,  # type: ignore[arg-type]
        PROMPT,
        sampling=s,
        block_size=k + 1,
    )
    return list(itertools.islice(rounds, count))


def compare(tables: Tables, s: Sampling, k: int, count: int) -> list[int]:
    """Play so many rounds, both ways; how many drafts each of those compared kept."""
    got = played(tables, s, k, count)
    assert s.seed is not None
    want = hand.rounds(
        tables.target, tables.guess, PROMPT, by_hand(s), rule=s.verify, k=k, seed=s.seed
    )
    seen = []
    for number, r in enumerate(got):
        try:
            expected = next(want)
        except Close:
            break
        assert r.tokens == expected.tokens, (number, expected)
        assert r.num_accepted == expected.accepted
        assert r.num_drafted == (k if number else 0)
        seen.append(r.num_accepted)
    return seen[1:]


@pytest.fixture
def count(implementation: str) -> int:
    """Rounds a case: plain MLX and the workbench are slow."""
    return 16 if implementation == "native" else 5


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", SETTINGS)
def test_rounds_are_those_by_hand(name: str, rule: str, count: int) -> None:
    tables, kept = Tables(1, HALF_RIGHT), []
    for k, seed in ((1, 2**32 - 1), (3, 5), (6, 77), (20, 2**31)):
        s = replace(SETTINGS[name], seed=seed, verify=rule)
        kept += [(k, n) for n in compare(tables, s, k, count)]
    assert len(kept) > 2 * count, "most rounds were too close to call"
    if count > 10:
        assert sum(n == 0 for _, n in kept) >= 3
        assert sum(0 < n < k for k, n in kept) >= 3
        assert sum(n == k for k, n in kept) >= 3


@pytest.mark.short
@pytest.mark.parametrize("rule", RULES)
def test_some_rounds_are_those_by_hand(rule: str) -> None:
    """The test above, short enough for the workbench."""
    s = replace(SETTINGS["all"], seed=3, verify=rule)
    assert len(compare(Tables(1, HALF_RIGHT), s, 3, 4)) == 3


@pytest.mark.parametrize("name", SETTINGS)
def test_plain_steps_are_those_by_hand(name: str, count: int) -> None:
    s = replace(SETTINGS[name], seed=9)
    assert len(compare(Tables(1, HALF_RIGHT), s, 0, 2 * count)) > count


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", SETTINGS)
def test_an_assistant_equal_to_the_target_is_always_right(name: str, rule: str, count: int) -> None:
    """Every draft of every round is kept, at a low and at a high temperature too."""
    tables = Tables(2, RIGHT)
    for k, temperature in ((1, 1.0), (4, 0.5), (9, 2.0)):
        s = SETTINGS[name]
        s = replace(s, temperature=s.temperature * temperature, seed=k, verify=rule)
        rounds = played(tables, s, k, count)[1:]
        assert [r.num_accepted for r in rounds] == [k] * len(rounds)
