"""Pages against a dict of who holds what: none is lost, none is given twice."""

from __future__ import annotations

import random

import pytest

from pyengine.model.pages import Pages


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_calls(seed: int) -> None:
    rng, count = random.Random(seed), random.Random(seed).randint(0, 5)
    pages, held = Pages(count), dict[int, int]()
    for _ in range(400):
        call = rng.choice(["take", "take", "hold", "drop", "drop", "add", "pack"])
        if call == "take" and len(held) == count:
            with pytest.raises(RuntimeError, match=rf"\[pages\] .* more than {count} but all are"):
                pages.take()
        elif call == "take":
            page = pages.take()
            assert page not in held and 0 <= page < count
            held[page] = 1
        elif call == "add" and rng.random() < 0.2:
            more = rng.randint(0, 4)
            pages.add(more)
            count += more
        elif call == "pack":
            count = len(held) + rng.randint(0, 2)
            moved = pages.pack(count)
            assert moved == {page: place for place, page in enumerate(sorted(held))}
            held = {moved[page]: times for page, times in held.items()}
        elif held and call == "hold":
            page = rng.choice(list(held))
            pages.hold(page)
            held[page] += 1
        elif held and call == "drop":
            page = rng.choice(list(held))
            pages.drop(page)
            held[page] -= 1
            if not held[page]:
                del held[page]
        assert (pages.count, pages.free) == (count, count - len(held))
        assert pages.holds == sum(held.values())
        for page in range(count):
            assert pages.is_shared(page) == (held.get(page, 0) > 1)
    for page, times in held.items():
        for _ in range(times):
            pages.drop(page)
    assert pages.free == pages.count == count
    assert sorted(pages.take() for _ in range(count)) == list(range(count))
    pages.clear()
    assert pages.count == pages.free == pages.holds == 0


def test_a_free_page_is_neither_dropped_nor_held() -> None:
    pages = Pages(2)
    page = pages.take()
    pages.drop(page)
    for call in (pages.drop, pages.hold):
        with pytest.raises(RuntimeError, match=rf"\[pages\] page {page} must be held but is free"):
            call(page)
    assert pages.free == 2
