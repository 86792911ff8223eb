"""Random texts, each alone and in rounds with others that come and go; what each round gave it."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from pyengine.drafters import new_drafter
from pyengine.engine import round as on_device
from pyengine.engine.prompts import process
from pyengine.engine.rounds import Rounds
from pyengine.engine.sequence import Round, TokenSequence
from pyengine.model.cache import Arena
from pyengine.model.head import whole
from pyengine.model.rows import apart
from pyengine.ops.accept_block import RULES
from pyengine.sampling.sampler import NO_TOKEN
from pyengine.sampling.settings import Sampling

LARGEST_BLOCK = 9


@dataclass(frozen=True)
class Case:
    """A text to be made."""

    prompt: list[int]
    sampling: Sampling
    block_size: int
    max_tokens: int
    drafter: str = "assistant"

    def begin(self, pair: Any, arena: Arena | None = None) -> TokenSequence:
        return TokenSequence(
            pair.target,
            new_drafter(self.drafter, pair.target, pair.assistant),
            self.prompt,
            sampling=self.sampling,
            block_size=self.block_size,
            max_tokens=self.max_tokens,
            arena=arena,
        )


@dataclass
class Story:
    """What became of a text: its rounds, and of each the bits of its committed rows."""

    rounds: list[Round] = field(default_factory=list)
    bits: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return [token for done in self.rounds for token in done.tokens]

    def begins(self, other: Story) -> bool:
        """Whether the other one goes on from here."""
        count = len(self.rounds)
        same = self.rounds == other.rounds[:count]
        return same and self.bits == other.bits[: len(self.bits)]


class Watched(Rounds):
    """Rounds that tell the bits of each sequence's rows: logits, hidden vectors, candidates."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[mx.array]] = []

    def play(self, sequences: Sequence[TokenSequence]) -> list[Round | Exception]:
        self.going: list[TokenSequence] = []
        self.told: dict[TokenSequence, str] = {}
        done = super().play(sequences)
        for place, sequence in enumerate(self.going):
            result = done[list(sequences).index(sequence)]
            if isinstance(result, Round):
                digest = hashlib.blake2b(digest_size=8)
                for rows in self.rows[place]:
                    digest.update(np.array(rows[: result.num_accepted + 1]).tobytes())
                self.told[sequence] = digest.hexdigest()
        return done

    def _round(
        self, going: Sequence[TokenSequence], groups: Sequence[on_device.Group]
    ) -> on_device.RecordedRound:
        self.going = list(going)
        return super()._round(going, groups)

    @contextmanager
    def watching(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """Rounds are built anew, for the rows of a recorded one are nowhere to be seen."""
        verify = on_device.verify

        def noted(texts: Any, block: Any) -> Any:
            logits, hidden, ps = verify(texts, block)
            made = apart(whole(logits), texts.counts)
            candidates = []
            for group, p in zip(texts.groups, ps, strict=True):
                counts = [texts.counts[n] for n in group.places]
                for ids, probs in zip(apart(p.ids, counts), apart(p.probs, counts), strict=True):
                    own = int((ids[0] != NO_TOKEN).sum().item())  # the rest is a neighbour's width
                    assert (ids[:, own:] == NO_TOKEN).all() and (probs[:, own:] == 0).all()
                    candidates.append((ids[:, :own], probs[:, :own]))
            self.rows = [
                [rows.view(mx.uint32), own.astype(mx.float32).view(mx.uint32), *theirs]
                for rows, own, theirs in zip(made, hidden, candidates, strict=True)
            ]
            return logits, hidden, ps

        with monkeypatch.context() as patch:
            patch.setattr(on_device, "verify", noted)
            patch.setattr(on_device, "recorded", lambda function: function)
            yield


def random_cases(rng: random.Random, text: list[int], count: int) -> list[Case]:
    """Texts of unlike prompts, settings and blocks, so that little is alike by chance."""
    cases = []
    for _ in range(count):
        length = rng.randrange(1, len(text) // 2)
        prompt = text[:length]
        if rng.random() < 0.3:
            prompt = [rng.randrange(3, max(text)) for _ in range(length)]
        if rng.random() < 0.3:
            prompt = prompt + prompt[: 1 + length // 2]  # for lookup
        penalty = rng.random() < 0.3
        sampling = Sampling(
            temperature=rng.choice([0.0, 0.5, 1.0, 2.0, 2.0]),
            top_k=rng.choice([0, 0, 5, 64]),
            top_p=rng.choice([0.9, 1.0, 1.0]),
            min_p=rng.choice([0.0, 0.0, 0.05]),
            seed=rng.randrange(1000),
            verify=rng.choice(RULES),
            repetition_penalty=rng.choice([1.0, 1.2]) if penalty else 1.0,
            presence_penalty=rng.choice([0.0, 0.4]) if penalty else 0.0,
            frequency_penalty=rng.choice([0.0, 0.3]) if penalty else 0.0,
            logit_bias={text[3]: 1.5} if rng.random() < 0.2 else {},
            suppress_tokens=(text[5],) if rng.random() < 0.2 else (),
            logprobs=rng.choice([None, None, None, 0, 2]),
        )
        block = rng.choice([1, 2, 3, 4, 6, LARGEST_BLOCK])
        drafter = rng.choice(["assistant", "assistant", "lookup", "early:2"])
        cases.append(Case(prompt, sampling, block, rng.randrange(8, 32), drafter))
    return cases


def alone(pair: Any, case: Case, rounds: Rounds | None = None) -> Story:
    return together(pair, [case], random.Random(0), rounds)[0]


def together(
    pair: Any,
    cases: Sequence[Case],
    rng: random.Random,
    rounds: Rounds | None = None,
    *,
    most: int = 6,
    leave: float = 0.0,
    vary: bool = False,
) -> list[Story]:
    """The texts in rounds of at most so many; one that waits joins at random, one under way leaves
    with that chance per round. ``vary`` draws each round's block sizes anew."""
    rounds, arena = Rounds() if rounds is None else rounds, pair.target.new_arena()
    waiting, active = list(range(len(cases))), dict[int, TokenSequence]()
    stories = [Story() for _ in cases]
    while waiting or active:
        while waiting and len(active) < most and (not active or rng.random() < 0.5):
            number = waiting.pop(0)
            active[number] = cases[number].begin(pair, arena)
        while reading := [n for n, sequence in active.items() if sequence.reads]:
            for number, done in zip(reading, process([active[n] for n in reading]), strict=True):
                assert isinstance(done, Round), done
                stories[number].rounds.append(done)
        for number in [n for n, s in active.items() if s.finish_reason or rng.random() < leave]:
            active.pop(number).release()
        order = list(active)
        rng.shuffle(order)
        if vary:
            for sequence in active.values():
                sequence.drafts = rng.randrange(LARGEST_BLOCK)
        for number, done in zip(order, rounds.play([active[n] for n in order]), strict=True):
            assert isinstance(done, Round), done
            stories[number].rounds.append(done)
            if isinstance(rounds, Watched):
                stories[number].bits.append(rounds.told[active[number]])
    assert arena.held_bytes == 0
    return stories
