"""The examples run, and what they print holds."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sklearn")

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def output_of(*command: str) -> str:
    """What a Python command that must succeed prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def accuracies(printed: str) -> list[float]:
    """Every accuracy that a program tells of, in order."""
    return [float(number) for number in re.findall(r"accuracy (?:of )?(\d\.\d+)", printed)]


def test_the_hand_written_loop_learns() -> None:
    pytest.importorskip("torch")
    found = accuracies(output_of(str(EXAMPLES / "hand_written_loop.py")))
    assert len(found) == 5
    assert found[-1] > 0.93


def test_local_work_saves_rounds() -> None:
    pytest.importorskip("torch")
    options = ["--clients", "20", "--fraction", "0.2", "--target", "0.85", "--learning-rates", "0.3"]
    rows = output_of(str(EXAMPLES / "fedavg_digits.py"), *options).splitlines()[2:]
    assert [row.split()[:3] for row in rows] == [
        ["FedSGD", "1", "∞"],
        ["FedAvg", "5", "∞"],
        ["FedAvg", "1", "10"],
        ["FedAvg", "5", "10"],
        ["FedAvg", "20", "10"],
    ]
    entries = [[int(rounds) for rounds in re.findall(r"(\d+) \(", row)] for row in rows]
    for row in entries[1:]:
        assert all(rounds < first for rounds, first in zip(row, entries[0], strict=True)), entries


def test_a_target_that_is_not_met_is_told() -> None:
    pytest.importorskip("torch")
    rows = output_of(str(EXAMPLES / "fedavg_digits.py"), "--rounds", "1", "--clients", "5").splitlines()[2:]
    assert rows[0].count("more than 1") == 2


@pytest.mark.parametrize("clients", [1, 7, 300])
def test_every_image_has_one_client(clients: int) -> None:
    torch = pytest.importorskip("torch")
    example: dict[str, Any] = runpy.run_path(str(EXAMPLES / "fedavg_digits.py"))
    train, test = example["digits"]()
    count = len(train.labels)
    assert count + len(test.labels) == 1797
    for shares in (
        example["split_evenly"](count, clients),
        example["split_by_label"](train.labels, clients, 0.3),
    ):
        assert len(shares) == clients
        assert torch.equal(torch.cat(shares).sort().values, torch.arange(count))


@pytest.mark.real_run
def test_the_mean_of_many_files_reads_better_than_a_client() -> None:
    pytest.importorskip("ray")
    printed = output_of(str(EXAMPLES / "ray_tree.py"), "--clients", "300", "--fan-in", "8")
    alone, together = accuracies(printed)
    assert together > alone + 0.2
    assert "gives the same bits" in printed


def test_ranks_that_simulate_clients_end_alike() -> None:
    pytest.importorskip("torch")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    printed = output_of(*launcher, str(EXAMPLES / "torchrun_fedavg.py"), "--clients", "10", "--rounds", "4")
    found = accuracies(printed)
    assert len(found) == 4
    assert found[-1] > 0.88
    assert "2 ranks have the same bits, of 10 clients" in printed


def test_robust_rules_withstand_what_ruins_a_mean() -> None:
    pytest.importorskip("rich")
    pytest.importorskip("typer")
    printed = output_of(str(EXAMPLES / "robust_digits.py"), "--hostile", "0", "--hostile", "4")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if line.startswith("│")]
    found = {name: (float(alone), float(attacked)) for name, alone, attacked in rows}
    alone, attacked = found.pop("FedAvg")
    assert alone > 0.95
    assert attacked < 0.5
    assert len(found) == 14
    for name, (alone, attacked) in found.items():
        assert attacked > alone - 0.03, name
        assert alone > 0.9, name


def test_the_plot_of_robust_rules(tmp_path: Path) -> None:
    for package in ("rich", "typer", "matplotlib"):
        pytest.importorskip(package)
    path = tmp_path / "plot.png"
    options = ["--attack", "not a number", "--hostile", "4", "--rounds", "2", "--output", str(path)]
    assert f"plot: {path}" in output_of(str(EXAMPLES / "robust_digits.py"), *options).replace("\n", "")
    assert path.read_bytes().startswith(b"\x89PNG")
