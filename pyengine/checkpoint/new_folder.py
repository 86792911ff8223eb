"""A folder that appears under its name when it is whole; nothing that lies there is touched."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# Lies in the folder while it is filled, locked by the run that fills it. A folder that holds this
# file, with this text and no lock, was left by a run that was killed.
MARK = ".pyengine-convert"
TEXT = b"pyengine convert fills this folder.\n"


@contextmanager
def new_folder(dst: Path, nbytes: int) -> Iterator[Path]:
    """A folder to fill, which gets its name when all went well and is removed when not.

    It is made beside ``dst`` under a name that can be made once, so that of two runs one is
    refused. What a killed run left under that name is emptied and used again; anything else that
    has the name is left alone.

    Raises:
        ValueError: dst exists, cannot be made, is being made, or would not fit the disk; or its
            temporary name is taken.
    """
    _check_free(dst)
    home = dst.absolute().parent
    if not home.is_dir():
        raise ValueError(f"[quantize] dst must lie in a folder that exists but got {dst}.")
    free = shutil.disk_usage(home).free
    if nbytes > free:
        raise ValueError(
            f"[quantize] dst must fit the free {free / 1e9:.1f} GB of its disk but needs "
            f"{nbytes / 1e9:.1f} GB."
        )
    partial = home / f".{dst.name}.partial"
    try:
        handle = _make(partial) or _take_over(partial, dst)
        try:
            yield partial
            (partial / MARK).unlink()
            _check_free(dst)
            partial.rename(dst)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            os.close(handle)
    except OSError as error:  # a write does not say to which file
        raise OSError(error.errno, error.strerror, str(error.filename or dst)) from error


def _check_free(dst: Path) -> None:
    if os.path.lexists(dst):
        raise ValueError(f"[quantize] dst must not exist yet but {dst} does.")


def _make(partial: Path) -> int | None:
    """Make the folder and its mark; the mark's descriptor, or None if the name is taken."""
    try:
        partial.mkdir()
    except FileExistsError:
        return None
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        handle = os.open(partial / MARK, flags, 0o600)
    except BaseException:
        partial.rmdir()
        raise
    # Where the disk has no locks nobody takes a folder over. Waits for one who looks in just now:
    # without the text he lets go again.
    with contextlib.suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX)
    os.write(handle, TEXT)
    return handle


def _take_over(partial: Path, dst: Path) -> int:
    """The descriptor of a killed run's mark, its folder emptied.

    Raises:
        ValueError: The run still goes on, or this is no run's folder.
    """
    foreign = ValueError(
        f"[quantize] dst must leave its temporary name free but {partial} is there, and not as a "
        "convert leaves it; remove it or name another dst."
    )
    going_on = ValueError(f"[quantize] dst must not be in the making but {dst} is.")
    try:
        found = os.lstat(partial)
    except FileNotFoundError:  # the run came to its end this very moment
        raise going_on from None
    if not _is_own(found, stat.S_ISDIR):
        raise foreign
    try:
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        handle = os.open(partial / MARK, flags)
    except FileNotFoundError:
        # Between a run's making of the folder and of its mark, or at its end, there is none
        raise (foreign if os.path.lexists(partial) else going_on) from None
    except OSError:
        raise foreign from None
    try:
        if not _is_own(os.fstat(handle), stat.S_ISREG):
            raise foreign
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The run may have come to its end since its mark was opened
            if not os.path.samestat(os.fstat(handle), os.lstat(partial / MARK)):
                raise going_on
        except OSError:
            raise going_on from None
        if os.read(handle, len(TEXT) + 1) != TEXT:
            raise foreign
        for path in partial.iterdir():
            if path.name == MARK:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    except BaseException:
        os.close(handle)
        raise
    return handle


def _is_own(info: os.stat_result, is_kind: Callable[[int], bool]) -> bool:
    """Whether something is of this kind, no link, and belongs to this user."""
    return is_kind(info.st_mode) and info.st_uid == os.geteuid()
