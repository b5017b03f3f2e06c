"""What others sent (clients, files), as messages repeat it: short, and nothing in it steers a terminal or a log."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from typing import Any

LONGEST = 100  # characters

_SHORTENING = reprlib.Repr()
_SHORTENING.maxother = _SHORTENING.maxstring = LONGEST


def quoted(value: Any, longest: int = LONGEST) -> str:
    """A value as Python writes it: a text in quotes, a number as it is; at most `longest` printable characters."""
    if type(value) is str and len(value) < longest:  # names, which loops over leaves ask for
        written = repr(value)
        if len(written) <= longest:
            return written
    return printable(_written(value, longest), longest)


def quoted_list(values: Iterable[Any], longest: int = LONGEST) -> str:
    """Values as `quoted` writes them, with commas between them; at most `longest` characters in all."""
    text = ""
    for value in values:
        text += f"{', ' if text else ''}{quoted(value, longest)}"
        if len(text) > longest:
            break
    return printable(text, longest)


def printable(text: str, longest: int = LONGEST) -> str:
    """A text as it is, its unprintable characters escaped and its end cut off; at most `longest` characters."""
    beginning = text[: longest + 1]
    if not beginning.isprintable():
        beginning = "".join(one if one.isprintable() else repr(one)[1:-1] for one in beginning)
    return beginning if len(beginning) <= longest else f"{beginning[: longest - 1]}…"


def _written(value: Any, longest: int) -> str:
    """What `repr` makes of it, without the time and the memory that it takes for large ones."""
    if isinstance(value, (str, bytes, bytearray)):
        return repr(value[: longest + 1])
    if isinstance(value, int) and value.bit_length() > 4 * longest:  # Python refuses to write 5000 digits
        return f"an integer of {value.bit_length()} bits"
    try:
        return _SHORTENING.repr(value)
    except Exception:  # whatever the value's own __repr__ raises
        return f"a {type(value).__name__}"
