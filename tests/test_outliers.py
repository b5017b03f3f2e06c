"""The Outlier Explorer: planted outliers are found and explained, honest clients are left alone."""

from __future__ import annotations

import ast
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fastagg
from data import generator
from fastagg.outliers import Explorer, Findings, Sketch, pairwise_cosines, sketch
from fastagg.report import Run
from fastagg.statistics import Statistics

METHODS = ("zscore", "kmeans", "local_outlier_factor", "isolation_forest")
SIZES = {"fc1.weight": 2000, "fc1.bias": 50, "fc2.weight": 500, "fc2.bias": 10}
Update = dict[str, np.ndarray]

by_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(autouse=True)
def _needs_sklearn(request: pytest.FixtureRequest) -> None:
    if getattr(request.node, "callspec", None) and request.node.callspec.params.get("method", "zscore") != "zscore":
        pytest.importorskip("sklearn")


def honest(random: np.random.Generator, clients: int, *, alike: float = 0.4, spread: float = 0.3) -> list[Update]:
    """Updates as clients with unlike data send them.

    Pairs of clients have a cosine of about `alike`, norms are log-normal: with a spread of 0.3, nine of ten lie within
    a factor of 2.7 of each other.
    """
    common = {name: random.normal(size=size) for name, size in SIZES.items()}
    updates = []
    for _ in range(clients):
        own = np.clip(alike * np.exp(0.3 * random.normal()), 0, 0.95)
        norm = np.exp(spread * random.normal())
        updates.append(
            {
                name: norm
                * np.exp(0.15 * random.normal())
                * (math.sqrt(own) * shared + math.sqrt(1 - own) * random.normal(size=shared.size))
                for name, shared in common.items()
            }
        )
    return updates


def flipped(update: Update, random: np.random.Generator) -> Update:
    return {name: -values for name, values in update.items()}


def scaled(update: Update, random: np.random.Generator) -> Update:
    return {name: 10 * values for name, values in update.items()}


def noisy(update: Update, random: np.random.Generator) -> Update:
    return {name: values + 10 * values.std() * random.normal(size=values.size) for name, values in update.items()}


def idle(update: Update, random: np.random.Generator) -> Update:
    return {name: 1e-3 * values for name, values in update.items()}


ATTACKS = {"flipped": flipped, "scaled": scaled, "noisy": noisy, "idle": idle}


def statistics_of(updates: list[Any], weights: Any = None) -> Statistics:
    return fastagg.fedavg(updates, weights, stats=True, nan_policy="propagate")[1]


SOURCES = {"statistics": statistics_of, "sketch": sketch}
by_source = pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES.keys())


# Honest clients


@by_source
@by_method
def test_honest_clients_are_left_alone(method: str, source: Any) -> None:
    flagged = clients = worst = 0
    for seed, (count, alike) in enumerate(((10, 0.4), (20, 0.1), (40, 0.3))):
        found = Explorer(method=method).explore(source(honest(generator(seed), count, alike=alike)))
        flagged, clients = flagged + len(found.outliers), clients + count
        worst = max(worst, len(found.outliers) / count)
    assert flagged <= 0.04 * clients
    assert worst <= 0.1


@by_source
def test_norms_that_differ_twofold_are_no_outliers(source: Any) -> None:
    """Most clients have norms much alike, one has one 2.2 times as large, one as small."""
    updates = honest(generator(5), 20, alike=0.9, spread=0.01)
    for client, factor in ((0, 2.2), (1, 1 / 2.2)):
        updates[client] = {name: factor * values for name, values in updates[client].items()}
    assert not Explorer().explore(source(updates)).outliers


@by_source
def test_many_leaves_do_not_make_outliers(source: Any) -> None:
    random = generator(6)
    updates = [{f"layer {index}": random.normal(size=200) for index in range(150)} for _ in range(20)]
    shared = {name: random.normal(size=200) for name in updates[0]}
    updates = [{name: values + shared[name] for name, values in update.items()} for update in updates]
    assert len(Explorer().explore(source(updates)).outliers) <= 1


# Planted outliers


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
@by_source
@by_method
def test_one_of_twenty_is_found(method: str, source: Any, attack: Any) -> None:
    random = generator(7)
    updates = honest(random, 20, alike=0.6)
    updates[4] = attack(updates[4], random)
    assert set(Explorer(method=method).explore(source(updates)).outliers) == {4}


