"""How commands end: with one sentence for what went wrong, and having cleared away what they had begun to write."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from types import FrameType

from fastagg._quoting import printable

_LONGEST = 10_000  # characters: two paths and what is wrong with them


def sentence(text: str) -> str:
    """A line for the terminal: nothing that stands in a file or its name steers it."""
    return printable(text, _LONGEST)


@contextlib.contextmanager
def failing_with_a_sentence(command: str) -> Iterator[None]:
    """Ends the process with status 1 and one sentence where a block raises what files and users can be the cause of."""
    try:
        yield
    except OSError as error:
        reason = str(error) if error.filename is None else f"{error.filename}: {error.strerror}"
    except MemoryError as error:
        reason = str(error) or "there is not enough memory"
    except (ImportError, RecursionError, TypeError, ValueError) as error:
        reason = str(error) or type(error).__name__
    else:
        return
    sys.exit(sentence(f"fastagg {command}: {reason}"))


def end_in_order() -> None:
    """Lets SIGTERM and SIGHUP end the process as an error does, unless they are ignored, as nohup does."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)
