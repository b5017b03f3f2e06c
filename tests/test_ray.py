"""`fastagg.trees` in one process, and `fastagg.ray` on a real local cluster: the same tree, so the same bits."""

from __future__ import annotations

import os
import signal
import sys
import weakref
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastagg
from data import counts, generator, normal
from fastagg import trees
from processes import run
from reference import assert_mean, assert_same_bits

SHAPES = {"weight": (7, 5), "bias": (33,), "scalar": ()}
Update = dict[str, np.ndarray]


def client(number: int, dtype: type = np.float32) -> Update:
    """The update of a client, the same wherever it is made."""
    random = generator(number)
    return {name: np.asarray(normal(random, shape, np.dtype(dtype))) for name, shape in SHAPES.items()}


def double_precision_client(number: int) -> Update:
    return client(number, np.float64)


def weights_of(clients: int) -> list[float]:
    return counts(generator(clients), clients)


def assert_same_update(one: Update, other: Update) -> None:
    assert list(one) == list(other)
    for name in one:
        assert_same_bits(one[name], other[name])


def save(path: Path, update: Update) -> Path:
    np.savez(path, **update)
    return path


def load_npz(path: Path) -> Update:
    with open(path, "rb") as file, np.load(file) as arrays:
        return dict(arrays)


# The tree


@pytest.mark.parametrize(
    ("leaves", "tree"),
    [
        ("a", "a"),
        ("ab", "(ab)"),
        ("abc", "((ab)c)"),
        ("abcd", "((ab)(cd))"),
        ("abcdefg", "(((ab)(cd))((ef)g))"),
        ("abcdefghi", "((((ab)(cd))((ef)(gh)))i)"),
    ],
)
def test_the_shape_of_the_tree(leaves: str, tree: str) -> None:
    assert trees.fold(iter(leaves), lambda left, right: f"({left}{right})") == tree


def test_few_partial_sums_are_alive_at_a_time() -> None:
    class Node:
        pass

    alive: weakref.WeakSet[Node] = weakref.WeakSet()
    most = 0

    def node(*_: Node) -> Node:
        nonlocal most
        made = Node()
        alive.add(made)
        most = max(most, len(alive))
        return made

    trees.fold((node() for _ in range(1000)), node)
    assert most <= 13  # log2(1000) + 2, and the result of a merge beside its operands


@pytest.mark.parametrize("fan_in", [1, np.int64(4), 32])
@pytest.mark.parametrize("clients", [1, 2, 33, 100])
def test_the_mean(clients: int, fan_in: int) -> None:
    weights = weights_of(clients)
    mean = trees.average(range(clients), weights, load=client, fan_in=fan_in)
    updates = [client(number) for number in range(clients)]
    for name in SHAPES:
        assert_mean(mean[name], [update[name] for update in updates], weights)


def test_equal_weights_are_the_default() -> None:
    assert trees.average([1.0, 2.0, 6.0], load=np.float32, fan_in=2) == 3.0


def test_the_bits_are_those_of_the_same_merges_by_hand() -> None:
    weights = weights_of(7)
    chunks = []
    for begin in (0, 2, 4, 6):
        chunks.append(fastagg.Accumulator())
        for number in range(begin, min(begin + 2, 7)):
            chunks[-1].add(client(number, np.float64), weights[number])
    chunks[0].merge(chunks[1])
    chunks[2].merge(chunks[3])
    chunks[0].merge(chunks[2])
    mean = trees.average(range(7), weights, load=double_precision_client, fan_in=2)
    assert_same_update(mean, chunks[0].result())


def test_one_client_is_in_memory_at_a_time() -> None:
    class Mapping(dict[str, np.ndarray]):
        pass

    loaded: list[weakref.ref[Mapping]] = []

    def load(number: int) -> Mapping:
        assert not any(reference() is not None for reference in loaded)
        update = Mapping(client(number))
        loaded.append(weakref.ref(update))
        return update

    trees.average(range(9), load=load, fan_in=4)
    assert len(loaded) == 9


def test_files_are_read_by_their_path(tmp_path: Path) -> None:
    pytest.importorskip("fastagg.files")
    paths = [save(tmp_path / f"client-{number}.npz", client(number)) for number in range(5)]
    mean = trees.average(paths, weights_of(5), fan_in=2)
    assert_same_update(mean, trees.average(range(5), weights_of(5), load=client, fan_in=2))


# Clients that are wrong. Each is a file, so that messages can name it.


def spoil_nan(path: Path) -> None:
    save(path, {**client(0), "bias": np.full(33, np.nan, np.float32)})


def spoil_shape(path: Path) -> None:
    save(path, {**client(0), "bias": np.zeros(32, np.float32)})


def spoil_dtype(path: Path) -> None:
    save(path, {**client(0), "bias": np.zeros(33, np.float16)})


def spoil_keys(path: Path) -> None:
    save(path, {name: array for name, array in client(0).items() if name != "bias"})


