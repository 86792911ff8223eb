"""Scores between calls: what a prefix holds never changes one, whatever put it there.

Compared bit for bit with calls that begin with nothing, and with the logits of the whole text.
"""

from __future__ import annotations

import random
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from knowing import tiny
from models import broken
from tiny_pairs import FLAVOURS, greedy_text

from pyengine.engine.prefix import Prefix
from pyengine.engine.report import NonFinite
from pyengine.engine.score import prompt_logprobs, score
from pyengine.generation import generate, stream
from pyengine.model import plan
from pyengine.sampling.settings import Sampling

GREEDY = Sampling(temperature=0.0, logprobs=2)
FORMS = ["float32", "bfloat16-q8"]


def by_logits(pair: Any, ids: list[int]) -> list[float]:
    """Log-probabilities of all tokens but the first, in float64."""
    rows = np.array(pair.target.logits(ids)[:-1]).astype(np.float64)
    best = rows.max(axis=-1)
    total = np.log(np.exp(rows - best[:, None]).sum(axis=-1)) + best
    return list(rows[np.arange(len(rows)), ids[1:]] - total)


def scores(pair: Any, ids: list[int], first: int, prefix: Prefix | None) -> list[float]:
    """Of the tokens from place ``first`` on."""
    return score(pair, ids[:first], ids[first:], prefix=prefix)[0]


