"""`Statistics`: what comes out of the same pass as the mean, against NumPy in float64."""

from __future__ import annotations

import json
import pickle
from typing import Any

import numpy as np
import pytest

import fastagg
from backends import Backend, on_scalar, threads
from data import at_offset, counts, generator, normal
from fastagg.statistics import QUANTITIES
from reference import FLOATS, assert_same_bits

by_dtype = pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS.keys())
SIZES = [1, 2, 3, 15, 16, 17, 257, 1024, 2047, 2048, 2049, 65535, 65537]
LARGEST_ERROR = 1e-6


def expected(x: np.ndarray, mean: np.ndarray) -> dict[str, float]:
    """One client's numbers, in float64, from the finite values."""
    x, mean = np.asarray(x, np.float64).reshape(-1), np.asarray(mean, np.float64).reshape(-1)
    finite, both = np.isfinite(x), np.isfinite(x) & np.isfinite(mean)
    values, mean_norm = x[finite], float(np.linalg.norm(mean[np.isfinite(mean)]))
    norm = float(np.linalg.norm(values))
    return {
        "norm": norm,
        "mean": values.mean(),
        "standard_deviation": values.std(),
        "minimum": values.min(),
        "maximum": values.max(),
        "nonfinite": int((~finite).sum()),
        "cosine": x[both] @ mean[both] / (norm * mean_norm) if norm * mean_norm else 0.0,
        "distance": float(np.linalg.norm(x[both] - mean[both])),
        "mean_norm": mean_norm,
    }


def assert_statistics(statistics: fastagg.Statistics, columns: list[np.ndarray], mean: Any, leaf: int = 0) -> None:
    """Every client's numbers; a mean that is small beside the deviation is measured by the deviation."""
    for client, x in enumerate(columns):
        for name, value in expected(x, mean).items():
            found = getattr(statistics, name)[client, leaf]
            scale = abs(value)
            if name == "cosine":
                scale = 1.0
            elif name == "mean":
                scale += float(np.abs(np.asarray(x, np.float64)[np.isfinite(np.asarray(x, np.float64))]).mean())
            assert abs(found - value) <= LARGEST_ERROR * scale, f"client {client}, {name}: {found}, expected {value}"


def assert_same(one: fastagg.Statistics, other: fastagg.Statistics) -> None:
    """Every number has the same bits."""
    assert (one.clients, one.leaves) == (other.clients, other.leaves)
    for name in ("elements", "weights", *QUANTITIES):
        assert_same_bits(getattr(one, name), getattr(other, name))


@by_dtype
def test_agrees_with_numpy_at_every_size(cpu: Backend, dtype: np.dtype) -> None:
    random = generator(1)
    for size in SIZES:
        columns, weights = [normal(random, size, dtype) for _ in range(3)], counts(random, 3)
        mean, statistics = fastagg.fedavg(columns, weights, stats=True)
        assert_statistics(statistics, columns, mean)
        assert statistics.elements.tolist() == [size]
        assert statistics.weights.tolist() == weights


