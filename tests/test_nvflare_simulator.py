"""NVFlare's simulator, for real: digits on two sites under `FedAvgAggregator`, and under NVFlare's own FedAvg."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

pytest.importorskip("nvflare")
pytest.importorskip("sklearn")
torch = pytest.importorskip("torch")
psutil = pytest.importorskip("psutil")  # one of NVFlare's own requirements

pytestmark = pytest.mark.real_run

JOB = Path(__file__).parents[1] / "examples" / "nvflare_digits" / "job.py"
SECONDS = 150
RUNS = {
    "nvflare": ["--aggregator", "nvflare"],
    "fastagg": ["--aggregator", "fastagg"],
    "int8": ["--aggregator", "fastagg", "--wire", "int8"],
}


class Run(NamedTuple):
    """What a simulation left."""

    accuracy: float
    model: dict[str, Any]
    meta: dict[str, Any]
    log: str


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """All simulations, at the same time: most of their time is spent starting."""
    folder = tmp_path_factory.mktemp("nvflare")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NVFLARE_SIMULATOR_WORKSPACE_ROOT": ""}
    started = {}
    for name, options in RUNS.items():
        command = [sys.executable, str(JOB), "--rounds", "2", "--workspace", str(folder / name), *options]
        with (folder / f"{name}.txt").open("w") as output:
            started[name] = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        for process in started.values():
            process.wait(SECONDS)
    finally:
        for process in started.values():
            _end(process)
    return {name: _result(folder / name, (folder / f"{name}.txt").read_text()) for name in RUNS}


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a simulation that hangs, with the server and sites that it started."""
    if process.poll() is None:
        everyone = psutil.Process(process.pid).children(recursive=True)
        for one in everyone:
            one.kill()
        process.kill()
        process.wait()


def _result(workspace: Path, log: str) -> Run:
    found = re.search(r"^accuracy (\S+) of", log, re.MULTILINE)
    assert found, log[-3000:]
    [path] = workspace.rglob("FL_global_model.pt")
    saved = torch.load(path, weights_only=True)
    return Run(float(found[1]), saved["model"], saved["meta_props"], log)


def test_fastagg_ends_where_nvflare_s_own_fedavg_ends(runs: dict[str, Run]) -> None:
    ours, theirs = runs["fastagg"], runs["nvflare"]
    assert ours.accuracy == pytest.approx(theirs.accuracy, abs=1 / 360)  # of 360 images one may lie on the border
    assert ours.accuracy > 0.8
    assert list(ours.model) == list(theirs.model)
    for name, leaf in ours.model.items():
        np.testing.assert_allclose(leaf.numpy(), theirs.model[name].numpy(), rtol=0, atol=1e-5, err_msg=name)


def test_buffers_keep_their_dtype(runs: dict[str, Run]) -> None:
    batches = runs["fastagg"].model["layers.1.num_batches_tracked"]
    assert (batches.dtype, int(batches)) == (torch.int64, 92)


def test_the_workflow_knows_who_contributed(runs: dict[str, Run]) -> None:
    for name in ("fastagg", "int8"):
        meta = runs[name].meta
        assert (meta["nr_aggregated"], meta["current_round"]) == (2, 1)
        assert meta["fastagg"] == {"total_weight": 92.0, "dropped": []}
        assert "is left out" not in runs[name].log


def test_sites_that_send_int8_learn_as_well(runs: dict[str, Run]) -> None:
    assert runs["int8"].accuracy > runs["nvflare"].accuracy - 0.03
    assert not torch.equal(runs["int8"].model["layers.0.weight"], runs["fastagg"].model["layers.0.weight"])
