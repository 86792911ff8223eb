"""A bound to a model's thoughts: after so many tokens the mark that ends them is written for it.

The engine knows of no such mark. So the text is broken off exactly behind the last token that is
allowed, whatever the round committed, and goes on as another text of the engine, whose prompt is
all there is with the closing mark behind it: the keys and values that are there are used again.
Where the cut lies, and the random numbers of what follows, depend on tokens and their places alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import TYPE_CHECKING

from pyengine.engine.sequence import Round
from pyengine.engine.stats import Stats, add_all
from pyengine.streams import Engine, Request
from pyengine.task import Answer, Result, Step
from pyengine.text.output import Reader

if TYPE_CHECKING:
    from pyengine.text.tokenizer import Tokenizer


class Thoughts:
    """Counts the tokens of thoughts; those of the channel's name are among them, the marks not."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self.marks = tokenizer.channel_ids()
        self.count = 0
        self._reader = Reader(tokenizer, prompt, ())

    @property
    def under_way(self) -> bool:
        return self._reader.thinks

    def add(self, token: int) -> None:
        self._reader.add(token)
        self.count += self.under_way and token not in self.marks


class Budgeted:
    """A text whose thoughts may have so many tokens, with the face of the engine's requests.

    Once they are used up no other thought begins: the mark for it is not drawn any more. Presence
    and frequency penalties begin anew behind the closing mark.
    """

    def __init__(self, engine: Engine, request: Request, budget: int) -> None:
        self._engine, self._budget = engine, budget
        self._first = self._request = request
        self._answer = Answer(request.task)
        self._thoughts = Thoughts(request.task.pair.tokenizer, request.task.ids)
        self.error: Exception | None = None
        self.ended = False

    @property
    def result(self) -> Result:
        return replace(self._answer.result, stats=self._stats())

    def cancel(self) -> None:
        self._request.cancel()

    def take(self) -> list[Step]:
        """What was made since and not heard yet."""
        return list(self._steps())

    def _steps(self) -> Iterator[Step]:
        heard = self._request.take()
        for number, step in enumerate(heard, 1):
            if step.prompt_done is None:
                yield self._told(step, self._request.ended and number == len(heard))
            if self._is_over():
                yield self._close()
                return
            if self._answer.finish_reason:
                break
        self.error = self._request.error
        self.ended = self._request.ended or self._answer.finish_reason is not None
        if self.ended:  # by a stop string that began before the thought, perhaps
            self._request.cancel()

    def _told(self, step: Step, is_last: bool) -> Step:
        """What a round says, as far as it is within the budget."""
        tokens, reason = step.tokens, None
        if is_last:
            ended_by_id = {*tokens[-1:]} & self._request.task.arguments["stop_ids"]
            was_long = self._request.answer.finish_reason == "length"
            # What else ends a text is found again
            reason = "stop" if ended_by_id else "length" if was_long else None
        for count, token in enumerate(tokens, 1):
            self._thoughts.add(token)
            if self._is_over():
                tokens, reason = tokens[:count], None
                break
        own = self._answer.add(Round(tokens, reason, 0, 0, step.logprobs[: len(tokens)]))
        sources = step.sources[: len(own.tokens)]
        return own._replace(drafted=step.drafted, accepted=step.accepted, sources=sources)

    def _is_over(self) -> bool:
        """Whether the budget is used up and the thought goes on."""
        is_open = self._thoughts.under_way and self._request is self._first
        return is_open and self._thoughts.count >= self._budget

    def _close(self) -> Step:
        """Go on behind the closing mark; what it adds to the text."""
        opens, closes = self._thoughts.marks
        task = self._request.task
        self._request.cancel()
        ids = [*task.ids, *self._answer.result.tokens, closes]
        most = task.pair.target.context
        if task.max_tokens is not None:
            most = min(most, len(task.ids) + task.max_tokens)
        left = most - len(ids)
        if left < 1:
            self.ended = True
            return self._close_mark(Round([closes] if left == 0 else [], "length", 0, 0))
        self._thoughts.add(closes)
        step = self._close_mark(Round([closes], None, 0, 0))
        suppressed = tuple(sorted({*task.sampling.suppress_tokens, opens}))
        sampling = replace(task.sampling, suppress_tokens=suppressed)
        try:
            self._request = self._engine.add(
                replace(task, ids=ids, max_tokens=left, sampling=sampling), most_unheard=1
            )
        except (ValueError, RuntimeError) as error:  # no memory for it; the engine was closed
            self.error = error
        return step

    def _close_mark(self, done: Round) -> Step:
        step = self._answer.add(done)
        return step._replace(sources=["budget"] * len(step.tokens))

    def _stats(self) -> Stats:
        """Of both parts; the prompt is the first one's."""
        first, last = self._first.answer.stats, self._request.answer.stats
        total = replace(first, generated_tokens=len(self._answer.result.tokens))
        if last is not first:
            for name in ("drafted_by_depth", "accepted_by_depth"):
                pairs = zip_longest(getattr(first, name), getattr(last, name), fillvalue=0)
                setattr(total, name, [a + b for a, b in pairs])
            total.prefill_s += last.prefill_s
            total.decode_s += last.decode_s
            total.rounds += last.rounds
            total.forced += last.forced
            total.drafted += last.drafted
            total.accepted += last.accepted
            total.bonus_tokens += last.bonus_tokens
            total.correction_tokens += last.correction_tokens
            total.by_drafter = {}
            for part in (first, last):
                add_all(total.by_drafter, part.by_drafter)
            total.peak_memory_bytes = max(first.peak_memory_bytes, last.peak_memory_bytes)
        return total
