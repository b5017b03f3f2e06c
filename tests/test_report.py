"""Records of runs, plots, comparisons of models, and the page that `fastagg report` writes."""

from __future__ import annotations

import html
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fastagg
from data import generator
from fastagg.outliers import Explorer, pairwise_cosines
from fastagg.report import Run, compare_models, weight_histograms, write_report
from fastagg.report.html import highest_leaf_scores, in_ranges, layer_shares, number, outlier_rows
from fastagg.report.run import FORMAT

LEAVES = {"conv.weight": 300, "conv.bias": 20, "head.weight": 80}


def updates_of(random: np.random.Generator, clients: int) -> list[dict[str, np.ndarray]]:
    shared = {name: random.normal(size=size) for name, size in LEAVES.items()}
    return [{name: x + random.normal(size=x.size) for name, x in shared.items()} for _ in range(clients)]


def recorded(rounds: int = 3, clients: int = 8) -> Run:
    """Client "site 2" flips its sign, "site 5" sends a NaN in round 2."""
    run, detector, random = Run(title="A small run"), Explorer(action="drop"), generator(1)
    labels = [f"site {client}" for client in range(clients)]
    model = {name: random.normal(size=size) for name, size in LEAVES.items()}
    run.add_model("start", model)
    for round_number in range(1, rounds + 1):
        updates = updates_of(random, clients)
        updates[2] = {name: -30 * values for name, values in updates[2].items()}
        if round_number == 2:
            updates[5]["conv.bias"][3] = math.nan
        _, statistics = fastagg.fedavg(updates, stats=True, nan_policy="propagate")
        statistics = statistics.with_clients(labels)
        run.record(
            statistics=statistics,
            findings=detector.explore(statistics),
            metrics={"loss": 2.0 / round_number, "accuracy": 1 - 0.5 / round_number},
            cosines=pairwise_cosines(updates),
        )
    changed = {name: 1.5 * values for name, values in model.items()}
    run.add_model("end", changed)
    run.compare("start", model, "end", changed)
    return run


@pytest.fixture(scope="module")
def run() -> Run:
    return recorded()


@pytest.fixture(scope="module")
def page(run: Run) -> str:
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    from fastagg.report.html import render

    return render(run)


# The record


def test_a_run_comes_back_as_it_was(run: Run, tmp_path: Path) -> None:
    run.save(tmp_path / "run.json")
    back = Run.load(tmp_path / "run.json")
    assert (back.title, [one.number for one in back.rounds], back.clients) == (run.title, [1, 2, 3], run.clients)
    assert back.comparisons == run.comparisons
    assert back.flagged() == run.flagged() == {"site 2": 3, "site 5": 1}
    for mine, theirs in zip(run.rounds, back.rounds, strict=True):
        assert theirs.metrics == mine.metrics
        np.testing.assert_array_equal(theirs.cosines, mine.cosines)
        assert theirs.statistics is not None
        np.testing.assert_array_equal(theirs.statistics.norm, mine.statistics.norm)
        assert theirs.findings is not None
        assert theirs.findings.outliers == mine.findings.outliers
        np.testing.assert_array_equal(theirs.findings.scores, mine.findings.scores)
    for mine, theirs in zip(run.models["end"], back.models["end"], strict=True):
        np.testing.assert_array_equal(theirs.counts, mine.counts)
        assert theirs[2:] == mine[2:]


def test_the_file_is_json_that_every_reader_takes(run: Run, tmp_path: Path) -> None:
    run.save(tmp_path / "run.json")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    plain = json.loads((tmp_path / "run.json").read_text(), parse_constant=refuse)
    assert plain["format"] == FORMAT


