"""What a text knows of its beginning from those before it, and what it leaves for those to come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import NoneType
from typing import Any

from pyengine.drafters.drafter import TargetLike
from pyengine.engine.beginnings import Beginnings
from pyengine.model.cache import Cache, window_pages
from pyengine.model.config import LayerConfig
from pyengine.model.plan import whole
from pyengine.ops.dispatch import borrows
from pyengine.ops.prepare_qkv import PAGE
from pyengine.untrusted import shown

WINDOWS = 4  # of the sliding layers, that a prefix of its own keeps
WORTH_A_MARK = 16  # tokens


class Prefix:
    """What is known between generations on one pair; it serves one generation at a time.

    If a prompt is repeated, or continues where an answer ended, all but its last known token are
    reused, whatever the context. A prompt that differs in its last turn is reused up to the
    beginning of that turn (a first prompt and a long turn: up to the last multiple of 512 tokens),
    one that differs earlier up to where earlier prompts were seen to differ.

    On a GPU, where whole chunks of 512 run other kernels than what is shorter, only what the new
    prompt's own calls would have made alike is reused, so that no bit goes with what was asked
    before: whole chunks, and what lies behind them while the new prompt completes no further one.

    It holds pages of 64 positions, shared by all texts that begin alike: at most twice as many of
    the full layers as the newest text has, and four windows of the sliding ones; what was used
    longest ago goes first. ``tokens`` are the newest text's ids whose keys and values are held;
    ``reused`` is how many of the last prompt's were found.
    """

    def __init__(self, known: Beginnings | None = None) -> None:
        self.reused = 0
        self.parting = 0
        self._busy = False
        self._is_own = known is None  # else an engine's
        self._known = known
        self._target: TargetLike | None = None
        self._cache: Cache | None = None  # of the text under way
        self._ids: list[int] = []
        self._processed = 0  # of the newest text, when it ended
        self._borrowed = 0  # positions of it in calls of MLX's kernels
        self._has_drafters = False  # whether its pages hold a drafter's keys and values too

    @property
    def tokens(self) -> list[int]:
        """The ids whose keys and values are held; of an abandoned prompt, those processed."""
        cache = self._cache  # another thread may forget it meanwhile
        return self._ids[: self._processed if cache is None else cache.committed]

    @property
    def nbytes(self) -> int:
        """Memory of the pages that are held."""
        known = self._known
        return known.arena.held_bytes if known is not None and self._is_own else 0

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Reserve the prefix for one generation. If that fails, everything is forgotten.

        Raises:
            ValueError: Another generation is under way.
        """
        if self._busy:
            raise ValueError("[generate] prefix must serve one generation at a time.")
        self._busy = True
        try:
            yield
            self._leave()
        except Exception:
            self.forget()
            raise
        finally:
            self._busy = False

    @property
    def marks(self) -> int:
        """How many windows of the sliding layers it keeps beside the newest text's."""
        return WINDOWS - 1

    def open(
        self,
        target: TargetLike,
        prompt: Sequence[int],
        stop: int | None = None,
        layers: tuple[LayerConfig, ...] = (),
    ) -> tuple[Cache, int]:
        """A cache that holds the first n tokens of a prompt, and n. Evaluates.

        At least one token is left to process, for its logits. The prompt counts as known as far as
        it gets into the cache, until :meth:`keep` tells more. ``parting`` is where it parts from
        earlier ones if that is worth a mark, else 0. Only what this prompt's calls would have made
        alike is reused (:mod:`pyengine.model.plan`); ``stop`` is where those calls end, if not with
        the prompt. ``layers`` are those of a drafter that keeps keys and values too.
        """
        try:
            self._leave()
            return self._begin(target, prompt, stop, layers)
        except BaseException:  # Ctrl-C among them: who knows what it came between
            self._drop()
            raise

    def _begin(
        self,
        target: TargetLike,
        prompt: Sequence[int],
        stop: int | None,
        layers: tuple[LayerConfig, ...],
    ) -> tuple[Cache, int]:
        if self._is_own and (self._known is None or target is not self._target):
            self._known = Beginnings(target.new_arena())
        assert self._known is not None
        self._target = target
        if layers:
            self._known.extend(layers)
        self._has_drafters = bool(layers)
        self._ids = list(prompt)
        parting = self._known.parting(self._named(), stop)
        self._cache, self.reused = self._known.begin(self._named(), stop)
        self._borrowed = whole(len(prompt) if stop is None else stop, borrows())
        self.parting = parting if parting - self.reused >= WORTH_A_MARK else 0
        return self._cache, self.reused

    def shared(self, prompt: Sequence[int], layers: tuple[LayerConfig, ...] = ()) -> int:
        """How many tokens a prompt has in common with what is known, whether or not a text can go
        on from there."""
        return 0 if self._known is None else self._known.tree.shared(_named(prompt, bool(layers)))

    def mark(self, length: int) -> None:
        """Keep what is there after ``length`` positions, so that a later prompt can begin there."""
        assert self._cache is not None and self._known is not None
        if length:
            self._known.note(self._named(length), self._cache, min(self._borrowed, length))

    def _named(self, length: int | None = None) -> list[int]:
        """The newest text's first tokens as the tree knows them."""
        return _named(self._ids[:length], self._has_drafters)

    def keep(self, tokens: Sequence[int]) -> None:
        """The cache holds these tokens, and perhaps more behind them."""
        self._ids = list(tokens)

    def forget(self) -> None:
        """Nothing is known any more: others may begin with what this text has made."""
        if self._cache is not None:
            self._cache.release()
        self._cache, self._ids = None, []
        if self._known is not None:
            self._known.shrink(0)
            if self._is_own:
                self._known.trim()

    def _drop(self) -> None:
        """Have nothing, not even an arena of its own."""
        self._cache, self._ids = None, []
        if self._is_own:
            self._known = None

    def _leave(self) -> None:
        """Leave the text under way to those to come."""
        cache, known = self._cache, self._known
        if cache is None or known is None:
            return
        self._processed = min(cache.committed, len(self._ids))
        length = self._processed
        if length:
            known.note(self._named(length), cache, min(self._borrowed, length))
        cache.release()
        self._cache = None
        if self._is_own:
            arena, windows = known.arena, WINDOWS * window_pages(known.arena.window, 1)
            pages = 2 * -(-length // PAGE)
            known.shrink(pages * arena.page_bytes(False) + windows * arena.page_bytes(True))
            known.trim()


def _named(ids: Sequence[int], has_drafters: bool) -> list[int]:
    """Tokens as the tree knows them: where pages hold a drafter's keys and values too, by their
    complements, so that no text without these begins alike."""
    return [~token for token in ids] if has_drafters else list(ids)


def check_prefix(op: str, prefix: Any) -> None:
    """Refuse what is no prefix.

    Raises:
        ValueError: It is neither a Prefix nor None.
    """
    if not isinstance(prefix, (Prefix, NoneType)):
        raise ValueError(f"[{op}] prefix must be a Prefix or None but got {shown(prefix)}.")
