"""What many texts of one arena know of each other, and what outlives the process."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest
from models import decode
from tiny_pairs import FLAVOURS, bits, tiny_pair

from pyengine.checkpoint.pair import Pair
from pyengine.engine.beginnings import Beginnings
from pyengine.engine.page_files import PageFiles
from pyengine.engine.prefix import Prefix
from pyengine.engine.stats import Stats
from pyengine.engine.stored import Stored
from pyengine.sampling.settings import Sampling

MODEL = "c" * 64


def known_of(pair: Pair, folder: Path | None = None, told: list[str] | None = None) -> Beginnings:
    arena = pair.target.new_arena()
    if folder is None:
        return Beginnings(arena)
    lines = [] if told is None else told
    return Beginnings(arena, Stored(PageFiles(folder, MODEL, 1 << 30, lines.append)))


def answer(
    pair: Pair, prompt: list[int], known: Beginnings | None, seed: int = 1
) -> tuple[list[int], int]:
    """New tokens, and how many of the prompt's were reused."""
    stats = Stats()
    prefix = None if known is None else Prefix(known)
    rounds = decode(
        pair.target,
        pair.assistant,
        prompt,
        sampling=Sampling(seed=seed, top_k=8),
        block_size=4,
        max_tokens=12,
        stats=stats,
        prefix=prefix,
    )
    tokens = [token for r in rounds for token in r.tokens]
    if prefix is not None:
        with prefix.in_use():
            pass
    return tokens, stats.reused_tokens


def text(count: int, seed: int = 0) -> list[int]:
    return mx.random.randint(3, 250, (count,), key=mx.random.key(seed)).tolist()


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_texts_of_one_arena_begin_where_another_has_been(flavour: str) -> None:
    pair, known = tiny_pair(flavour), known_of(tiny_pair(flavour))
    system = text(130)
    reused = []
    for n in range(4):
        prompt = [*system, *text(20, 10 + n)]
        said, count = answer(pair, prompt, known)
        assert said == answer(pair, prompt, None)[0]
        reused.append(count)
    assert reused == [0, 130, 130, 130]
    held = known.nbytes
    known.shrink(held // 2)
    assert 0 < known.nbytes <= held // 2
    prompt = [*system, *text(20, 13)]
    assert answer(pair, prompt, known)[0] == answer(pair, prompt, None)[0]
    known.shrink(0)
    arena = known.arena
    assert arena.held_bytes == 0 and arena.full.free == arena.full.count > 0


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("length", [63, 64, 65, 127, 128, 200])
def test_a_prompt_is_not_read_again_by_another_process(
    flavour: str, length: int, tmp_path: Path
) -> None:
    """Whole pages come back; the bits of what follows are those of a cold start."""
    pair, prompt = tiny_pair(flavour), text(length)
    first = known_of(pair, tmp_path)
    said, _ = answer(pair, prompt, first)
    while first.store():
        pass
    told: list[str] = []
    other = known_of(pair, tmp_path, told)
    longer = [*prompt, *said, 7, 8, 9]
    warm, count = answer(pair, longer, other)
    assert warm == answer(pair, longer, None)[0]
    assert count == (length + len(said) - 1) // 64 * 64
    cache, begun = other.begin(longer)
    assert begun == len(longer) - 1 and told == []  # by now it is there to the end
    cache.release()
    third = known_of(pair, tmp_path)
    cache, begun = third.begin(longer)
    logits, _ = pair.target.prefill(longer[begun:], cache)
    cold, _ = pair.target.prefill(longer, pair.target.new_cache())
    assert (bits(logits) == bits(cold)).all()


def test_how_far_back_a_window_goes() -> None:
    """By hand, for a window of 8: 200 positions and 12 of an answer, whose newest is not processed.
    Pages are kept from the last whole one 16 positions back on, which is the third: its window
    begins at 121, in the second. Further back only the mark at the prompt's end helps."""
    pair, prompt = tiny_pair("dense31"), text(200)
    for shared, reused in ((211, 211), (200, 200), (135, 135), (71, 71), (70, 0), (9, 0)):
        known = known_of(pair)
        whole = [*prompt, *answer(pair, prompt, known)[0]]
        asked = [*whole[:shared], 255 - whole[shared], 9, 9]
        warm, count = answer(pair, asked, known, 5)
        assert count == reused, shared
        assert warm == answer(pair, asked, None, 5)[0]


def test_another_model_finds_nothing(tmp_path: Path) -> None:
    pair, prompt = tiny_pair("uni12"), text(150)
    first = known_of(pair, tmp_path)
    answer(pair, prompt, first)
    while first.store():
        pass
    files = PageFiles(tmp_path, "d" * 64, 1 << 30, lambda line: None)
    other = Beginnings(pair.target.new_arena(), Stored(files))
    assert answer(pair, prompt, other)[1] == 0


@pytest.mark.parametrize("kind", ["full", "sliding"])
def test_a_damaged_page_ends_what_is_read(kind: str, tmp_path: Path) -> None:
    pair, prompt = tiny_pair("dense31"), text(300)
    first = known_of(pair, tmp_path)
    for end in (100, 200, 300):  # each leaves its window
        answer(pair, prompt[:end], first)
    while first.store():
        pass
    files = sorted(tmp_path.glob(f"*/*.{kind}.page"))
    assert len(files) >= 3
    whole = answer(pair, prompt, None)[0]
    counts = []
    for path in files:
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        told: list[str] = []
        other = known_of(pair, tmp_path, told)
        warm, count = answer(pair, prompt, other)
        assert warm == whole
        assert [str(path) in line for line in told] in ([], [True])
        assert told or count == 256  # not asked for
        assert path.exists() != bool(told)
        counts.append(count)
        other.shrink(0)
        assert other.arena.held_bytes == 0
        while first.store():  # nothing: it has written it, and does not look again
            pass
        path.write_bytes(data)
    assert any(count < 256 for count in counts)
    assert kind == "sliding" or 0 in counts  # where the first page is none


def test_where_the_arena_has_no_room_nothing_is_read(tmp_path: Path) -> None:
    pair, prompt = tiny_pair("dense31"), text(300)
    first = known_of(pair, tmp_path)
    answer(pair, prompt, first)
    while first.store():
        pass
    arena = pair.target.new_arena(first.arena.page_bytes(False) * 2)
    files = PageFiles(tmp_path, MODEL, 1 << 30, lambda line: None)
    known = Beginnings(arena, Stored(files))
    assert len(known.tree) == 0
    cache, begun = known.begin(prompt)
    assert begun == 0 and arena.held_bytes == 0
    cache.release()


def test_what_is_stored_is_not_written_again(tmp_path: Path) -> None:
    pair, known = tiny_pair("uni12"), known_of(tiny_pair("uni12"), tmp_path)
    answer(pair, text(150), known)
    while known.store():
        pass
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*.page")}
    assert before and not known.store()
    answer(pair, text(150), known)
    while known.store():
        pass
    after = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*.page")}
    assert before == after
    answer(pair, [*text(150), *text(80, 3)], known)
    while known.store():
        pass
    assert len(list(tmp_path.glob("*/*.page"))) > len(before)