def test_saving_again_replaces_the_file(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    Run(title="old").save(path)
    run.save(path)
    assert Run.load(path).title == "A small run"
    assert [one.name for one in tmp_path.iterdir()] == ["run.json"]


def test_a_run_that_cannot_be_written_leaves_the_old_one(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    run.save(path)
    before = path.read_bytes()
    broken = Run(title=object())  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        broken.save(path)
    assert path.read_bytes() == before


def test_rounds_are_numbered_on(tmp_path: Path) -> None:
    run = Run()
    run.record(metrics={"loss": 1})
    run.record(5, metrics={"loss": 1})
    run.record(metrics={"loss": 1})
    assert [one.number for one in run.rounds] == [1, 5, 6]


def test_numbers_of_numpy_are_written(tmp_path: Path) -> None:
    run, labels = Run(), np.arange(3)
    statistics = fastagg.fedavg([np.ones(3)] * 3, stats=True)[1].with_clients(labels)
    run.record(np.int64(4), statistics=statistics, findings=Explorer().explore(statistics, np.int64(4)))
    run.record(metrics={"loss": np.float32(0.5), "accuracy": np.array(1)})
    run.save(tmp_path / "run.json")
    back = Run.load(tmp_path / "run.json")
    assert [(one.number, one.clients, one.metrics) for one in back.rounds] == [
        (4, (0, 1, 2), {}),
        (5, (), {"loss": 0.5, "accuracy": 1.0}),
    ]


def test_clients_are_in_natural_order() -> None:
    run = Run()
    statistics = fastagg.fedavg([np.ones(3)] * 4, stats=True)[1]
    run.record(statistics=statistics.with_clients(["site 10", "site 9", 11, 2]))
    assert run.clients == [2, 11, "site 9", "site 10"]


def test_clients_with_odd_digits_have_an_order(tmp_path: Path) -> None:
    labels = ["²", "site ٣", "9" * 5000, "1" + "0" * 5000, "site 007", "site 8", "\ud800", ""]
    statistics = fastagg.fedavg([np.ones(3)] * len(labels), stats=True)[1].with_clients(labels)
    run = Run()
    run.record(statistics=statistics)
    run.save(tmp_path / "run.json")
    assert Run.load(tmp_path / "run.json").clients == run.clients
    in_order = [label for label in run.clients if label in labels[2:6]]
    assert in_order == ["site 007", "site 8", "9" * 5000, "1" + "0" * 5000]
    with pytest.raises(ValueError, match="client an integer of 16610 bits: expected a number of less than 4300 digits"):
        run.record(statistics=statistics.with_clients([*labels[:-1], 10**5000]))


def wrong_records() -> list[Any]:
    statistics = fastagg.fedavg([np.ones(3)] * 3, stats=True)[1]
    others = Explorer().explore(statistics.with_clients("abc"))
    return [
        ({"round": 1}, ValueError, "round 1 has been recorded already"),
        ({"metrics": {"loss": "low"}}, TypeError, "metric 'loss': expected a number, got 'low'"),
        ({"metrics": {"loss": "3.5"}}, TypeError, "metric 'loss': expected a number, got '3.5'"),
        (
            {"statistics": {}},
            TypeError,
            r"statistics: expected the Statistics of fedavg\(\.\.\., stats=True\), got dict",
        ),
        ({"findings": [1]}, TypeError, r"findings: expected the Findings of Explorer\.explore, got list"),
        ({"metrics": [1]}, TypeError, "metrics: expected a mapping from names to numbers, got list"),
        ({"round": "8"}, TypeError, "round: expected an integer, got '8'"),
        ({"round": -1}, ValueError, "round: expected 0 or more, got -1"),
        ({"statistics": statistics, "findings": others, "round": 9}, ValueError, "round 9: the findings are of other"),
        ({"cosines": np.ones((3, 3))}, ValueError, r"cosines: expected shape \(0, 0\)"),
        ({"statistics": statistics, "cosines": np.ones((2, 2))}, ValueError, r"expected shape \(3, 3\).*got \(2, 2\)"),
        ({"statistics": statistics.with_clients([(1, 2), 3, 4])}, TypeError, r"client \(1, 2\): expected a label"),
    ]


@pytest.mark.parametrize(("options", "error", "message"), wrong_records())
def test_what_does_not_fit_is_not_recorded(options: dict[str, Any], error: type[Exception], message: str) -> None:
    run = Run()
    run.record(metrics={"loss": 1})
    with pytest.raises(error, match=message):
        run.record(**options)
    assert len(run.rounds) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no run of fastagg: Expecting value"),
        (b"PK\x03\x04\xff\xfe", "is no run of fastagg: it is not text"),
        (b"[1, 2]", "is no run of fastagg: it does not say 'fastagg run'"),
        (b'{"loss": 3}', "is no run of fastagg: it does not say 'fastagg run'"),
        (b'{"format":"fastagg run","version":7}', "is of version 7, and this fastagg reads version 1"),
        (b'{"format":"fastagg run","version":1,"title":"x","rou', "is truncated, or no run of fastagg"),
        (b'{"format":"fastagg run","version":1}', "is damaged: KeyError: 'title'"),
        (b'{"format":"fastagg run","version":1,"title":' + b"[" * 100_000, "is truncated, or no run of fastagg: "),
        (b"[" * 100_000 + b"]" * 100_000, "is no run of fastagg: "),
        (b'{"format":"fastagg run","version":1,"title":{"$float":[]}}', "is damaged: TypeError: expected a text, got"),
        (
            b'{"format":"fastagg run","version":1,"title":{"$float":"x"}}',
            "is truncated, or no run of fastagg: could not",
        ),
        (b'{"format":"fastagg run","version":' + b"9" * 5000 + b"}", "is truncated, or no run of fastagg: Exceeds"),
    ],
)
def test_files_that_are_no_runs_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "other.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"other\.json {re.escape(message)}"):
        Run.load(path)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("title",), None, "expected a text, got None"),
        (("rounds", 0, "number"), "x", "round: expected an integer, got 'x'"),
        (("rounds", 1, "number"), 1, "round 1 has been recorded already"),
        (("rounds", 0, "metrics"), [1], "metrics: expected a mapping from names to numbers, got list"),
        (("rounds", 0, "cosines"), [[1.0]], r"cosines: expected shape \(8, 8\)"),
        (("rounds", 0, "statistics", "elements", 0), math.inf, "elements: expected integers, got NaN, infinity"),
        (("rounds", 0, "findings", "clients", 2), "stranger", "outliers: {'site 2'} are not among the clients"),
        (("rounds", 0, "findings", "scores"), [1.0], "cannot reshape array"),
        (("rounds", 0, "findings", "method"), "guess", "method: expected one of zscore"),
        (("rounds", 0, "findings", "threshold"), None, "threshold: expected a number, got None"),
        (("models", "start", 0, "counts"), [], "counts: expected one number a bin"),
        (("models", "start", 0, "leaf"), 3, "expected a text, got 3"),
        (("comparisons", 0, "rows", 0, "elements"), 1.5, "elements: expected an integer, got 1.5"),
        (("comparisons", 0, "rows", 0, "cosine"), None, "float"),
    ],
)
def test_what_is_damaged_is_told_before_a_page_is_drawn(
    run: Run, tmp_path: Path, place: tuple[Any, ...], value: Any, message: str
) -> None:
    path = tmp_path / "run.json"
    run.save(path)
    plain = json.loads(path.read_text())
    holder = plain
    for step in place[:-1]:
        holder = holder[step]
    holder[place[-1]] = value
    path.write_text(json.dumps(plain))
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} is damaged: .*{message}"):
        Run.load(path)


