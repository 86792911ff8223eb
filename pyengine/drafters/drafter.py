"""What a round asks of a source of drafts, and of the target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import mlx.core as mx

from pyengine.model.cache import Cache
from pyengine.model.head import Logits
from pyengine.model.target import Reader
from pyengine.ops.filter_logits import Filtered
from pyengine.sampling.sampler import Sampler

if TYPE_CHECKING:
    from typing import Self

MAX_BLOCK = 128  # a primary token and its drafts


class Asked(NamedTuple):
    """What a text's next draft follows, and how its distribution is filtered."""

    token: mx.array  # int32 [1]: the block's primary one, or the draft before
    drafts: mx.array  # int32 [i]: those of the block so far
    cache: Cache  # the target's; committed positions may be read, and such a read be noted there
    sampler: Sampler


class Drafter(Reader, Protocol):
    """Where the drafts of one sequence come from.

    It may propose anything: the rules that accept drafts keep the text exact. Under the rules
    ``residual`` and ``block`` two things must hold for that. A draft's distribution may depend on
    the tokens before it alone, and ``wants_to_draft`` on committed tokens alone: never on a draft
    that was refused, on a clock or on what else the machine does.

    One with taps reads every row of its text: no prefix is reused for it.
    """

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
    def propose(cls, i: int, drafters: Sequence[Self], asked: Sequence[Asked]) -> list[Filtered]:
        """The distributions that draft i, from 0, of each of several sequences is drawn from.

        Args:
            i: Called for 0 to k - 1 in turn; a sequence that drafts fewer is not there any more.
                Drafts that a grammar forces are left out, wherever they stand.
            drafters: Of the sequences, all of this class, and made for the same models.
            asked: By sequence. Logits that are made for them are filtered under the settings of
                each (:func:`pyengine.sampling.sampler.filter_together`).

        Returns:
            One row per sequence.
        """
        ...


class TargetLike(Protocol):
    """What a generation asks of the target (:class:`pyengine.model.target.Target`)."""

    @property
    def context(self) -> int: ...

    def embed(self, ids: mx.array) -> mx.array: ...

    def new_cache(self, max_block: int) -> Cache: ...

    def prefill(
        self, ids: list[int], cache: Cache, *, reader: Reader | None = None
    ) -> tuple[mx.array, mx.array]: ...

    def forward(
        self, ids: Sequence[mx.array], caches: Sequence[Cache], taps: tuple[int, ...] = ()
    ) -> tuple[mx.array | Logits, mx.array]: ...
