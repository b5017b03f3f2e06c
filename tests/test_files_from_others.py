"""Files that somebody sent: what is odd but valid is read; what asks for more than it is, or changes, is refused."""

from __future__ import annotations

import json
import os
import signal
import stat
import struct
import subprocess
import sys
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import fastagg
from fastagg.files import NotKeptWarning, atomic, average, open_checkpoint
from fastagg.files.atomic import atomic_directory, atomic_file
from fastagg.report import Run
from test_average_files import FORMATS, contents, invoke, refuses, safetensors_bytes, write, write_shards

torch = pytest.importorskip("torch")

ONES = {"w": np.ones(3, np.float32)}


def header_file(path: Path, header: dict | bytes, data: bytes = b"") -> Path:
    """A .safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def npy(header: str, data: bytes, version: tuple[int, int] = (1, 0)) -> bytes:
    """An .npy file with any header."""
    length = struct.pack("<H" if version == (1, 0) else "<I", len(header))
    return b"\x93NUMPY" + bytes(version) + length + header.encode() + data


def npz_file(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    """An .npz file with any members."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


# What the formats' own readers accept.

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
VALUES = np.arange(1, 3, dtype=np.float32)


@pytest.mark.parametrize(
    "header",
    [
        {"__metadata__": None, "w": ENTRY},
        {"__metadata__": {}, "w": ENTRY},
        json.dumps({"w": ENTRY}).encode() + b"     ",
        json.dumps({"w": ENTRY}, indent=2).encode() + b"\n",
        {"w": {**ENTRY, "unknown": {"a": [1]}}},
        {"w": ENTRY, "none": {"dtype": "I64", "shape": [0, 3], "data_offsets": [0, 0]}},
        {"": ENTRY},
        {"a\0b\u202e": ENTRY},
        {
            "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
            "a": {**ENTRY, "shape": [], "data_offsets": [0, 4]},
        },
    ],
)
def test_what_the_safetensors_library_reads_is_read(tmp_path, header):
    library = pytest.importorskip("safetensors.numpy")
    path = header_file(tmp_path / "a.safetensors", header, VALUES.tobytes())
    expected = library.load_file(path)
    result = contents(average([path, path], tmp_path / "out.safetensors").output)
    assert result.keys() == expected.keys()
    assert all(np.array_equal(result[name], expected[name]) for name in expected)
    assert library.load_file(tmp_path / "out.safetensors").keys() == expected.keys()


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize(("descr", "order"), [("<f4", "False"), (">f4", "True")])
def test_what_numpy_reads_is_read(tmp_path, method, version, descr, order):
    header = f"{{'descr': '{descr}', 'fortran_order': {order}, 'shape': (3, 50), }}" + " " * 9000
    member = npy(header, np.arange(150, dtype=descr).tobytes(), version)
    path = npz_file(tmp_path / "a.npz", {"folder/": b"", "folder/w.npy": member, "../v": member}, method)
    with np.load(path) as archive:
        expected = archive["folder/w"]
    for result in (contents(path), contents(average([path], tmp_path / "out.npz").output)):
        assert result.keys() == {"folder/w", "../v"}
        np.testing.assert_array_equal(result["folder/w"], expected)


