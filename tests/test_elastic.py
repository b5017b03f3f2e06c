"""The example of elastic restarts: a worker is killed, and training ends as if it had not been."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("sklearn")

EXAMPLE = Path(__file__).parents[1] / "examples" / "elastic" / "kill_a_worker.py"


def test_training_goes_on_from_the_last_checkpoint_bit_for_bit() -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "--steps", "30", "--every", "4"], capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-3000:]}"
    undisturbed, disturbed = done.stdout.split("with a worker killed:")
    assert starts(undisturbed) == [(0, 0)]
    assert "rank 1 is killed" in disturbed
    first, (restart, step) = starts(disturbed)
    assert first == (0, 0)
    assert restart == 1
    assert step >= 4
    losses = re.findall(r"all its bits: (\S+)", done.stdout)
    assert len(losses) == 2
    assert losses[0] == losses[1]


def starts(printed: str) -> list[tuple[int, int]]:
    """The starts of the workers, each with the step from which they went on."""
    return [(int(count), int(step)) for count, step in re.findall(r"start (\d+) from step (\d+)", printed)]
