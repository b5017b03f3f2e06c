"""Files and directories that appear under their name all at once, or not at all.

Files are written without a name where the system can (Linux), and get theirs at the end. All else is written beside its
place, under a name that begins with a dot, and renamed. The writer holds a lock on it: what nobody holds was left by a
process that was killed, and the next one for the same place removes it.
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
import stat
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
    _remove_leftovers(path)
    descriptor = _open_unnamed(path)
    temporary = None
    if descriptor is None:
        temporary, descriptor = _create(path, is_directory=False)
    try:
        keep_permissions(descriptor, path)
        yield descriptor
        os.fsync(descriptor)
        check_place(path, force)
        if temporary is None and not force:
            _name(descriptor, path)
        else:
            if temporary is None:
                temporary = _temporary_name(path)
                _name(descriptor, temporary)
            if force:
                os.replace(temporary, path)
            else:
                _link(temporary, path)
        _sync_directory(path.parent)
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        os.close(descriptor)


@contextlib.contextmanager
def atomic_directory(path: Path, force: bool) -> Iterator[Path]:
    """A directory to write to, whose files the writer syncs; it is at `path` once the block ends without an error.

    Raises:
        FileExistsError: something is at `path`, and not `force`.
        OSError: it cannot be written, or what is at `path` cannot be exchanged for it at once.
    """
    check_place(path, force, is_directory=True)
    _remove_leftovers(path)
    temporary, descriptor = _create(path, is_directory=True)
    try:
        keep_permissions(descriptor, path)
        yield temporary
        os.fsync(descriptor)
        if path.exists():
            check_place(path, force, is_directory=True)
            _swap(temporary, path)  # what was there is removed below
        else:
            temporary.rename(path)
        _sync_directory(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(descriptor)


def check_place(path: Path, force: bool, is_directory: bool = False) -> None:
    """Refuses a place where nothing can be written, or something would be lost.

    Raises:
        FileNotFoundError: the path's directory is missing.
        FileExistsError: something is there, and not `force`; or it is a device, a pipe or a socket.
        IsADirectoryError: a directory is there, and a file is to be written.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: there is no such directory")
    if not os.path.lexists(path):
        return
    if not force:
        raise FileExistsError(f"{path} exists: force overwrites it")
    if path.is_dir() and not path.is_symlink() and not is_directory:
        raise IsADirectoryError(f"{path} is a directory")
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise FileExistsError(f"{path} is no plain file, and is not replaced: name another output")


def keep_permissions(descriptor: int, replaced: Path) -> None:
    """Gives a new file or directory the mode of what it will replace, and its owner where that is permitted.

    A link is replaced itself, by a file that the same users may read as the one that it points to.
    """
    try:
        status = os.stat(replaced)
    except OSError:  # nothing, or a link to nothing: the process's own mask has said who may read it
        return
    for owner, group in ((status.st_uid, status.st_gid), (-1, status.st_gid)):
        with contextlib.suppress(OSError):
            os.fchown(descriptor, owner, group)
            break
    is_group_kept = os.fstat(descriptor).st_gid == status.st_gid
    os.fchmod(descriptor, status.st_mode & (0o777 if is_group_kept else 0o707))


def new_mode(replaced: Path, mode: int) -> int:
    """The mode to create a file or directory with: its owner's alone until it has that of what it will replace."""
    return mode & 0o700 if os.path.exists(replaced) else mode


def _open_unnamed(path: Path) -> int | None:
    """A descriptor of a new file that has no name yet, and is gone with its writer; None where the system cannot."""
    try:
        descriptor = os.open(path.parent, os.O_RDWR | os.O_TMPFILE, new_mode(path, 0o666))
    except (AttributeError, OSError):
        return None
    _lock(descriptor)
    if os.path.exists(f"/proc/self/fd/{descriptor}"):  # by which it gets its name
        return descriptor
    os.close(descriptor)
    return None


def _name(descriptor: int, path: Path) -> None:
    """Gives a file without a name one that nothing has."""
    folder = os.open(path.parent, os.O_RDONLY)  # unused, but with it Python follows the link to the file
    try:
        os.link(f"/proc/self/fd/{descriptor}", path, src_dir_fd=folder, follow_symlinks=True)
    except FileExistsError:
        raise FileExistsError(f"{path} exists: force overwrites it") from None
    finally:
        os.close(folder)


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.fastagg-{secrets.token_hex(4)}")


def _create(path: Path, is_directory: bool) -> tuple[Path, int]:
    """A new temporary beside a path, locked."""
    while True:
        temporary = _temporary_name(path)
        if is_directory:
            temporary.mkdir(new_mode(path, 0o777))
            descriptor = os.open(temporary, os.O_RDONLY)
        else:
            descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, new_mode(path, 0o666))
        _lock(descriptor)
        if temporary.exists():
            return temporary, descriptor
        os.close(descriptor)  # another process took it for a leftover, before it was locked


def _lock(descriptor: int) -> None:
    """Tells that this process writes it."""
    with contextlib.suppress(OSError):  # without locks there, nobody removes anything either
        fcntl.flock(descriptor, fcntl.LOCK_EX)


def _remove_leftovers(path: Path) -> None:
    """Removes what killed writers have left of a place."""
    for leftover in path.parent.glob(f"{glob.escape(f'.{path.name}.fastagg-')}*"):
        _remove_unless_locked(leftover)


def _remove_unless_locked(leftover: Path) -> None:
    try:  # what is no file and no directory was left by somebody else: a pipe would be waited for
        descriptor = os.open(leftover, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if kind == stat.S_IFDIR:
            shutil.rmtree(leftover)
        elif kind == stat.S_IFREG:
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