@pytest.mark.parametrize("attack", [flipped, scaled, noisy])
@by_source
@pytest.mark.parametrize("method", ["zscore", "kmeans", "local_outlier_factor"])
def test_four_of_twenty_are_found(method: str, source: Any, attack: Any) -> None:
    random = generator(8)
    updates = honest(random, 20, spread=0.2)
    for client in (0, 5, 10, 15):
        updates[client] = attack(updates[client], random)
    assert set(Explorer(method=method).explore(source(updates)).outliers) == {0, 5, 10, 15}


def test_a_sketch_sees_directions_that_a_large_client_hides_from_the_mean() -> None:
    random = generator(9)
    updates = honest(random, 20)
    updates[2] = flipped(updates[2], random)
    updates[3] = {name: 1e3 * random.normal(size=values.size) for name, values in updates[3].items()}
    assert set(Explorer().explore(sketch(updates)).outliers) == {2, 3}
    assert set(Explorer().explore(statistics_of(updates)).outliers) == {3}


def test_whole_models_are_compared_by_their_difference_from_a_reference() -> None:
    random = generator(10)
    model = {name: 100 * random.normal(size=size) for name, size in SIZES.items()}
    updates = honest(random, 12)
    updates[1] = flipped(updates[1], random)
    models = [{name: model[name] + values for name, values in update.items()} for update in updates]
    assert set(Explorer().explore(sketch(models, reference=model)).outliers) == {1}
    assert not Explorer().explore(sketch(models)).outliers


@by_source
@by_method
def test_a_client_with_nan_is_always_one(method: str, source: Any) -> None:
    updates = honest(generator(11), 12)
    updates[3]["fc1.weight"][[0, 7, 1999]] = [math.nan, math.inf, -math.inf]
    found = Explorer(method=method, threshold=1e6).explore(source(updates))
    assert found.outliers == {3: ("3 non-finite values in layer fc1.weight",)}
    assert math.isinf(found.scores[3])
    assert math.isinf(found.leaf_scores[3, 0])
    assert np.isfinite(np.delete(found.scores, 3)).all()


# Reasons


def reasons(updates: list[Any], client: int, **options: Any) -> tuple[str, ...]:
    return Explorer(**options).explore(statistics_of(updates)).outliers[client]


def test_reasons_name_the_norm_of_a_layer() -> None:
    updates = honest(generator(12), 20, spread=0)
    norms = [float(np.linalg.norm(update["fc1.weight"])) for update in updates]
    updates[6]["fc1.weight"] *= 9.3 * np.median(norms) / norms[6]
    assert "norm of layer fc1.weight is 9.3 times the median" in reasons(updates, 6)


def test_reasons_name_the_direction() -> None:
    updates = honest(generator(13), 20, alike=0.8)
    updates[6] = flipped(updates[6], generator())
    statistics = statistics_of(updates)
    whole = statistics.whole().cosine[:, 0]
    first = Explorer().explore(statistics).outliers[6][0]
    assert first == f"points away from the centre: cosine {whole[6]:.2f}, median {np.median(whole):.2f}"
    assert whole[6] < -0.5


def test_reasons_of_a_layer_that_nobody_else_moved() -> None:
    updates = [{"a": values, "frozen": np.zeros(4)} for values in honest_arrays(10)]
    updates[2]["frozen"] = np.array([3.0, 4.0, 0.0, 0.0])
    assert "norm of layer frozen is 5 where the median is 0" in reasons(updates, 2)


def honest_arrays(clients: int) -> list[np.ndarray]:
    return [update["fc1.weight"] for update in honest(generator(14), clients)]


def test_reasons_of_a_single_array() -> None:
    updates = honest_arrays(10)
    updates[0] *= 20
    assert reasons(updates, 0)[0].startswith("norm of the whole update is ")
    updates[0][5] = math.nan
    assert reasons(updates, 0) == ("1 non-finite value in the update",)


@by_method
def test_reasons_of_every_method(method: str) -> None:
    updates = honest(generator(15), 20)
    updates[8] = scaled(updates[8], generator())
    told = " / ".join(reasons(updates, 8, method=method))
    assert "norm of the whole update is" in told
    assert told.count(" / ") <= 4
    if method != "zscore":
        assert "spreads above the median client's" in told


# Actions


def planted(action: str) -> Findings:
    updates = honest(generator(16), 12)
    updates[2] = scaled(updates[2], generator())
    updates[7]["fc2.bias"][0] = math.nan
    return Explorer(action=action).explore(sketch(updates))


def test_report_leaves_the_weights_alone() -> None:
    assert planted("report").weights(range(1, 13)) == [float(weight) for weight in range(1, 13)]