def spoil_bytes(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04 no archive")


def spoil_existence(path: Path) -> None:
    path.unlink()


WRONG: dict[str, tuple[Callable[[Path], None], type[Exception], str]] = {
    "nan": (spoil_nan, ValueError, "leaf 'bias': holds a NaN"),
    "shape": (spoil_shape, ValueError, r"leaf 'bias': expected shape \(33,\) like .*client-4.npz's, got \(32,\)"),
    "dtype": (spoil_dtype, TypeError, "leaf 'bias': expected dtype float32 like .*client-4.npz's, got float16"),
    "keys": (spoil_keys, ValueError, "missing leaves 'bias', compared with .*client-4.npz"),
    "bytes": (spoil_bytes, zipfile.BadZipFile, "zip"),
    "existence": (spoil_existence, FileNotFoundError, ""),
}
wrong = pytest.mark.parametrize(("spoil", "kind", "message"), WRONG.values(), ids=WRONG.keys())


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Nine clients' files; with a fan-in of 4, the sixth is in the middle of the second chunk."""
    return [save(tmp_path / f"client-{number}.npz", client(number)) for number in range(9)]


@wrong
def test_a_wrong_client_is_named(
    files: list[Path], spoil: Callable[[Path], None], kind: type[Exception], message: str
) -> None:
    spoil(files[5])
    with pytest.raises(kind, match=f"client-5.npz.*{message}|{message}.*client-5.npz"):
        trees.average(files, load=load_npz, fan_in=4)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_shape, r"leaf 'bias': expected float32 \(33,\), got float32 \(32,\)"),
        (spoil_keys, "its leaves have other names"),
    ],
)
def test_chunks_that_differ_are_named(files: list[Path], spoil: Callable[[Path], None], message: str) -> None:
    for path in files[4:8]:
        spoil(path)
    names = "client-4.npz to .*client-7.npz.*{}.*, compared with .*client-0.npz to .*client-3.npz"
    with pytest.raises(ValueError, match=names.format(message)):
        trees.average(files, load=load_npz, fan_in=4)


def test_leaves_are_matched_by_name_in_chunks_and_among_them() -> None:
    def load(number: int) -> Update:
        update = client(number)
        return update if number % 3 else dict(reversed(update.items()))

    mean = trees.average(range(1, 9), load=load, fan_in=2)
    assert_same_update(mean, trees.average(range(1, 9), load=client, fan_in=2))


def test_a_wrong_weight_names_its_client(files: list[Path]) -> None:
    with pytest.raises(ValueError, match=r"the weight of .*client-8.npz: expected 0, or"):
        trees.average(files, [1.0] * 8 + [1e200], load=load_npz)


def test_a_client_is_dropped_by_name(files: list[Path]) -> None:
    spoil_nan(files[4])
    with pytest.warns(fastagg.DroppedUpdateWarning, match="dropped: .*client-4.npz, leaf 'bias': holds") as warnings:
        mean = trees.average(files, load=load_npz, fan_in=4, nan_policy="drop")
    assert len(warnings) == 1
    assert warnings[0].filename == __file__
    weights = [float(number != 4) for number in range(9)]
    assert_same_update(mean, trees.average(files, weights, load=load_npz, fan_in=4))


def test_a_chunk_of_which_nothing_is_left(files: list[Path]) -> None:
    for path in files[:4]:
        spoil_nan(path)
    with pytest.warns(fastagg.DroppedUpdateWarning, match="client-") as warnings:
        mean = trees.average(files, load=load_npz, fan_in=2, nan_policy="drop")
    assert len(warnings) == 4
    assert_mean(mean["bias"], [client(number)["bias"] for number in range(4, 9)], [1.0] * 5)


def test_nobody_is_left(files: list[Path]) -> None:
    spoil_nan(files[0])
    with (
        pytest.warns(fastagg.DroppedUpdateWarning, match="client-0"),
        pytest.raises(ValueError, match="nothing was added"),
    ):
        trees.average(files[:1], load=load_npz, nan_policy="drop")


def test_the_words_of_a_load_stay_as_they_are() -> None:
    def load(number: int) -> np.ndarray:
        if number == 1:
            raise ValueError("client 12 has no data, client 1 has")
        return np.zeros(2)

    with pytest.raises(ValueError, match=r"^source 1: client 12 has no data, client 1 has$"):
        trees.average(range(2), load=load)


def test_an_error_of_a_type_that_needs_more_than_a_message_is_told_as_a_value_error() -> None:
    def load(number: int) -> np.ndarray:
        return np.array([float(b"\xff".decode())])

    with pytest.raises(ValueError, match=r"source 0: .*can't decode byte 0xff.*\(UnicodeDecodeError\)"):
        trees.average([0], load=load)


