"""Beginnings of texts and the pages that hold their keys and values. Numbers only, no arrays.

A node is a page: up to 64 tokens, behind those of the nodes above it. All that begin alike share
the nodes, and the pages, of their common beginning. Full layers need every page from the root on;
sliding layers those of a window, so a node may have lost its page of them: a text can begin only
where the pages of the window before it are all there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from pyengine.model.pages import Pages
from pyengine.ops.prepare_qkv import PAGE

Tokens = tuple[int, ...]


class Found(NamedTuple):
    """Where a text may begin: so many positions, and their pages.

    They are the tree's: whoever uses one holds it, and copies the last where it is not whole.
    """

    length: int
    full: list[int]
    sliding: dict[int, int]  # by page of the text, those of the window


@dataclass(eq=False)
class Node:
    """Tokens of a page and who has computed them (:mod:`pyengine.model.plan`)."""

    tokens: Tokens  # fewer than 64 only where there are no children
    is_borrowed: bool  # made by MLX's kernels
    parent: Node | None
    full: int
    sliding: int | None
    children: dict[tuple[Tokens, bool], Node] = field(default_factory=dict)
    name: str = ""  # of its files, where it has some

    @property
    def key(self) -> tuple[Tokens, bool]:
        return self.tokens, self.is_borrowed


class Tree:
    """The beginnings that are known. It holds its pages, each once.

    Args:
        full: Pages of the full layers.
        sliding: Pages of the sliding ones.
        window: Of the sliding layers; 0 where there are none.
        page_bytes: Memory of a page of each kind, full and sliding.
    """

    def __init__(
        self, full: Pages, sliding: Pages, window: int, page_bytes: tuple[int, int]
    ) -> None:
        self._full, self._sliding, self._window = full, sliding, window
        self.page_bytes = page_bytes
        self._root = Node((), False, None, -1, None)
        # Nodes, and nodes' sliding pages (True). What was used last comes last, a node behind
        # those below it: so the first node of all is a leaf
        self._used: OrderedDict[tuple[Node, bool], None] = OrderedDict()
        self._num_nodes = 0
        self.changes = 0  # rises with every page that joins

    @property
    def nbytes(self) -> int:
        """Memory of the pages that are held, whoever else holds them."""
        full, sliding = self.page_bytes
        return self.holds[False] * full + self.holds[True] * sliding

    def __len__(self) -> int:
        """Number of nodes."""
        return self._num_nodes

    def find(self, tokens: Sequence[int], borrowed: int = 0, chunk: int = PAGE) -> Found:
        """The longest beginning of these tokens that a text can go on from.

        Args:
            tokens: All that may be taken over.
            borrowed: So many of the text's positions are made by MLX's kernels, chunk by chunk.
            chunk: Positions of such a chunk; a multiple of 64.
        """
        path, ends = self.path(tokens, borrowed), []
        for depth, above in enumerate([self._root, *path]):
            rest = tuple(tokens[depth * PAGE : (depth + 1) * PAGE])
            for child in above.children.values():
                alike = child.is_borrowed == ((depth + 1) * PAGE <= borrowed)
                if alike and (count := _shared(child.tokens, rest)):
                    ends.append((depth, count, child))
        for depth, count, child in sorted(ends, key=lambda end: end[:2], reverse=True):
            length = depth * PAGE + count
            if length < borrowed:
                length -= length % chunk
            nodes = [*path[:depth], child][: -(-length // PAGE)]
            if (found := self._from(nodes, length)) is not None:
                self._touch(nodes, found.sliding)
                return found
        return Found(0, [], {})

    def path(self, tokens: Sequence[int], borrowed: int = 0) -> list[Node]:
        """The nodes whose pages are wholly of these tokens; arguments as :meth:`find`."""
        node, nodes = self._root, []
        for end in range(PAGE, len(tokens) + 1, PAGE):
            below = node.children.get((tuple(tokens[end - PAGE : end]), end <= borrowed))
            if below is None:
                break
            nodes.append(node := below)
        return nodes

    def shared(self, tokens: Sequence[int]) -> int:
        """How many tokens these have in common with what is known, whether or not a text can go on
        from there."""
        node, length = self._root, 0
        while True:
            rest = tuple(tokens[length : length + PAGE])
            best = max(node.children.values(), key=lambda c: _shared(c.tokens, rest), default=None)
            if best is None:
                return length
            count = _shared(best.tokens, rest)
            length += count
            if count < PAGE:
                return length
            node = best

    def insert(
        self,
        tokens: Sequence[int],
        full: Sequence[int],
        sliding: Mapping[int, int],
        borrowed: int = 0,
    ) -> None:
        """Note a text that was processed, and hold the pages that were not known.

        Args:
            tokens: Its tokens; the pages hold their keys and values, and perhaps more behind them.
            full: Its pages.
            sliding: Those that are left of the sliding layers', by page of the text.
            borrowed: How many positions MLX's kernels have made.
        """
        node, nodes = self._root, []
        for at, page in enumerate(full[: -(-len(tokens) // PAGE)]):
            own = tuple(tokens[at * PAGE : (at + 1) * PAGE])
            node = self._below(node, own, (at + 1) * PAGE <= borrowed, page, sliding.get(at))
            nodes.append(node)
        self._touch(nodes, sliding)

    def shrink(self, is_enough: Callable[[], bool]) -> None:
        """Forget what was used longest ago, page by page, until it is enough or nothing is left."""
        while self._used and not is_enough():
            node, is_window = next(iter(self._used))
            if is_window:
                self._remove_window(node)
            else:
                self._remove(node)

    def clear(self) -> None:
        self.shrink(lambda: False)

    @property
    def holds(self) -> dict[bool, int]:
        """Pages that it holds by kind, whether sliding."""
        return {False: self._num_nodes, True: len(self._used) - self._num_nodes}

    def renumber(self, is_sliding: bool, numbers: Mapping[int, int]) -> None:
        """Note that the pages of a kind have other numbers now."""
        for node in self.nodes():
            if not is_sliding:
                node.full = numbers[node.full]
            elif node.sliding is not None:
                node.sliding = numbers[node.sliding]

    def nodes(self) -> Iterator[Node]:
        """Every node, parents first."""
        stack = list(self._root.children.values())
        while stack:
            node = stack.pop()
            yield node
            stack += node.children.values()

    def has(self, node: Node) -> bool:
        """Whether a node is still there."""
        return (node, False) in self._used

    def _from(self, nodes: list[Node], length: int) -> Found | None:
        """These pages as a beginning, None where one of the window is gone."""
        if not length:
            return None
        sliding = {}
        if self._window:
            for at in range(max(0, length - self._window + 1) // PAGE, len(nodes)):
                page = nodes[at].sliding
                if page is None:
                    return None
                sliding[at] = page
        return Found(length, [node.full for node in nodes], sliding)

    def _below(
        self, node: Node, own: Tokens, is_borrowed: bool, full: int, sliding: int | None
    ) -> Node:
        """The child with these tokens, made if there is none."""
        child = node.children.get((own, is_borrowed))
        if child is None:
            child = Node(own, is_borrowed, node, full, None)
            self._full.hold(full)
            self._used[child, False] = None
            self._num_nodes += 1
            node.children[child.key] = child
            self.changes += 1
        if child.sliding is None and sliding is not None:
            child.sliding = sliding
            self._sliding.hold(sliding)
            self._used[child, True] = None
            self.changes += 1
        for other in list(node.children.values()):
            # The beginning of a page is of no use beside more of it
            is_beginning = len(other.tokens) < len(own) and own[: len(other.tokens)] == other.tokens
            is_covered = child.sliding is not None or other.sliding is None
            if is_beginning and is_covered and other.is_borrowed == is_borrowed:
                self._remove(other)
        return child

    def _touch(self, nodes: Sequence[Node], windows: Iterable[int]) -> None:
        """Note that a path of nodes was used just now, and these of its sliding pages."""
        used = [(node, False) for node in reversed(nodes)]
        used += [(nodes[at], True) for at in windows if at < len(nodes)]
        for node, is_window in used:
            if not is_window or node.sliding is not None:
                self._used[node, is_window] = None  # Ctrl-C may have come as it was made
                self._used.move_to_end((node, is_window))

    def _remove(self, node: Node) -> None:
        """Forget a leaf."""
        assert node.parent is not None and not node.children
        node.parent.children.pop(node.key, None)
        self._used.pop((node, False), None)
        self._num_nodes -= 1
        self._full.drop(node.full)
        self._remove_window(node)

    def _remove_window(self, node: Node) -> None:
        if node.sliding is not None:
            page, node.sliding = node.sliding, None
            self._used.pop((node, True), None)
            self._sliding.drop(page)


def _shared(known: Sequence[int], tokens: Sequence[int]) -> int:
    """Length of the common beginning."""
    pairs = zip(known, tokens, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(known), len(tokens)))