ODD: list[Any] = [
    *(None, True, -1, 2**70, 1.5, 1e308, "", "²", "1" * 5000, "\x1b[2J", [], [[1]], [None], {}),
    *({"a": 1}, {"$float": "nan"}, {"$float": "-inf"}, {"$float": []}, [[[[]]]], ["a", "b"]),
]


def places_of(plain: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where there is a value in a run's file; of long lists the first two entries."""
    if place:
        yield place
    entries = plain.items() if isinstance(plain, dict) else enumerate(plain[:2]) if isinstance(plain, list) else ()
    for step, value in entries:
        yield from places_of(value, (*place, step))


def test_a_field_of_another_type_is_an_error_or_a_value(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    path = tmp_path / "run.json"
    small = Run(rounds=run.rounds[:1], models={"end": run.models["end"]}, comparisons=run.comparisons)
    small.save(path)
    whole = path.read_text()
    random, places = generator(5), list(places_of(json.loads(whole)))
    refusals = []
    for turn in range(150):
        holder = plain = json.loads(whole)
        *steps, last = places[random.integers(len(places))]
        for step in steps:
            holder = holder[step]
        holder[last] = ODD[random.integers(len(ODD))]
        path.write_text(json.dumps(plain))
        try:
            loaded = Run.load(path)
        except ValueError as error:
            refusals.append(str(error))
            continue
        assert isinstance(loaded.clients, list)
        if turn == 100:
            write_report(loaded, tmp_path / "page.html", force=True)
    assert len(refusals) > 60
    assert all(text.startswith(f"{path} is") and len(text) < 1000 for text in refusals)


def test_a_run_cut_short_anywhere_is_refused(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    run.save(path)
    whole = path.read_bytes()
    for length in np.linspace(30, len(whole) - 1, 20).astype(int):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="is truncated"):
            Run.load(path)


# Models


def test_models_are_compared_leaf_by_leaf() -> None:
    random = generator(2)
    first, second = ({"a": random.normal(size=(70, 1000)), "b": random.normal(size=5)} for _ in range(2))
    for row, name in zip(compare_models(first, second), first, strict=True):
        x, y = first[name].ravel(), second[name].ravel()
        norms = np.linalg.norm(x), np.linalg.norm(y)
        expected = (*norms, np.linalg.norm(y - x) / norms[0], x @ y / (norms[0] * norms[1]), np.abs(y - x).max())
        assert row[:2] == (name, x.size)
        np.testing.assert_allclose(row[2:], expected, rtol=1e-12)


def test_dtypes_and_libraries_may_differ_between_models() -> None:
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    narrow = {
        name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items() if tensor.is_floating_point()
    }
    wide = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    as_numpy = {name: tensor.float().numpy().astype(ml_dtypes.bfloat16) for name, tensor in narrow.items()}
    assert [row.leaf for row in compare_models(wide, narrow)] == list(wide)
    assert compare_models(wide, narrow) == compare_models(wide, as_numpy)
    assert all(row.largest_difference == 0 for row in compare_models(narrow, as_numpy))
    assert [row.leaf for row in compare_models(model.state_dict(), model.state_dict())] == list(wide)  # no counters


@pytest.mark.parametrize(
    ("first", "second", "relative", "cosine"),
    [(0.0, 0.0, 0.0, math.nan), (0.0, 1.0, math.inf, math.nan), (1.0, 0.0, 1.0, math.nan), (2.0, -2.0, 2.0, -1.0)],
)
def test_zeros_and_opposites(first: float, second: float, relative: float, cosine: float) -> None:
    row = compare_models(np.full(4, first), np.full(4, second))[0]
    assert row.relative_difference == relative
    np.testing.assert_equal(row.cosine, cosine)


def test_what_is_not_finite_compares_as_nan() -> None:
    row = compare_models(np.array([1.0, math.nan]), np.array([1.0, 2.0]))[0]
    assert math.isnan(row.relative_difference)
    assert math.isnan(row.cosine)
    assert math.isnan(row.largest_difference)


@pytest.mark.parametrize(
    ("first", "second", "error", "message"),
    [
        ({"a": np.ones(3)}, {"b": np.ones(3)}, ValueError, "the second model: missing leaves 'a'"),
        ([np.ones(3)], [np.ones(3)] * 2, ValueError, "the second model: expected 1 leaves, got 2"),
        ({"a": np.ones(3)}, {"a": np.ones(4)}, ValueError, r"the second model, leaf 'a': expected shape \(3,\) like"),
        ({"a": np.ones(3)}, {"a": np.arange(3)}, TypeError, "leaf 'a': expected floating dtypes in both models"),
        ({"a": np.ones(3)}, [np.ones(3)], TypeError, "the second model: expected a mapping like the first model's"),
        (5, np.ones(3), TypeError, "the first model: expected an array, a sequence"),
        ({}, {}, ValueError, "the first model: the update has no leaves"),
    ],
)
def test_models_that_do_not_fit_are_refused(first: Any, second: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        compare_models(first, second)


def test_histograms_count_every_finite_value() -> None:
    values = generator(3).normal(size=150_000)
    values[[5, 9]] = math.nan, math.inf
    found = weight_histograms({"w": values, "steps": np.arange(3)}, bins=40)
    assert [leaf.leaf for leaf in found] == ["w"]
    finite = values[np.isfinite(values)]
    np.testing.assert_array_equal(found[0].counts, np.histogram(finite, 40)[0])
    assert found[0][2:] == (finite.min(), finite.max(), 2)


@pytest.mark.parametrize("values", [np.full(9, 3.0), np.full(9, math.nan), np.zeros(0)])
def test_histograms_of_one_value_and_of_none(values: np.ndarray) -> None:
    leaf = weight_histograms(values)[0]
    assert leaf.counts.sum() == np.isfinite(values).sum()
    assert leaf.nonfinite == np.isnan(values).sum()


def test_histograms_need_a_bin() -> None:
    with pytest.raises(ValueError, match="bins: expected 1 or more, got 0"):
        weight_histograms(np.ones(3), 0)


# The page


def words_of(page: str) -> str:
    """What a person reads."""
    without_style = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", without_style)))


def test_the_page_says_who_and_why(page: str) -> None:
    words = words_of(page)
    assert "2 of 8 clients were outliers in at least one of 3 rounds, 1 of them more than once" in words
    assert re.search(r"site 2 3 of 3 1–3 \S+ round \d norm of the whole update is \d+ times the median", words)
    assert "site 5 1 of 3 2 ∞ round 2 1 non-finite value in layer conv.bias" in words
    told = "the aggregation was told to leave them out (drop)."
    assert f"Found by their most unusual feature (zscore), above a score of 3.5; {told}" in words
    assert re.search(r"last loss 0\.667 last accuracy 0\.833", words)
    assert re.search(r"conv\.weight 300 \S+ \S+ 0\.5 1 ", words)


def test_the_page_stands_alone(page: str) -> None:
    assert not re.findall(r"<script|<link|@import|url\(", page)
    sources = re.findall(r"""(?:src|href)=["']?([^"'> ]+)""", page)
    assert len(sources) == 7
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert page.count('alt="') == len(sources)


def test_the_page_escapes_what_clients_are_called(tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    label, leaf = "<script>alert(1)</script>", "$x_{1}$ <b>"
    updates = [{leaf: np.arange(5.0) + client, "other": np.ones(3)} for client in range(6)]
    updates[0][leaf] = np.array([math.nan] * 5)
    statistics = fastagg.fedavg(updates, stats=True, nan_policy="propagate")[1].with_clients([label, *range(1, 6)])
    run = Run(title="<i>title</i>")
    run.record(statistics=statistics, findings=Explorer().explore(statistics), metrics={"$loss": math.nan})
    run.compare("<a>", updates[1], "$b", updates[2])
    write_report(run, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page
    assert "<i>" not in page
    assert html.escape(label) in page
    assert "5 non-finite values in layer $x_{1}$ &lt;b&gt;" in page


FORMULA, CONTROL, HALF = "$x^$ $", "new\nline\ttab\0\x1b\u202e", "\ud800"  # half of a character beyond 16 bits
AT_THE_CUT = 20 * "a$" + 21 * "b$"


STRANGE = [FORMULA, CONTROL, HALF, AT_THE_CUT, "<&>", "医院", "", 5000 * "x"]


def test_no_name_breaks_the_page(tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    updates = [{name: np.arange(3.0) + client for name in STRANGE} for client in range(len(STRANGE))]
    updates[0][CONTROL] *= 100
    statistics = fastagg.fedavg(updates, stats=True)[1].with_clients(STRANGE)
    run = Run(title=HALF)
    findings = Explorer().explore(statistics)
    assert list(findings.outliers) == [FORMULA]
    metrics = dict.fromkeys(STRANGE, 1.0)
    run.record(statistics=statistics, findings=findings, metrics=metrics, cosines=pairwise_cosines(updates))
    for name, model in zip(STRANGE, updates, strict=True):
        run.add_model(name, model)
    run.compare(FORMULA, updates[0], AT_THE_CUT, updates[1])
    run.save(tmp_path / "run.json")
    write_report(Run.load(tmp_path / "run.json"), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<title>?</title>" in page
    assert all(html.escape(name.replace(HALF, "?")) in page for name in STRANGE)


def test_every_plot_says_what_its_axes_are(run: Run) -> None:
    pytest.importorskip("matplotlib")
    from fastagg import plots

    shares = {"a": 0.25, "b": 0.75}
    for figure, axes in (
        (plots.norms_by_round({one.number: one.statistics for one in run.rounds}), ("round", "norm of the update")),
        (plots.cosine_map(np.eye(2), [0, 1]), ("client", "client")),
        (plots.layer_by_client(np.ones((2, 1)), [0, 1], ["a"]), ("client", "layer")),
        (plots.layer_importance(shares, shares), ("share of all layers", "layer")),
        (plots.compare_models(run.comparisons[0].rows), ("relative difference: |second − first| / |first|", "layer")),
    ):
        assert (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) == axes
    histograms = plots.weight_histograms(run.models)
    assert (histograms.get_supxlabel(), histograms.get_supylabel()) == ("weight", "density")
    curves = plots.metrics_by_round({1: {"loss": 1.0}}).axes[0]
    assert (curves.get_xlabel(), curves.get_title(loc="left")) == ("round", "loss")


@pytest.mark.parametrize("keep", ["metrics", "statistics", "findings", "models", "comparisons"])
def test_a_page_of_any_part_alone(run: Run, keep: str) -> None:
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    from fastagg.report.html import render

    part = Run()
    if keep in ("models", "comparisons"):
        setattr(part, keep, getattr(run, keep))
    else:
        part.record(**{keep: getattr(run.rounds[0], keep)})
    assert "<h2>" in render(part)


def test_an_empty_run_has_no_page(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the run is empty"):
        write_report(Run(), tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


def test_the_worst_round_gives_the_reasons(run: Run) -> None:
    rows = outlier_rows(run)
    assert [(row.client, row.flagged, row.seen, row.rounds) for row in rows] == [
        ("site 2", 3, 3, "1–3"),
        ("site 5", 1, 3, "2"),
    ]
    scores = [one.findings.scores[2] for one in run.rounds if one.findings is not None]
    assert rows[0].worst_round == 1 + int(np.argmax(scores))


def test_leaf_scores_are_the_highest_of_all_rounds(run: Run) -> None:
    scores, clients, leaves, threshold = highest_leaf_scores(run)
    every = np.stack([one.findings.leaf_scores for one in run.rounds if one.findings is not None])
    np.testing.assert_array_equal(scores, every.max(axis=0))
    assert (clients, leaves) == (run.clients, list(LEAVES))
    assert math.isinf(scores[5, 1])
    assert threshold == pytest.approx(math.sqrt(3.5**2 + 2 * math.log(12)))


def test_layer_shares_leave_outliers_out(run: Run) -> None:
    shares, sizes = layer_shares(run)
    expected = np.zeros(len(LEAVES))
    for one in run.rounds:
        assert one.statistics is not None
        kept = [client for client in range(8) if client != 2 and (one.number, client) != (2, 5)]
        squares = (one.statistics.norm[kept] ** 2).sum(axis=0)
        expected += squares / squares.sum() / 3
    np.testing.assert_allclose(list(shares.values()), expected, rtol=1e-12)
    assert sizes == {name: size / 400 for name, size in LEAVES.items()}


def test_rounds_in_ranges() -> None:
    assert in_ranges([1, 2, 3, 7, 9, 10]) == "1–3, 7, 9–10"


def test_numbers_as_people_write_them() -> None:
    assert [number(x) for x in (-0.123456, math.nan, math.inf, -math.inf, 2)] == ["−0.123", "–", "∞", "−∞", "2"]


# The plots


def texts_of(figure: Any) -> list[str]:
    from matplotlib.text import Text

    figure.draw_without_rendering()
    return [text.get_text() for text in figure.findobj(Text) if text.get_visible() and text.get_text()]


def overlapping(labels: list[Any]) -> list[tuple[str, str]]:
    """Neighbouring labels whose boxes overlap."""
    boxes = [(label.get_text(), label.get_window_extent()) for label in labels if label.get_text()]
    pairs = [(one, other) for index, one in enumerate(boxes) for other in boxes[index + 1 :]]
    return [(one[0], other[0]) for one, other in pairs if one[1].overlaps(other[1])]


@pytest.mark.parametrize(("clients", "leaves"), [(1, 1), (40, 64), (100, 214)])
def test_labels_do_not_overlap(clients: int, leaves: int) -> None:
    pytest.importorskip("matplotlib")
    from fastagg import plots

    labels = [f"hospital-{client}" for client in range(clients)]
    names = [f"encoder.layer.{leaf}.attention.output.weight" for leaf in range(leaves)]
    scores = np.abs(generator(4).normal(size=(clients, leaves)))
    scores[0, 0] = math.inf
    outliers = labels[::7]
    for figure in (
        plots.layer_by_client(scores, labels, names, outliers=outliers),
        plots.cosine_map(np.eye(clients), labels, outliers),
        plots.layer_importance(dict.fromkeys(names, 1 / leaves), dict.fromkeys(names, 1 / leaves)),
    ):
        figure.draw_without_rendering()
        axes = figure.axes[0]
        assert not overlapping(axes.get_xticklabels())
        assert not overlapping(axes.get_yticklabels())


def test_norms_name_the_outliers_and_do_not_pile_up() -> None:
    pytest.importorskip("matplotlib")
    from fastagg import plots

    updates = [np.full(4, 1 + client / 1000) for client in range(12)]
    statistics = fastagg.fedavg(updates, stats=True)[1].with_clients([f"c{client}" for client in range(12)])
    flagged = ["c1", "c4", "c5"]
    figure = plots.norms_by_round({1: statistics, 2: statistics}, {1: flagged})
    assert set(flagged) <= set(texts_of(figure))
    names = [text for text in figure.axes[0].texts if text.get_text() in flagged]
    assert not overlapping(names)


def test_norms_that_are_not_finite_and_zero_norms_have_a_plot() -> None:
    pytest.importorskip("matplotlib")
    from fastagg import plots

    updates = [np.zeros(3), np.full(3, math.nan)]
    statistics = fastagg.fedavg(updates, stats=True, nan_policy="propagate")[1]
    for rounds in ({1: statistics}, {1: statistics, 2: statistics}):
        assert "norm of the update" in texts_of(plots.norms_by_round(rounds, {1: [1]}))


def test_the_largest_layers_get_a_histogram() -> None:
    pytest.importorskip("matplotlib")
    from fastagg import plots

    model = {f"layer {index}": np.arange(float(index + 1)) for index in range(10)}
    texts = texts_of(plots.weight_histograms({"only": weight_histograms(model)}, most=3))
    assert [text for text in texts if text.startswith("layer")] == ["layer 7", "layer 8", "layer 9"]


def test_a_comparison_shows_layers_that_cannot_be_compared() -> None:
    pytest.importorskip("matplotlib")
    from fastagg import plots

    rows = compare_models({"a": np.zeros(2), "b": np.ones(2)}, {"a": np.ones(2), "b": np.array([1, math.nan])})
    texts = texts_of(plots.compare_models(rows, "start", "end"))
    assert {"a", "b", "start is zero", "not finite"} <= set(texts)


def test_plots_of_nothing_are_refused() -> None:
    pytest.importorskip("matplotlib")
    from fastagg import plots

    for call in (
        lambda: plots.norms_by_round({}),
        lambda: plots.weight_histograms({}),
        lambda: plots.weight_histograms({"a": []}),
        lambda: plots.compare_models([]),
        lambda: plots.layer_importance({}, {}),
        lambda: plots.metrics_by_round({1: {}}),
    ):
        with pytest.raises(ValueError, match="expected at least one, got none"):
            call()
    for call in (lambda: plots.cosine_map(np.eye(2), [1]), lambda: plots.layer_by_client(np.eye(2), [1], ["a"])):
        with pytest.raises(ValueError, match="expected shape"):
            call()


# The command


@pytest.fixture
def invoke() -> Any:
    pytest.importorskip("typer")
    pytest.importorskip("rich")
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    from typer.testing import CliRunner

    from fastagg.cli.commands import application

    return lambda *arguments: CliRunner().invoke(application, ["report", *map(str, arguments)])


def test_the_extra_report_brings_the_command_line() -> None:
    project = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'^report = \[.*"fastagg\[cli\]"', project, re.MULTILINE)


def save_metrics(path: Path) -> None:
    run = Run()
    run.record(metrics={"loss": 1.0})
    run.save(path)


def test_the_command_writes_the_page(invoke: Any, tmp_path: Path) -> None:
    run, page = tmp_path / "run.json", tmp_path / "report.html"
    save_metrics(run)
    done = invoke(run, "-o", page)
    assert done.exit_code == 0, done.output
    assert done.output == f"wrote {page}\n"
    written = page.read_text()
    assert written.startswith("<!doctype html>")
    again = invoke(run, "-o", page)
    assert again.exit_code == 1
    assert again.output == f"fastagg report: {page} exists: force overwrites it\n"
    page.write_text("old")
    assert invoke(run, "-o", page, "--force").exit_code == 0
    assert page.read_text() == written


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, ": No such file or directory"), ("{}", " is no run of fastagg: it does not say 'fastagg run'")],
)
def test_the_command_names_what_is_no_run(invoke: Any, tmp_path: Path, content: str | None, message: str) -> None:
    run, page = tmp_path / "run.json", tmp_path / "report.html"
    if content is not None:
        run.write_text(content)
    done = invoke(run, "-o", page)
    assert done.exit_code == 1
    assert done.output == f"fastagg report: {run}{message}\n"
    assert not page.exists()


def test_an_output_in_no_directory_is_named(invoke: Any, tmp_path: Path) -> None:
    save_metrics(tmp_path / "run.json")
    done = invoke(tmp_path / "run.json", "-o", tmp_path / "none" / "report.html")
    assert done.output == f"fastagg report: {tmp_path / 'none'}: there is no such directory\n"


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("jinja2", "Reports need jinja2: pip install 'fastagg[report]'"),
        ("matplotlib", "fastagg.plots needs matplotlib: pip install 'fastagg[report]'"),
    ],
)
def test_without_a_package_one_sentence(module: str, message: str) -> None:
    pytest.importorskip("jinja2")
    program = f"""
import sys
sys.modules[{module!r}] = None
from fastagg.report import Run, write_report
run = Run()
run.record(metrics={{"loss": 1}})
try:
    write_report(run, "never.html")
except ModuleNotFoundError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == message + "\n"