def test_what_torch_reads_is_read(tmp_path):
    base = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)
    state = {
        "transposed": base.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        "strided": base[:, ::2],
        "expanded": torch.ones(3).expand(4, 3),
        "brain": base.bfloat16().permute(2, 0, 1),
        "parameter": torch.nn.Parameter(base),
        "imaginary": torch.complex(base, base).conj().imag,
        "empty": base[:0],
    }
    torch.save(state, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    for path in (tmp_path / "a.pt", npz_file(tmp_path / "deflated.pt", records, zipfile.ZIP_DEFLATED)):
        for result in (contents(path), contents(average([path], tmp_path / "out.safetensors", force=True).output)):
            assert {name: leaf.shape for name, leaf in result.items()} == {name: x.shape for name, x in state.items()}
            for name, tensor in state.items():
                assert np.array_equal(result[name].astype(np.float32), tensor.detach().resolve_neg().float().numpy()), (
                    name
                )


# What is no plain file.


@pytest.mark.parametrize("name", ["a.safetensors", "a.npz", "a.pt", "m.safetensors.index.json", "shard", "run.json"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_plain_file_is_not_waited_for(tmp_path, name, kind):
    path = tmp_path / name
    if name == "shard":
        path = write_shards(tmp_path / "m", {"a.safetensors": ONES}) / "a.safetensors"
        path.unlink()
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=f"{path.name}: expected a plain file, got a pipe, a device"):
        Run.load(path) if name == "run.json" else open_checkpoint(path.parent if name == "shard" else path)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_named_like_a_leftover_is_left(tmp_path, kind):
    leftover = tmp_path / ".out.fastagg-dead"
    if kind == "pipe":
        os.mkfifo(leftover)
    else:
        (tmp_path / "kept").mkdir()
        leftover.symlink_to("/dev/zero" if kind == "device" else tmp_path / "kept")
    with atomic_file(tmp_path / "out", force=False) as descriptor:
        os.write(descriptor, b"done")
    assert leftover.exists()
    assert (tmp_path / "out").read_bytes() == b"done"


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/null"), os.mkdir])
def test_an_output_that_is_no_plain_file_is_not_replaced(tmp_path, make):
    make(tmp_path / "out.npz")
    path = write(tmp_path / "a.npz", ONES)
    refuses(OSError, r"out\.npz is (no plain file|a directory)", [path], tmp_path / "out.npz", force=True)


# What asks for more than it is.


def test_a_name_among_many_that_stands_twice_is_found_at_once(tmp_path):
    entry = json.dumps({"dtype": "F32", "shape": [0], "data_offsets": [0, 0]})
    names = [f"{index:x}" for index in range(30_000)] + ["752f"]
    header = "{" + ",".join(f'"{name}":{entry}' for name in names) + "}"
    with pytest.raises(ValueError, match="'752f' stands there twice"):
        open_checkpoint(header_file(tmp_path / "a.safetensors", header.encode()))


@pytest.mark.parametrize("sizes", [[10**9] * 1_000_000, [10**4000] * 20, "2" * 1_000_000, [10**4000]])
def test_sizes_that_no_array_has_are_not_multiplied(tmp_path, sizes):
    header = {"w": {"dtype": "F32", "shape": sizes, "data_offsets": [0, 8]}}
    with pytest.raises(ValueError, match="leaf 'w': shape") as caught:
        open_checkpoint(header_file(tmp_path / "a.safetensors", header, bytes(8)))
    assert len(str(caught.value)) < 1000
    with pytest.raises(ValueError, match=r"a\.npz: leaf 'w'"):
        open_checkpoint(
            npz_file(
                tmp_path / "a.npz",
                {"w.npy": npy(f"{{'descr':'<f4','fortran_order':False,'shape':{(10**3000,) * 3}}}", b"")},
            )
        )


def test_headers_have_a_length_that_is_compared_before_they_are_read(tmp_path):
    member = b"\x93NUMPY\x02\0" + struct.pack("<I", 16 << 20) + b" " * (16 << 20)
    path = npz_file(tmp_path / "a.npz", {"w.npy": member}, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    refuses(ValueError, r"a\.npz: leaf 'w': .*16777216 bytes \(at most 10000\)", [path], tmp_path / "out.npz")
    path = header_file(tmp_path / "a.safetensors", b"")
    path.write_bytes((100_000_001).to_bytes(8, "little"))
    refuses(ValueError, "a header of 100000001 bytes", [path], tmp_path / "out.npz")


def test_tensors_larger_than_what_their_file_holds_are_refused(tmp_path):
    torch.save({"v": torch.ones(2), "w": torch.ones(1).expand(10**9)}, tmp_path / "a.pt")
    refuses(ValueError, r"a\.pt: leaf 'w': 1000000000 elements.*save its clone", [tmp_path / "a.pt"], tmp_path / "o.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    bomb = npz_file(tmp_path / "b.pt", {**records, "a/data/9": bytes(65 << 20)}, zipfile.ZIP_DEFLATED)
    refuses(ValueError, r"b\.pt: \d+ bytes that would inflate to 6815\d+", [bomb], tmp_path / "o.pt")
    with warnings.catch_warnings(), zipfile.ZipFile(tmp_path / "a.pt", "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr(next(iter(records)), b"")
    refuses(ValueError, r"a\.pt: .*twice", [tmp_path / "a.pt"], tmp_path / "o.pt")


def test_a_leaf_that_is_there_twice_is_refused(tmp_path):
    entry = {"version": 1, "leaves": {"w": {"wire": "int8", "block": 256, "dtype": "float32", "shape": [3]}}}
    leaves = {"w.codes": np.ones(3, np.int8), "w.scales": np.ones(1, np.float32), "w": np.ones(10**6, np.float32)}
    path = write(tmp_path / "a.safetensors", leaves, metadata={"fastagg.quantized": json.dumps(entry)})
    refuses(ValueError, "leaf 'w' is there twice", [path, path], tmp_path / "out.safetensors")
    leaves = {"a.safetensors": {"w": np.ones(10**6, np.float32)}, "b.safetensors": {}}
    folder = write_shards(tmp_path / "m", leaves)
    codes = {"w.codes": np.ones(3, np.int8), "w.scales": np.ones(1, np.float32)}
    write(folder / "b.safetensors", codes, metadata={"fastagg.quantized": json.dumps(entry)})
    index = {"weight_map": {"w": "a.safetensors"} | dict.fromkeys(codes, "b.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refuses(ValueError, r"b\.safetensors: leaf 'w' is in another shard", [folder], tmp_path / "out.safetensors")


def test_encrypted_members_are_named(tmp_path):
    path = npz_file(tmp_path / "a.npz", {"w.npy": npy("{'descr':'<f4','fortran_order':False,'shape':()}", bytes(4))})
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\1\2") + 8] |= 1
    content[6] |= 1
    path.write_bytes(content)
    refuses(ValueError, r"a\.npz: leaf 'w': .*encrypted", [path], tmp_path / "out.npz")


# What changes while it is read.


@pytest.mark.parametrize("suffix", [*FORMATS, "compressed.npz"])
@pytest.mark.parametrize("length", [5000, 5_000_000])
def test_a_file_that_is_cut_off_while_it_is_read_is_an_error(tmp_path, suffix, length):
    leaves = {name: np.ones(1_500_000, np.float32) for name in "abc"}
    paths = [tmp_path / f"{index}{suffix}" for index in range(2)]
    for path in paths:
        np.savez_compressed(path, **leaves) if suffix == "compressed.npz" else write(path, leaves)
    if suffix == "compressed.npz":
        length //= 1000

    def cut(done, total):
        os.truncate(paths[1], length)

    refuses(ValueError, rf"1{suffix}: .*(cut off|leaf)", paths, tmp_path / "out.safetensors", progress=cut)
    refuses(ValueError, rf"1{suffix}: ", paths, tmp_path / "out.safetensors")


def test_an_open_checkpoint_that_is_cut_off_reads_as_nan_and_says_so(tmp_path):
    path = write(tmp_path / "a.safetensors", {"w": np.ones(10**6, np.float32)})
    checkpoint = open_checkpoint(path)
    leaf = checkpoint["w"]
    os.truncate(path, 4096)
    assert np.isnan(leaf[5000:]).all()
    with pytest.raises(fastagg.NonFiniteUpdateError):
        fastagg.fedavg([leaf, leaf])
    with pytest.raises(ValueError, match=r"a\.safetensors: the file was cut off while it was read"):
        checkpoint.close()


@pytest.mark.parametrize("name", ["a\nb.pt", "x\u2028y.pt", "a b.pt"])
def test_a_torch_file_of_any_name_that_is_cut_off_reads_as_nan(tmp_path, name):
    torch = pytest.importorskip("torch")
    torch.save({"w": torch.ones(3_000_000)}, tmp_path / name)
    checkpoint = open_checkpoint(tmp_path / name)
    leaf = checkpoint["w"]
    os.truncate(tmp_path / name, 8192)
    assert np.isnan(leaf[-5:]).all()
    with pytest.raises(ValueError, match="the file was cut off while it was read"):
        checkpoint.close()


def test_a_torch_file_whose_name_is_not_utf8_is_explained(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"w": torch.ones(3)}, tmp_path / "a.pt")
    path = os.fsdecode(os.fsencode(tmp_path) + b"/q\xff.pt")
    os.rename(tmp_path / "a.pt", path)
    refuses(ValueError, "name is not UTF-8: rename it", [path], tmp_path / "out.npz")


def test_versions_of_modules_of_any_kind_are_no_traceback(tmp_path):
    torch = pytest.importorskip("torch")
    state = OrderedDict(w=torch.ones(3))
    state._metadata = {"": {"version": torch.zeros(2)}}  # type: ignore[attr-defined]
    torch.save(state, tmp_path / "a.pt")
    with pytest.warns(NotKeptWarning, match="versions of its modules"):
        average([tmp_path / "a.pt"], tmp_path / "out.npz")


def test_a_number_of_5000_digits_in_an_index_names_the_file(tmp_path):
    (tmp_path / "m.safetensors.index.json").write_text('{"metadata": {"total_size": ' + "9" * 5000 + "}}")
    refuses(ValueError, r"index\.json: the index is no valid JSON", [tmp_path], tmp_path / "out.npz")


BUS_ERROR = """
import mmap, os, signal, sys
from fastagg import _core
signal.signal(signal.SIGBUS, lambda *_: print("handled", flush=True)) if sys.argv[2] == "handler" else None
with open(sys.argv[1], "r+b") as file:
    file.truncate(1 << 20)
    mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    guard = _core.MappedFileGuard(0, 1)
    os.kill(os.getpid(), signal.SIGBUS)
    file.truncate(0)
    mapping[5000]
"""


@pytest.mark.parametrize(("handler", "said"), [("none", ""), ("handler", "handled\n")])
def test_other_bus_errors_are_what_they_were(tmp_path, handler, said):
    command = [sys.executable, "-c", BUS_ERROR, str(tmp_path / "file"), handler]
    (tmp_path / "file").touch()
    done = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert done.stdout is not None
    assert done.stdout.readline() == said
    if handler == "none":
        assert done.wait(30) == -signal.SIGBUS
    else:  # Python's own handler returns to the instruction, again and again
        done.kill()
        done.wait(30)
    done.stdout.close()


# Who may read what is written.


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("named", [False, True])
def test_what_is_replaced_keeps_its_mode(tmp_path, monkeypatch, suffix, named):
    if named:
        monkeypatch.setattr(atomic, "_open_unnamed", lambda _: None)
    path, output = write(tmp_path / "a.npz", ONES), tmp_path / f"out{suffix}"
    for mode in (0o600, 0o640, 0o666):
        output.touch()
        output.chmod(mode)
        average([path], output, force=True)
        assert stat.S_IMODE(output.stat().st_mode) == mode
    target = tmp_path / "target"
    output.rename(target)
    target.chmod(0o600)
    output.symlink_to(target)
    average([path], output, force=True)
    assert (output.is_symlink(), stat.S_IMODE(output.stat().st_mode)) == (False, 0o600)


def test_replaced_directories_reports_and_runs_keep_their_modes(tmp_path):
    folder = write_shards(tmp_path / "m", {"a.safetensors": ONES})
    modes = {".": 0o710, "a.safetensors": 0o600, "model.safetensors.index.json": 0o640}
    for name, mode in modes.items():
        (folder / name).chmod(mode)
    average([folder], folder, force=True)
    assert {name: stat.S_IMODE((folder / name).stat().st_mode) for name in modes} == modes
    Run().save(tmp_path / "run.json")
    (tmp_path / "run.json").chmod(0o600)
    Run().save(tmp_path / "run.json")
    assert stat.S_IMODE((tmp_path / "run.json").stat().st_mode) == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_what_is_replaced_keeps_its_owner(tmp_path):
    (tmp_path / "out").touch()
    os.chown(tmp_path / "out", 12345, 23456)
    with atomic_file(tmp_path / "out", force=True):
        pass
    status = (tmp_path / "out").stat()
    assert (status.st_uid, status.st_gid) == (12345, 23456)


def test_while_it_is_written_nobody_else_may_read_it(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "_open_unnamed", lambda _: None)
    (tmp_path / "out").touch(0o600)
    (tmp_path / "folder").mkdir(0o700)
    with atomic_file(tmp_path / "out", force=True), atomic_directory(tmp_path / "folder", force=True):
        hidden = list(tmp_path.glob(".*"))
        assert len(hidden) == 2
        assert not any(path.stat().st_mode & 0o077 for path in hidden)


ENDED = """
import sys, time
from fastagg.files import averaging
averaging._Meter.add = lambda *_: (print("half", flush=True), time.sleep(60))
from fastagg.cli import main
sys.argv = ["fastagg", "average", sys.argv[1], "-o", sys.argv[2]]
main()
"""


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        *(pytest.param(one, marks=pytest.mark.exhaustive) for one in (signal.SIGHUP, signal.SIGINT)),
    ],
)
def test_a_command_that_is_told_to_end_leaves_nothing(tmp_path, number):
    source = write_shards(tmp_path / "m", {"a.safetensors": ONES})
    command = [sys.executable, "-c", ENDED, str(source), str(tmp_path / "out")]
    signals = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)  # which may be ignored where the tests run
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: [signal.signal(one, signal.SIG_DFL) for one in signals],
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == (130 if number == signal.SIGINT else 128 + number)
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == [source]


# What a terminal is shown.


def test_nothing_in_a_file_steers_the_terminal(tmp_path):
    evil = "\x1b[2J\r" + "x" * 100_000
    files = {
        "name": {evil: {**ENTRY, "shape": [3]}},
        "dtype": {"w": {**ENTRY, "dtype": evil}},
        "metadata": {"__metadata__": {"fastagg.quantized": json.dumps({"version": evil})}, "w": ENTRY},
        "twice": f'{{"{evil[9:]}\\u001b":1,"{evil[9:]}\\u001b":2}}'.encode(),
    }
    for name, header in files.items():
        path = header_file(tmp_path / f"{name}\x1b.safetensors", header, bytes(8))
        done = invoke(path, "-o", tmp_path / "out.safetensors")
        assert done.exit_code == 1, name
        assert done.output[:-1].isprintable(), name
        assert len(done.output) < 1000, name
    folder = write_shards(tmp_path / "m", {"a.safetensors": ONES})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": evil}}))
    done = invoke(folder, "-o", tmp_path / "out.safetensors")
    assert (done.exit_code, done.output[:-1].isprintable(), len(done.output) < 1000) == (1, True, True)
    path = write(tmp_path / "good\x1b.safetensors", {"w": np.full(3, np.nan, np.float32)})
    good = write(tmp_path / "good.safetensors", ONES)
    done = invoke(good, path, "-o", tmp_path / "out\x1b.safetensors", "--nan-policy", "drop")
    assert done.exit_code == 0
    assert done.output.replace("\n", "").isprintable()


def test_dtypes_that_np_savez_does_not_name_are_explained(tmp_path):
    for dtype, word in ((ml_dtypes.bfloat16, "bf16"), (ml_dtypes.float8_e4m3fn, "fp8")):
        np.savez(tmp_path / "a.npz", w=np.ones(2, dtype))
        refuses(TypeError, rf"leaf 'w': .*\.npz has no {word}.*save it as", [tmp_path / "a.npz"], tmp_path / "out.npz")


# Directories, and what stands beside the arrays.


def test_a_directory_with_one_checkpoint_file_is_that_file(tmp_path):
    for name in ("model.safetensors", "weights.npz", "state.pt"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        write(folder / name, ONES)
        (folder / "config.json").write_text("{}")
    write(tmp_path / "model" / "optimizer.pt", ONES)
    folders = sorted(path for path in tmp_path.iterdir() if path.is_dir())
    average(folders, tmp_path / "out.npz", [1, 2, 3])
    assert contents(tmp_path / "out.npz")["w"].tolist() == [1, 1, 1]
    with pytest.warns(NotKeptWarning, match=r"model: what lies beside .*: 'config\.json', 'optimizer\.pt'; copy"):
        done = average([tmp_path / "model"] * 2, tmp_path / "out")
    assert [path.name for path in done.output.iterdir()] == ["model.safetensors"]
    assert len(done.not_kept) == 1
    write(tmp_path / "weights" / "other.npz", ONES)
    refuses(ValueError, r"found 2 of them: 'other\.npz', 'weights\.npz'; name what", [folders[-1]], tmp_path / "o.npz")
    folder = tmp_path / "half"
    folder.mkdir()
    write(folder / "model-00001-of-00002.safetensors", ONES)
    refuses(ValueError, "found a shard, but not its index", [folder], tmp_path / "o.npz")


def test_the_format_is_told_where_the_first_file_tells_nothing(tmp_path):
    for suffix in FORMATS:
        average([write(tmp_path / f"a{suffix}", ONES)], tmp_path / "out.safetensors", force=True)
        with open_checkpoint(tmp_path / "out.safetensors") as result:
            assert result.metadata == {"format": "pt"}
    shards = write_shards(tmp_path / "m", {name: {name: np.ones(1)} for name in ("a.safetensors", "b.safetensors")})
    for name in ("a.safetensors", "b.safetensors"):
        metadata = {"format": "pt", "of": name, "all": "same"}
        (shards / name).write_bytes(safetensors_bytes({name: np.ones(1)}, metadata))
    average([shards], tmp_path / "out.safetensors", force=True)
    with open_checkpoint(tmp_path / "out.safetensors") as result:
        assert result.metadata == {"format": "pt", "all": "same"}


def test_the_versions_of_modules_are_kept_or_missed(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    torch.save(model.state_dict(), tmp_path / "a.pt")
    average([tmp_path / "a.pt"] * 2, tmp_path / "out.pt")
    assert torch.load(tmp_path / "out.pt", weights_only=True)._metadata == model.state_dict()._metadata
    assert fastagg.fedavg([model.state_dict()] * 2)._metadata == model.state_dict()._metadata
    with pytest.warns(NotKeptWarning, match=r"a\.pt: the versions of its modules"):
        average([tmp_path / "a.pt"], tmp_path / "out.safetensors")
    done = invoke(tmp_path / "a.pt", "-o", tmp_path / "out.npz")
    assert (done.exit_code, done.stderr.count("\n")) == (0, 1)
    assert "a.pt: the versions of its modules" in done.stderr


def test_metadata_that_a_format_has_no_place_for_are_missed(tmp_path):
    path = write(tmp_path / "a.safetensors", ONES, metadata={"format": "pt", "step": "7"})
    with pytest.warns(NotKeptWarning, match=r"a\.safetensors: its metadata are not kept, .*\.npz has no place: 'step'"):
        average([path], tmp_path / "out.npz")


def test_metadata_of_an_index_are_kept_by_shards_and_missed_in_one_file(tmp_path):
    folder = write_shards(tmp_path / "m", {"a.safetensors": ONES})
    index = folder / "model.safetensors.index.json"
    index.write_text('{"metadata": {"total_size": 16, "author": "x"}, "weight_map": {"w": "a.safetensors"}}')
    with pytest.warns(NotKeptWarning, match=r"metadata of its index are not kept: 'author'"):
        average([folder], tmp_path / "out.safetensors")
    average([folder], tmp_path / "out")
    assert json.loads((tmp_path / "out" / index.name).read_text())["metadata"]["author"] == "x"


def test_a_null_in_an_index_is_no_metadata(tmp_path):
    folder = write_shards(tmp_path / "m", {"a.safetensors": ONES})
    (folder / "model.safetensors.index.json").write_text('{"metadata": null, "weight_map": {"w": "a.safetensors"}}')
    assert list(contents(average([folder], tmp_path / "out").output)) == ["w"]
