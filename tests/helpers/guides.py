"""Grammars of token ids for tests: what may come next is a function of the tokens so far."""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np

from pyengine.engine.guided import Mask

Allowed = Callable[[tuple[int, ...]], Collection[int]]


class Toy:
    """Follows such a grammar; fails where it allows nothing."""

    def __init__(self, allowed: Allowed) -> None:
        self.allowed = allowed
        self.text: list[int] = []

    def fill(self, row: Mask) -> None:
        ids = self.allowed(tuple(self.text))
        if not ids:
            raise RuntimeError("[grammar] nothing may come next.")
        for token in ids:
            row[token // 32] |= np.uint32(1 << token % 32)

    def add(self, token: int) -> bool:
        if token not in self.allowed(tuple(self.text)):
            return False
        self.text.append(token)
        return True

    def take_back(self, count: int) -> None:
        del self.text[len(self.text) - count :]
