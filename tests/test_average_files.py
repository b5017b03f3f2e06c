"""Averaging of checkpoint files: the bits of `fedavg` from every format, and what happens when something is wrong."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import data
import fastagg
import reference
from fastagg.files import NotKeptWarning, atomic, average, open_checkpoint
from fastagg.files.atomic import atomic_directory, atomic_file
from fastagg.files.safetensors import DTYPES, read_header
from processes import output_of

torch = pytest.importorskip("torch")
application = pytest.importorskip("fastagg.cli.commands").application
CliRunner = pytest.importorskip("typer.testing").CliRunner

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FORMATS = (".safetensors", ".npz", ".pt")
WIRES = ("fp32", "bf16", "fp16", "fp8_e4m3", "fp8_e5m2", "int8", "int4", "sign")
NAMES = {np.dtype(name) if name != "bfloat16" else BFLOAT16: short for short, name in DTYPES.items()}


def model(seed, bf16=True):
    """Leaves of many dtypes and shapes: one larger than a piece, empty ones, scalars, sizes that no block divides."""
    generator = data.generator(seed)
    shapes = {"large": (3, 200_003), "odd": (1001,), "scalar": (), "empty": (0, 3), "one": (1,)}
    leaves = {name: data.normal(generator, shape, np.float32) for name, shape in shapes.items()}
    leaves["half"] = data.normal(generator, 77, np.float16)
    leaves["double"] = data.normal(generator, (3, 5), np.float64)
    leaves["count"] = np.array(seed + 5)
    leaves["mask"] = data.whole(generator, 13, np.dtype(bool))
    leaves["bytes"] = data.whole(generator, 9, np.dtype(np.uint8))
    if bf16:
        leaves["brain"] = data.normal(generator, 515, BFLOAT16)
    return leaves


def safetensors_bytes(leaves, metadata=None):
    """A .safetensors file, made from the format's description, leaves as they come."""
    header = {} if metadata is None else {"__metadata__": metadata}
    parts = []
    end = 0
    for name, array in leaves.items():
        parts.append(np.ascontiguousarray(array).tobytes())
        offsets = [end, end + len(parts[-1])]
        header[name] = {"dtype": NAMES[array.dtype], "shape": list(array.shape), "data_offsets": offsets}
        end = offsets[1]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(parts)


def as_tensor(array):
    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def write(path, leaves, **options):
    """A checkpoint of the format that the suffix names, written without fastagg."""
    if path.suffix == ".safetensors":
        path.write_bytes(safetensors_bytes(leaves, **options))
    elif path.suffix == ".npz":
        np.savez(path, **leaves)
    else:
        torch.save({name: as_tensor(array) for name, array in leaves.items()}, path)
    return path


def write_shards(folder, shards, index="model.safetensors.index.json", **metadata):
    """A sharded checkpoint: leaves by file name."""
    folder.mkdir()
    for name, leaves in shards.items():
        write(folder / name, leaves, metadata={"shard": name})
    weight_map = {leaf: name for name, leaves in shards.items() for leaf in leaves}
    (folder / index).write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}))
    return folder


def contents(path):
    """All leaves of a checkpoint, in memory."""
    with open_checkpoint(path) as checkpoint:
        return {name: leaf if isinstance(leaf, fastagg.Quantized) else leaf.copy() for name, leaf in checkpoint.items()}


def assert_same(result, expected):
    """The same names, and each leaf the same bits."""
    assert result.keys() == expected.keys()
    for name in expected:
        reference.assert_same_bits(result[name], np.asarray(expected[name]))


def refuses(error, message, *arguments, **options):
    """An average that must fail, and leave nothing behind."""
    folder = Path(arguments[1]).parent
    before = sorted(folder.iterdir())
    with pytest.raises(error, match=message) as caught:
        average(*arguments, **options)
    assert sorted(folder.iterdir()) == before
    return str(caught.value)


def invoke(*arguments):
    return CliRunner().invoke(application, ["average", *map(str, arguments)])


# The mean.


@pytest.mark.parametrize("suffix", FORMATS)
def test_an_opened_checkpoint_gives_the_file_s_arrays(tmp_path, suffix):
    leaves = model(0, bf16=suffix != ".npz")
    with open_checkpoint(write(tmp_path / f"a{suffix}", leaves)) as checkpoint:
        assert_same(dict(checkpoint), leaves)
        assert checkpoint.leaves["large"] == ("float32", (3, 200_003), None)
        assert checkpoint.nbytes == sum(leaf.nbytes for leaf in leaves.values())
        array = checkpoint["large"]
        with pytest.raises(KeyError):
            checkpoint["nothing"]
    assert not array.flags.writeable
    reference.assert_same_bits(array, leaves["large"])  # stays valid


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("output", FORMATS)
def test_the_same_bits_as_fedavg_from_and_to_every_format(tmp_path, suffix, output):
    bf16 = ".npz" not in (suffix, output)
    models = [model(seed, bf16) for seed in range(3)]
    paths = [write(tmp_path / f"{seed}{suffix}", leaves) for seed, leaves in enumerate(models)]
    done = average(paths, tmp_path / f"out{output}", [1, 20, 3.5])
    assert_same(contents(done.output), fastagg.fedavg(models, [1, 20, 3.5]))
    assert done.leaves == len(models[0])
    assert done.bytes_read == 3 * sum(leaf.nbytes for leaf in models[0].values())


def test_formats_mix(tmp_path):
    models = [model(seed, bf16=False) for seed in range(4)]
    paths = [write(tmp_path / f"a{suffix}", leaves) for suffix, leaves in zip(FORMATS, models[:3], strict=True)]
    shards = {"x.safetensors": {"odd": models[3].pop("odd")}, "y.safetensors": models[3]}
    paths.append(write_shards(tmp_path / "shards", shards))
    models[3] = shards["x.safetensors"] | shards["y.safetensors"]
    average(paths, tmp_path / "out.safetensors")
    assert_same(contents(tmp_path / "out.safetensors"), fastagg.fedavg(models))


