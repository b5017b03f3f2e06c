"""Contenders in processes of their own: none inherits another's memory, warm or torn."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any


def arguments(description: str, quick: str) -> argparse.Namespace:
    """The arguments of a benchmark that calls itself for every contender: results, quick, contender and case."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--results", type=Path, default=Path("fastagg-bench"), help="folder of the report")
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--contender", help="measure this one in this process")
    parser.add_argument("--case", type=json.loads, help="its case as JSON")
    return parser.parse_args()


def measure(contender: str, case: Any) -> dict[str, Any]:
    """What the running script prints last, as JSON, when it is called for one contender of a case.

    Raises:
        RuntimeError: it failed, for example for want of memory.
    """
    script = str(Path(sys.argv[0]).resolve())
    command = [sys.executable, script, "--contender", contender, "--case", json.dumps(asdict(case))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{contender}: exit status {done.returncode}: {done.stderr.strip()}")
    return json.loads(done.stdout.splitlines()[-1])
