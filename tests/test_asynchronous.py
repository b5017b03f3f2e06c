"""FedAsync and FedBuff: each update as it arrives, whatever version its client started from."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastagg
from backends import Backend
from data import generator, normal
from fastagg.asynchronous import DroppedContribution, FedAsync, FedBuff, constant, hinge, polynomial
from reference import FLOATS, assert_same_bits

Model = dict[str, np.ndarray]


def model_of(value: float, count: int = 0) -> Model:
    """A model with one weight, a float buffer and a counter."""
    return {
        "weight": np.full(3, value, np.float32),
        "norm.running_var": np.full(2, value, np.float32),
        "norm.num_batches_tracked": np.array(count),
    }


def test_staleness_functions() -> None:
    assert [constant()(t) for t in (0, 5, 100)] == [1, 1, 1]
    assert [hinge(2, 3)(t) for t in (0, 3, 4, 5)] == [1, 1, 1 / 3, 1 / 5]
    assert [polynomial(0.5)(t) for t in (0, 3, 8)] == [1, 1 / 2, 1 / 3]
    for make in (lambda: hinge(-1, 0), lambda: hinge(1, -1), lambda: polynomial(-0.5)):
        with pytest.raises(ValueError, match="expected a number of 0 or more"):
            make()


def test_fedasync_by_hand() -> None:
    server = FedAsync(model_of(0.0), mixing=0.5, staleness=polynomial(1))
    assert server.add(model_of(4.0, count=7), 0) == 1
    assert server.model["weight"].tolist() == [2, 2, 2]
    assert server.add(model_of(6.0, count=5), 0) == 2  # a version behind: 0.25
    assert server.model["weight"].tolist() == [3, 3, 3]
    assert server.model["norm.running_var"].tolist() == [3, 3]
    assert server.model["norm.num_batches_tracked"] == 7
    model, version = server.latest()
    assert (model["weight"].tolist(), version) == ([3, 3, 3], 2)


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS.keys())
def test_fedasync_is_a_weighted_mean(backend: Backend, dtype: np.dtype) -> None:
    random = generator(1)
    x, update = normal(random, 1025, dtype), normal(random, 1025, dtype)
    server = FedAsync(backend.put(x), mixing=0.6, staleness=hinge(10, 4))
    server.add(backend.put(update), 0)
    assert_same_bits(backend.get(server.model), fastagg.fedavg([x, update], [1 - 0.6, 0.6]))


def test_fedasync_with_a_mixing_of_one_takes_the_update() -> None:
    server = FedAsync(np.zeros(3), mixing=1.0)
    server.add(np.array([1.0, 2.0, 3.0]), 0)
    assert server.model.tolist() == [1, 2, 3]


def fedbuff_deltas(divisor: str) -> FedBuff:
    """A server that has applied a fresh delta of 4, and one of 8 that is a version behind."""
    server = FedBuff(np.zeros(2), buffer_size=1, staleness=polynomial(1), divisor=divisor)
    server.add(np.zeros(2), 0)
    server.buffer_size = 2
    server.add(np.full(2, 4.0), 1)
    server.add(np.full(2, 8.0), 0)
    return server


@pytest.mark.parametrize(("divisor", "expected"), [("count", (4 + 8 / 2) / 2), ("weights", (4 + 8 / 2) / 1.5)])
def test_fedbuff_by_hand(divisor: str, expected: float) -> None:
    server = fedbuff_deltas(divisor)
    assert server.version == 2
    np.testing.assert_allclose(server.model, [expected, expected], rtol=1e-15)


def test_fedbuff_counts_each_update_for_itself() -> None:
    # One client of an old version and three of the newest: a quarter each, not a half for each version.
    server = FedBuff(np.zeros(1), buffer_size=1, staleness=constant())
    server.add(np.zeros(1), 0)
    server.buffer_size = 4
    for delta, version in ((8.0, 0), (0.0, 1), (0.0, 1), (0.0, 1)):
        server.add(np.array([delta]), version)
    assert server.model == [2.0]


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS.keys())
def test_fedbuff_adds_the_mean_of_the_deltas(backend: Backend, dtype: np.dtype) -> None:
    random = generator(2)
    x, deltas = normal(random, 333, dtype), [normal(random, 333, dtype) for _ in range(3)]
    server = FedBuff(backend.put(x), buffer_size=3, learning_rate=0.5)
    for delta in deltas:
        server.add(backend.put(delta), 0)
    wide = np.float64 if dtype == np.float64 else np.float32
    mean = fastagg.Accumulator()
    for delta in deltas:
        mean.add(delta)
    expected = x.astype(wide) + 0.5 * mean.result().astype(wide)
    assert_same_bits(backend.get(server.model), expected.astype(dtype))


def test_fedbuff_averages_buffers_as_they_are() -> None:
    server = FedBuff(model_of(0.5, count=3), buffer_size=2, learning_rate=2.0, staleness=constant())
    server.add(model_of(0.25, count=9), 0)
    assert (server.version, server.pending) == (0, 1)
    server.add(model_of(0.75, count=4), 0)
    assert (server.version, server.pending) == (1, 0)
    assert server.model["weight"].tolist() == [0.5 + 2 * 0.5] * 3
    assert server.model["norm.running_var"].tolist() == [0.5, 0.5]
    assert server.model["norm.num_batches_tracked"] == 9


def test_fedbuff_keeps_nothing_of_an_update() -> None:
    server = FedBuff(np.zeros(3), buffer_size=2)
    delta = np.ones(3)
    server.add(delta, 0)
    delta[:] = 99
    server.add(np.ones(3), 0)
    assert server.model.tolist() == [1, 1, 1]


SERVERS: dict[str, Callable[..., Any]] = {
    "FedAsync": FedAsync,
    "FedBuff": lambda model, **options: FedBuff(model, buffer_size=1, **options),
}
by_server = pytest.mark.parametrize("make", SERVERS.values(), ids=SERVERS)


@by_server
def test_versions_that_never_were_are_refused(make: Callable[..., Any]) -> None:
    server = make(np.zeros(2))
    server.add(np.ones(2), 0)
    before = server.model.copy()
    for version in (-1, 2, 10**9):
        with pytest.raises(ValueError, match=f"version: expected 0 to 1, the newest, got {version}"):
            server.add(np.ones(2), version)
    for version in (0.5, "1", None, True):
        with pytest.raises(TypeError, match="version: expected an integer"):
            server.add(np.ones(2), version)
    assert server.version == 1
    assert_same_bits(server.model, before)
    assert server.add(np.ones(2), np.int64(1)) == 2


@by_server
def test_updates_that_are_too_old_are_dropped(make: Callable[..., Any]) -> None:
    server = make(np.zeros(2), max_staleness=1)
    for version in (0, 1):
        server.add(np.ones(2), version)
    before = server.model
    with pytest.warns(fastagg.DroppedUpdateWarning, match="update of version 0 dropped: its staleness is 2") as caught:
        assert server.add(np.ones(2), 0) == 2
    assert caught[0].filename == __file__
    np.testing.assert_array_equal(server.model, before)
    assert server.dropped == [DroppedContribution(0, "its staleness is 2, above max_staleness=1")]
    assert server.add(np.ones(2), 1) == 3


@by_server
@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_an_update_that_is_not_finite(make: Callable[..., Any], number: float) -> None:
    bad = {"a": np.ones(2), "b": np.array([1.0, number])}
    server = make({"a": np.zeros(2), "b": np.zeros(2)})
    with pytest.warns(fastagg.DroppedUpdateWarning, match="update of version 0 dropped: it holds a NaN") as caught:
        assert server.add(bad, 0) == 0
    assert caught[0].filename == __file__
    assert server.dropped == [DroppedContribution(0, "it holds a NaN or an infinity")]
    assert server.model["b"].tolist() == [0, 0]
    strict = make({"a": np.zeros(2), "b": np.zeros(2)}, nan_policy="raise")
    with pytest.raises(ValueError, match=r"update of version 0.*holds a NaN or an infinity"):
        strict.add(bad, 0)
    assert strict.version == 0
    assert strict.add({"a": np.ones(2), "b": np.ones(2)}, 0) == 1
    trusting = make({"a": np.zeros(2), "b": np.zeros(2)}, nan_policy="propagate")
    assert trusting.add(bad, 0) == 1
    assert not np.isfinite(trusting.model["b"][1])


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "a missing leaf": ({"a": np.ones(2)}, ValueError, "missing leaves 'b'"),
    "another name": ({"a": np.ones(2), "c": np.ones(2)}, ValueError, "unexpected leaves 'c'"),
    "another shape": (
        {"a": np.ones(2), "b": np.ones(3)},
        ValueError,
        r"leaf 'b': expected shape \(2,\) like the server's",
    ),
    "another dtype": ({"a": np.ones(2), "b": np.ones(2, "f4")}, TypeError, "leaf 'b': expected dtype float64"),
    "another library": ({"a": np.ones(2), "b": torch.ones(2)}, TypeError, "leaf 'b'"),
    "a sequence": ([np.ones(2), np.ones(2)], TypeError, "expected a mapping like the server's"),
}


@by_server
@pytest.mark.parametrize("what", WRONG)
def test_an_update_that_does_not_fit_changes_nothing(make: Callable[..., Any], what: str) -> None:
    update, error, message = WRONG[what]
    server = make({"a": np.zeros(2), "b": np.zeros(2)}, staleness=constant())
    with pytest.raises(error, match=f"update of version 0.*{message}"):
        server.add(update, 0)
    assert server.version == 0
    assert server.add({"b": np.ones(2), "a": np.full(2, 2.0)}, 0) == 1
    assert server.model["a"][0] == 2 * server.model["b"][0]


def test_a_wrong_first_delta_does_not_lock_the_buffer() -> None:
    server = FedBuff(np.zeros(2), buffer_size=2)
    with pytest.raises(ValueError, match="expected shape"):
        server.add(np.ones(3), 0)
    with pytest.warns(fastagg.DroppedUpdateWarning):
        server.add(np.full(2, np.nan), 0)
    for _ in range(2):
        server.add(np.ones(2), 0)
    assert server.model.tolist() == [1, 1]


@by_server
def test_quantized_updates(make: Callable[..., Any]) -> None:
    x = normal(generator(3), 300, np.dtype(np.float32))
    coded = fastagg.quantize(x, "int8")
    one, other = make(np.zeros(300, np.float32)), make(np.zeros(300, np.float32))
    one.add(coded, 0)
    other.add(fastagg.dequantize(coded), 0)
    assert one.version == 1
    assert_same_bits(one.model, other.model)


def test_fedbuff_takes_quantized_deltas_of_the_models_dtype_alone() -> None:
    # The buffer's mean is of the deltas' dtype, and the model's would be lost in it, or it in the model's.
    coded = fastagg.quantize(np.ones(300, np.float32), "int8")
    with pytest.raises(TypeError, match="update of version 0, the array: expected dtype float64, got float32"):
        FedBuff(np.zeros(300)).add(coded, 0)


@by_server
def test_models_are_never_altered(make: Callable[..., Any]) -> None:
    own = np.zeros(3)
    server = make(own)
    first = server.model
    assert first is not own
    own[:] = 7
    update = np.ones(3)
    server.add(update, 0)
    assert first.tolist() == [0, 0, 0]
    assert update.tolist() == [1, 1, 1]
    assert server.model is not first


@by_server
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_who_trains_what_was_handed_out_changes_nothing_here(make: Callable[..., Any], library: str) -> None:
    server = make({"w": np.zeros(2) if library == "numpy" else torch.zeros(2)})
    for handed_out in (server.latest()[0], server.model, server.state_dict()["model"]):
        handed_out["w"][:] = 5
    assert server.model["w"].tolist() == [0, 0]


@by_server
def test_a_mask_stays(make: Callable[..., Any]) -> None:
    mask = np.float32([-np.inf, 0])
    server = make({"w": np.zeros(2, np.float32), "mask": mask})
    start, version = server.latest()
    with np.errstate(invalid="ignore"):
        trained = {"w": start["w"] + 1, "mask": start["mask"]}
        difference = {name: trained[name] - start[name] for name in start}  # NaN, where the mask is infinite
    server.add(trained if isinstance(server, FedAsync) else difference, version)
    assert (server.version, server.dropped) == (1, [])
    assert_same_bits(server.model["mask"], mask)
    assert (server.model["w"] > 0).all()
    restored = make({"w": np.zeros(2, np.float32), "mask": mask})
    restored.load_state_dict(server.state_dict())
    assert_same_bits(restored.model["mask"], mask)


def test_fedbuffs_buffers_may_be_infinite_where_the_model_is() -> None:
    mask = np.float32([-np.inf, 0])
    server = FedBuff({"mask": mask}, buffer_size=2, buffers=["mask"])
    for _ in range(4):
        server.add({"mask": mask}, server.version)
    assert_same_bits(server.model["mask"], mask)
    with pytest.warns(fastagg.DroppedUpdateWarning):
        server.add({"mask": -mask}, server.version)


def test_torch_models() -> None:
    layer = torch.nn.BatchNorm1d(2)
    server = FedBuff(layer.state_dict(), buffer_size=1)
    delta = {name: torch.ones_like(leaf) for name, leaf in layer.state_dict().items()}
    server.add(delta, 0)
    assert server.model["weight"].tolist() == [2, 2]
    assert server.model["running_mean"].tolist() == [1, 1]
    layer.load_state_dict(server.model)


@pytest.mark.parametrize("make", [FedAsync, lambda model: FedBuff(model, buffer_size=3)], ids=["FedAsync", "FedBuff"])
def test_resumes_bit_for_bit(make: Callable[..., Any]) -> None:
    def update(step: int) -> Model:
        return model_of(float(generator(step).normal()), step)

    server = make(model_of(0.0))
    for step in range(5):
        server.add(update(step), max(0, server.version - 1))
    resumed = make(model_of(9.0))
    resumed.load_state_dict(pickle.loads(pickle.dumps(server.state_dict())))
    for step in range(5, 12):
        version = max(0, server.version - 2)
        assert server.add(update(step), version) == resumed.add(update(step), version)
        for name, leaf in server.model.items():
            assert_same_bits(leaf, resumed.model[name])


def test_a_buffer_is_resumed_with_the_servers_own_policies() -> None:
    trusting = FedBuff(np.zeros(2), buffer_size=2, nan_policy="propagate")
    trusting.add(np.ones(2), 0)
    strict = FedBuff(np.zeros(2), buffer_size=2, nan_policy="raise")
    strict.load_state_dict(trusting.state_dict())
    with pytest.raises(fastagg.NonFiniteUpdateError, match="update of version 0"):
        strict.add(np.full(2, np.nan), 0)
    assert strict.pending == 1
    strict.add(np.full(2, 3.0), 0)
    assert strict.model.tolist() == [2, 2]


def test_an_empty_buffer_is_resumed_with_the_servers_own_policies() -> None:
    server = FedBuff(np.zeros(1, int), buffer_size=2, integer_policy="round")
    server.load_state_dict(FedBuff(np.zeros(1, int)).state_dict())
    for value in (2, 4):
        server.add(np.array([value]), 0)
    assert server.model.tolist() == [3]


def test_a_buffer_of_leaves_in_another_order_is_resumed() -> None:
    server = FedBuff({"a": np.zeros(1), "b": np.zeros(2)}, buffer_size=2)
    server.add({"b": np.ones(2), "a": np.ones(1)}, 0)
    server.load_state_dict(server.state_dict())
    assert server.pending == 1


def without(state: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name != key}


def buffer_of(update: Any, **options: Any) -> dict[str, Any]:
    accumulator = fastagg.Accumulator(**options)
    accumulator.add(update)
    return accumulator.state_dict()


def test_wrong_states_change_nothing() -> None:
    server = FedBuff(model_of(1.0), buffer_size=2)
    server.add(model_of(2.0), 0)
    other = {**model_of(2.0), "weight": np.zeros(4, np.float32)}
    for state, message in (
        (without(server.state_dict(), "buffer"), "expected a buffer"),
        ({**server.state_dict(), "buffer": buffer_of(other)}, "of another model"),
        ({**server.state_dict(), "buffer": buffer_of(np.zeros(3, np.float32))}, "of another model"),
        ({**server.state_dict(), "buffer": buffer_of(model_of(2.0), integer_policy="round")}, "another policy"),
        ({**server.state_dict(), "version": -3}, "version: expected 0 or more, got -3"),
        ({**server.state_dict(), "version": 0.5}, "version: expected an integer, got 0.5"),
        ({}, "expected what FedBuff"),
        (FedAsync(model_of(0.0)).state_dict(), "expected what FedBuff"),
        (FedBuff({"weight": np.zeros(3, np.float32)}).state_dict(), "of another model"),
        ({**server.state_dict(), "buffer": {}}, "Accumulator"),
    ):
        with pytest.raises(ValueError, match=message):
            server.load_state_dict(state)
    assert (server.version, server.pending) == (0, 1)
    assert server.model["weight"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("nan_policy", ["drop", "raise"])
def test_a_step_out_of_range_leaves_the_model_and_empties_the_buffer(nan_policy: str) -> None:
    large = {"a": np.zeros(1, np.float16), "b": np.full(2, 60000, np.float16)}
    server = FedBuff(large, buffer_size=2, nan_policy=nan_policy)
    server.add(large, 0)
    with pytest.raises(fastagg.NonFiniteUpdateError, match="leaf 'b': the step from version 0 leads to a NaN"):
        server.add(large, 0)
    assert (server.version, server.pending) == (0, 0)
    assert server.model["b"].tolist() == [60000, 60000]
    for _ in range(2):
        server.add({"a": large["a"], "b": np.full(2, -10000, np.float16)}, 0)
    assert server.model["b"].tolist() == [49984, 49984]


@by_server
def test_a_model_that_is_not_finite_is_resumed_under_propagate_alone(make: Callable[..., Any]) -> None:
    trusting = make(np.zeros(2), nan_policy="propagate")
    trusting.add(np.full(2, np.nan), 0)
    strict = make(np.zeros(2))
    with pytest.raises(ValueError, match=r"state: .*the model, the array: it holds a NaN"):
        strict.load_state_dict(trusting.state_dict())
    assert strict.version == 0
    trusting.load_state_dict(trusting.state_dict())
    assert trusting.version == 1


def test_a_step_out_of_range_propagates() -> None:
    server = FedBuff(np.full(1, 60000, np.float16), buffer_size=1, nan_policy="propagate")
    assert server.add(np.full(1, 60000, np.float16), 0) == 1
    assert np.isinf(server.model).all()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: FedAsync(np.zeros(1), mixing=0.0), ValueError, "mixing"),
        (lambda: FedAsync(np.zeros(1), mixing=1.5), ValueError, "mixing"),
        (lambda: FedAsync(np.zeros(1), staleness=0.5), TypeError, "staleness: expected a function"),
        (lambda: FedAsync(np.zeros(1), max_staleness=-1), ValueError, "max_staleness"),
        (lambda: FedAsync(np.zeros(1), nan_policy="ignore"), ValueError, "nan_policy"),
        (lambda: FedAsync(np.array([np.nan])), ValueError, "holds a NaN"),
        (lambda: FedBuff(np.zeros(1), buffer_size=0), ValueError, "buffer_size"),
        (lambda: FedBuff(np.zeros(1), divisor="sum"), ValueError, "divisor: expected one of count, weights"),
        (lambda: FedBuff(np.zeros(1), learning_rate=-1.0), ValueError, "learning_rate"),
        (lambda: FedBuff(np.zeros(1), integer_policy="mean"), ValueError, "integer_policy"),
        (lambda: FedBuff(np.zeros(1), buffers="weight"), TypeError, "buffers"),
        (lambda: FedBuff(model_of(0.0), buffers=["wieght"]), ValueError, "buffers: the model has no leaf 'wieght'"),
    ],
)
def test_wrong_arguments_are_refused(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@by_server
@pytest.mark.parametrize("weight", [0.0, -1.0, 2.0, np.nan])
def test_staleness_weights_out_of_range_are_refused(make: Callable[..., Any], weight: float) -> None:
    server = make(np.zeros(1), staleness=lambda staleness: weight)
    with pytest.raises(ValueError, match="the weight of staleness 0"):
        server.add(np.ones(1), 0)
    assert server.version == 0


@by_server
def test_threads_lose_no_update(make: Callable[..., Any]) -> None:
    server = make(np.zeros(1000), staleness=constant())
    seen: list[bool] = []

    def client() -> None:
        for _ in range(50):
            model, version = server.latest()
            seen.append(bool((model == model[0]).all()))  # no half of a newer model
            server.add(np.full(1000, version + 1.0), version)

    clients = [threading.Thread(target=client) for _ in range(4)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    assert server.version == 200
    assert all(seen)


def test_the_example_shows_what_stragglers_cost() -> None:
    pytest.importorskip("sklearn")
    example = Path(__file__).resolve().parent.parent / "examples" / "async_stragglers.py"
    done = subprocess.run(
        [sys.executable, str(example), "--seconds", "40"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    rows = done.stdout.splitlines()[1:4]
    assert [row.split(",")[0].split()[0] for row in rows] == ["FedAvg", "FedAsync", "FedBuff"]
    last = [float(row.split()[-1].removesuffix("%")) for row in rows]
    assert last[0] + 10 < min(last[1:])


def test_a_server_tells_its_version() -> None:
    mixing, buffered = FedAsync(np.zeros(3)), FedBuff(np.zeros(3), buffer_size=5)
    for server in (mixing, buffered):
        for _ in range(9):
            server.add(np.ones(3), 0)
    assert repr(mixing) == "FedAsync(version=9)"
    assert repr(buffered) == "FedBuff(version=1, pending=4)"
