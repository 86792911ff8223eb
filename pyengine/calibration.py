"""How far an early exit may go: whole answers with it against those of the full model, tested.

Each prompt is answered by the full model, and with every threshold from the safest on by the layers
before the exit where these are sure enough; both by plain decoding, with the same noise. A
threshold passes if the losses say that the mean loss on prompts like these is at most delta; the
first that does not ends the test, and the last that passed is the one to use.

Source: CALM, https://arxiv.org/abs/2207.07061, textual consistency; Learn then Test,
https://arxiv.org/abs/2110.01052.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pyengine.arguments import number, whole
from pyengine.checkpoint.certificate import (
    MOST_DECAY,
    MOST_N,
    MOST_TESTED,
    Certificate,
    Trial,
    bound,
    without_seed,
)
from pyengine.engine.early_exit import EarlyRounds, Exit
from pyengine.engine.loop import decode
from pyengine.engine.rounds import Rounds
from pyengine.engine.stats import Stats
from pyengine.risk import METRICS, Metric, check_bounds, fixed_sequence, loss, p_value
from pyengine.sampling.settings import MAX_SEED, Sampling
from pyengine.task import Task, embedded_pair, new_task
from pyengine.text.prompt import Prompt
from pyengine.untrusted import shown

if TYPE_CHECKING:
    from pyengine.checkpoint.pair import Pair

THRESHOLDS = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0)
DECAY = 4.0
MAX_TOKENS = 64

OnAnswer = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Answered:
    """One prompt at one threshold."""

    loss: float
    layers: int  # of all tokens behind the first
    tokens: int  # so many


def calibrate(
    prompts: Sequence[Prompt],
    *,
    layer: int,
    pair: Pair | None = None,
    delta: float = 0.1,
    epsilon: float = 0.05,
    metric: Metric = "lcs",
    thresholds: Sequence[float] = THRESHOLDS,
    decay: float = DECAY,
    max_tokens: int = MAX_TOKENS,
    sampling: Sampling | None = None,
    raw: bool = False,
    on_answer: OnAnswer = lambda done, total, label: None,
) -> Certificate:
    """Test an early exit on prompts: which threshold keeps the mean loss on prompts like these at
    most delta, with confidence 1 - epsilon. Evaluates.

    All arguments must be fixed before any loss is seen: to choose them by what passes is to test
    again. The confidence is over the draw of the prompts, which must be drawn as those to come are.

    Args:
        prompts: As :func:`pyengine.generate` takes one, each; prompt i is answered with the seed of
            ``sampling`` plus i.
        layer: Tokens may leave behind so many layers, fewer than the target has.
        pair: From :func:`pyengine.load`; the embedded pair when None.
        delta: Bound of the mean loss.
        epsilon: How likely the bound may be wrong.
        metric: The loss of an answer: "lcs" is 1 - ROUGE-L with the full model's, "differs" is 1
            if it is not the same.
        thresholds: Confidences that a token must have to leave, from 1 down to 0, in the order in
            which they are tested.
        decay: How fast a threshold falls along an answer; 0: it does not.
        max_tokens: Tokens of an answer at most.
        sampling: How tokens are chosen; None takes the pair's own defaults. Seed 0 where it has
            none.
        raw: As for :func:`pyengine.generate`.
        on_answer: Called before each answer with answers done, at most so many, and what comes.

    Returns:
        What was tested. Its ``threshold`` is None where none passed: then there is nothing to use.

    Raises:
        ValueError: A prompt or a setting is impossible.
        RuntimeError: The weights gave logits that are not finite.
    """
    pair = embedded_pair() if pair is None else pair
    pair.target.check_alone("calibrate")
    settings = check_settings(layer, delta, epsilon, metric, thresholds, decay, max_tokens)
    layers, n = len(pair.target.layers), len(prompts)
    if layer >= layers:
        raise ValueError(
            f"[calibrate] layer must leave a layer of the target's {layers} out but got {layer}."
        )
    if not 1 <= n <= MOST_N:
        raise ValueError(f"[calibrate] prompts must be 1 to {MOST_N} but got {n}.")
    first = (sampling.seed if sampling is not None else None) or 0
    if first + n - 1 > MAX_SEED:
        raise ValueError(
            f"[calibrate] seed must be at most {MAX_SEED} for the last of {n} prompts but got "
            f"{first} for the first."
        )
    ask: dict[str, Any] = {"pair": pair, "max_tokens": max_tokens, "block_size": 1, "raw": raw}
    tasks = [new_task(prompt, sampling=sampling, **ask) for prompt in prompts]
    tasks = [
        replace(task, sampling=replace(task.sampling, seed=first + i, logprobs=None))
        for i, task in enumerate(tasks)
    ]
    files = bound(pair)
    run = Run(tasks, metric, (1 + len(thresholds)) * n, on_answer)
    means: dict[float, float | None] = {}
    totals: dict[float, float] = {}

    def test(threshold: float) -> float:
        answers = run.answers(Exit(layer, threshold, settings["decay"], max_tokens))
        totals[threshold] = math.fsum(one.loss for one in answers)
        tokens = sum(one.tokens for one in answers)
        means[threshold] = sum(one.layers for one in answers) / tokens if tokens else None
        return p_value(totals[threshold], n, delta, metric == "differs")

    tested = fixed_sequence([float(one) for one in thresholds], test, epsilon)
    run.end()
    return Certificate(
        target=files["target"],
        tokenizer=files["tokenizer"],
        prompts=hash_of([task.ids for task in tasks]),
        dtype=files["dtype"],
        sampling=without_seed(tasks[0].sampling),
        max_tokens=max_tokens,
        layer=layer,
        decay=settings["decay"],
        n=n,
        delta=settings["delta"],
        epsilon=settings["epsilon"],
        metric=metric,
        tested=tuple(Trial(one, totals[one], p, means[one]) for one, p in tested),
    )


class Run:
    """The answers of prompts: the full model's once, and those with exits."""

    def __init__(
        self, tasks: Sequence[Task], metric: Metric, total: int, on_answer: OnAnswer
    ) -> None:
        self._tasks, self._metric = tasks, metric
        self._done, self._total, self._on_answer = 0, total, on_answer
        self._full: list[list[int]] = []
        self._plain = Rounds()

    def answers(self, exit: Exit) -> list[Answered]:
        """Each prompt's answer with this exit, against the full model's."""
        found, early = [], EarlyRounds(exit)
        for i in range(len(self._tasks)):
            if i == len(self._full):
                self._full.append(self._answer(i, "full model", self._plain)[0])
            text, stats = self._answer(i, f"threshold {exit.threshold:g}", early)
            layers = sum(n * count for n, count in stats.exits.items())
            lost = loss(self._metric, text, self._full[i])
            found.append(Answered(lost, layers, sum(stats.exits.values())))
        return found

    def end(self) -> None:
        self._on_answer(self._total, self._total, "done")

    def _answer(self, i: int, what: str, rounds: Rounds) -> tuple[list[int], Stats]:
        self._on_answer(self._done, self._total, f"{what}, prompt {i + 1} of {len(self._tasks)}")
        self._done += 1
        task, stats = self._tasks[i], Stats()
        task.check_memory(None)
        model = (task.pair.target, None, task.ids)
        played = decode(*model, **task.arguments, stats=stats, rounds=rounds)
        return [token for done in played for token in done.tokens], stats


