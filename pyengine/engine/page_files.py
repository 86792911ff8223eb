"""Pages of keys and values in a folder, so that a prompt outlives the process.

A file holds one page of one kind. Its name is a hash of all that its bits follow from: the weights,
the tokenizer and the kernels, and every token up to the page's last. It begins with a hash of its
content, so that a damaged or foreign file is one that is not there.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

from pyengine.untrusted import write_whole

Kind = Literal["full", "sliding"]
DIGEST_BYTES = 32


class PageFiles:
    """The files below a folder; those of one model are in a folder of their own.

    Args:
        folder: Made if it is not there.
        model: Names weights, tokenizer and kernels, see
            :func:`pyengine.checkpoint.fingerprint.fingerprint`.
        limit: Most bytes of all files, of whatever model; what was used longest ago goes first.
        tell: Gets a line where a file is ignored, or the folder cannot be written to.

    Raises:
        ValueError: The folder cannot be made.
    """

    def __init__(self, folder: Path, model: str, limit: int, tell: Callable[[str], None]) -> None:
        self.folder, self.limit = folder, limit
        self._model, self._tell = model, tell
        self._own = folder / model[:32]
        self.is_open = True  # until something keeps us from writing
        try:
            self._own.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"[cache] {folder} must be a folder to write to but got {error.strerror}."
            ) from None
        self._total = self._make_room()

    def key(self, above: str | None, tokens: Sequence[int], is_borrowed: bool) -> str:
        """The name of a page behind another one, or of a first page."""
        digest = hashlib.sha256((above or self._model).encode())
        digest.update(bytes([is_borrowed]) + array("i", tokens).tobytes())
        return digest.hexdigest()

    def has(self, key: str, kind: Kind) -> bool:
        return self._path(key, kind).is_file()

    def read(self, key: str, kind: Kind, nbytes: int) -> bytes | None:
        """The page of so many bytes; None if it is not there, or not what it should be: then it is
        removed."""
        path = self._path(key, kind)
        try:
            if path.stat().st_size != DIGEST_BYTES + nbytes:
                self._ignore(path, "has another size")
                return None
            data = path.read_bytes()
            os.utime(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._ignore(path, f"cannot be read ({error.strerror})")
            return None
        content = data[DIGEST_BYTES:]
        if len(content) != nbytes or data[:DIGEST_BYTES] != _digest(key, kind, content):
            self._ignore(path, "is damaged")
            return None
        return content

    def write(self, key: str, kind: Kind, content: bytes) -> None:
        """Keep a page. What fails is told once, and nothing is written after that."""
        nbytes = DIGEST_BYTES + len(content)
        if not self.is_open or nbytes > self.limit:
            return
        try:
            write_whole(self._path(key, kind), _digest(key, kind, content) + content, 0o600)
            self._total += nbytes
            if self._total > self.limit:  # by our own count: others may write here too
                self._total = self._make_room()
        except OSError as error:
            self.is_open = False
            self._tell(f"No more prompts are kept in {self.folder}: {error.strerror}.")

    def _make_room(self) -> int:
        """Remove what was used longest ago, down to the limit; the bytes that are left."""
        found = sorted(self._files())
        total = sum(size for _, size, _ in found)
        for _, size, path in found:
            if total <= self.limit:
                break
            path.unlink(missing_ok=True)
            total -= size
        return total

    def _files(self) -> Iterator[tuple[int, int, Path]]:
        """When each was used, its size, and where it is."""
        for path in self.folder.glob("*/*.page"):
            try:
                found = path.stat()
            except OSError:  # another process has removed it
                continue
            yield found.st_mtime_ns, found.st_size, path

    def _path(self, key: str, kind: Kind) -> Path:
        return self._own / f"{key}.{kind}.page"

    def _ignore(self, path: Path, why: str) -> None:
        """Say so, and make room for what it should be."""
        self._tell(f"{path} is ignored: it {why}.")
        with suppress(OSError):
            path.unlink()


def _digest(key: str, kind: Kind, content: bytes) -> bytes:
    return hashlib.sha256(f"{key} {kind}\n".encode() + content).digest()
