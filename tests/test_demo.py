"""The demo: it learns, it counts what it uploads, it repeats itself, and its figure is drawn."""

from dataclasses import replace

import numpy as np
import pytest

import fastagg

pytest.importorskip("sklearn")

from fastagg.cli import demo

SETTINGS = demo.Settings(rounds=3, clients=6, wires=("fp32", "int8"))


@pytest.fixture(scope="module")
def results():
    return demo.run(SETTINGS)


def test_accuracy_improves(results):
    for one in results.runs:
        untrained = demo.accuracy(demo.initial_model(SETTINGS), demo.load_digits(SETTINGS.seed)[1])
        assert len(one.accuracy) == SETTINGS.rounds
        assert untrained < one.accuracy[0] < one.accuracy[-1]
        assert one.accuracy[-1] > 0.7


def test_wires_learn_alike(results):
    plain, narrow = results.runs
    assert np.allclose(plain.accuracy, narrow.accuracy, atol=0.02)


def test_upload_bytes_are_those_of_the_codes(results):
    model = demo.initial_model(SETTINGS)
    expected = {
        "fp32": sum(layer.nbytes for layer in model),
        "int8": sum(fastagg.quantize(layer, "int8").nbytes for layer in model),
    }
    for one in results.runs:
        assert one.upload_bytes == [SETTINGS.clients_per_round * expected[one.wire]] * SETTINGS.rounds


def test_times_are_taken_each_round(results):
    for one in results.runs:
        assert len(one.fastagg_seconds) == len(one.numpy_seconds) == SETTINGS.rounds
        assert min(one.fastagg_seconds + one.numpy_seconds) > 0


def test_same_seed_gives_same_bits(results):
    again = demo.run(SETTINGS)
    for one, other in zip(results.runs, again.runs, strict=True):
        assert one.accuracy == other.accuracy
        assert [layer.tobytes() for layer in one.model] == [layer.tobytes() for layer in other.model]
    different = demo.run(replace(SETTINGS, seed=1, rounds=1))
    assert different.runs[0].accuracy[0] != results.runs[0].accuracy[0]


@pytest.mark.parametrize("concentration", [0.01, 0.5, 100.0])
def test_every_image_has_one_holder_and_nobody_is_empty_handed(concentration):
    labels = demo.load_digits(0)[0].labels
    shares = demo.split(labels, demo.Settings(clients=50, concentration=concentration))
    assert all(len(share) for share in shares)
    assert sorted(np.concatenate(shares).tolist()) == list(range(len(labels)))


def test_average_by_hand_agrees_with_fedavg_on_codes():
    values = np.random.default_rng(0).normal(size=(3, 7, 100)).astype(np.float32)
    uploads = [[fastagg.quantize(value, wire)] for value, wire in zip(values, ("fp16", "int8", "fp32"), strict=True)]
    np.testing.assert_allclose(
        demo.average_by_hand(uploads, [1, 2, 3])[0], fastagg.fedavg(uploads, [1, 2, 3])[0], rtol=1e-5, atol=1e-6
    )


def test_disagreement_is_an_error(monkeypatch):
    monkeypatch.setattr(demo, "fedavg", lambda uploads, weights: [layer + 1 for layer in uploads[0]])
    with pytest.raises(RuntimeError, match="layer 0: fedavg and the NumPy loop disagree"):
        demo.run(replace(SETTINGS, wires=("fp32",)))


def test_progress_is_told():
    seen = []
    demo.run(replace(SETTINGS, rounds=2), lambda wire, done: seen.append((wire, done)))
    assert seen == [("fp32", 1), ("fp32", 2), ("int8", 1), ("int8", 2)]


@pytest.mark.parametrize(
    ("name", "value"), [("rounds", 0), ("clients", 0), ("participation", 0.0), ("participation", 2.0)]
)
def test_wrong_settings_are_refused(name, value):
    with pytest.raises(ValueError, match=name):
        replace(SETTINGS, **{name: value})


@pytest.mark.parametrize("wires", [("fp32",), ("fp32", "int8")])
def test_figure_is_drawn(results, tmp_path, wires):
    pytest.importorskip("matplotlib")
    report = pytest.importorskip("fastagg.cli.demo_report")
    output = tmp_path / "folder" / "figure.png"
    report.draw(replace(results, runs=results.runs[: len(wires)]), output)
    picture = output.read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000
