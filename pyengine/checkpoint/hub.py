"""Names of the Hugging Face hub in place of folders. Needs the extra ``hub``."""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from pyengine.checkpoint.safetensors import MAX_HEADER

# owner/name, with @revision where one is wanted: a branch, a tag, a commit, or a pull request as
# the hub spells it, refs/pr/1. A path that begins otherwise is only a path.
_NAME = re.compile(
    r"(?P<repo>(?P<owner>\w[\w.-]*)/\w[\w.-]*)(@(?P<revision>\w[\w.-]*(/\w[\w.-]*)*))?"
)
_PAGES = ("models", "datasets", "spaces")  # of the hub itself: no owner has these names
SMALL = ["*.json", "*.jinja", "*.model"]
PATTERNS = [*SMALL, "*.safetensors"]
MAX_FILES = 512  # with weights in a repository; the largest model has some dozens

OnProgress = Callable[[int, int], None]


class _Repository(NamedTuple):
    name: str
    revision: str | None


def locate(place: str | Path) -> Path:
    """A folder: ``place`` itself if it is there, else the hub's repository of that name.

    Fetches what is not in the hub's cache yet. What looks like no name is returned as it is: a
    ``Path``, and a string with a slash too many, or none, or a ``.``, ``/`` or ``~`` in front.
    ``owner/name`` is a path too, and refused as one that is missing, where a folder ``owner`` is
    here or the owner is a page of the hub's, as in ``models/gemma``; a revision makes it a name.

    Raises:
        ValueError: The name is not a folder and cannot be fetched; the message says why.
    """
    repository = _repository(place)
    if repository is None:
        return Path(place)
    with _asking(place):
        return _snapshot(repository, PATTERNS)


@contextmanager
def headers(
    place: str | Path, on_progress: OnProgress = lambda done, total: None
) -> Iterator[Path]:
    """As :func:`locate`, for a reader of headers: no weights are fetched.

    Where weights of a name are not in the hub's cache, the folder is a temporary one. It has the
    repository's small files, and for each file of weights a sparse file of the same size that
    holds the header alone. So what is read is checked by the same code as a file of this machine.

    Args:
        place: A folder, or a name on the hub.
        on_progress: Called with headers read and headers in all.

    Raises:
        ValueError: The name is not a folder and cannot be fetched; the message says why.
    """
    repository = _repository(place)
    if repository is None:
        yield Path(place)
        return
    with _asking(place):
        snapshot = _snapshot(repository, SMALL)
        # The snapshot is named after its commit: a branch may move in between
        pinned = _Repository(repository.name, snapshot.name)
        remote = _remote_weights(pinned, snapshot)
    if all((snapshot / name).is_file() for name in remote):
        yield snapshot
        return
    if len(remote) > MAX_FILES or any(map(_leads_out, remote)):
        raise ValueError(
            f"[hub] {place} must have at most {MAX_FILES} files of weights, all inside it, but has "
            f"{len(remote)}, or one outside."
        )
    with tempfile.TemporaryDirectory(prefix="pyengine-headers-") as temporary:
        folder = Path(temporary) / repository.name
        shutil.copytree(snapshot, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        for done, (name, size) in enumerate(sorted(remote.items())):
            on_progress(done, len(remote))
            local = snapshot / name
            with _asking(place):
                begin = _first_bytes(local) if local.is_file() else _remote_bytes(pinned, name)
                _write_sparse(folder / name, begin, size)
        on_progress(len(remote), len(remote))
        yield folder


def _repository(place: str | Path) -> _Repository | None:
    """The repository that a place names; None where it is a path."""
    path, name = Path(place), _NAME.fullmatch(str(place))
    if path.exists() or not name or isinstance(place, Path):
        return None
    owner, revision = name["owner"], name["revision"]
    if owner in _PAGES:
        raise ValueError(
            f"{_missing(place)} {owner} is no owner there and {path.absolute()} is not here."
        )
    if Path(owner).is_dir() and not revision:
        raise ValueError(
            f"{_missing(place)} the folder {owner} is here without it; {place}@main asks the hub."
        )
    return _Repository(name["repo"], revision)


def _missing(place: str | Path) -> str:
    return f"[hub] {place} must be a folder that is there, or owner/name on the hub, but"


@contextmanager
def _asking(place: str | Path) -> Iterator[None]:
    """Make one sentence of whatever the hub's library raises."""
    try:
        yield
    except ImportError:
        raise ValueError(
            f"{_missing(place)} it is not here, and the hub needs huggingface_hub; run: "
            f'{sys.executable} -m pip install "pyengine-mlx[hub]".'
        ) from None
    except Exception as error:  # the library's own kinds, and those of the one below it
        reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
        raise ValueError(f"{_missing(place)} is neither: {reason}.") from error


def _snapshot(repository: _Repository, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    name, revision = repository
    return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))


def _remote_weights(repository: _Repository, snapshot: Path) -> dict[str, int]:
    """The repository's files of weights, with their sizes.

    Without a connection they are those of the cache, if it has any.
    """
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(
            repository.name, revision=repository.revision, files_metadata=True
        )
    except Exception:
        cached = sorted(path for path in snapshot.rglob("*.safetensors") if path.is_file())
        if not cached:
            raise
        return {str(path.relative_to(snapshot)): path.stat().st_size for path in cached}
    files = {file.rfilename: file.size for file in info.siblings or []}
    return {name: size or 0 for name, size in files.items() if name.endswith(".safetensors")}


def _leads_out(name: str) -> bool:
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return _header(file)


def _remote_bytes(repository: _Repository, name: str) -> bytes:
    """A file's header, read by ranges of bytes."""
    from huggingface_hub import HfFileSystem

    path = f"{repository.name}/{name}"
    with HfFileSystem().open(path, "rb", revision=repository.revision, cache_type="none") as file:
        return _header(file)


def _header(file: Any) -> bytes:
    """The length and the header; the length alone where it is not to be believed.

    What is wrong with either is said by :func:`pyengine.checkpoint.safetensors.read_header`.
    """
    length: bytes = file.read(8)
    count = int.from_bytes(length, "little")
    return length + (file.read(count) if count <= MAX_HEADER else b"")


def _write_sparse(path: Path, begin: bytes, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(begin[:size])
        file.truncate(size)
