"""What the keys and values of a text follow from, beside its tokens: one hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx

from pyengine import _ext
from pyengine.checkpoint.safetensors import read_headers
from pyengine.ops import dispatch
from pyengine.untrusted import read_object, write_whole

if TYPE_CHECKING:
    from pyengine.checkpoint.pair import Pair

KNOWN = "hashes.json"  # of files, by path, size and time of the last change
BLOCK = 1 << 22
TOKENIZER = ("tokenizer.json", "tokenizer.model")


def fingerprint(
    pair: Pair, folder: Path, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> str:
    """A hash of the files of the target, its tokenizer and its DFlash drafter, and of the kernels
    that run, in hexadecimal.

    To read the weights once more takes as long as the disk needs; a file that has not changed since
    is not read again.

    Args:
        pair: A loaded pair, from files that have not changed since.
        folder: Where the hashes of files are kept.
        on_progress: Gets the bytes that were hashed, and all.

    Raises:
        ValueError: A file is gone, or cannot be read.
    """
    files = [*weight_files(pair), *files_of(pair, TOKENIZER)]
    if pair.dflash_path is not None:  # whose keys and values are kept too
        dflash = pair.dflash_path
        files += [dflash / "config.json", *(path for path, _ in read_headers(dflash))]
    kernels = {
        "mlx": metadata.version("mlx"),
        "sources": _ext.built_from,
        "instructions": _ext.instruction_set(),
        "device": str(mx.default_device()),
        "ops": dispatch.status(),
        "dtype": str(pair.target.dtype),
    }
    digest = hashlib.sha256(json.dumps(kernels, sort_keys=True).encode())
    for name, own in zip(files, _hashes(files, folder, on_progress), strict=True):
        digest.update(f"{name.name} {own}\n".encode())
    return digest.hexdigest()


def weight_files(pair: Pair) -> list[Path]:
    """The target's config and weights."""
    place = pair.target_path
    return [place / "config.json", *(path for path, _ in read_headers(place))]


def files_of(pair: Pair, names: Sequence[str]) -> list[Path]:
    """The target's files of these names, as far as there are any."""
    return [path for name in names if (path := pair.target_path / name).is_file()]


def content_hash(
    files: Sequence[Path], on_progress: Callable[[int, int], None] = lambda done, total: None
) -> str:
    """SHA-256 of the names and contents of files, in hexadecimal.

    Raises:
        ValueError: A file is gone, or cannot be read.
    """
    digest = hashlib.sha256()
    for path, own in zip(files, _hashes(files, None, on_progress), strict=True):
        digest.update(f"{path.name} {own}\n".encode())
    return digest.hexdigest()


def _hashes(
    files: Sequence[Path], folder: Path | None, on_progress: Callable[[int, int], None]
) -> list[str]:
    """SHA-256 of each file; none is kept without a folder."""
    known = {}
    if folder is not None and (folder / KNOWN).is_file():
        with suppress(ValueError):
            known = read_object(folder / KNOWN, "cache")
    found, done = {}, 0
    try:
        total = sum(path.stat().st_size for path in files)
        for path in files:
            state = path.stat()
            key = f"{path.resolve()} {state.st_size} {state.st_mtime_ns}"
            own = known.get(key)
            if not isinstance(own, str) or len(own) != 64:
                digest = hashlib.sha256()
                with path.open("rb") as file:
                    while block := file.read(BLOCK):
                        digest.update(block)
                        done += len(block)
                        on_progress(done, total)
                own = digest.hexdigest()
            else:
                done += state.st_size
            found[key] = own
        if folder is not None and any(key not in known for key in found):
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / KNOWN, json.dumps({**known, **found}))
    except OSError as error:
        raise ValueError(f"[cache] {error.filename} cannot be used: {error.strerror}.") from None
    return list(found.values())
