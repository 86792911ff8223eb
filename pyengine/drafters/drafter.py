"""What a round asks of a source of drafts, and of the target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import mlx.core as mx

from pyengine.model.cache import Cache
from pyengine.model.head import Logits
from pyengine.model.target import Reader
from pyengine.ops.filter_logits import Filtered

MAX_BLOCK = 128  # a primary token and its drafts

Filter = Callable[[mx.array | Logits], Filtered]


class Drafter(Reader, Protocol):
    """Where the drafts of one generation come from.

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

    def wants_to_draft(self, text: Sequence[int], k: int) -> bool:
        """Called on the host before a round with all committed tokens, the primary one last.

        Returns:
            Whether to draft ``k`` tokens; without drafts the round is one plain step.
        """
        ...

    def propose(self, i: int, token: mx.array, cache: Cache, filter: Filter) -> Filtered:
        """The distribution that draft i, from 0, is drawn from: one row.

        Args:
            i: Called for 0 to k - 1 in turn.
            token: The token before it, int32 ``[1]``: the block's primary one, or draft i - 1.
            cache: The target's; committed positions may be read, and such a read be noted there.
            filter: Makes a distribution of logits ``[1, V]``, under the settings of the text.
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
        self, ids: mx.array, cache: Cache, taps: tuple[int, ...] = ()
    ) -> tuple[mx.array | Logits, mx.array]: ...
