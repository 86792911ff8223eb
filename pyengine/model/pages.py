"""Pages of an arena: which are free, and how many hold each. Numbers only."""

from __future__ import annotations


class Pages:
    """Pages of one kind; ``free`` and those that somebody holds are ``count`` at all times."""

    def __init__(self, count: int) -> None:
        self._holders: list[int] = []
        self._free: list[int] = []
        self.add(count)

    @property
    def count(self) -> int:
        return len(self._holders)

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def holds(self) -> int:
        """How many times pages are held, all together."""
        return sum(self._holders)

    def add(self, count: int) -> None:
        """More pages, behind the others. The lowest are taken first."""
        self._free[:0] = range(self.count + count - 1, self.count - 1, -1)
        self._holders += [0] * count

    def pack(self, count: int) -> dict[int, int]:
        """Have ``count`` pages, no fewer than are held; those that are held come first, in the same
        order. By its old number, each one's new one."""
        held = [page for page, holders in enumerate(self._holders) if holders]
        holders = [self._holders[page] for page in held]
        self.clear()
        self.add(count)
        self._holders[: len(held)] = holders
        self._free = self._free[: count - len(held)]
        return {page: place for place, page in enumerate(held)}

    def clear(self) -> None:
        """Have no pages, whoever holds some."""
        self._holders, self._free = [], []

    def take(self) -> int:
        """A free page, held once.

        Raises:
            RuntimeError: There is none.
        """
        if not self._free:
            raise RuntimeError(f"[pages] pages must be more than {self.count} but all are held.")
        page = self._free.pop()
        self._holders[page] = 1
        return page

    def hold(self, page: int) -> None:
        """Hold once more what somebody holds."""
        self._check(page)
        self._holders[page] += 1

    def drop(self, page: int) -> None:
        """Hold once less; a page that nobody holds is free."""
        self._check(page)
        self._holders[page] -= 1
        if not self._holders[page]:
            self._free.append(page)

    def is_shared(self, page: int) -> bool:
        """Whether it is held more than once."""
        return self._holders[page] > 1

    def _check(self, page: int) -> None:
        if not self._holders[page]:
            raise RuntimeError(f"[pages] page {page} must be held but is free.")