def test_other_programs_read_what_is_written(tmp_path):
    leaves = model(0)
    path = write(tmp_path / "a.safetensors", leaves)
    average([path], tmp_path / "out.pt")
    loaded = torch.load(tmp_path / "out.pt", weights_only=True)
    assert all(torch.equal(loaded[name], as_tensor(leaf)) for name, leaf in leaves.items())
    leaves.pop("brain")
    average([write(path, leaves)], tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz") as archive:
        assert_same(dict(archive), leaves)


def test_the_safetensors_library_reads_what_is_written(tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    leaves = model(0, bf16=False)
    average([write(tmp_path / "a.npz", leaves)], tmp_path / "out.safetensors")
    assert_same(library.load_file(tmp_path / "out.safetensors"), leaves)


def test_compressed_fortran_and_big_endian_members(tmp_path):
    plain = {"a": np.arange(12.0).reshape(3, 4), "b": np.arange(6, dtype=np.int32)}
    other = {"a": np.asfortranarray(plain["a"] * 2), "b": plain["b"].astype(">i4")}
    np.savez_compressed(tmp_path / "a.npz", **plain)
    np.savez(tmp_path / "b.npz", **other)
    average([tmp_path / "a.npz", tmp_path / "b.npz"], tmp_path / "out.npz")
    assert_same(contents(tmp_path / "out.npz"), fastagg.fedavg([plain, {**other, "b": plain["b"]}]))


def test_tensors_that_lie_unaligned_or_strided(tmp_path):
    models = [{"flag": np.array([True]), "w": data.normal(data.generator(seed), 1001, np.float32)} for seed in range(2)]
    paths = [write(tmp_path / f"{seed}.safetensors", leaves) for seed, leaves in enumerate(models)]
    state = {"flag": torch.tensor([True]), "w": torch.from_numpy(np.repeat(models[0]["w"], 2))[::2]}
    torch.save(state, tmp_path / "c.pt")
    average([*paths, tmp_path / "c.pt"], tmp_path / "out.safetensors")
    assert_same(contents(tmp_path / "out.safetensors"), fastagg.fedavg([*models, models[0]]))


def test_the_first_file_s_order_and_metadata_are_kept(tmp_path):
    leaves = {name: np.full(3, index, np.float32) for index, name in enumerate("cab")}
    first = write(tmp_path / "a.safetensors", leaves, metadata={"format": "pt", "é": "ü"})
    second = write(tmp_path / "b.safetensors", dict(sorted(leaves.items())), metadata={"other": "1"})
    average([first, second], tmp_path / "out.safetensors")
    with open_checkpoint(tmp_path / "out.safetensors") as result:
        assert list(result) == ["c", "a", "b"]
        assert result.metadata == {"format": "pt", "é": "ü"}


@pytest.mark.parametrize("dtype", ["float32", "fp16", torch.bfloat16, np.float64])
def test_dtype_says_what_the_result_is(tmp_path, dtype):
    models = [model(0), {**model(1), "half": model(1)["half"].astype(np.float32)}]
    paths = [write(tmp_path / f"{seed}.safetensors", leaves) for seed, leaves in enumerate(models)]
    refuses(TypeError, r"1\.safetensors: leaf 'half': expected dtype float16 .*got float32", paths, tmp_path / "o.pt")
    average(paths, tmp_path / "out.safetensors", dtype=dtype)
    assert_same(contents(tmp_path / "out.safetensors"), fastagg.fedavg(models, dtype=dtype))


@pytest.mark.parametrize("policy", ["max", "first", "round"])
def test_the_integer_policies(tmp_path, policy):
    models = [model(seed) for seed in range(3)]
    paths = [write(tmp_path / f"{seed}.safetensors", leaves) for seed, leaves in enumerate(models)]
    average(paths, tmp_path / "out.safetensors", [0, 2, 3], integer_policy=policy)
    assert_same(contents(tmp_path / "out.safetensors"), fastagg.fedavg(models, [0, 2, 3], integer_policy=policy))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.lists(st.lists(st.integers(0, 40), max_size=3), min_size=1, max_size=5),
    dtype=st.sampled_from(sorted(NAMES, key=str)),
    clients=st.lists(st.tuples(st.sampled_from(FORMATS), st.integers(0, 100)), min_size=1, max_size=5),
    output=st.sampled_from(FORMATS),
)
def test_any_structure_gives_the_bits_of_fedavg(tmp_path, shapes, dtype, clients, output):
    weights = [weight for _, weight in clients[:-1]] + [clients[-1][1] + 1]
    suffixes = [".safetensors" if dtype == BFLOAT16 and suffix == ".npz" else suffix for suffix, _ in clients]
    output = ".safetensors" if dtype == BFLOAT16 and output == ".npz" else output
    models, paths = [], []
    for client, suffix in enumerate(suffixes):
        generator = data.generator(client)
        make = data.normal if dtype.kind in "fV" else data.whole
        models.append({f"leaf.{index}": make(generator, tuple(shape), dtype) for index, shape in enumerate(shapes)})
        models[-1] = {name: np.asarray(array, dtype) for name, array in models[-1].items()}
        paths.append(write(tmp_path / f"{client}{suffix}", models[-1]))
    done = average(paths, tmp_path / f"out{output}", weights, integer_policy="max", force=True)
    assert_same(contents(done.output), fastagg.fedavg(models, weights, integer_policy="max"))


# Weights.


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    weights=st.lists(st.floats(-100, 100), min_size=1, max_size=20).filter(any),
    dtype=st.sampled_from([np.dtype(np.float64), np.dtype(np.float32), np.dtype(np.float16), BFLOAT16]),
    normalize=st.booleans(),
)
@example(weights=[63.0, 1.9271349599911574, -54.0], dtype=np.dtype(np.float64), normalize=True)  # sums that cancel
def test_signed_weights_are_within_the_stated_error(tmp_path, weights, dtype, normalize):
    columns = [data.normal(data.generator(seed), 300, dtype) for seed in range(len(weights))]
    paths = [write(tmp_path / f"{seed}.safetensors", {"w": column}) for seed, column in enumerate(columns)]
    options = {"allow_negative": True, "normalize": normalize, "force": True, "nan_policy": "propagate"}
    wide = [np.longdouble(weight) for weight in weights]
    divisor = sum(wide) if normalize else np.longdouble(1)
    if abs(divisor) <= 1e-9 * sum(map(abs, wide)):  # the error is tested below
        return
    average(paths, tmp_path / "out.safetensors", weights, **options)
    exact = sum(weight * reference.wide(column) for weight, column in zip(wide, columns, strict=True)) / divisor
    terms = zip(wide, columns, strict=True)
    scale = sum(abs(weight) * np.abs(reference.wide(column)) for weight, column in terms) / abs(divisor)
    narrow = dtype.itemsize == 2
    slack = ((len(weights) + 1) * 2.0**-52 + (2.0**-21 if narrow else 0)) * scale
    result = contents(tmp_path / "out.safetensors")["w"]
    if dtype == np.float64:
        assert np.all(np.abs(result - exact) <= slack + np.spacing(np.abs(result)))
    else:
        reference.assert_rounded_once(
            result, exact.astype(np.float64), (slack + 2.0**-52 * np.abs(exact)).astype(float)
        )