@by_dtype
def test_same_bits_on_every_instruction_set_and_any_number_of_threads(cpu: Backend, dtype: np.dtype) -> None:
    random = generator(2)
    for size in (7, 2049, 3 * 65536 + 4097):
        columns = [at_offset(normal(random, size, dtype), client) for client in range(4)]
        columns[1][size // 2] = np.nan
        weights = counts(random, 4)

        def run(columns: list[np.ndarray] = columns, weights: list[float] = weights) -> Any:
            return fastagg.fedavg(columns, weights, nan_policy="propagate", stats=True)

        mean, statistics = on_scalar(run)
        for count in (1, 3):
            with threads(count):
                again, own = run()
            assert_same_bits(again, mean)
            assert_same(own, statistics)


@by_dtype
def test_the_mean_has_the_bits_of_the_plain_mean(cpu: Backend, dtype: np.dtype) -> None:
    # Large enough to be stored around the cache, and at an odd address.
    random = generator(3)
    columns, weights = [normal(random, 1_200_011, dtype) for _ in range(3)], counts(random, 3)
    outs = [at_offset(np.zeros(1_200_011, dtype), 3) for _ in range(2)]
    fastagg.fedavg(columns, weights, out=outs[0])
    result, _ = fastagg.fedavg(columns, weights, out=outs[1], stats=True)
    assert result is outs[1]
    assert_same_bits(outs[0], outs[1])


@pytest.mark.parametrize("wire", ["bf16", "fp16", "fp8_e4m3", "fp8_e5m2", "int8", "int4", "sign"])
def test_quantized_leaves_count_as_what_they_decode_to(cpu: Backend, wire: str) -> None:
    random = generator(4)
    for size in (33, 2 * 65536 + 77):
        sent = [fastagg.quantize(normal(random, size, np.dtype(np.float32)), wire) for _ in range(3)]
        mean, statistics = fastagg.fedavg(sent, [1, 2, 3], stats=True)
        assert_statistics(statistics, [fastagg.dequantize(one) for one in sent], mean)


@pytest.mark.parametrize(("mean", "deviation"), [(1e3, 1e-3), (-1e3, 1e-1), (5e4, 1.0), (1.0, 1e-4)])
def test_a_large_mean_does_not_swallow_the_deviation(cpu: Backend, mean: float, deviation: float) -> None:
    random = generator(5)
    columns = [(mean + deviation * random.normal(size=100_003)).astype(np.float32) for _ in range(3)]
    result, statistics = fastagg.fedavg(columns, stats=True)
    assert_statistics(statistics, columns, result)


@pytest.mark.parametrize("scale", [1e30, 1e18, 1e-18, 1e-25, 1e-38, 1e-42])
def test_values_whose_squares_leave_float32(cpu: Backend, scale: float) -> None:
    columns = [(scale * generator(6 + client).normal(size=5000)).astype(np.float32) for client in range(3)]
    result, statistics = fastagg.fedavg(columns, stats=True)
    assert_statistics(statistics, columns, result)


def test_clients_of_very_different_sizes(cpu: Backend) -> None:
    columns = [(10.0**power * generator(7).normal(size=70_000)).astype(np.float32) for power in (-18, -6, 0, 3)]
    result, statistics = fastagg.fedavg(columns, [1e6, 1e6, 1.0, 1e-6], stats=True)
    assert_statistics(statistics, columns, result)


def test_an_outlier_comes_first(cpu: Backend) -> None:
    columns = [generator(8).normal(size=9000).astype(np.float32) for _ in range(3)]
    columns[0][0], columns[1][2048] = 1e6, -1e12
    result, statistics = fastagg.fedavg(columns, stats=True)
    assert_statistics(statistics, columns, result)


def test_cosines_of_a_mean_that_nearly_vanishes(cpu: Backend) -> None:
    random = generator(9)
    x = random.normal(size=300_000).astype(np.float32)
    for rest in (1e-1, 1e-3, 1e-5):
        columns = [x, (rest * random.normal(size=x.size) - x).astype(np.float32)]
        result, statistics = fastagg.fedavg(columns, stats=True)
        assert_statistics(statistics, columns, result)


def test_leaves_of_a_few_elements_whose_clients_nearly_cancel(cpu: Backend) -> None:
    random = generator(12)
    for size in (*range(1, 20), 33):
        for rest in (0.3, 0.02, 0.01):
            x = normal(random, size, np.dtype(np.float32))
            columns = [x, np.asarray((rest - 1) * x, np.float32)]
            result, statistics = fastagg.fedavg(columns, stats=True)
            assert_statistics(statistics, columns, result)


def test_identical_clients_and_constant_leaves(cpu: Backend) -> None:
    for x in (normal(generator(10), 70_001, np.dtype(np.float32)), np.full(5000, 1 / 3, np.float32), np.zeros(99)):
        mean, statistics = fastagg.fedavg([x, x, x], stats=True)
        assert_statistics(statistics, [x] * 3, mean)
        assert_same_bits(mean, x)
        assert not statistics.distance.any()
    assert not statistics.cosine.any()  # of the zeros
    _, statistics = fastagg.fedavg([np.full(5000, 1 / 3, np.float32)] * 2, stats=True)
    assert not statistics.standard_deviation.any()


def test_nearly_identical_clients(cpu: Backend) -> None:
    x = normal(generator(11), 10_000, np.dtype(np.float32))
    columns = [x, np.nextafter(x, np.float32(np.inf)), x.copy()]
    columns[2][5] += np.float32(1e-30)
    for dtype in (None, np.float64):
        mean, statistics = fastagg.fedavg(columns, dtype=dtype, stats=True)
        assert_statistics(statistics, columns, mean)


def damaged() -> tuple[list[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """Three clients, of which the second holds NaN and infinities."""
    random = generator(12)
    updates = [{"a": random.normal(size=5000).astype(np.float32), "b": random.normal(size=(3, 7))} for _ in range(3)]
    bad = updates[1]
    bad["a"][[0, 17, 4999]] = np.nan, np.inf, -np.inf
    bad["b"][:] = np.nan
    return updates, bad


def test_raise_raises_as_without_statistics(cpu: Backend) -> None:
    updates, _ = damaged()
    with pytest.raises(fastagg.NonFiniteUpdateError, match="client 1, leaf 'a'"):
        fastagg.fedavg(updates, stats=True)


def test_drop_measures_the_dropped_client_against_the_mean_of_the_others(cpu: Backend) -> None:
    updates, _ = damaged()
    with pytest.warns(fastagg.DroppedUpdateWarning, match="client 1"):
        mean, statistics = fastagg.fedavg(updates, nan_policy="drop", stats=True)
    kept = fastagg.fedavg([updates[0], updates[2]])
    for index, name in enumerate(("a", "b")):
        assert_same_bits(mean[name], kept[name])
        others = [updates[client][name] for client in (0, 1, 2)]
        if name == "a":
            assert_statistics(statistics, others, mean[name], index)
    assert statistics.nonfinite.tolist() == [[0, 0], [3, 21], [0, 0]]
    assert statistics.norm[1, 1] == statistics.distance[1, 1] == statistics.cosine[1, 1] == 0
    for name in ("mean", "standard_deviation", "minimum", "maximum"):
        assert np.isnan(getattr(statistics, name)[1, 1])


def test_propagate_leaves_out_where_the_mean_is_not_finite(cpu: Backend) -> None:
    updates, _ = damaged()
    mean, statistics = fastagg.fedavg(updates, nan_policy="propagate", stats=True)
    assert np.isnan(mean["a"][0])
    assert_statistics(statistics, [update["a"] for update in updates], mean["a"])
    assert np.isfinite(statistics.distance).all()


def test_clients_of_weight_zero_are_measured(cpu: Backend) -> None:
    columns = [normal(generator(client), 3000, np.dtype(np.float32)) for client in range(3)]
    columns[1][7] = np.inf
    mean, statistics = fastagg.fedavg(columns, [1, 0, 2], stats=True)
    assert_same_bits(mean, fastagg.fedavg([columns[0], columns[2]], [1, 2]))
    assert_statistics(statistics, columns, mean)
    assert statistics.nonfinite.tolist() == [[0], [1], [0]]


def test_only_floating_leaves_have_statistics(cpu: Backend) -> None:
    updates = [
        {"steps": np.array(client), "w": np.array([client + 1.0, 2]), "e": np.empty((0, 3))} for client in (0, 1)
    ]
    mean, statistics = fastagg.fedavg(updates, stats=True)
    assert mean["steps"] == 1
    assert statistics.leaves == ("w", "e")
    assert statistics.elements.tolist() == [2, 0]
    assert np.isnan(statistics.mean[0, 1])
    assert statistics.norm[:, 1].tolist() == [0, 0]
    assert_statistics(statistics, [update["w"] for update in updates], mean["w"])
    _, none = fastagg.fedavg([np.array([1, 2]), np.array([3, 4])], stats=True)
    assert none.norm.shape == (2, 0)
    assert none.whole().norm.tolist() == [[0], [0]]
    _, sequence = fastagg.fedavg([[np.ones(2), np.ones(3)]], stats=True)
    assert sequence.leaves == (0, 1)
    assert fastagg.fedavg([np.ones(2)], stats=True)[1].leaves == ("array",)


def test_torch_tensors(cpu: Backend) -> None:
    torch = pytest.importorskip("torch")
    columns = [normal(generator(client), 3000, np.dtype(np.float32)) for client in range(3)]
    mean, statistics = fastagg.fedavg([torch.from_numpy(column) for column in columns], stats=True)
    assert_statistics(statistics, columns, mean.numpy())


def test_whole_is_the_statistics_of_the_leaves_in_one(cpu: Backend) -> None:
    updates, bad = damaged()
    bad["a"][:] = np.nan_to_num(bad["a"])
    bad["b"][0, 0] = 2.0
    mean, statistics = fastagg.fedavg(updates, nan_policy="propagate", stats=True)
    whole = statistics.whole()
    assert (whole.leaves, whole.elements.tolist()) == (("all",), [5021])
    flat = [np.concatenate([leaf.reshape(-1) for leaf in update.values()], dtype=np.float64) for update in updates]
    assert_statistics(whole, flat, np.concatenate([leaf.reshape(-1) for leaf in mean.values()], dtype=np.float64))
    again = whole.whole()
    for name in QUANTITIES:
        np.testing.assert_allclose(getattr(again, name), getattr(whole, name), rtol=1e-15)


def some_statistics() -> fastagg.Statistics:
    """A table with NaN in it."""
    updates, _ = damaged()
    _, statistics = fastagg.fedavg(updates, [3, 1, 2], nan_policy="propagate", stats=True)
    return statistics


def test_other_labels(cpu: Backend) -> None:
    statistics = some_statistics()
    named = statistics.with_clients(["x", "y", "z"])
    assert named.clients == ("x", "y", "z")
    assert_same(named.with_clients(range(3)), statistics)
    with pytest.raises(ValueError, match="expected 3, one for each client, got 2"):
        statistics.with_clients("ab")


def test_through_json_and_pickle(cpu: Backend) -> None:
    statistics = some_statistics()
    text = json.dumps(statistics.as_dict(), allow_nan=False)
    assert_same(fastagg.Statistics.from_dict(json.loads(text)), statistics)
    assert_same(pickle.loads(pickle.dumps(statistics)), statistics)
    one = fastagg.fedavg([np.array([1e200, 1.0])], stats=True)[1]
    assert np.isinf(one.norm[0, 0])  # squares of float64 overflow
    assert_same(fastagg.Statistics.from_dict(json.loads(json.dumps(one.as_dict(), allow_nan=False))), one)


@pytest.mark.parametrize("damage", ["missing", "shape", "text", "empty"])
def test_a_damaged_dictionary_is_refused(damage: str) -> None:
    plain = some_statistics().as_dict()
    if damage == "missing":
        del plain["cosine"]
    elif damage == "shape":
        plain["norm"] = plain["norm"][:2]
    elif damage == "text":
        plain["norm"][0][0] = "large"
    else:
        plain = {}
    with pytest.raises(ValueError, match=r"expected what Statistics\.as_dict\(\) returned"):
        fastagg.Statistics.from_dict(plain)


def test_a_table_needs_every_column() -> None:
    with pytest.raises(TypeError, match="missing or unknown: cosine"):
        fastagg.Statistics([0], ["a"], [1], [1.0], **{name: [[0]] for name in QUANTITIES if name != "cosine"})


def test_to_pandas() -> None:
    statistics = some_statistics()
    try:
        import pandas  # noqa: F401
    except ImportError:
        with pytest.raises(ModuleNotFoundError, match="pip install pandas"):
            statistics.to_pandas()
        return
    table = statistics.with_clients(["x", "y", "z"]).to_pandas()
    assert list(table.columns) == ["client", "leaf", "weight", "elements", *QUANTITIES]
    assert len(table) == 6
    row = table[(table.client == "z") & (table.leaf == "b")].iloc[0]
    assert (row.weight, row.elements, row.norm) == (2, 21, statistics.norm[2, 1])


class Writer:
    """What `to_tensorboard` needs of a SummaryWriter."""

    def __init__(self) -> None:
        self.scalars: dict[str, tuple[float, int]] = {}
        self.histograms: dict[str, np.ndarray] = {}

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars[tag] = (value, step)

    def add_histogram(self, tag: str, values: np.ndarray, step: int) -> None:
        assert values.size
        self.histograms[tag] = values


def test_to_tensorboard() -> None:
    statistics, writer = some_statistics(), Writer()
    statistics.with_clients(["x", "y", "z"]).to_tensorboard(writer, 5)
    assert writer.scalars["norm/client y"] == (statistics.whole().norm[1, 0], 5)
    assert len(writer.scalars) == 3 * len(QUANTITIES)
    np.testing.assert_array_equal(writer.histograms["distance/leaf a"], statistics.distance[:, 0])
    assert writer.histograms["mean/leaf b"].size == 2  # without the NaN


def test_to_a_real_tensorboard(tmp_path: Any) -> None:
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as writer:
        some_statistics().to_tensorboard(writer, 1)
    assert any(path.stat().st_size > 1000 for path in tmp_path.iterdir())


def accumulated(columns: list[Any], weights: list[float], **options: Any) -> fastagg.Accumulator:
    """An accumulator with statistics."""
    accumulator = fastagg.Accumulator(stats=True, **options)
    for column, weight in zip(columns, weights, strict=True):
        accumulator.add(column, weight)
    return accumulator


@by_dtype
@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("low_memory", [False, True])
def test_an_accumulator_compares_with_the_mean_so_far(
    cpu: Backend, dtype: np.dtype, batch: int, low_memory: bool
) -> None:
    random = generator(20)
    columns, weights = [normal(random, 70_003, dtype) for _ in range(5)], counts(random, 5)
    accumulator = accumulated(columns, weights, batch=batch, low_memory=low_memory)
    statistics = accumulator.statistics
    wide = [column.astype(np.float64) for column in columns]
    assert statistics.clients == tuple(range(5))
    assert statistics.weights.tolist() == weights
    for client in range(5):
        folded = min((client // batch + 1) * batch, 5)
        mean = np.average(wide[:folded], axis=0, weights=weights[:folded])
        alone = {name: getattr(statistics, name)[client, 0] for name in QUANTITIES}
        for name, value in expected(wide[client], mean).items():
            scale = 1.0 if name in ("cosine", "mean") else abs(value)
            if name == "distance":  # the sums are rounded
                scale += value + alone["norm"] / 10
            assert abs(alone[name] - value) <= LARGEST_ERROR * scale, f"client {client}, {name}"
    plain = fastagg.Accumulator(batch=batch, low_memory=low_memory)
    for column, weight in zip(columns, weights, strict=True):
        plain.add(column, weight)
    assert_same_bits(accumulator.result(), plain.result())


def test_an_accumulator_measures_what_contributed(cpu: Backend) -> None:
    columns = [normal(generator(client), 3000, np.dtype(np.float32)) for client in range(4)]
    columns[1][5] = np.nan
    accumulator = fastagg.Accumulator(stats=True, nan_policy="drop", batch=2)
    accumulator.add(columns[0])
    with pytest.warns(fastagg.DroppedUpdateWarning, match="client 1"):
        accumulator.add(columns[1])
    accumulator.add(columns[2], 0)
    accumulator.add(columns[3])
    statistics = accumulator.statistics
    assert statistics.clients == (0, 3)
    assert_statistics(statistics, [columns[0], columns[3]][:1], columns[0])
    assert not statistics.nonfinite.any()


def test_a_refused_update_leaves_the_statistics_alone(cpu: Backend) -> None:
    accumulator = accumulated([np.ones(9, np.float32)], [1.0])
    with pytest.raises(fastagg.NonFiniteUpdateError):
        accumulator.add(np.full(9, np.nan, np.float32))
    assert accumulator.statistics.clients == (0,)
    accumulator.add(np.ones(9, np.float32))
    assert accumulator.statistics.clients == (0, 2)


def test_merging_and_saving_keep_statistics(cpu: Backend) -> None:
    columns = [normal(generator(client), 500, np.dtype(np.float32)) for client in range(5)]
    updates = [{"n": np.array(client), "w": column} for client, column in enumerate(columns)]
    one, other = accumulated(updates[:2], [1, 2]), accumulated(updates[2:], [3, 4, 5], batch=3)
    before = other.statistics
    one.merge(other)
    assert one.statistics.clients == (0, 1, 2, 3, 4)
    assert_same_bits(one.statistics.distance[2:], before.distance)
    assert one.statistics.leaves == ("w",)
    loaded = fastagg.Accumulator()
    loaded.load_state_dict(one.state_dict())
    assert_same(loaded.statistics, one.statistics)
    assert_same(pickle.loads(pickle.dumps(one)).statistics, one.statistics)
    one.merge(one)
    assert one.statistics.clients == tuple(range(10))
    one.reset()
    assert one.stats
    with pytest.raises(ValueError, match="nothing was added"):
        _ = one.statistics


def test_states_without_statistics_load(cpu: Backend) -> None:
    state = accumulated([np.ones(3)], [1.0]).state_dict()
    del state["statistics"]  # as older versions saved it
    loaded = fastagg.Accumulator(stats=True)
    loaded.load_state_dict(state)
    assert not loaded.stats


def test_damaged_statistics_in_a_state_are_refused() -> None:
    state = accumulated([np.ones(3)], [1.0]).state_dict()
    for statistics in ([], [(0, 1.0, np.zeros((2, 9)))], [(0, 1.0)]):
        with pytest.raises(ValueError, match="damaged"):
            fastagg.Accumulator().load_state_dict({**state, "statistics": statistics})


def test_an_accumulator_without_statistics(cpu: Backend) -> None:
    plain = fastagg.Accumulator()
    plain.add(np.ones(3))
    with pytest.raises(ValueError, match="stats=True"):
        _ = plain.statistics
    measured = accumulated([np.ones(3)], [1.0])
    with pytest.raises(ValueError, match="stats=True"):
        measured.merge(plain)
    assert measured.count == 1
    plain.merge(measured)
    assert plain.count == 2


def test_integer_updates_in_an_accumulator(cpu: Backend) -> None:
    accumulator = accumulated([np.array([1, 2]), np.array([3, 4])], [1.0, 1.0])
    assert accumulator.statistics.norm.shape == (2, 0)


def test_arrays_on_a_cuda_device_are_refused_before_anything_is_done() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available() or fastagg.build_info()["cuda"] is None:
        pytest.skip("no CUDA device, or a build without CUDA")
    out = torch.zeros(3, device="cuda")
    with pytest.raises(ValueError, match="expected updates on the CPU, got device cuda:0"):
        fastagg.fedavg([torch.ones(3, device="cuda")], out=out, stats=True)
    assert not out.any()
    with pytest.raises(ValueError, match="expected updates on the CPU"):
        fastagg.Accumulator(stats=True).add(torch.ones(3, device="cuda"))


def test_wrong_arguments_raise_as_without_statistics(cpu: Backend) -> None:
    with pytest.raises(ValueError, match="expected shape"):
        fastagg.fedavg([np.ones(3), np.ones(4)], stats=True)
    with pytest.raises(ValueError, match="all are zero"):
        fastagg.fedavg([np.ones(3)], [0], stats=True)
