"""The beginnings of texts that an arena holds, so that what is known is not processed again."""

from __future__ import annotations

from collections.abc import Sequence

from pyengine.engine.stored import Stored
from pyengine.engine.tree import Tree
from pyengine.model import plan
from pyengine.model.cache import Arena, Cache
from pyengine.model.config import LayerConfig
from pyengine.ops.dispatch import borrows


class Beginnings:
    """A tree of beginnings over an arena's pages, and the pages that are kept in files.

    Args:
        arena: Of all texts.
        stored: Pages of earlier processes, if any.
    """

    def __init__(self, arena: Arena, stored: Stored | None = None) -> None:
        self.arena = arena
        self.tree = self._new_tree()
        self._stored = stored

    @property
    def nbytes(self) -> int:
        """Memory of the pages that are kept, some of which texts under way hold too."""
        return self.tree.nbytes

    def extend(self, layers: tuple[LayerConfig, ...]) -> None:
        """Have room for a drafter's layers in the arena, see
        :meth:`pyengine.model.cache.Arena.extend`."""
        self.arena.extend(layers)
        self.tree.page_bytes = self._page_bytes

    @property
    def _page_bytes(self) -> tuple[int, int]:
        return self.arena.page_bytes(False), self.arena.page_bytes(True)

    def begin(self, prompt: Sequence[int], stop: int | None = None) -> tuple[Cache, int]:
        """A sequence that has the first n tokens of a prompt, and n. Evaluates.

        At least one token is left to process, for its logits. Only what the prompt's own calls
        would have made alike is taken over (:mod:`pyengine.model.plan`).

        Args:
            prompt: Its tokens.
            stop: Where the calls that process it end, if not with it.
        """
        borrowed = plan.whole(len(prompt) if stop is None else stop, borrows())
        found = self.tree.find(prompt[:-1], borrowed, plan.CHUNK)
        if self._stored is not None:
            self._stored.load(self.tree, self.arena, prompt[:-1], borrowed, found.length)
            found = self.tree.find(prompt[:-1], borrowed, plan.CHUNK)
        return self.arena.resume(*found), found.length

    def parting(self, prompt: Sequence[int], stop: int | None = None) -> int:
        """Where a prompt parts from what is known: the last place there at which its calls may be
        parted."""
        end = len(prompt) if stop is None else stop
        return plan.border(self.tree.shared(prompt[:-1]), end, borrows())

    def note(self, tokens: Sequence[int], cache: Cache, borrowed: int) -> None:
        """Keep the pages of a sequence's first positions, whose tokens these are.

        The sequence may go on: it writes behind them.

        Args:
            tokens: At most as many as are committed.
            cache: The sequence.
            borrowed: How many positions MLX's kernels have made.
        """
        self.tree.insert(tokens, cache.full, cache.sliding, borrowed)

    def shrink(self, nbytes: int) -> None:
        """Forget what was used longest ago until no more is kept than so many bytes."""
        self.tree.shrink(lambda: self.tree.nbytes <= nbytes)

    def trim(self) -> None:
        """Give memory of the arena back while no text is under way, if most of it is free. What is
        kept is moved, not changed. Evaluates."""
        arena, holds = self.arena, self.tree.holds
        if any(arena.pages(kind).holds != holds[kind] for kind in holds):
            return  # somebody else has pages, whose numbers must stay
        try:
            for kind in holds:
                if arena.spare(kind):
                    self.tree.renumber(kind, arena.trim(kind))
        except BaseException:  # Ctrl-C among them: who knows what it came between
            self.tree = self._new_tree()
            arena.clear()
            raise

    def _new_tree(self) -> Tree:
        arena = self.arena
        return Tree(arena.full, arena.sliding, arena.window, self._page_bytes)

    def store(self) -> bool:
        """Write a page that is in no file yet; whether there may be more. Evaluates."""
        return self._stored is not None and self._stored.save(self.tree, self.arena)
