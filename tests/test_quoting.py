"""What messages repeat of what others sent."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fastagg._quoting import LONGEST, printable, quoted, quoted_list


class Unwritable:
    def __repr__(self) -> str:
        raise RuntimeError("no")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("layer.weight", "'layer.weight'"),
        ("ä", "'ä'"),
        ("\x1b[31m\n\u202e", r"'\x1b[31m\n\u202e'"),
        (3, "3"),
        (True, "True"),
        (0.5, "0.5"),
        (None, "None"),
        (b"\x00a", r"b'\x00a'"),
        (10**5000, "an integer of 16610 bits"),
        ([1, "a"], "[1, 'a']"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_value_is_written_as_python_writes_it(value: Any, expected: str) -> None:
    assert quoted(value) == expected


@pytest.mark.parametrize(
    "value",
    [
        "a" * 10_000_000,
        "\x1b" * 10_000_000,
        b"\x00" * 10_000_000,
        ["a" * 1000] * 1000,
        [10**5000],
        {"k" * 1000: ["\n"] * 100},
        np.array(["\n" * 1000] * 2000),
        10**100,
        Unwritable(),
        -(10**5000),
    ],
    ids=["text", "control", "bytes", "list", "integers", "dict", "array", "integer", "unwritable", "large"],
)
def test_a_quotation_is_short_and_printable(value: Any) -> None:
    for text in (quoted(value), quoted_list([value] * 10), printable(str(type(value)) * 100)):
        assert len(text) <= LONGEST
        assert text.isprintable()


def test_a_list_says_where_it_was_cut() -> None:
    assert quoted_list(["a", "b"]) == "'a', 'b'"
    assert quoted_list(f"leaf {number}" for number in range(100)).endswith("…")


def test_a_text_keeps_what_is_printable() -> None:
    assert printable("folder/a b\x07.pt") == r"folder/a b\x07.pt"
    assert printable("a" * 200, 300) == "a" * 200
