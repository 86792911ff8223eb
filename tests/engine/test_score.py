"""Scores of given tokens, against the logits of the whole text in float64; no extra is needed."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from models import broken
from tiny_pairs import FLAVOURS, greedy_text, tiny_pair

from pyengine.checkpoint.pair import Pair
from pyengine.engine.prefix import Prefix
from pyengine.engine.report import NonFinite
from pyengine.engine.score import prompt_logprobs, score


def by_logits(pair: Pair, context: list[int], continuation: list[int]) -> tuple[list[float], bool]:
    """The same from the logits of the whole, in float64."""
    rows = np.array(pair.logits([*context, *continuation])[:-1]).astype(np.float64)
    rows = rows[len(context) - 1 :]
    total = np.log(np.exp(rows - rows.max(axis=-1, keepdims=True)).sum(axis=-1)) + rows.max(axis=-1)
    chosen = rows[np.arange(len(continuation)), continuation]
    return list(chosen - total), bool((rows.argmax(axis=-1) == continuation).all())


@pytest.mark.parametrize("length", [1, 2, 16, 17, 33])
def test_scores_are_those_of_the_logits(length: int) -> None:
    pair, prefix, text = tiny_pair("dense31"), Prefix(), greedy_text("dense31")
    context = text[:30]
    for continuation, own in ((text[30 : 30 + length], True), ([7] * length, False)):
        got, greedy = score(pair, context, continuation, prefix=prefix)
        want, best = by_logits(pair, context, continuation)
        assert np.allclose(got, want, atol=1e-4) and greedy == best == own
    # The context was there already, but for its last token
    assert prefix.reused == len(context) - 1
    again, _ = score(pair, context, [7] * length)
    assert again == got


def test_score_errors() -> None:
    pair = tiny_pair("uni12")
    with pytest.raises(ValueError, match=r"\[score\] context must hold at least one token"):
        score(pair, [], [5])
    with pytest.raises(ValueError, match=r"token ids must be 0 to 255 but got 256"):
        score(pair, [5], [256, 5])
    with pytest.raises(ValueError, match=r"prompt must be shorter than the context of 512"):
        score(pair, [5] * 300, [5] * 300)
    assert score(pair, [5], []) == ([], True)
    prefix = Prefix()
    pair.target.forward = broken(pair.target.forward)
    try:
        with pytest.raises(NonFinite, match=r"\[score\] logits must be finite"):
            score(pair, [5, 6], [7], prefix=prefix)
    finally:
        del pair.target.forward
    assert prefix.tokens == []


@pytest.mark.parametrize("wrong", [0, 15, 16, 30])
def test_one_token_that_greedy_decoding_would_not_write(wrong: int) -> None:
    """In the first block of rows or the second, first or last in it; the others agree."""
    pair, ids = tiny_pair("uni12"), greedy_text("uni12")[:20]
    for place in range(31):
        best = int(mx.argmax(pair.logits(ids)[-1]).item())
        ids.append((best + 1) % 256 if place == wrong else best)
    assert score(pair, ids[:20], ids[20:])[1] is False
    assert score(pair, ids[:20], ids[20 : 20 + wrong])[1] is True
    assert score(pair, ids[: 21 + wrong], ids[21 + wrong :])[1] is True


def test_a_prefix_holds_what_was_scored_but_for_the_last_token() -> None:
    pair, prefix, text = tiny_pair("e2b", "bfloat16"), Prefix(), greedy_text("e2b")
    score(pair, text[:10], text[10:30], prefix=prefix)
    assert prefix.tokens == text[:29]
    score(pair, text[:25], [5, 6], prefix=prefix)
    assert prefix.reused == 24 and prefix.tokens == [*text[:25], 5]


@pytest.mark.parametrize("count", [0, 1, 3, 256])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_prompts_logprobs_are_those_of_the_logits(flavour: str, count: int) -> None:
    pair, ids = tiny_pair(flavour), greedy_text(flavour)[:37]
    said: list[Any] = []
    rows = prompt_logprobs(pair, ids, count, lambda *now: said.append(now))
    assert [row.token for row in rows] == ids[1:]
    assert said == [(17, 37), (33, 37), (37, 37)]
    logits = np.array(pair.logits(ids)[:-1]).astype(np.float64)
    total = np.log(np.exp(logits - 30).sum(axis=-1)) + 30
    for place, row in enumerate(rows):
        want = logits[place] - total[place]
        assert abs(row.logprob - want[row.token]) < 1e-4
        assert len(row.top) == count
        best = np.sort(want)[::-1][:count]
        assert np.allclose([value for _, value in row.top], best, atol=1e-4)
        assert np.allclose([want[token] for token, _ in row.top], best, atol=1e-4)
        assert len({token for token, _ in row.top}) == count


def test_arguments_are_named_in_what_is_wrong_with_them() -> None:
    pair = tiny_pair("uni12")
    with pytest.raises(ValueError, match=r"^\[score\] context must be .* but got 'five'"):
        score(pair, "five", [5])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^\[score\] continuation must be .* but got 'five'"):
        score(pair, [5], "five")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^\[score\] ids must be .* but got 'five'"):
        prompt_logprobs(pair, "five", 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^\[score\] prefix must be .* but got 'five'"):
        score(pair, [5], [6], prefix="five")  # type: ignore[arg-type]
    for count in (-1, 257):
        with pytest.raises(ValueError, match=rf"^\[score\] count must be 0 to 256 but got {count}"):
            prompt_logprobs(pair, [5, 6], count)
    with pytest.raises(ValueError, match=r"^\[score\] progress must be a function but got 3"):
        prompt_logprobs(pair, [5, 6], 1, 3)  # type: ignore[arg-type]


def test_what_does_not_fit_the_memory_is_not_processed(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = tiny_pair("uni12")
    monkeypatch.setattr("pyengine.checkpoint.memory.free_bytes", lambda: 0)
    for call in (lambda: score(pair, [5], [6]), lambda: prompt_logprobs(pair, [5, 6], 1)):
        with pytest.raises(ValueError, match=r"prompt must fit the free memory of 0\.00 GB"):
            call()