def test_drop_gives_outliers_no_weight() -> None:
    weights = planted("drop").weights()
    assert [client for client, weight in enumerate(weights) if weight == 0] == [2, 7]
    assert set(weights) == {0.0, 1.0}


def test_down_weight_divides_by_the_score() -> None:
    found = planted("down_weight")
    weights = found.weights([10.0] * 12)
    assert weights[2] == 10 * 3.5 / found.scores[2]
    assert 0 < weights[2] < 10
    assert weights[7] == 0
    assert weights[0] == 10


def test_the_weights_fit_fedavg() -> None:
    updates = honest(generator(17), 12)
    updates[5] = scaled(updates[5], generator())
    updates[9]["fc1.bias"][3] = math.nan
    found = Explorer(action="drop").explore(sketch(updates))
    mean = fastagg.fedavg(updates, found.weights())
    kept = [update for client, update in enumerate(updates) if client not in (5, 9)]
    np.testing.assert_allclose(mean["fc1.bias"], fastagg.fedavg(kept)["fc1.bias"], rtol=1e-12)


def test_weights_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 12, one for each update, got 2"):
        planted("drop").weights([1, 2])


def test_no_weight_left_is_an_error() -> None:
    broken = [np.full(5, math.nan) for _ in range(4)]
    found = Explorer(action="drop").explore(sketch(broken))
    assert set(found.outliers) == {0, 1, 2, 3}
    with pytest.raises(ValueError, match="every client of a weight other than 0 is an outlier"):
        found.weights()


# Rounds


def test_history_counts_rounds() -> None:
    detector = Explorer()
    for number in range(3):
        updates = honest(generator(18 + number), 12)
        updates[1] = scaled(updates[1], generator())
        if number == 2:
            updates[4] = scaled(updates[4], generator())
        detector.explore(sketch(updates))
    assert [found.round for found in detector.history] == [1, 2, 3]
    assert detector.flagged() == {1: 3, 4: 1}
    assert detector.flagged(rounds=2) == {1: 3}


def test_rounds_have_the_number_that_is_given() -> None:
    detector = Explorer()
    assert detector.explore(sketch(honest_arrays(4)), round=7).round == 7
    assert detector.explore(sketch(honest_arrays(4))).round == 8


def test_labels_name_clients() -> None:
    updates = honest(generator(21), 5)
    updates[2] = scaled(updates[2], generator())
    labels = ["a", "b", "c", "d", "e"]
    assert set(Explorer().explore(sketch(updates, clients=labels)).outliers) == {"c"}
    assert set(Explorer().explore(statistics_of(updates).with_clients(labels)).outliers) == {"c"}


@by_source
def test_a_client_beyond_float64s_squares_is_found(source: Any) -> None:
    updates = honest(generator(32), 8)
    updates[3] = {name: 1e200 * values for name, values in updates[3].items()}
    found = Explorer().explore(source(updates))
    assert set(found.outliers) == {3}
    assert "largest value of the whole update is" in found.outliers[3][0]


@by_method
def test_the_same_seed_finds_the_same(method: str) -> None:
    sketched = sketch(honest(generator(22), 15))
    first, second = (Explorer(method=method, seed=5).explore(sketched) for _ in range(2))
    np.testing.assert_array_equal(first.scores, second.scores)


def test_findings_survive_plain_values() -> None:
    found = planted("drop")
    back = Findings.from_dict(found.as_dict())
    assert back.outliers == found.outliers
    assert (back.round, back.clients, back.leaves, back.action) == (1, tuple(range(12)), tuple(SIZES), "drop")
    np.testing.assert_array_equal(back.scores, found.scores)
    np.testing.assert_array_equal(back.leaf_scores, found.leaf_scores)


# Bad input


@by_method
@pytest.mark.parametrize("clients", [1, 2])
def test_of_one_or_two_nobody_is_an_outlier(method: str, clients: int) -> None:
    found = Explorer(method=method).explore(statistics_of([np.ones(10), -100 * np.ones(10)][:clients]))
    assert not found.outliers
    assert found.scores.tolist() == [0.0] * clients


@by_source
@by_method
@pytest.mark.parametrize("values", [np.ones(50), np.zeros(50)])
def test_identical_clients_are_no_outliers(method: str, source: Any, values: np.ndarray) -> None:
    assert not Explorer(method=method).explore(source([{"a": values, "b": values[:3]} for _ in range(8)])).outliers


@by_source
@by_method
def test_one_that_differs_from_identical_ones_is_found(method: str, source: Any) -> None:
    updates = [{"a": np.ones(50), "b": np.ones(3)} for _ in range(12)]
    updates[5] = {"a": -20 * np.ones(50), "b": np.ones(3)}
    assert set(Explorer(method=method).explore(source(updates)).outliers) == {5}


