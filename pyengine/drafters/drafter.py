"""What a round asks of a source of drafts, and of the target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, NamedTuple, Protocol

import mlx.core as mx

from pyengine.model.cache import Arena, Cache
from pyengine.model.config import LayerConfig
from pyengine.model.head import Logits
from pyengine.model.target import Branches, Part, Reader
from pyengine.ops.filter_logits import Filtered

if TYPE_CHECKING:
    from typing import Self

MAX_BLOCK = 128  # a primary token and its drafts


class Asked(NamedTuple):
    """What the next drafts of Q texts follow, and how their distributions are filtered."""

    tokens: mx.array  # int32 [Q]: of each block the primary one, or the draft before
    # The target's; committed positions may be read, and such a read be noted in their arena. Those
    # behind them may be written as the target writes them for the same tokens.
    caches: Sequence[Cache]
    # Logits [Q, V], made or not, under the settings of each text: parts of the Q rows
    filter: Callable[[mx.array | Logits], list[Filtered]]
    # Drafts of each in this round, as far as that is known: no fewer than i + 1
    ks: Sequence[int]
    # Primary token and drafts so far, int32 [Q, i + 1], where some of these were not proposed but
    # left out; else None
    block: mx.array | None = None


class Drafter(Reader, Protocol):
    """Where the drafts of one sequence come from.

    It may propose anything: the rules that accept drafts keep the text exact. Under the rules
    ``residual`` and ``block`` two things must hold for that. A draft's distribution may depend on
    the tokens before it alone, and ``wants_to_draft`` on committed tokens alone: never on a draft
    that was refused, on a clock or on what else the machine does.

    One with taps reads every row of its text. What it makes of them it may keep as keys and values
    of layers of its own, in the pages of the text: then a prefix has them. Without such layers no
    prefix is reused for it.
    """

    @property
    def layers(self) -> tuple[LayerConfig, ...]:
        """Layers whose keys and values it keeps beside the target's
        (:meth:`pyengine.model.cache.Arena.extend`); () for none."""
        ...

    @property
    def arrays(self) -> list[mx.array]:
        """What it carries from round to round on the device, once it has read the prompt."""
        ...

    def with_arrays(self, arrays: list[mx.array]) -> Drafter:
        """The same over other arrays: those of a recorded round."""
        ...

    def take_results(self, arrays: list[mx.array]) -> None:
        """Go on with what a recorded round gave for ``arrays``."""
        ...

    def wants_to_draft(self, text: Sequence[int], k: int, forced: Sequence[int] = ()) -> bool:
        """Called on the host before a round with all committed tokens, the primary one last.

        ``forced`` are those that come next whatever anybody drafts, so the drafter's own begin
        behind them: :meth:`propose` is asked for draft ``len(forced)`` first.

        Returns:
            Whether to draft ``k`` tokens; without drafts the round is one plain step.
        """
        ...

    @classmethod
    def propose(cls, i: int, drafters: Sequence[Self], asked: Asked) -> Sequence[Filtered]:
        """The distributions that draft i, from 0, of each of several sequences is drawn from.

        Args:
            i: Called for 0 to k - 1 in turn; a sequence that drafts fewer is not there any more.
                Drafts that a grammar forces are left out, wherever they stand.
            drafters: Of the sequences, all of this class, and made for the same models.
            asked: What they follow.

        Returns:
            One row per sequence, behind one another: what ``asked.filter`` gives, or a part for
            each.
        """
        ...


class TargetLike(Protocol):
    """What a generation asks of the target (:class:`pyengine.model.target.Target`)."""

    @property
    def context(self) -> int: ...

    def embed(self, ids: mx.array) -> mx.array: ...

    def new_cache(self) -> Cache: ...

    def waiting(self) -> AbstractContextManager[None]: ...

    def new_arena(self, *, sequences: int = 1) -> Arena: ...

    def prefill(
        self, ids: list[int], cache: Cache, *, reader: Reader | None = None
    ) -> tuple[mx.array, mx.array]: ...

    def prefill_together(self, parts: Sequence[Part]) -> list[tuple[mx.array, mx.array]]: ...

    def forward(
        self,
        ids: Sequence[mx.array],
        caches: Sequence[Cache],
        taps: tuple[int, ...] = (),
        branches: Branches | None = None,
    ) -> tuple[mx.array | Logits, mx.array]: ...
