"""The tree of beginnings: what it finds is what a plain list of all texts says, and what it holds
is what it lets go."""

from __future__ import annotations

import random

import pytest

from pyengine.engine.tree import Found, Tree
from pyengine.model.pages import Pages

PAGE = 64


class Texts:
    """A tree with an arena of numbers: texts take pages, and give them back."""

    def __init__(self, count: int = 400, window: int = 100) -> None:
        self.full, self.sliding, self.window = Pages(count), Pages(count), window
        self.tree = Tree(self.full, self.sliding, window, (10, 3))
        self.content: dict[tuple[bool, int], tuple[int, ...]] = {}  # of a page: the text up to it

    def add(self, tokens: list[int], borrowed: int = 0, behind: int | None = None) -> None:
        """Process a text, note it at its end, and let it go. Sliding pages are those of the window
        before ``behind`` positions, all of which are there."""
        behind = len(tokens) if behind is None else behind
        pages = range(-(-len(tokens) // PAGE))
        first = max(0, behind - self.window + 1) // PAGE if self.window else len(pages)
        full = [self.take(False, tokens, at) for at in pages]
        sliding = {at: self.take(True, tokens, at) for at in pages if at >= first}
        self.tree.insert(tokens, full, sliding, borrowed)
        for page in full:
            self.full.drop(page)
        for page in sliding.values():
            self.sliding.drop(page)

    def take(self, is_sliding: bool, tokens: list[int], at: int) -> int:
        page = (self.sliding if is_sliding else self.full).take()
        self.content[is_sliding, page] = tuple(tokens[: (at + 1) * PAGE])
        return page

    def check(self, found: Found, tokens: list[int]) -> None:
        """Every page that was found holds these tokens, and none is missing."""
        length = found.length
        assert len(found.full) == -(-length // PAGE)
        oldest = max(0, length - self.window + 1) // PAGE
        wanted = range(oldest, len(found.full)) if self.window else range(0)
        assert sorted(found.sliding) == list(wanted)
        for is_sliding, pages in ((False, dict(enumerate(found.full))), (True, found.sliding)):
            for at, page in pages.items():
                end = min((at + 1) * PAGE, length)
                assert self.content[is_sliding, page][:end] == tuple(tokens[:end])

    def find(self, tokens: list[int], borrowed: int = 0, chunk: int = PAGE) -> int:
        found = self.tree.find(tokens, borrowed, chunk)
        self.check(found, tokens)
        return found.length


def words(count: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1000) for _ in range(count)]


@pytest.mark.parametrize("count", [1, 63, 64, 65, 128, 200, 300])
def test_a_text_is_found_to_its_end(count: int) -> None:
    texts, text = Texts(), words(count)
    assert texts.find(text) == 0
    texts.add(text)
    assert texts.find(text) == count
    assert texts.find([*text, 7, 8]) == count
    assert texts.find(text[:-1]) == count - 1
    assert texts.find([2000, *text]) == 0


def test_a_text_can_begin_only_where_its_window_is_there() -> None:
    texts, text = Texts(window=100), words(640)
    texts.add(text)
    # Pages from (640 - 99) // 64 = 8 on are there: the first whole window ends at 8 * 64 + 99
    assert texts.find(text[:612]) == 612
    assert texts.find(text[:610]) == 0
    texts.add(text[:300])  # as at a mark: its pages join the nodes that are there
    assert texts.find(text[:610]) == 300
    assert texts.find(text[:292]) == 292
    assert texts.find(text[:200]) == 0
    assert len(texts.tree) == 11  # ten pages, and the beginning of the fifth with its window


def test_without_sliding_layers_any_beginning_will_do() -> None:
    texts, text = Texts(window=0), words(640)
    texts.add(text)
    assert [texts.find(text[:n]) for n in (1, 64, 65, 639)] == [1, 64, 65, 639]
    assert len(texts.tree) == 10 and texts.sliding.free == 400


def test_texts_share_the_pages_of_their_common_beginning() -> None:
    texts, text = Texts(window=1000), words(200)
    texts.add([*text, *words(200, 1)])
    texts.add([*text, *words(200, 2)])
    assert texts.find([*text, *words(300, 1)]) == 400
    assert texts.find([*text, *words(300, 2)]) == 400
    assert texts.find([*text, *words(300, 3)]) == 200
    assert len(texts.tree) == 3 + 2 * 4  # three whole pages are both's
    assert texts.full.free == 400 - 11


def test_the_beginning_of_a_page_gives_way_to_more_of_it() -> None:
    texts, text = Texts(), words(100)
    for count in (10, 30, 64, 70, 100):
        texts.add(text[:count])
        assert texts.find(text) == count
    assert len(texts.tree) == 2
    assert texts.full.free == 398 and texts.sliding.free == 398


def test_a_beginning_with_a_window_stays_beside_more_without_one() -> None:
    texts, text = Texts(window=70), words(600)
    texts.add(text[:150])
    texts.add(text)  # whose early sliding pages are gone
    assert texts.find(text[:152]) == 150
    assert texts.find(text) == 600


def test_pages_of_other_kernels_are_others() -> None:
    """With whole chunks by MLX's kernels, a page serves only prompts whose calls would make it."""
    texts, text = Texts(window=0), words(400)
    texts.add(text, borrowed=256)
    assert texts.find(text, borrowed=256, chunk=128) == 400
    assert texts.find(text, borrowed=384, chunk=128) == 256
    assert texts.find(text[:200], borrowed=128, chunk=128) == 128
    assert texts.find(text[:100], borrowed=0) == 0
    texts.add(text, borrowed=0)
    assert texts.find(text[:100], borrowed=0) == 100
    # Within the whole chunks a text begins at a border only
    assert texts.find([*text[:250], 7, 8, *words(200)], borrowed=384, chunk=128) == 128


def test_what_was_used_longest_ago_goes_first() -> None:
    texts = Texts(window=0)
    a, b, c = (words(192, seed) for seed in range(3))
    for text in (a, b, c):
        texts.add(text)
    assert texts.find(a) == 192  # used now
    limit = 60
    texts.tree.shrink(lambda: texts.tree.nbytes <= limit)
    assert texts.tree.nbytes == 60
    assert [texts.find(text) for text in (a, b, c)] == [192, 0, 192]
    limit = 40
    texts.tree.shrink(lambda: texts.tree.nbytes <= limit)
    assert [texts.find(text) for text in (a, c)] == [64, 192]  # its last pages first
    texts.tree.clear()
    assert texts.full.free == 400 and len(texts.tree) == 0 and texts.tree.nbytes == 0


def test_an_unused_window_goes_before_a_leaf_that_is_used() -> None:
    texts, text = Texts(window=100), words(300)
    texts.add(text[:150])
    texts.add(text)
    for _ in range(2):
        assert texts.find(text) == 300
    before = texts.tree.nbytes
    texts.tree.shrink(lambda: texts.tree.nbytes < before)
    assert texts.find(text) == 300


def test_shared_is_the_common_beginning_with_or_without_a_window() -> None:
    texts, text = Texts(window=64), words(300)
    texts.add(text)
    assert texts.tree.shared(text[:100]) == 100
    assert texts.tree.shared([*text[:130], 5000]) == 130
    assert texts.tree.shared([5000]) == 0
    assert texts.tree.shared([*text, 1, 2]) == 300


def test_nodes_are_told_parents_first() -> None:
    texts = Texts(window=0)
    texts.add(words(200))
    texts.add([*words(100), *words(100, 5)])
    seen: list[object] = [texts.tree._root]
    for node in texts.tree.nodes():
        assert node.parent in seen and texts.tree.has(node)
        seen.append(node)
    assert len(seen) - 1 == len(texts.tree) == 1 + 3 + 3


@pytest.mark.parametrize("seed", range(4))
def test_random_texts_against_a_list_of_them(seed: int) -> None:
    """Without a limit: every beginning is found that a list of the texts and their windows has."""
    rng, window = random.Random(seed), random.Random(seed).choice([0, 1, 64, 100, 200])
    texts = Texts(count=2000, window=window)
    known: list[list[int]] = []
    pool = [words(rng.randrange(1, 400), n) for n in range(3)]
    for _ in range(40):
        text = rng.choice(pool)[: rng.randrange(1, 400)] + words(
            rng.randrange(0, 90), rng.randrange(3)
        )
        asked = text[: rng.randrange(1, len(text) + 1)]
        length = texts.find(asked)
        # Whatever was added and is a whole beginning of it will do; nothing that nobody said
        at_least = max((len(k) for k in known if asked[: len(k)] == k), default=0)
        at_most = max((_shared(k, asked) for k in known), default=0)
        assert at_least <= length <= at_most, (window, at_least, length, at_most)
        if not window:
            assert length == at_most
        texts.add(text)
        known.append(text)
    texts.tree.clear()
    assert texts.full.free == texts.sliding.free == 2000


@pytest.mark.parametrize("seed", range(4))
def test_random_forgetting_keeps_what_is_left_right(seed: int) -> None:
    rng, texts = random.Random(seed), Texts(count=600, window=130)
    pool = [words(300, n) for n in range(4)]
    for _ in range(120):
        text = rng.choice(pool)[: rng.randrange(1, 300)] + words(
            rng.randrange(0, 90), rng.randrange(9)
        )
        texts.find(text)
        texts.add(text)
        limit = rng.randrange(50, 400)
        if rng.random() < 0.5:
            texts.tree.shrink(lambda limit=limit: texts.tree.nbytes <= limit)
            assert texts.tree.nbytes <= limit
        held = sum(1 for _ in texts.tree.nodes())
        assert len(texts.tree) == held == 600 - texts.full.free
        windows = sum(node.sliding is not None for node in texts.tree.nodes())
        assert windows == 600 - texts.sliding.free
    texts.tree.clear()
    assert texts.full.free == texts.sliding.free == 600


def _shared(a: list[int], b: list[int]) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