def test_task_arithmetic(tmp_path):
    base, tuned = (np.arange(6, dtype=np.float32) * factor for factor in (1, 3))
    paths = [
        write(tmp_path / f"{name}.safetensors", {"w": array}) for name, array in (("base", base), ("tuned", tuned))
    ]
    refuses(
        ValueError, r"base\.safetensors: expected a weight of 0 or more, got -0\.5", paths, tmp_path / "o.pt", [-0.5, 1]
    )
    average(paths, tmp_path / "out.safetensors", [-0.5, 1.5], allow_negative=True)
    np.testing.assert_array_equal(contents(tmp_path / "out.safetensors")["w"], base * 4)


def test_the_plain_sum(tmp_path):
    paths = [
        write(tmp_path / f"{value}.npz", {"w": np.full(3, value, np.float32), "b": np.array([True])})
        for value in (1, 2)
    ]
    average(paths, tmp_path / "out.npz", [1, 3], normalize=False, integer_policy="round")
    result = contents(tmp_path / "out.npz")
    np.testing.assert_array_equal(result["w"], 7)
    assert result["b"].tobytes() == b"\1"  # a sum of four is still no other bool than True
    zero = {"allow_negative": True}
    refuses(ValueError, "sum is zero", paths, tmp_path / "o.pt", [1, -1], **zero)
    refuses(ValueError, "sum is zero", [*paths, paths[0]], tmp_path / "o.pt", [0.1, 0.2, -0.3], **zero)
    average(paths, tmp_path / "out.npz", [1, -1], normalize=False, force=True, **zero)
    np.testing.assert_array_equal(contents(tmp_path / "out.npz")["w"], -1)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1], "expected 2, one for each file, got 1"),
        ([0, 0], "all are zero"),
        ([1, float("nan")], r"b\.npz: expected a finite weight, got nan"),
        ([float("inf"), 1], r"a\.npz: expected a finite weight, got inf"),
        ([10**400, 1], r"a\.npz: expected a finite weight, got inf"),
    ],
)
def test_wrong_weights(tmp_path, weights, message):
    paths = [write(tmp_path / name, {"w": np.ones(3)}) for name in ("a.npz", "b.npz")]
    refuses(ValueError, message, paths, tmp_path / "out.npz", weights)


@pytest.mark.parametrize("weight", ["1", "x", True, None, np.True_])
def test_a_weight_that_is_no_number_names_its_file(tmp_path, weight):
    paths = [write(tmp_path / name, {"w": np.ones(3)}) for name in ("a.npz", "b.npz")]
    refuses(TypeError, r"b\.npz: expected a number as its weight", paths, tmp_path / "out.npz", [1, weight])


# NaN and infinity.


def with_nan(tmp_path, value=np.nan):
    models = [model(seed) for seed in range(3)]
    models[1]["large"][2, 199_999] = value
    return models, [write(tmp_path / f"{seed}.safetensors", leaves) for seed, leaves in enumerate(models)]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_nan_is_an_error_that_names_the_file_and_the_leaf(tmp_path, value):
    _, paths = with_nan(tmp_path, value)
    refuses(ValueError, r"1\.safetensors: leaf 'large' holds a NaN", paths, tmp_path / "out.safetensors")


def test_dropping_leaves_the_whole_file_out(tmp_path):
    models, paths = with_nan(tmp_path)
    with pytest.warns(fastagg.DroppedUpdateWarning, match=r"1\.safetensors dropped: leaf 'large'"):
        done = average(paths, tmp_path / "out.safetensors", [1, 2, 3], nan_policy="drop")
    assert done.dropped == {paths[1]: "large"}
    assert_same(contents(done.output), fastagg.fedavg([models[0], models[2]], [1, 3]))
    with pytest.warns(fastagg.DroppedUpdateWarning):
        refuses(ValueError, "none is left", [paths[1]], tmp_path / "o.safetensors", nan_policy="drop")


def test_a_file_of_weight_zero_never_contributes(tmp_path):
    models, paths = with_nan(tmp_path)
    average(paths, tmp_path / "out.safetensors", [1, 0, 3])
    assert_same(contents(tmp_path / "out.safetensors"), fastagg.fedavg([models[0], models[2]], [1, 3]))


def test_propagating(tmp_path):
    models, paths = with_nan(tmp_path)
    average(paths, tmp_path / "out.safetensors", nan_policy="propagate")
    assert_same(contents(tmp_path / "out.safetensors"), fastagg.fedavg(models, nan_policy="propagate"))


