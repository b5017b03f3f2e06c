"""A report's JSON and Markdown files, and what their pages are made of."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine
from verdicts import Target


@dataclass
class Page:
    """What a run has found.

    Attributes:
        machine: what it ran on, as plain values.
        machine_lines: the same in words.
        paragraphs: how it was measured, and how far it can be trusted.
        targets: none for a smoke test.
        data: what else the JSON file holds.
        sections: Markdown by heading.
    """

    title: str
    machine: dict[str, Any]
    machine_lines: list[str]
    paragraphs: list[str]
    targets: list[Target]
    data: dict[str, Any]
    sections: dict[str, str]

    def write(self, path: Path, command: str, quick: bool) -> None:
        """Writes the Markdown page, and the JSON file beside it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        described = {"machine": self.machine, "date": today(), "command": command, "quick": quick}
        judged = [{**target._asdict(), "verdict": target.verdict} for target in self.targets]
        everything = {**described, "targets": judged, **rounded(self.data)}
        path.with_suffix(".json").write_text(json.dumps(everything, indent=1) + "\n")
        lines = [*self.machine_lines, f"date: {today()}", f"command: `{command}`"]
        sections = {"Targets": targets_table(self.targets)} if self.targets else {}
        sections |= self.sections
        parts = [f"# {self.title}", "\n".join(f"- {line}" for line in lines), *self.paragraphs]
        parts += [f"## {heading}\n\n{section}" for heading, section in sections.items()]
        path.write_text("\n\n".join(parts) + "\n")


def cpu_page(
    title: str, paragraphs: list[str], targets: list[Target], data: dict[str, Any], sections: dict[str, str]
) -> Page:
    """A page about this machine's processors."""
    described = machine.describe()
    return Page(title, described, _machine_lines(described), paragraphs, targets, data, sections)


def cpu_subtitle(described: dict[str, Any]) -> str:
    """This machine and the date, for a plot."""
    return f"{described['processor']}, {described['processors']} processors, {today()}"


def today() -> str:
    """The date, the same all over the world."""
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()


def in_lines(judged: list[Target]) -> str:
    """Targets for the terminal; a quick run has none."""
    lines = (f"{target.verdict:15}  {target.text}: {target.measured} ({target.needed})" for target in judged)
    return "\n".join(lines) or "quick run: small arrays, so the targets do not apply"


def rounded(value: Any) -> Any:
    """Numbers with six significant digits: what is beyond them is noise."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def _machine_lines(described: dict[str, Any]) -> list[str]:
    build = described["fastagg"]
    packages = ", ".join(f"{name} {version}" for name, version in described["packages"].items())
    processors, threads = described["processors"], f"{build['threads']} thread{'s' * (build['threads'] > 1)}"
    return [
        f"machine: {described['processor']}, {processors} processors, "
        f"{described['memory_gigabytes']:g} GB, {described['system']}",
        f"fastagg {build['version']}: {build['isa']}, {threads}, compiler {build['compiler']}",
        f"Python {described['python']}, {packages}",
    ]


def targets_table(judged: list[Target]) -> str:
    """The targets and their verdicts."""
    cells = [(target.text, target.needed, target.measured, target.verdict) for target in judged]
    return table(("target", "needed", "measured", "verdict"), cells)


def number(value: float | None, digits: int) -> str:
    """A number, or a dash for none."""
    return "–" if value is None else f"{value:.{digits}f}"


def table(header: tuple[str, ...], lines: Sequence[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    rule = tuple("---" for _ in header)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines))
