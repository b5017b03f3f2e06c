"""Real runs of Flower: servers and nodes as processes, over plain connections, over TLS, and simulated on Ray."""

from __future__ import annotations

import importlib
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("flwr")
pytest.importorskip("sklearn")

import flower_deployment
from flower_deployment import APP, Deployment, load_model, make_certificates

pytestmark = pytest.mark.real_run

ROUNDS = 2
Model = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with Deployment(tmp_path_factory.mktemp("flower")) as deployment:
        yield deployment


@pytest.fixture(scope="module")
def own_model() -> Model:
    """The same run as a loop in this process, with NumPy's mean."""
    sys.path.insert(0, str(APP))
    task = importlib.import_module("flower_digits.task")
    sys.path.remove(str(APP))
    model = task.new_model()
    for server_round in range(1, ROUNDS + 1):
        shares = [task.load_images(partition, 2) for partition in range(2)]
        models = [task.train(model, pixels, labels, seed=server_round) for pixels, labels in shares]
        counts = [len(labels) for _, labels in shares]
        model = {
            name: np.average([m[name].astype(np.float64) for m in models], axis=0, weights=counts) for name in model
        }
        model = {name: x.astype(models[0][name].dtype) for name, x in model.items()}
    return model


def accuracy(model: Model) -> float:
    return sys.modules["flower_digits.task"].accuracy(model)


def assert_same_training(model: Model, other: Model) -> None:
    for name in ("weight", "bias"):
        np.testing.assert_allclose(model[name], other[name], atol=1e-5)
    assert accuracy(model) == accuracy(other) > 0.85


def test_the_documents_name_every_option_that_is_used_here() -> None:
    used = set(re.findall(r"--[a-z]+[a-z-]*", Path(flower_deployment.__file__).read_text())) - {
        "--help",
        "--simulationio-api-address",
    }
    documented = (APP.parents[1] / "docs" / "flower.md").read_text()
    assert len(used) > 10
    assert [option for option in sorted(used) if option not in documented] == []


def test_a_deployment_ends_as_flowers_own_fedavg_does(plain: Deployment, own_model: Model) -> None:
    rounds = {"num_server_rounds": ROUNDS}
    ours, theirs = plain.run(rounds, {**rounds, "strategy": "flower"})
    assert ours["weight"].dtype == np.float32
    assert ours["steps"].dtype == own_model["steps"].dtype
    assert_same_training(ours, own_model)
    assert_same_training(ours, theirs)


# Behind the test before, since it kills a node of its deployment.
@pytest.mark.usefixtures("own_model")
def test_a_round_whose_node_is_killed_completes_with_the_rest(plain: Deployment) -> None:
    mark, output = plain.folder / "training", plain.folder / "model.npz"
    config = {"num_server_rounds": 1, "timeout": 20.0, "pause": 60.0, "mark": str(mark), "output": str(output)}
    app = plain.begin(config)
    end = time.monotonic() + 60
    while not mark.exists() and time.monotonic() < end:
        time.sleep(0.1)
    plain.kill_node(1)
    assert "Received 1 results" in plain.finish(app)
    assert accuracy(load_model(output)) > 0.8


def test_quantised_replies_stream_in_over_tls(tmp_path: Path, own_model: Model) -> None:
    with Deployment(tmp_path, certificates=make_certificates(tmp_path)) as deployment:
        (model,) = deployment.run({"num_server_rounds": ROUNDS, "streaming": True, "wire": "int8"})
    assert accuracy(model) == pytest.approx(accuracy(own_model), abs=0.02)
    np.testing.assert_allclose(model["weight"], own_model["weight"], atol=0.05)


def test_a_simulation_on_ray(tmp_path: Path, own_model: Model) -> None:
    pytest.importorskip("ray")
    with Deployment(tmp_path, simulation=True) as deployment:
        (model,) = deployment.run({"num_server_rounds": ROUNDS})
    assert_same_training(model, own_model)