def test_a_result_that_is_too_large_for_its_dtype(tmp_path):
    path = write(tmp_path / "a.npz", {"w": np.full(3, 70000, np.float32)})
    refuses(ValueError, "leaf 'w': the result is too large for float16", [path], tmp_path / "o.npz", dtype="fp16")
    refuses(ValueError, "leaf 'w': the result is too large for fp16", [path], tmp_path / "o.safetensors", wire="fp16")


# Quantised files.


@pytest.mark.parametrize("wire", WIRES)
def test_a_quantised_file_holds_what_quantize_gives(tmp_path, wire):
    models = [model(seed) for seed in range(2)]
    paths = [write(tmp_path / f"{seed}.safetensors", leaves) for seed, leaves in enumerate(models)]
    average(paths, tmp_path / "q.safetensors", wire=wire)
    for name, mean in fastagg.fedavg(models).items():
        leaf = contents(tmp_path / "q.safetensors")[name]
        if mean.dtype.kind not in "fV":
            reference.assert_same_bits(leaf, np.asarray(mean))
            continue
        expected = fastagg.quantize(mean, wire)
        reference.assert_same_bits(leaf.data, expected.data)
        assert (leaf.scales is None) == (expected.scales is None)
        if leaf.scales is not None:
            reference.assert_same_bits(leaf.scales, expected.scales)
        assert (leaf.dtype, leaf.shape, leaf.block) == (expected.dtype, expected.shape, expected.block)


@pytest.mark.parametrize("wire", WIRES)
def test_a_quantised_file_can_be_an_input(tmp_path, wire):
    models = [model(seed) for seed in range(2)]
    paths = [write(tmp_path / f"{seed}.safetensors", leaves) for seed, leaves in enumerate(models)]
    average(paths[:1], tmp_path / "q.safetensors", wire=wire)
    coded = contents(tmp_path / "q.safetensors")
    average([tmp_path / "q.safetensors", paths[1]], tmp_path / "out.safetensors", [3, 1])
    expected = fastagg.fedavg([coded, models[1]], [3, 1])
    assert_same({name: contents(tmp_path / "out.safetensors")[name] for name in expected}, expected)


def test_what_a_quantised_file_cannot_be(tmp_path):
    path = write(tmp_path / "a.safetensors", {"w": np.ones(3, np.float32), "w.codes": np.ones(3, np.float32)})
    refuses(ValueError, r"only \.safetensors", [path], tmp_path / "o.npz", wire="int8")
    refuses(ValueError, "cannot hold NaN", [path], tmp_path / "o.safetensors", wire="int8", nan_policy="propagate")
    other = write(tmp_path / "b.safetensors", {"w": np.ones(3, np.float32), "w.codes": np.ones(3, np.int32)})
    refuses(ValueError, r"'w\.codes' is also a name of codes", [other], tmp_path / "o.safetensors", wire="int8")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{", "cannot be understood"),
        ('{"version":2,"leaves":{}}', "version 2, expected 1"),
        ('{"version":1,"leaves":{"w":{"wire":"int9","block":null,"dtype":"float32","shape":[3]}}}', "'int9'"),
        (
            '{"version":1,"leaves":{"v":{"wire":"int8","block":256,"dtype":"float32","shape":[3]}}}',
            r"'v\.\w+'.* missing",
        ),
        ('{"version":1,"leaves":{"w":{"wire":"int8","block":256,"dtype":"float32","shape":[4]}}}', "expected shape"),
        ('{"version":1,"leaves":{"w":{"wire":"int8","block":100,"dtype":"float32","shape":[3]}}}', "power of two"),
    ],
)
def test_wrong_metadata_of_quantised_leaves(tmp_path, entry, message):
    leaves = {"w.codes": np.ones(3, np.int8), "w.scales": np.ones(1, np.float32)}
    path = write(tmp_path / "q.safetensors", leaves, metadata={"fastagg.quantized": entry})
    with pytest.raises((TypeError, ValueError), match=rf"q\.safetensors: .*{message}"):
        open_checkpoint(path)


# Shards.


def test_shards_become_shards(tmp_path):
    models = [{f"leaf.{index}": np.full(5, index + seed, np.float32) for index in range(4)} for seed in range(2)]
    folders = []
    for seed, leaves in enumerate(models):
        names = sorted(leaves)
        shards = {f"{part}-of-2.safetensors": {name: leaves[name] for name in names[2 * part :][:2]} for part in (0, 1)}
        folders.append(write_shards(tmp_path / f"m{seed}", shards, index="x.safetensors.index.json", kept="yes"))
    average([folders[0], folders[1] / "x.safetensors.index.json"], tmp_path / "out")
    assert_same(contents(tmp_path / "out"), fastagg.fedavg(models))
    names = ["0-of-2.safetensors", "1-of-2.safetensors", "x.safetensors.index.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    index = json.loads((tmp_path / "out" / names[2]).read_text())
    assert index["metadata"] == {"kept": "yes", "total_size": 80}
    with open_checkpoint(tmp_path / "out" / names[0]) as shard:
        assert (list(shard), shard.metadata) == (["leaf.0", "leaf.1"], {"shard": names[0]})
    average(folders, tmp_path / "quantised", wire="int8")
    assert isinstance(contents(tmp_path / "quantised")["leaf.3"], fastagg.Quantized)
    with pytest.warns(NotKeptWarning, match="metadata of its index"):
        average(folders, tmp_path / "one.npz")  # or one file
    assert_same(contents(tmp_path / "one.npz"), fastagg.fedavg(models))


def test_a_directory_is_replaced_as_a_whole(tmp_path):
    old = write_shards(tmp_path / "m", {"a.safetensors": {"a": np.ones(2, np.float32)}})
    refuses(FileExistsError, "exists", [old], old)
    average([old], old, [2], normalize=False, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]
    np.testing.assert_array_equal(contents(old)["a"], 2)
    (old / "config.json").write_text("{}")
    refuses(ValueError, r"not replaced, for it holds 'config\.json'", [old], old, force=True)


def test_a_directory_needs_shards_to_be_like(tmp_path):
    path = write(tmp_path / "a.npz", {"w": np.ones(3)})
    refuses(ValueError, "expected a name that ends in", [path], tmp_path / "out")
    refuses(ValueError, "name the directory", [path], tmp_path / "x.safetensors.index.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.update(weight_map={}), "weight_map"),
        (lambda index: index["weight_map"].update(b="a.safetensors"), r"a\.safetensors: lacks 'b'"),
        (lambda index: index["weight_map"].pop("a"), r"a\.safetensors: holds 'a'"),
        (lambda index: index["weight_map"].update(a="../a.safetensors"), "beside the index"),
        (lambda index: index["weight_map"].update(a="c.safetensors"), r"c\.safetensors"),
        (lambda index: index["weight_map"].update(a=".."), r"index\.json: leaf 'a': expected the name of a \.safet"),
        (lambda index: index["weight_map"].update(a=""), r"index\.json: leaf 'a': expected the name of a \.safet"),
        (lambda index: index["weight_map"].update(a="a.bin"), r"index\.json: leaf 'a': expected the name of a \.safet"),
        (lambda index: index["weight_map"].update(a="\0.safetensors"), r"index\.json: leaf 'a': expected the name"),
    ],
)
def test_wrong_indices(tmp_path, change, message):
    leaves = {"a": np.ones(2, np.float32), "z": np.ones(2, np.float32)}
    folder = write_shards(tmp_path / "m", {"a.safetensors": leaves})
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    with pytest.raises((OSError, ValueError), match=message):
        open_checkpoint(folder)
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="no valid JSON"):
        open_checkpoint(path)
    path.unlink()
    (folder / "a.safetensors").unlink()
    with pytest.raises(ValueError, match="found 0"):
        open_checkpoint(folder)