# Where the text ends, and the first token that is scored
CALLS = [
    (35, 30),  # a block of 5
    (55, 30),  # the same and more: behind what was scored, and over it
    (55, 50),  # all of it known
    (56, 55),  # one token more
    (60, 56),
    (90, 40),  # back, and three blocks
    (90, 89),
    (33, 20),
    (52, 35),  # one block and the first row of another
    (51, 35),
    (2, 1),
    (3, 1),
    (100, 1),  # the context is one token
    (70, 60),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_score_may_extend_a_scored_prefix(flavour: str, form: str) -> None:
    pair, prefix = tiny(flavour, form), Prefix()
    text = greedy_text(flavour)
    other = [255 - token for token in text]
    want = by_logits(pair, text[:100])
    for end, first in CALLS:
        known = len(prefix.tokens)
        got = scores(pair, text[:end], first, prefix)
        assert got == scores(pair, text[:end], first, None), (end, first)
        assert np.allclose(got, want[first - 1 : end - 1], atol=1e-4 if form == "float32" else 0.1)
        # The last token of the text is scored, not processed
        assert prefix.tokens == text[: end - 1]
        assert prefix._known is not None
        cache, there = prefix._known.begin(text[:end], end - 1)
        assert there == cache.length.item() == end - 1
        cache.release()
        if end > known > first:
            assert prefix.reused == first - 1
    # Another continuation of the same context; then the first again
    for ids, first in (([*text[:40], *other[:20]], 40), (text[:60], 40), (text[:60], 45)):
        assert scores(pair, ids, first, prefix) == scores(pair, ids, first, None)
        assert prefix.tokens == ids[:-1]


def test_scores_of_a_text_do_not_depend_on_where_they_begin() -> None:
    """Each token has one log-probability, whichever call asks for it."""
    pair, text, prefix = tiny("e2b"), greedy_text("e2b")[:80], Prefix()
    whole = scores(pair, text, 1, None)
    for first in (79, 40, 64, 17, 16, 2, 48):
        for used in (None, prefix):
            assert scores(pair, text, first, used) == whole[first - 1 :]
    assert [row.logprob for row in prompt_logprobs(pair, text, 3)] == whole


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("flavour", ["dense31", "moe26"])
def test_scores_and_answers_share_a_prefix_in_any_order(flavour: str, form: str) -> None:
    rng = random.Random(3)
    pair, text, prefix = tiny(flavour, form), greedy_text(flavour), Prefix()
    scores(pair, text[:9], 5, prefix)  # whose rings are wide enough for both
    kinds, shared = [], 0
    for step in range(30):
        end = rng.randint(25, 100)
        first = rng.randint(1, end - 1)
        kind = rng.choice(["score", "answer", "rows", "left"])
        if kind == "score":
            assert scores(pair, text[:end], first, prefix) == scores(pair, text[:end], first, None)
        elif kind == "rows":
            rows = prompt_logprobs(pair, text[:end], 2)
            assert [row.logprob for row in rows] == scores(pair, text[:end], 1, None)
        else:
            ask: dict[str, Any] = {"pair": pair, "sampling": GREEDY, "block_size": 4}
            running = stream(text[:end], max_tokens=9, prefix=prefix, **ask)
            limit = 2 if kind == "left" else 99
            for _, _ in zip(range(limit), running.steps(), strict=False):
                pass
            running.close()
            cold, got = generate(text[:end], max_tokens=9, **ask), running.result
            assert got.logprobs is not None and cold.logprobs is not None
            assert got.tokens == cold.tokens[: len(got.tokens)], step
            assert got.logprobs == cold.logprobs[: len(got.tokens)], step
            # What greedy decoding wrote is what it finds likeliest
            chosen, best = score(pair, text[:end], got.tokens, prefix=prefix)
            assert best and chosen == [row.logprob for row in got.logprobs]
        kinds.append(kind)
        shared += prefix.reused
    assert len({*kinds}) == 4 and shared > 300


def test_greedy_is_said_of_the_whole_continuation() -> None:
    """One token in its first block is another; all later ones are what greedily follows it."""
    pair, text = tiny("dense31"), greedy_text("dense31")
    for place in (0, 3, 20):
        wrong = [*text[: 30 + place], 255 - text[30 + place]]
        more = generate(wrong, pair=pair, sampling=GREEDY, max_tokens=40, block_size=1)
        assert score(pair, text[:30], [*wrong[30:], *more.tokens])[1] is False
        assert score(pair, wrong, more.tokens)[1] is True
        assert score(pair, wrong, [*more.tokens[:-1], 255 - more.tokens[-1]])[1] is False


def test_a_score_after_an_answer_takes_it_over() -> None:
    """Its keys and values are those of the scored text; a score's are those of an answer."""
    pair, text, prefix = tiny("dense31"), greedy_text("dense31"), Prefix()
    scores(pair, text[:9], 5, prefix)
    generate(text[:30], pair=pair, sampling=GREEDY, max_tokens=20, block_size=4, prefix=prefix)
    assert prefix.tokens == text[:49]
    assert scores(pair, text[:70], 49, prefix) == scores(pair, text[:70], 49, None)
    assert prefix.reused == 48 and prefix.tokens == text[:69]
    result = generate(
        text[:75], pair=pair, sampling=GREEDY, max_tokens=20, block_size=4, prefix=prefix
    )
    assert result.stats.reused_tokens == 69 and result.tokens == text[75:95]


def test_a_score_that_fails_or_is_interrupted_leaves_a_right_prefix(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At every evaluation: in the context, whose chunks are small here, and in every block."""
    monkeypatch.setattr(plan, "CHUNK", 16)
    pair, text = tiny("dense31"), greedy_text("dense31")
    cold, real = scores(pair, text[:100], 35, None), mx.eval
    for error in (KeyboardInterrupt(), RuntimeError("the machine")):
        for n in range(1, 9):
            for after in (False, True):
                prefix, left = Prefix(), n

                def broken(*args: Any, after: bool = after, error: BaseException = error) -> None:
                    nonlocal left
                    left -= 1
                    if left == 0 and not after:
                        raise error
                    real(*args)
                    if left == 0:
                        raise error

                with monkeypatch.context() as patch:
                    patch.setattr(mx, "eval", broken)
                    with pytest.raises(type(error), match=str(error) or None):
                        scores(pair, text[:100], 35, prefix)
                assert prefix.tokens == text[: len(prefix.tokens)]
                if isinstance(error, RuntimeError):
                    assert prefix.nbytes == 0
                assert scores(pair, text[:100], 35, prefix) == cold
                # It is not in use any more
                generate(text[:50], pair=pair, sampling=GREEDY, max_tokens=2, prefix=prefix)


def test_a_score_of_broken_logits_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, text, prefix = tiny("uni12"), greedy_text("uni12"), Prefix()
    cold = scores(pair, text[:60], 30, None)
    assert scores(pair, text[:60], 30, prefix) == cold
    with monkeypatch.context() as patch:
        patch.setattr(pair.target, "forward", broken(pair.target.forward))
        with pytest.raises(NonFinite, match="logits must be finite"):
            scores(pair, text[:80], 60, prefix)
    assert prefix.tokens == [] and scores(pair, text[:60], 30, prefix) == cold


def test_a_score_leaves_a_prefix_in_use_alone() -> None:
    pair, text, prefix = tiny("dense31"), greedy_text("dense31"), Prefix()
    running = stream(
        text[:30], pair=pair, sampling=GREEDY, max_tokens=12, block_size=4, prefix=prefix
    )
    next(running)
    for _ in range(2):
        with pytest.raises(ValueError, match="prefix must serve one generation at a time"):
            scores(pair, text[:20], 10, prefix)
    assert "".join(running) and running.result.tokens == text[30:42]
    assert prefix.tokens == text[:41]
    assert scores(pair, text[:60], 30, prefix) == scores(pair, text[:60], 30, None)
