"""Pages of an arena in files: read where a prompt goes on from what is known, written by and by."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from pyengine.engine.page_files import Kind, PageFiles
from pyengine.engine.tree import Node, Tree
from pyengine.model.cache import Arena
from pyengine.ops.prepare_qkv import PAGE

KINDS: dict[bool, Kind] = {False: "full", True: "sliding"}


class Stored:
    """The files of a tree's pages, and how pages go there and come back.

    Only whole pages are kept: of a prompt that is read from them, less than a page is processed
    again. Of the sliding layers no more is read than the last window.
    """

    def __init__(self, files: PageFiles) -> None:
        self._files = files
        self._unwritten: deque[tuple[Node, bool]] = deque()
        self._seen = 0  # changes of the tree

    def load(
        self, tree: Tree, arena: Arena, tokens: Sequence[int], borrowed: int, known: int
    ) -> None:
        """Bring back pages of a text that the tree lacks, as far as files go. Evaluates.

        Args:
            tree: Gets them.
            arena: Where they go; without room for them nothing is read.
            tokens: Of the text.
            borrowed: How many positions MLX's kernels make.
            known: Positions that the text may go on from without.
        """
        names = self._names(tokens, borrowed)
        while True:
            path = tree.path(tokens, borrowed)
            end, wanted = self._readable(path, names, arena.window)
            if end * PAGE <= known or not self._has_room(arena, end - len(path), len(wanted)):
                return
            if self._read(tree, arena, tokens[: end * PAGE], borrowed, names[:end], wanted):
                return
            # A file was none, and is gone: what is left may do for less

    def _readable(
        self, path: Sequence[Node], names: Sequence[str], window: int
    ) -> tuple[int, list[int]]:
        """How many pages a text may begin with after reading, and the sliding ones to be read."""
        end = len(path)
        while end < len(names) and self._files.has(names[end], "full"):
            end += 1
        while end:
            first = max(0, end * PAGE - window + 1) // PAGE
            wanted = [at for at in range(first, end) if at >= len(path) or path[at].sliding is None]
            lacking = [at for at in wanted if not self._files.has(names[at], "sliding")]
            if not lacking:
                return end, wanted
            end = lacking[-1]
        return 0, []

    @staticmethod
    def _has_room(arena: Arena, full: int, sliding: int) -> bool:
        try:
            arena.make_room(max(0, full), sliding)
        except RuntimeError:
            return False
        return True

    def save(self, tree: Tree, arena: Arena) -> bool:
        """Write a page that is in no file yet; whether there may be more. Evaluates."""
        if not self._unwritten and tree.changes != self._seen:
            self._seen = tree.changes
            for node in tree.nodes():
                if len(node.tokens) == PAGE:
                    self._unwritten += [(node, sliding) for sliding in KINDS]
        while self._unwritten and self._files.is_open:
            node, sliding = self._unwritten.popleft()
            page = node.sliding if sliding else node.full
            if page is None or not tree.has(node):
                continue
            name = self._name(node)
            if not self._files.has(name, KINDS[sliding]):
                self._files.write(
                    name, KINDS[sliding], arena.content(sliding, page, _is_own(node.tokens))
                )
                return True
        return False

    def _read(
        self,
        tree: Tree,
        arena: Arena,
        tokens: Sequence[int],
        borrowed: int,
        names: Sequence[str],
        wanted: Sequence[int],
    ) -> bool:
        """Read the pages of a text that the tree lacks, of the sliding ones those wanted; whether
        all were what they should be."""
        full = [node.full for node in tree.path(tokens, borrowed)]
        known, sliding = len(full), {}
        try:
            for name in names[known:]:
                page = self._page(arena, False, name, _is_own(tokens))
                if page is None:
                    break
                full.append(page)
            for at in wanted:
                page = self._page(arena, True, names[at], _is_own(tokens))
                if page is not None:
                    sliding[at] = page
            tree.insert(tokens[: len(full) * PAGE], full, sliding, borrowed)
            return len(full) == len(names) and len(sliding) == len(wanted)
        finally:
            for page in full[known:]:
                arena.full.drop(page)
            for page in sliding.values():
                arena.sliding.drop(page)

    def _page(self, arena: Arena, sliding: bool, name: str, own: bool) -> int | None:
        """A new page with the content of a file; None where that is not what it should be."""
        content = self._files.read(name, KINDS[sliding], arena.page_bytes(sliding, own))
        if content is None:
            return None
        page = arena.pages(sliding).take()
        arena.fill(sliding, page, content)
        return page

    def _names(self, tokens: Sequence[int], borrowed: int) -> list[str]:
        """What the files of a text's whole pages are called."""
        names: list[str] = []
        for end in range(PAGE, len(tokens) + 1, PAGE):
            above = names[-1] if names else None
            names.append(self._files.key(above, tokens[end - PAGE : end], end <= borrowed))
        return names

    def _name(self, node: Node) -> str:
        """The same of a node."""
        unnamed = []
        while not node.name:
            unnamed.append(node)
            if node.parent is None or node.parent.parent is None:
                break
            node = node.parent
        name = node.name or None
        for node in reversed(unnamed):
            name = node.name = self._files.key(name, node.tokens, node.is_borrowed)
        assert name is not None
        return name


def _is_own(tokens: Sequence[int]) -> bool:
    """Whether pages of a text hold the target's keys and values alone, and no drafter's
    (:class:`pyengine.engine.prefix.Prefix` names them so)."""
    return tokens[0] >= 0