# What differs between files, and files that are damaged.


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"w": None}, ValueError, "missing leaf 'w'"),
        ({"extra": np.ones(1)}, ValueError, "unexpected leaf 'extra'"),
        ({"w": np.ones((3, 1))}, ValueError, r"leaf 'w': expected shape \(3,\) .*, got \(3, 1\)"),
        ({"w": np.ones(3, np.float32)}, TypeError, "leaf 'w': expected dtype float64 .*, got float32"),
        ({"n": np.ones(2, np.int64)}, TypeError, "leaf 'n': expected dtype int32 .*, got int64"),
        ({"n": np.ones(2)}, TypeError, "leaf 'n': expected dtype int32 .*, got float64"),
    ],
)
def test_files_that_differ(tmp_path, change, error, message):
    leaves = {"w": np.ones(3), "n": np.ones(2, np.int32)}
    other = {name: leaf for name, leaf in {**leaves, **change}.items() if leaf is not None}
    paths = [write(tmp_path / "a.npz", leaves), write(tmp_path / "b.safetensors", other)]
    refuses(error, rf"b\.safetensors: .*{message}", paths, tmp_path / "out.npz")


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_file_cut_off_anywhere_is_named(tmp_path, suffix):
    whole = write(tmp_path / f"a{suffix}", {"w": np.arange(300, dtype=np.float32), "n": np.arange(3)}).read_bytes()
    good = write(tmp_path / f"good{suffix}", {"w": np.arange(300, dtype=np.float32), "n": np.arange(3)})
    cut = tmp_path / f"cut{suffix}"
    for length in [*range(40), *range(40, len(whole), 97), len(whole) - 1]:
        cut.write_bytes(whole[:length])
        refuses(ValueError, rf"cut{suffix}", [good, cut], tmp_path / "out.safetensors")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(suffix=st.sampled_from(FORMATS), place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
def test_a_changed_byte_is_an_error_or_a_value(tmp_path, suffix, place, value):
    leaves = {"w": np.arange(40, dtype=np.float32), "n": np.arange(3)}
    damaged = bytearray(write(tmp_path / f"a{suffix}", leaves).read_bytes())
    damaged[int(place * len(damaged))] = value
    path = tmp_path / f"a{suffix}"
    path.write_bytes(damaged)
    complaint = None
    try:
        average([path], tmp_path / "out.safetensors", force=True, nan_policy="propagate")
    except (TypeError, ValueError) as error:
        complaint = str(error)
    assert complaint is None or f"a{suffix}" in complaint


@pytest.mark.parametrize("compressed", [False, True])
def test_a_wrong_checksum_is_named(tmp_path, compressed):
    path = tmp_path / "a.npz"
    (np.savez_compressed if compressed else np.savez)(path, w=np.zeros(5000), v=np.zeros(5))
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("w.npy")
    damaged = bytearray(path.read_bytes())
    damaged[info.header_offset + (30 if compressed else 3000) + info.compress_size // 2] ^= 1
    path.write_bytes(damaged)
    refuses(ValueError, r"a\.npz: leaf 'w'", [path], tmp_path / "out.safetensors")


def header_with(**changes):
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}
    return {"w": entry, "v": {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]}}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{", "no valid JSON"),
        (b"[" * 50_000, "no valid JSON"),
        (b"[]", "no JSON object"),
        (b'{"w":1,"w":2}', "'w' stands there twice"),
        (b'{"__metadata__":{"a":1}}', "__metadata__"),
        (b'{"w":{"dtype":"F32"}}', "leaf 'w': the header lacks"),
        (header_with(dtype="F8_E4M3"), "leaf 'w': dtype F8_E4M3 is not supported"),
        (header_with(shape=[3]), "leaf 'w': expected 12 bytes"),
        (header_with(shape=[-2]), "integers of 0 or more"),
        (header_with(shape=[2.0]), "integers of 0 or more"),
        (header_with(shape=[2**70]), r"leaf 'w': shape \(1180591620717411303424,\): expected at most 64 sizes"),
        (header_with(dtype=["F32"]), r"leaf 'w': dtype \['F32'\] is not supported"),
        (header_with(shape=[0, 2**63], data_offsets=[8, 8]) | {"x": header_with()["w"]}, r"leaf 'w': shape \(0, "),
        (header_with(shape=[2] + [1] * 99), r"leaf 'w': (?:shape|.*dimension)"),
        (header_with() | {"\ud800": header_with(data_offsets=[12, 20])["w"]}, r"'\\ud800' is no Unicode"),
        (header_with() | {"__metadata__": {"format": "\udfff"}}, r"'\\udfff' is no Unicode"),
        (json.dumps(header_with()).encode("utf-16"), "no valid JSON"),
        (header_with(data_offsets=[4, 12]), "leaves a gap|overlaps"),
        (header_with(data_offsets=[8, 16]), "leaves a gap"),
        (header_with(data_offsets=[2**40, 2**40 + 8]), "truncated|gap"),
        ({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, "4 bytes behind the last tensor"),
    ],
)
def test_wrong_safetensors_headers(tmp_path, header, message):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(12))
    with pytest.raises((TypeError, ValueError), match=rf"a\.safetensors: .*(?:{message})"):
        open_checkpoint(path)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_no_header_makes_anything_but_an_error(junk):
    for file in (junk, len(junk).to_bytes(8, "little") + junk):
        try:
            _, tensors = read_header(np.frombuffer(file, np.uint8))
        except (TypeError, ValueError):
            continue
        assert not tensors