def check_settings(
    layer: int,
    delta: float,
    epsilon: float,
    metric: Metric,
    thresholds: Sequence[float],
    decay: float,
    max_tokens: int,
) -> dict[str, float]:
    """Refuse what no pair allows; the numbers as Python's.

    Raises:
        ValueError: As :func:`calibrate`.
    """
    for name, value in (("layer", layer), ("max_tokens", max_tokens)):
        if whole("calibrate", name, value) < (least := 1 + (name == "max_tokens")):
            raise ValueError(f"[calibrate] {name} must be at least {least} but got {value}.")
    if max_tokens > MOST_N:
        raise ValueError(f"[calibrate] max_tokens must be at most {MOST_N} but got {max_tokens}.")
    delta, epsilon = check_bounds("calibrate", delta, epsilon)
    if metric not in METRICS:
        raise ValueError(
            f"[calibrate] metric must be of {', '.join(METRICS)} but got {shown(metric)}."
        )
    if not 0 <= (decay := number("calibrate", "decay", decay)) <= MOST_DECAY:
        raise ValueError(f"[calibrate] decay must be 0 to {MOST_DECAY:g} but got {decay}.")
    order = [number("calibrate", "thresholds", one) for one in thresholds]
    if not 1 <= len(order) <= MOST_TESTED or order != sorted(set(order), reverse=True):
        raise ValueError(
            f"[calibrate] thresholds must be 1 to {MOST_TESTED} numbers, each below the one "
            f"before, but got {shown(list(thresholds))}."
        )
    if not all(0 <= one <= 1 for one in order):
        raise ValueError(
            f"[calibrate] thresholds must be from 1 down to 0 but got {shown(list(thresholds))}."
        )
    return {"delta": delta, "epsilon": epsilon, "decay": decay}


def hash_of(prompts: Sequence[Sequence[int]]) -> str:
    """SHA-256 of the token ids of prompts."""
    return hashlib.sha256(json.dumps([list(ids) for ids in prompts]).encode()).hexdigest()
