"""Plain decoding in which a token may leave after some layers: not exact, and never the default.

A step is two graphs with the host in between. The first runs the layers before the exit, the last
norm and the head behind them, and draws a token with the noise of its position, as plain decoding
does; the host reads it with its confidence. Where that suffices the token stays, and the layers
behind the exit get keys and values made of what left it; else the second graph runs them.

So with a seed the text is always the same, and texts of one seed with exits and without are like
each other as far as their distributions are. How like, :mod:`pyengine.calibration` bounds.

Source: CALM, https://arxiv.org/abs/2207.07061: softmax response, a threshold that falls along the
answer, state propagation.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, cast

import mlx.core as mx

from pyengine import ops
from pyengine.engine import round as on_device
from pyengine.engine.rounds import Rounds, kept
from pyengine.engine.sequence import TokenSequence
from pyengine.model.cache import Cache
from pyengine.model.head import Logits, whole
from pyengine.ops import dispatch
from pyengine.ops.recorded import recorded


@dataclass(frozen=True)
class Exit:
    """Where tokens may leave, and when.

    Attributes:
        layer: So many layers run at least.
        threshold: Confidence that a token must have, which is lambda in the paper; above 1 none
            leaves.
        decay: How fast the threshold falls along an answer, tau in the paper.
        length: Tokens of the longest answer.
    """

    layer: int
    threshold: float
    decay: float
    length: int

    def least(self, t: int) -> float:
        """The confidence with which token t of an answer, from 0, may leave."""
        falling = math.exp(-self.decay * t / self.length)
        return min(1.0, max(0.0, 0.9 * self.threshold + 0.1 * falling))

    def lets(self, t: int, confidence: float) -> bool:
        """Whether token t leaves; one of confidence NaN does not."""
        return self.threshold <= 1 and confidence >= self.least(t)


class Leavable(Protocol):
    """What is asked of the target (:class:`pyengine.model.target.Target`)."""

    @property
    def layers(self) -> Sequence[Any]: ...

    def leave(
        self, depth: int, ids: Sequence[mx.array], caches: Sequence[Cache]
    ) -> tuple[Logits, mx.array]: ...

    def go_on(
        self, depth: int, stream: mx.array, ids: Sequence[mx.array], caches: Sequence[Cache]
    ) -> Logits: ...

    def skip(self, depth: int, stream: mx.array, caches: Sequence[Cache]) -> list[mx.array]: ...

    def writes_behind(self, depth: int) -> bool: ...


class Looked(NamedTuple):
    """What the first graph gives."""

    played: on_device.Played  # the round, if the token leaves
    confidence: mx.array  # float32 [1]
    stream: mx.array  # [1, E], behind the exit


class EarlyRounds(Rounds):
    """Rounds of plain texts whose tokens may leave early, each of one text: another's would leave
    at other tokens.

    Args:
        exit: Where tokens leave.
        waits: A round ends when all that a token left is written, so that another thread may play
            the next one; else it may be under way while the host does something else.

    Raises:
        RuntimeError: A round of several texts, or of one that drafts.
    """

    def __init__(self, exit: Exit, waits: bool = False) -> None:
        super().__init__()
        self._exit, self._waits = exit, waits
        self._graphs: OrderedDict[Any, Graphs] = OrderedDict()

    def _free(self, going: Sequence[TokenSequence], begin: on_device.Start) -> on_device.Played:
        if len(going) != 1 or going[0].k:
            raise RuntimeError(
                "[early-exit] a round must be a plain step of one text but got "
                f"{len(going)} texts with {sum(s.k for s in going)} drafts."
            )
        [sequence] = going
        graphs, layer = self._recorded_of(sequence), self._exit.layer
        looked = graphs.look(begin)
        mx.eval(looked)
        begin = _after(begin, looked.played.arena)
        target, stats = cast(Leavable, sequence.parts.target), sequence.stats
        confidence = cast(float, looked.confidence.item())
        if not self._exit.lets(stats.generated_tokens, confidence):
            stats.count_exit(len(target.layers))
            return graphs.go_on(begin, looked.stream)
        stats.count_exit(layer)
        if not target.writes_behind(layer):
            return looked.played
        written = graphs.skip(begin, looked.stream)
        # Queued now, so that it comes before whatever moves the pages; the next look waits for both
        if self._waits:
            mx.eval(written)
        else:
            mx.async_eval(written)  # type: ignore[no-untyped-call]
        return looked.played._replace(arena=[] if dispatch.in_place() else written)

    def _recorded_of(self, sequence: TokenSequence) -> Graphs:
        def record() -> Graphs:
            opened = on_device.RecordedRound([sequence.parts], [0], self._groups).open_texts
            return Graphs(self._exit.layer, opened)

        return kept(self._graphs, self._key([sequence], self._groups), record)


OpenTexts = Callable[[on_device.Start], on_device.Texts]


class Graphs:
    """The parts of a step, recorded: the layers before the exit, those behind it, or only their
    keys and values."""

    def __init__(self, depth: int, open_texts: OpenTexts) -> None:
        self.look = recorded(partial(_look, depth, open_texts))
        self.go_on = recorded(partial(_go_on, depth, open_texts))
        self.skip = recorded(partial(_skip, depth, open_texts))


def _after(begin: on_device.Start, arrays: list[mx.array]) -> on_device.Start:
    """The same over the arrays that a graph gave, if any."""
    return begin._replace(arena=begin.arena._replace(arrays=arrays)) if arrays else begin


def _look(depth: int, open_texts: OpenTexts, start: on_device.Start) -> Looked:
    texts, target, ids, caches = _opened(open_texts, start)
    waiting, stream = target.leave(depth, ids, caches)
    logits = whole(waiting)
    played = _accepted(texts, ids, logits)
    return Looked(played, confidence(logits), stream)


def _go_on(
    depth: int, open_texts: OpenTexts, start: on_device.Start, stream: mx.array
) -> on_device.Played:
    texts, target, ids, caches = _opened(open_texts, start)
    return _accepted(texts, ids, target.go_on(depth, stream, ids, caches))


def _skip(
    depth: int, open_texts: OpenTexts, start: on_device.Start, stream: mx.array
) -> list[mx.array]:
    """All arrays of the arena; where they are written in place, the keys that were."""
    _, target, _, caches = _opened(open_texts, start)
    written = target.skip(depth, stream, caches)
    return written if dispatch.in_place() else caches[0].arena.arrays


def _opened(
    open_texts: OpenTexts, start: on_device.Start
) -> tuple[on_device.Texts, Leavable, list[mx.array], list[Cache]]:
    texts = open_texts(start)
    [parts], [state] = texts.each, start.states
    return texts, cast(Leavable, parts.target), [state.primary], [parts.cache]


def _accepted(
    texts: on_device.Texts, ids: list[mx.array], logits: mx.array | Logits
) -> on_device.Played:
    """The plain step with these logits."""
    block = on_device.Block(ids[0], (None,))
    ps = on_device.target_rows(texts, block, logits)
    return on_device.accept(texts, block, logits, [ids[0]], ps)  # nobody reads the hidden vectors


def confidence(logits: mx.array) -> mx.array:
    """Softmax response of rows ``[T, V]``: the best probability less the next one, ``[T]``."""
    best = ops.filter_logits(logits, top_k=2).ids
    values = mx.take_along_axis(logits, best, axis=-1) - mx.logsumexp(logits, -1, keepdims=True)
    first, second = mx.split(mx.exp(values), 2, axis=-1)
    return (first - second)[:, 0]