def test_object_arrays_and_other_contents_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", w=np.array([{}], object))
    np.savez(tmp_path / "b.npz", w=np.ones(3, complex))
    np.savez(tmp_path / "c.npz", w=np.ones(3, BFLOAT16))
    torch.save([torch.ones(1)], tmp_path / "d.pt")
    torch.save({"model": {"w": torch.ones(1)}}, tmp_path / "e.pt")
    torch.save({"w": torch.ones(1), "epoch": 3}, tmp_path / "f.pt")
    for name, message in {
        "a.npz": "'w': dtype object",
        "b.npz": "'w': dtype complex128",
        "c.npz": "'w': dtype",
        "d.pt": "state_dict, got list",
        "e.pt": "'model'",
        "f.pt": "'epoch': expected a tensor, got int",
    }.items():
        with pytest.raises(TypeError, match=f"{name}.*{message}"):
            open_checkpoint(tmp_path / name)
    with pytest.raises(ValueError, match=r"expected a \.safetensors"):
        open_checkpoint(write(tmp_path / "g.npz", {}).rename(tmp_path / "g.bin"))
    with pytest.raises(FileNotFoundError):
        open_checkpoint(tmp_path / "nowhere.pt")


def test_pt_files_without_values_and_of_other_kinds_are_named(tmp_path):
    torch.save({"w": torch.empty(3, device="meta")}, tmp_path / "meta.pt")
    refuses(TypeError, r"meta\.pt: leaf 'w': .*got meta: it has no values", [tmp_path / "meta.pt"], tmp_path / "out.pt")
    torch.save({"w": torch.ones(3)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    refuses(ValueError, r"old\.pt: .* since torch 1\.6", [tmp_path / "old.pt"], tmp_path / "out.pt")


@pytest.mark.parametrize("shape", ["(0, 4611686018427387904, 8)", "(" + "1, " * 99 + ")"], ids=["large", "deep"])
def test_a_shape_that_no_array_has_is_named(tmp_path, shape):
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        member = b"\x93NUMPY\x01\0" + len(text).to_bytes(2, "little") + text
        archive.writestr("w.npy", member if shape.startswith("(0") else member + bytes(4))
    refuses(ValueError, r"a\.npz: leaf 'w': shape", [tmp_path / "a.npz"], tmp_path / "out.npz")


def test_a_name_that_npz_would_cut_is_refused(tmp_path):
    path = write(tmp_path / "a.safetensors", {"w": np.ones(2, np.float32), "w\0x": np.zeros(2, np.float32)})
    refuses(ValueError, r"leaf 'w\\x00x': \.npz cannot hold such a name", [path], tmp_path / "out.npz")
    assert average([path], tmp_path / "out.safetensors").leaves == 2


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.safetensors")
    refuses(ValueError, r"a\.safetensors: expected a plain file", [tmp_path / "a.safetensors"], tmp_path / "out.npz")


def test_a_link_is_replaced_and_not_followed(tmp_path):
    path = write(tmp_path / "a.safetensors", {"w": np.ones(2, np.float32)})
    target = write(tmp_path / "target.safetensors", {"w": np.zeros(2, np.float32)})
    link = tmp_path / "link.safetensors"
    link.symlink_to(target)
    refuses(FileExistsError, r"link\.safetensors exists", [path], link)
    average([path], link, force=True)
    assert not link.is_symlink()
    assert (contents(link)["w"][0], contents(target)["w"][0]) == (1, 0)


class Bomb:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path):
    torch.save({"w": torch.ones(1), "x": Bomb(tmp_path / "ran")}, tmp_path / "bomb.pt")
    refuses(ValueError, r"bomb\.pt: not loaded", [tmp_path / "bomb.pt"], tmp_path / "out.pt")
    assert not (tmp_path / "ran").exists()


def test_without_bf16_one_sentence(tmp_path):
    path = write(tmp_path / "a.safetensors", {"w": np.ones(3, BFLOAT16)})
    program = f"""
import sys
sys.modules["ml_dtypes"] = None
from fastagg.files import open_checkpoint
try:
    open_checkpoint({str(path)!r})
except TypeError as error:
    print(error)
"""
    assert output_of(program) == f"{path}: NumPy has bf16 only with ml_dtypes: pip install ml_dtypes"


def test_bf16_needs_no_torch(tmp_path):
    path = write(tmp_path / "a.safetensors", {"w": np.full(3, 1.5, BFLOAT16)})
    program = f"""
import sys
from fastagg.files import average, open_checkpoint
average([{str(path)!r}] * 2, {str(tmp_path / "out.safetensors")!r})
print(open_checkpoint({str(tmp_path / "out.safetensors")!r})["w"], "torch" in sys.modules)
"""
    assert output_of(program) == "[1.5 1.5 1.5] False"


# The output.


def test_nothing_is_overwritten_without_force(tmp_path):
    path = write(tmp_path / "a.safetensors", {"w": np.ones(3, np.float32)})
    before = path.read_bytes()
    refuses(FileExistsError, r"a\.safetensors exists", [path], path)
    assert path.read_bytes() == before
    average([path, path], path, [2, 1], normalize=False, force=True)
    np.testing.assert_array_equal(contents(path)["w"], 3)
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_what_appears_meanwhile_is_not_overwritten(tmp_path):
    place = tmp_path / "out"
    for output, create in ((atomic_file, place.touch), (atomic_directory, (tmp_path / "folder").mkdir)):
        path = place if output is atomic_file else tmp_path / "folder"
        with pytest.raises(FileExistsError), output(path, force=False):
            create()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "out"]


