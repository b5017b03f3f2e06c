"""The code blocks of documents run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


def blocks_of(document: str) -> list[str]:
    """A document's blocks of Python."""
    return re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)


def test_the_readme_begins_with_means_and_quantised_uploads() -> None:
    names: dict[str, Any] = {}
    exec(compile(blocks_of("README.md")[0], "README.md", "exec"), names)
    expected = (1200 * 1 + 800 * 2 + 350 * 4) / 2350
    assert names["mean"]["weight"] == pytest.approx(expected, rel=1e-2)


def test_the_readme_s_loop_of_your_own() -> None:
    pytest.importorskip("sklearn")
    names: dict[str, Any] = {}
    exec(compile(blocks_of("README.md")[-1], "README.md", "exec"), names)
    assert names["server"].version == 2
    assert names["server"].pending == 2
    assert names["mean"]["weight"].mean() == pytest.approx(1, rel=0.1)


def test_server_optimisers_and_asynchronous_servers() -> None:
    pytest.importorskip("torch")
    names: dict[str, Any] = {}
    for block in blocks_of("docs/server.md"):
        exec(compile(block, "docs/server.md", "exec"), names)
