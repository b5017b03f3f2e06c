"""Plain files opened for reading: to open a pipe would wait for who writes to it, and a device never ends."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def open_plain(path: Path) -> int:
    """A descriptor of a plain file, to read from.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is a directory, a pipe, a device or another thing that is no plain file.
    """
    _check_mode(path, path.stat())  # to open some devices has effects
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        _check_mode(path, os.fstat(descriptor))  # it may be another one by now
    except ValueError:
        os.close(descriptor)
        raise
    return descriptor


def read_plain(path: Path, most: int) -> bytes:
    """A plain file's bytes, of which there may be so many.

    Raises:
        OSError, ValueError: as for `open_plain`, or it is larger.
    """
    with os.fdopen(open_plain(path), "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"{path}: larger than {most} bytes, which no such file is")
    return content


def _check_mode(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = "a directory" if stat.S_ISDIR(status.st_mode) else "a pipe, a device or a socket"
        raise ValueError(f"{path}: expected a plain file, got {kind}")
