"""Files and directories that appear under their name all at once, or not at all.

They are written beside their place, under a name that begins with a dot, and renamed. The writer holds a lock on what
it writes: what nobody holds was left by a process that was killed, and the next one for the same place removes it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

_CURRENT_DIRECTORY = -100  # AT_FDCWD
_EXCHANGE = 2  # RENAME_EXCHANGE


@contextlib.contextmanager
def atomic_file(path: Path, force: bool) -> Iterator[int]:
    """A descriptor to write to; what was written is at `path` once the block ends without an error.

    Raises:
        FileExistsError: something is at `path`, and not `force`.
        OSError: it cannot be written.
    """
    check_place(path, force)
    temporary, descriptor = _create(path, is_directory=False)
    try:
        yield descriptor
        os.fsync(descriptor)
        if force:
            os.replace(temporary, path)
        else:
            _link(temporary, path)
        _sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(descriptor)


@contextlib.contextmanager
def atomic_directory(path: Path, force: bool) -> Iterator[Path]:
    """A directory to write to, whose files the writer syncs; it is at `path` once the block ends without an error.

    Raises:
        FileExistsError: something is at `path`, and not `force`.
        OSError: it cannot be written, or what is at `path` cannot be exchanged for it at once.
    """
    check_place(path, force)
    temporary, descriptor = _create(path, is_directory=True)
    try:
        yield temporary
        os.fsync(descriptor)
        if path.exists():
            check_place(path, force)
            _swap(temporary, path)  # what was there is removed below
        else:
            temporary.rename(path)
        _sync_directory(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(descriptor)


def check_place(path: Path, force: bool) -> None:
    """Raises FileNotFoundError without the path's directory, and FileExistsError where something is, unless forced."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: there is no such directory")
    if not force and os.path.lexists(path):
        raise FileExistsError(f"{path} exists: force overwrites it")


def _create(path: Path, is_directory: bool) -> tuple[Path, int]:
    """A new temporary beside a path, locked, after those that were left there are gone."""
    prefix = f".{path.name}.fastagg-"
    for leftover in path.parent.glob(f"{glob.escape(prefix)}*"):
        _remove_unless_locked(leftover)
    while True:
        temporary = path.with_name(prefix + secrets.token_hex(4))
        if is_directory:
            temporary.mkdir()
            descriptor = os.open(temporary, os.O_RDONLY)
        else:
            descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        with contextlib.suppress(OSError):  # without locks there, nobody removes anything either
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if temporary.exists():
            return temporary, descriptor
        os.close(descriptor)  # another process took it for a leftover, before it was locked


def _remove_unless_locked(leftover: Path) -> None:
    try:
        descriptor = os.open(leftover, os.O_RDONLY)
    except OSError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink(missing_ok=True)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def _link(temporary: Path, path: Path) -> None:
    """Gives a file its name, unless something has it by now."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise FileExistsError(f"{path} exists: force overwrites it") from None
    except OSError:  # a file system without hard links
        check_place(path, force=False)
        temporary.rename(path)


def _swap(one: Path, other: Path) -> None:
    """Exchanges two paths in one step.

    Raises:
        OSError: this system cannot.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    arguments = (_CURRENT_DIRECTORY, os.fsencode(one), _CURRENT_DIRECTORY, os.fsencode(other), _EXCHANGE)
    if rename is None or rename(*arguments):
        code = errno.ENOSYS if rename is None else ctypes.get_errno()
        raise OSError(
            code, f"cannot replace a directory in one step here ({os.strerror(code)}): remove it first", other
        )


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