def test_leftovers_are_removed_unless_somebody_still_writes_them(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "_open_unnamed", lambda _: None)  # as where every file has a name
    for leftover in (".out.fastagg-dead", ".other.fastagg-dead"):
        (tmp_path / leftover).write_text("left")
    (tmp_path / ".out.fastagg-folder").mkdir()
    (tmp_path / ".out.fastagg-folder" / "shard").write_text("left")
    with atomic_file(tmp_path / "out", force=True) as one:
        with atomic_file(tmp_path / "out", force=True) as other:
            assert len(list(tmp_path.glob(".out.*"))) == 2
            os.write(other, b"second")
        os.write(one, b"first")
    assert (tmp_path / "out").read_text() == "first"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.fastagg-dead", "out"]


SLOW = """
import sys, time
from fastagg.files import average
def wait(done, total):
    if done * 2 > total:
        print("half", flush=True)
        time.sleep(60)
average(sys.argv[1:-1], sys.argv[-1], progress=wait)
"""


def started_half(paths, output):
    """A process that has written half of its output and waits."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *map(str, paths), str(output)],
        stdout=subprocess.PIPE,
        text=True,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    return process


@pytest.mark.parametrize("sharded", [False, True])
def test_a_killed_run_leaves_a_temporary_that_the_next_one_removes(tmp_path, sharded):
    leaves = {f"w{index}": np.full(1_500_000, index, np.float32) for index in range(4)}
    if sharded:
        source, output = (
            write_shards(tmp_path / "m", {f"{name}.safetensors": {name: leaf} for name, leaf in leaves.items()}),
            tmp_path / "out",
        )
    else:
        source, output = write(tmp_path / "m.safetensors", leaves), tmp_path / "out.safetensors"
    process = started_half([source], output)
    process.kill()
    process.communicate()
    left = [path.name for path in tmp_path.iterdir() if path != source]
    if sharded or not hasattr(os, "O_TMPFILE"):
        assert len(left) == 1
        assert left[0].startswith(f".{output.name}.fastagg-")
    else:
        assert left == []
    average([source], output)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([source.name, output.name])
    assert_same(contents(output), leaves)


def test_an_interrupted_run_leaves_nothing(tmp_path):
    source = write(tmp_path / "m.safetensors", {f"w{index}": np.ones(1_500_000, np.float32) for index in range(4)})
    process = started_half([source], tmp_path / "out.safetensors")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT
    assert list(tmp_path.iterdir()) == [source]


KILLED_WHERE_A_FILE_GETS_ITS_NAME = """
import os, signal, sys
import torch
from fastagg.files import average
sys.addaudithook(lambda event, _: event == "os.link" and os.kill(os.getpid(), signal.SIGKILL))
average([sys.argv[1]], sys.argv[2])
"""


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="files without a name are Linux's")
def test_the_tensors_of_a_pt_file_never_have_a_name(tmp_path):
    source, output = write(tmp_path / "m.npz", {"w": np.ones(3, np.float32)}), tmp_path / "out.pt"
    command = [sys.executable, "-c", KILLED_WHERE_A_FILE_GETS_ITS_NAME, str(source), str(output)]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="this system does not tell a process its files")
def test_a_pt_file_without_room_keeps_no_descriptor(tmp_path):
    source = write(tmp_path / "m.npz", {"w": np.ones(1_000_000, np.float32)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        with pytest.raises(OSError, match="too large") as caught:
            average([source], tmp_path / "out.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    opened = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if os.path.lexists(link)]
    left = [path for path in opened if path.startswith(str(tmp_path)) and path != str(source)]
    assert left == [], caught


LIMITED = """
import resource, sys
from fastagg.cli.commands import application
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
application(["average", *sys.argv[1:]])
"""


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, suffix):
    source = write(tmp_path / "m.safetensors", {"w": np.ones(1_500_000, np.float32)})
    command = [sys.executable, "-c", LIMITED, str(source), "-o", str(tmp_path / f"out{suffix}")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("fastagg average: ")
    assert list(tmp_path.iterdir()) == [source]


PEAK = """
import sys
from pathlib import Path
from fastagg.files import average
average(sys.argv[1:-1], sys.argv[-1])
status = Path("/proc/self/status").read_text().splitlines()
print(next(line.split()[1] for line in status if line.startswith("VmHWM:")))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system does not tell a process its peak")
@pytest.mark.parametrize(
    ("suffix", "wire"), [(".safetensors", None), (".safetensors", "int8"), (".npz", None), ("compressed.npz", None)]
)
def test_memory_does_not_grow_with_the_files(tmp_path, suffix, wire):
    leaves = {"a": np.ones(12_000_000, np.float32), "b": np.ones(4_000_000, np.float32)}
    if suffix == "compressed.npz":
        np.savez_compressed(tmp_path / suffix, **leaves)
        paths = [tmp_path / suffix] * 6
    else:
        paths = [write(tmp_path / f"{index}{suffix}", leaves) for index in range(6)]
    if wire is not None:
        average(paths[:1], tmp_path / "q.safetensors", wire=wire)
        paths.append(tmp_path / "q.safetensors")
    command = [sys.executable, "-c", PEAK, *map(str, paths), str(tmp_path / f"out{suffix}")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 < 128 << 20  # one file of six has 64 MB, and NumPy alone takes 30


# The command.


def test_the_command(tmp_path):
    models = [model(seed) for seed in range(2)]
    paths = [write(tmp_path / f"{seed}.safetensors", leaves) for seed, leaves in enumerate(models)]
    output = tmp_path / "out.safetensors"
    done = invoke(*paths, "-w", 10, "--weight", 20, "-o", output)
    assert done.exit_code == 0, done.output
    nbytes = 2 * sum(leaf.nbytes for leaf in models[0].values())
    assert f"wrote {output}: 11 leaves of 2 files, {nbytes / 1e6:.1f} MB read in " in done.stdout
    assert done.stderr == ""
    assert_same(contents(output), fastagg.fedavg(models, [10, 20]))
    done = invoke(*paths, "-o", output)
    assert done.exit_code == 1
    assert done.output == f"fastagg average: {output} exists: force overwrites it\n"
    options = ("--wire", "int8", "-w", -1, "-w", 3, "--allow-negative", "--no-normalize", "--dtype", "fp32", "--force")
    done = invoke(*paths, "-o", output, *options, "--integer-policy", "first")
    assert done.exit_code == 0, done.output
    assert contents(output)["half"].dtype == np.float32


@pytest.mark.parametrize(
    ("second", "options", "message"),
    [
        (
            np.ones(3),
            ("-w", 1, "-w", -2),
            "expected a weight of 0 or more, got -2.0 (negative ones must be allowed)",
        ),
        (np.ones(3), ("-w", 1, "-w", -1, "--allow-negative"), "their sum is zero, so they cannot be normalized"),
        (np.ones(3, BFLOAT16), ("--dtype", "bf16"), ".npz has no bf16: ask for another dtype, or write .safetensors"),
        (np.ones(3, np.float16), (), "got float16 (ask for a dtype to say what the result shall be)"),
    ],
)
def test_what_the_command_refuses_is_said_as_a_user_of_it_would(tmp_path, second, options, message):
    leaves = ({"w": np.ones(3)}, {"w": second})
    paths = [write(tmp_path / f"{place}.safetensors", update) for place, update in enumerate(leaves)]
    done = invoke(*paths, "-o", tmp_path / "out.npz", *options)
    assert done.exit_code == 1
    assert done.output.endswith(f"{message}\n")


def test_a_checkpoint_tells_its_size(tmp_path):
    for suffix, kind in ((".safetensors", "Safetensors"), (".npz", "Npz"), (".pt", "Torch")):
        path = write(tmp_path / f"a{suffix}", {"v": np.ones(3), "w": np.ones(3)})
        with open_checkpoint(path) as opened:
            assert repr(opened) == f"{kind}Checkpoint({str(path)!r}, 2 leaves)"


def test_a_terminal_shows_bytes_and_their_rate(tmp_path, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal for rich
    path = write(tmp_path / "a.safetensors", {"w": np.zeros(5_000_000, np.float32)})
    done = invoke(path, "-o", tmp_path / "out.safetensors")
    assert done.exit_code == 0, done.output
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", done.stderr)
    assert re.search(r"20\.0/20\.0 MB \d+\.\d [kMG]B/s", shown), shown


def test_more_files_than_descriptors(tmp_path):
    path = write(tmp_path / "a.safetensors", {"w": np.ones(2, np.float32)})
    program = f"""
import resource
from fastagg.cli.commands import application
from fastagg.files import average
paths, output = [{str(path)!r}] * 100, {str(tmp_path / "out.safetensors")!r}
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
try:
    average(paths, output)
except OSError as error:
    print(error.filename)
application(["average", *paths, "-o", output])
"""
    named, wrote = output_of(program).splitlines()
    assert named == str(path)
    assert "1 leaves of 100 files" in wrote


def test_the_command_tells_which_files_were_dropped(tmp_path):
    _, paths = with_nan(tmp_path)
    done = invoke(*paths, "-o", tmp_path / "out.safetensors", "--nan-policy", "drop")
    assert done.exit_code == 0
    assert done.stderr == f"dropped {paths[1]}: leaf 'large' holds a NaN or an infinity\n"
    assert "of 2 files" in done.stdout
    done = invoke(*paths, "-o", tmp_path / "out.safetensors", "-w", 1, "-w", 0, "-w", 3, "--force")
    assert done.exit_code == 0
    assert "of 2 files" in done.stdout


@pytest.mark.parametrize(
    "options",
    [
        ("-w", 1),
        ("-w", "x", "-w", 1),
        ("--nan-policy", "no"),
        ("--integer-policy", "no"),
        ("--wire", "no"),
        ("--dtype", "int8"),
        ("--no",),
    ],
)
def test_wrong_usage_ends_with_two(tmp_path, options):
    paths = [write(tmp_path / name, {"w": np.ones(3)}) for name in ("a.npz", "b.npz")]
    done = invoke(*paths, "-o", tmp_path / "out.npz", *options)
    assert done.exit_code == 2
    assert "Traceback" not in done.output
    assert sorted(tmp_path.iterdir()) == paths


@pytest.mark.parametrize("name", ["cut.safetensors", "nowhere.safetensors", "nowhere.pt"])
def test_the_command_as_a_process_fails_with_one_sentence(tmp_path, name):
    good = write(tmp_path / "good.safetensors", {"w": np.ones(3)})
    (tmp_path / "cut.safetensors").write_bytes(good.read_bytes()[:-1])
    program = "import sys; from fastagg.cli import main; main()"
    arguments = ["average", str(good), str(tmp_path / name), "-o", str(tmp_path / "out.npz")]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("fastagg average: ")
    assert name in done.stderr


@pytest.mark.parametrize("text", ["((((((", "'''abc", "-" * 9000])
def test_a_header_that_no_parser_takes_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "odd.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w.npy", b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode())
    with pytest.raises(ValueError, match=r"odd\.npz: leaf 'w': its header is no \.npy header"):
        open_checkpoint(path)