@pytest.mark.parametrize(
    ("arguments", "options", "kind", "message"),
    [
        (("model.npz",), {}, TypeError, "sources: expected a sequence of sources, got the single path 'model.npz'"),
        (([],), {}, ValueError, "sources: expected at least one, got none"),
        (([np.zeros(1)],), {}, TypeError, "source 0: expected a path, or a load= that reads it, got ndarray"),
        (([0], [1.0, 2.0]), {}, ValueError, "weights: expected 1, one for each update, got 2"),
        (([0], [-1.0]), {}, ValueError, "the weight of client 0"),
        (([0],), {"fan_in": 0}, ValueError, "fan_in: expected an integer of 1 or more, got 0"),
        (([0],), {"nan_policy": "ignore"}, ValueError, "nan_policy: expected one of"),
        (([0],), {"integer_policy": "sum"}, ValueError, "integer_policy: expected one of"),
    ],
)
def test_wrong_arguments(arguments: Any, options: dict[str, Any], kind: type[Exception], message: str) -> None:
    if "expected a path" not in message:
        options = {"load": client, **options}
    with pytest.raises(kind, match=message):
        trees.average(*arguments, **options)


def test_without_ray_one_sentence_says_what_to_install() -> None:
    done = run("import sys; sys.modules['ray'] = None; import fastagg.ray")
    assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: fastagg.ray needs Ray: pip install 'fastagg[ray]'"


# The cluster

on_a_cluster = [
    pytest.mark.real_run,
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),  # hints of Ray's own
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # its processes and log files, left to the collector
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Ray on this machine, with two processors."""
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as environment:  # workers import the functions of this file by its name
        environment.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
        ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield ray
    ray.shutdown()


class TestCluster:
    """Tests of one running cluster."""

    pytestmark = on_a_cluster

    @pytest.mark.parametrize("load", [client, double_precision_client])
    def test_the_bits_are_those_of_one_process_whatever_the_workers(self, cluster: Any, load: Any) -> None:
        import fastagg.ray

        weights = weights_of(50)
        here = trees.average(range(50), weights, load=load, fan_in=4)
        for num_cpus in (0.5, 1, 2):  # four workers, two, and one of two threads
            there = fastagg.ray.average(range(50), weights, load=load, fan_in=4, num_cpus=num_cpus)
            assert_same_update(there, here)

    def test_files(self, cluster: Any, files: list[Path]) -> None:
        pytest.importorskip("fastagg.files")
        import fastagg.ray

        assert_same_update(fastagg.ray.average(files, fan_in=4), trees.average(files, fan_in=4))

    def test_updates_in_the_object_store(self, cluster: Any) -> None:
        import fastagg.ray

        references = [cluster.put(client(number)) for number in range(5)]
        mean = fastagg.ray.average(references, load=cluster.get, fan_in=2)
        assert_same_update(mean, trees.average(range(5), load=client, fan_in=2))

    @wrong
    def test_a_wrong_client_is_named_here(
        self,
        cluster: Any,
        files: list[Path],
        spoil: Callable[[Path], None],
        kind: type[Exception],
        message: str,
    ) -> None:
        import fastagg.ray

        spoil(files[5])
        with pytest.raises(kind, match=f"client-5.npz.*{message}|{message}.*client-5.npz") as caught:
            fastagg.ray.average(files, load=load_npz, fan_in=4)
        assert not isinstance(caught.value, cluster.exceptions.RayError)
        assert "\n" not in str(caught.value)

    def test_chunks_that_differ_are_named_here(self, cluster: Any, files: list[Path]) -> None:
        import fastagg.ray

        for path in files[4:8]:
            spoil_shape(path)
        with pytest.raises(ValueError, match=r"client-4.npz to .*client-7.npz, leaf 'bias'.*compared with"):
            fastagg.ray.average(files, load=load_npz, fan_in=4)

    def test_what_a_worker_drops_is_warned_of_here(self, cluster: Any, files: list[Path]) -> None:
        import fastagg.ray

        spoil_nan(files[6])
        with pytest.warns(fastagg.DroppedUpdateWarning, match="dropped: .*client-6.npz, leaf 'bias'") as warnings:
            mean = fastagg.ray.average(files, load=load_npz, fan_in=4, nan_policy="drop")
        assert len(warnings) == 1
        assert_same_update(
            mean, trees.average(files, [float(number != 6) for number in range(9)], load=load_npz, fan_in=4)
        )

    def test_a_killed_worker_changes_no_bit(self, cluster: Any, files: list[Path], tmp_path: Path) -> None:
        import fastagg.ray

        killed = tmp_path / "killed"

        def load(path: Path) -> Update:
            if path == files[5] and not killed.exists():
                killed.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return load_npz(path)

        mean = fastagg.ray.average(files, load=load, fan_in=4)
        assert killed.exists()
        assert_same_update(mean, trees.average(files, load=load_npz, fan_in=4))

    def test_an_error_ends_the_run_before_all_is_read(self, cluster: Any, tmp_path: Path) -> None:
        import fastagg.ray

        def load(number: int) -> Update:
            (tmp_path / str(number)).touch()
            if number == 0:
                raise ValueError("unreadable")
            return client(number)

        with pytest.raises(ValueError, match="source 0: unreadable"):
            fastagg.ray.average(range(200), load=load, fan_in=2)
        assert len(list(tmp_path.iterdir())) < 100

    def test_processors_must_be_more_than_none(self, cluster: Any) -> None:
        import fastagg.ray

        with pytest.raises(ValueError, match="num_cpus: expected a number above 0, got 0"):
            fastagg.ray.average(range(2), load=client, num_cpus=0)
