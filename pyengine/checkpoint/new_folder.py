"""A folder that appears under its name when it is whole; nothing that lies there is touched."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# Lies in the folder while it is filled. The run that fills the folder holds a lock on it: one that
# holds this file, with this text, and is not locked was left by a run that was killed.
MARK = ".pyengine-convert"
TEXT = b"pyengine convert fills this folder.\n"

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)


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
        raise ValueError(f"[convert] dst must lie in a folder that exists but got {dst}.")
    free = shutil.disk_usage(home).free
    if nbytes > free:
        raise ValueError(
            f"[convert] dst must fit the free {free / 1e9:.1f} GB of its disk but needs "
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
        raise ValueError(f"[convert] dst must not exist yet but {dst} does.")


def _make(partial: Path) -> int | None:
    """Make the folder; its descriptor, locked, or None if the name is taken.

    It gets the name when it is locked and marked: nobody meets it without.
    """
    if os.path.lexists(partial):
        return None
    made = partial.with_name(f"{partial.name}-{secrets.token_hex(8)}")
    made.mkdir()
    handle = None
    try:
        handle = os.open(made, FOLDER)
        # Where the disk has no locks nobody takes a folder over
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (made / MARK).write_bytes(TEXT)
        made.rename(partial)  # refused where something lies there by now
        return handle
    except BaseException as error:
        shutil.rmtree(made, ignore_errors=True)
        if handle is not None:
            os.close(handle)
        if isinstance(error, OSError) and error.errno in TAKEN:
            return None
        raise


def _take_over(partial: Path, dst: Path) -> int:
    """The descriptor of a killed run's folder, locked and emptied.

    Raises:
        ValueError: The run still goes on, or this is no run's folder.
    """
    foreign = ValueError(
        f"[convert] dst must leave its temporary name free but {partial} is there, and not as a "
        "convert leaves it; remove it or name another dst."
    )
    going_on = ValueError(f"[convert] dst must not be in the making but {dst} is.")
    try:
        handle = os.open(partial, FOLDER)
    except FileNotFoundError:  # the run came to its end this very moment
        raise (foreign if os.path.lexists(partial) else going_on) from None
    except OSError:
        raise foreign from None
    try:
        if not _is_own(os.fstat(handle), stat.S_ISDIR):
            raise foreign
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The run may have come to its end since the folder was opened
            if not os.path.samestat(os.fstat(handle), os.lstat(partial)):
                raise going_on
        except OSError:
            raise going_on from None
        if not _is_marked(handle):
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


def _is_marked(folder: int) -> bool:
    """Whether the folder holds the mark as a run writes it."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        handle = os.open(MARK, flags, dir_fd=folder)
    except OSError:
        return False
    try:
        return _is_own(os.fstat(handle), stat.S_ISREG) and os.read(handle, len(TEXT) + 1) == TEXT
    finally:
        os.close(handle)


def _is_own(info: os.stat_result, is_kind: Callable[[int], bool]) -> bool:
    """Whether something is of this kind, no link, and belongs to this user."""
    return is_kind(info.st_mode) and info.st_uid == os.geteuid()