@by_source
def test_nan_everywhere_makes_everyone_an_outlier(source: Any) -> None:
    found = Explorer().explore(source([np.full(6, math.nan) for _ in range(5)]))
    assert set(found.outliers) == set(range(5))
    assert found.outliers[0] == ("6 non-finite values in the update",)


@by_source
def test_leaves_without_elements_count_for_nothing(source: Any) -> None:
    updates = [{"empty": np.zeros(0), **update} for update in honest(generator(23), 10)]
    updates[3] = scaled(updates[3], generator())
    assert set(Explorer().explore(source(updates)).outliers) == {3}


@by_source
def test_leaves_of_one_element_point_either_way(source: Any) -> None:
    """Of a single number, every cosine is 1 or -1: that 40 % differ in sign is nothing unusual."""
    random = generator(24)
    updates = [{**update, "scale": random.normal(1, 0.3, 1)} for update in honest(random, 20)]
    for update in updates[:8]:
        update["scale"] = -update["scale"]
    assert not Explorer().explore(source(updates)).outliers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "dbscan"}, "method: expected one of zscore, kmeans, local_outlier_factor, isolation_forest"),
        ({"action": "ban"}, "action: expected one of report, drop, down_weight, got 'ban'"),
        ({"threshold": 0}, "threshold: expected a finite number above 0, got 0"),
        ({"threshold": math.nan}, "threshold: expected a finite number above 0, got nan"),
        ({"seed": -1}, "seed: expected 0 or more, got -1"),
        ({"seed": 2**32}, r"seed: expected a number below 2\*\*32"),
    ],
)
def test_options_that_do_not_exist_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Explorer(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": "3"}, "threshold: expected a number, got '3'"),
        ({"threshold": True}, "threshold: expected a number, got True"),
        ({"seed": None}, "seed: expected an integer, got None"),
    ],
)
def test_options_of_other_types_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Explorer(**options)


def test_what_is_no_statistics_is_refused() -> None:
    with pytest.raises(TypeError, match=r"expected the Statistics .* or the Sketch .*, got list"):
        Explorer().explore([np.ones(3)])  # type: ignore[arg-type]


def test_labels_that_are_there_twice_are_refused() -> None:
    with pytest.raises(ValueError, match="client 'a': its label is there twice"):
        Explorer().explore(sketch(honest_arrays(3), clients=["a", "b", "a"]))


