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

    def add(self, count: int) -> None:
        """More pages, behind the others. The lowest are taken first."""
        self._free[:0] = range(self.count + count - 1, self.count - 1, -1)
        self._holders += [0] * count

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