def test_without_sklearn_one_sentence() -> None:
    program = """
import sys
sys.modules["sklearn"] = None
import numpy as np
from fastagg.outliers import Explorer, sketch
updates = sketch([np.arange(5.0) + k for k in range(5)])
Explorer().explore(updates)
try:
    Explorer(method="kmeans").explore(updates)
except ModuleNotFoundError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "This method of fastagg.outliers needs scikit-learn: pip install 'fastagg[report]'\n"


# Sketches


def test_a_sketch_keeps_inner_products() -> None:
    random = generator(25)
    updates = honest(random, 6)
    vectors = np.stack([np.concatenate(list(update.values())) for update in updates])
    sketched = np.stack([sketch(updates, 64, seed).values.sum(axis=1) for seed in range(200)])
    products = np.einsum("skd,sjd->skj", sketched, sketched)
    norms = np.linalg.norm(vectors, axis=1)
    errors = (products - vectors @ vectors.T) / np.outer(norms, norms)
    assert np.abs(errors.mean(axis=0)).max() < 4 * math.sqrt(2 / 64 / 200)  # unbiased
    assert errors.std(axis=0).max() < 1.2 * math.sqrt(2 / 64)


def test_a_sketch_is_the_same_for_the_same_seed() -> None:
    updates = honest(generator(26), 3)
    assert np.array_equal(sketch(updates, seed=3).values, sketch(updates, seed=3).values)
    assert not np.array_equal(sketch(updates, seed=3).values, sketch(updates, seed=4).values)


def test_a_sketch_is_linear_and_blockwise() -> None:
    """The sketch of a difference is the difference of the sketches, over more than one block of elements."""
    random = generator(27)
    model, update = (random.normal(size=200_000) for _ in range(2))
    of_both = sketch([model, update]).values
    of_difference = sketch([update], reference=model).values
    np.testing.assert_allclose(of_difference[0], of_both[1] - of_both[0], rtol=1e-9, atol=1e-9)


def test_sketches_of_every_dtype_and_library_agree() -> None:
    torch = pytest.importorskip("torch")
    values = generator(28).normal(size=(30, 40)).astype(ml_dtypes.bfloat16)
    as_float64 = sketch([values.astype(np.float64)])
    tensor = torch.from_numpy(values.astype(np.float32)).to(torch.bfloat16)
    same = (values, values.astype(np.float32), tensor, torch.nn.Parameter(tensor), fastagg.quantize(tensor, "bf16"))
    for one in same:
        assert np.array_equal(sketch([one]).values, as_float64.values)


def test_integer_leaves_are_left_out_of_sketches() -> None:
    updates = [{"steps": np.array(5), "weight": np.ones(3)} for _ in range(2)]
    assert sketch(updates).leaves == ("weight",)


def test_cosines_of_pairs() -> None:
    updates = honest(generator(29), 6)
    updates[1] = flipped(updates[0], generator())
    updates[2] = {name: np.zeros_like(values) for name, values in updates[2].items()}
    vectors = np.stack([np.concatenate(list(update.values())) for update in updates])
    cosines = pairwise_cosines(updates)
    known = [0, 1, 3, 4, 5]
    norms = np.linalg.norm(vectors[known], axis=1)
    expected = vectors[known] @ vectors[known].T / np.outer(norms, norms)
    np.testing.assert_allclose(cosines[np.ix_(known, known)], expected, rtol=1e-10)
    assert cosines[0, 1] == -1
    assert np.isnan(cosines[2]).all()
    sketched = sketch(updates, 1024).cosines()
    assert np.nanmax(np.abs(sketched - cosines)) < 5 / math.sqrt(1024)


@pytest.mark.parametrize(
    ("updates", "options", "error", "message"),
    [
        ([], {}, ValueError, "expected at least one, got none"),
        ([np.ones(3)], {"dimensions": 0}, ValueError, "dimensions: expected 1 or more, got 0"),
        ([np.ones(3)], {"clients": ["a", "b"]}, ValueError, "expected 1 labels, one for each update, got 2"),
        ([np.ones(3), np.ones(4)], {}, ValueError, r"client 1, the array: expected shape \(3,\) like the first"),
        ([{"a": np.ones(3)}, {"b": np.ones(3)}], {}, ValueError, "client 1: missing leaves 'a'"),
        ([np.ones(3)], {"reference": np.ones(2)}, ValueError, r"reference, the array: expected shape \(3,\)"),
        ([np.ones(3)], {"reference": [np.ones(3)]}, TypeError, "reference: expected an array"),
        ([np.arange(3)], {}, ValueError, "expected at least one floating leaf, got none"),
        ([np.ones(3), "x"], {}, TypeError, "client 1: expected an array"),
        ({"a": np.ones(3)}, {}, TypeError, "expected a sequence of updates, got a single mapping"),
        ([np.ones(3)], {"dimensions": 2.5}, TypeError, "dimensions: expected an integer, got 2.5"),
        ([np.ones(3)], {"seed": -1}, ValueError, "seed: expected 0 or more, got -1"),
        ([np.ones(3)], {"clients": [[1]]}, TypeError, r"labels: expected numbers, texts .*, got \[1\]"),
        ([np.ones(3) * 1j], {}, TypeError, "client 0, the array: dtype complex128 is not supported"),
    ],
)
def test_updates_that_do_not_fit_are_refused(
    updates: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        sketch(updates, **options)


def test_a_sketch_tells_its_size() -> None:
    made = sketch(honest(generator(30), 3), 100)
    assert isinstance(made, Sketch)
    assert made.dimensions == 100
    assert made.values.shape == (3, 4, 100)
    assert made.elements.tolist() == list(SIZES.values())
    assert repr(made) == "Sketch(3 clients, 4 leaves, 100 dimensions)"


def test_findings_tell_who_was_found() -> None:
    updates = honest(generator(31), 10)
    updates[3]["fc1.bias"][0] = np.nan
    found = Explorer().explore(sketch(updates, 32, clients=[f"site {client}" for client in range(10)]))
    assert repr(found) == "Findings(round=1, 10 clients, outliers=['site 3'])"


def test_the_documented_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (Path(__file__).resolve().parent.parent / "docs" / "outliers.md").read_text()
    monkeypatch.chdir(tmp_path)
    exec(compile(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0], "docs/outliers.md", "exec"), {})
    found, flagged = map(ast.literal_eval, capsys.readouterr().out.splitlines())
    assert set(found) == {"site 3"}
    assert found["site 3"][0].startswith("points away from the centre: cosine -")
    assert flagged == {"site 3": 5}
    assert Run.load("run.json").flagged() == flagged
