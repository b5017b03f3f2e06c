"""Checkpoint files opened by their formats, and averaged piece by piece."""

from __future__ import annotations

import os
import re
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastagg._errors import DroppedUpdateWarning, NotKeptWarning
from fastagg._native.codes import float_code, wire_name
from fastagg._one_thread import OneThread
from fastagg._quoting import quoted, quoted_list
from fastagg._updates.policies import check_policies
from fastagg.files.agreement import check_integers, leaves_of_mean
from fastagg.files.checkpoints import Checkpoint
from fastagg.files.means import Files, Means, Piece, batches, first_nonfinite
from fastagg.files.npz import NpzCheckpoint
from fastagg.files.outputs import FILE_SUFFIXES, check_output, not_kept, open_output
from fastagg.files.safetensors import SafetensorsCheckpoint
from fastagg.files.sharded import INDEX_SUFFIX, ShardedCheckpoint
from fastagg.files.weights import check_weights, combine
from fastagg.files.writers import Writer

Progress = Callable[[int, int], None]

_PART = re.compile(r"-\d+-of-\d+\.")  # of a larger checkpoint, in the name of a shard


class Averaged(NamedTuple):
    """What `average` has done.

    Attributes:
        output: the file or directory that was written.
        leaves: how many leaves it has.
        bytes_read: bytes of the leaves that were read, twice where files were looked through for NaN first.
        seconds: how long it took.
        dropped: the files that nan_policy="drop" left out, and their first leaf with a NaN or an infinity.
        not_kept: what stands in the first input or beside it and not in the output, a sentence for each.
    """

    output: Path
    leaves: int
    bytes_read: int
    seconds: float
    dropped: dict[Path, str]
    not_kept: list[str]


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Opens a checkpoint as a mapping from names to arrays; use it in a `with` block.

    Arrays are NumPy's (bf16 with ml_dtypes), read-only views of the mapped file where the format allows: .safetensors,
    .pt, and .npz members that are not compressed. Leaves of a quantised checkpoint are `Quantized`.

    Args:
        path: a .safetensors file; a directory with a *.safetensors.index.json, or the index; a .npz file; a .pt or
            .pth file with a state_dict, which is loaded with weights_only; or a directory with one such file.

    Raises:
        ImportError: a package that the format needs is not installed.
        OSError: a file cannot be read.
        TypeError: a leaf is no array, or of a dtype that fastagg has no arithmetic for (fp8 without scales among them).
        ValueError: a file is truncated, damaged or of another format; the message names the file and the leaf.
    """
    checkpoint = _open(Path(path))
    for name, leaf in checkpoint.leaves.items():
        try:
            leaf.check_shape()
        except ValueError as error:
            raise ValueError(f"{path}: leaf {quoted(name)}: shape {quoted(leaf.shape)}: {error}") from None
    return checkpoint


def _open(path: Path) -> Checkpoint:
    """Opens a checkpoint by the format that its name tells."""
    file = _file_in(path) if path.is_dir() else path
    if file.name.endswith(INDEX_SUFFIX) or (file != path and file.suffix == ".safetensors"):
        return ShardedCheckpoint(path, file)
    if file.suffix == ".safetensors":
        return SafetensorsCheckpoint(file)
    if file.suffix == ".npz":
        return NpzCheckpoint(file)
    if file.suffix in (".pt", ".pth"):
        from fastagg.files.pytorch import TorchCheckpoint

        return TorchCheckpoint(file)
    raise ValueError(f"{path}: expected a .safetensors, .npz, .pt or .pth file, an index of shards or its directory")


def _file_in(folder: Path) -> Path:
    """What a directory is to be opened as: its index, else its .safetensors file, else its file of another format.

    Raises:
        ValueError: there is none, or more than one.
    """
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith((*FILE_SUFFIXES, INDEX_SUFFIX)))
    for found in (
        [name for name in names if name.endswith(INDEX_SUFFIX)],
        [name for name in names if name.endswith(".safetensors")],
        names,
    ):
        if len(found) == 1 and not _PART.search(found[0]):
            return folder / found[0]
        if found:
            what = "a shard, but not its index" if len(found) == 1 else f"{len(found)} of them"
            raise ValueError(
                f"{folder}: expected one index of shards or one checkpoint file, found {what}: "
                f"{quoted_list(found)}; name what is meant"
            )
    raise ValueError(f"{folder}: expected one *{INDEX_SUFFIX} or one checkpoint file in the directory, found 0")


def average(
    paths: Iterable[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    weights: Iterable[float] | None = None,
    *,
    wire: Any = None,
    nan_policy: str = "raise",
    integer_policy: str | None = None,
    dtype: Any = None,
    normalize: bool = True,
    allow_negative: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Averaged:
    """Averages checkpoint files into a new one, a few megabytes of every file at a time.

    ``mean[i] = sum_k(weights[k] * x_k[i]) / sum_k(weights[k])``

    The same bits as `fedavg` of the files' arrays. Negative weights are summed in the same way: before the one rounding
    to the result's dtype, the error is at most (K + 1) * 2**-52 * sum_k |weights[k] * x_k| / |sum_k(weights[k])|, and
    2**-21 times the same fraction where 16-bit files make a 16-bit result (runs of eight are added up in float32).

    Leaves are matched by name. The first file gives their order, dtypes and metadata, and its shards if the output is a
    directory. All files are opened and compared before anything is written; the output is written beside its place,
    and renamed.

    Args:
        paths: K checkpoints that `open_checkpoint` opens, of any formats.
        output: a .safetensors, .npz, .pt or .pth file; or a directory, if the first checkpoint is sharded.
        weights: K finite numbers; None for equal weights. A file of weight 0 never contributes, whatever it holds.
        wire: encodes floating leaves, as `quantize` does, in .safetensors files; `open_checkpoint` gives `Quantized`.
        nan_policy: for a file with a NaN or an infinity: "raise", "drop" (leave the whole file out, weight and all, and
            warn; all files are read once more to find them first) or "propagate" (not with a wire).
        integer_policy: for integer and bool leaves, as in `fedavg`: "max", "first", "round" or None.
        dtype: floating dtype of the result's floating leaves; None keeps the first file's.
        normalize: whether to divide by the sum of the weights. Without, the result is the plain weighted sum.
        allow_negative: permits negative weights (task arithmetic).
        force: permits to overwrite the output, which may be one of the inputs.
        progress: called with the bytes read so far, and those to read in all.

    Raises:
        ImportError, OSError: a file cannot be read or written, or a package that its format needs is not installed.
        TypeError: leaves that are no arrays, of unsupported dtypes, or of other dtypes than the first file's.
        ValueError: no files, wrong weights or options, a damaged file, differing names or shapes, a NaN or an infinity
            under "raise", or a result too large for its dtype or wire (but under "propagate").
    """
    begin = time.perf_counter()
    check_policies(nan_policy, integer_policy)
    target, wire = None if dtype is None else float_code(dtype), None if wire is None else wire_name(wire)
    if wire is not None and nan_policy == "propagate":
        raise ValueError("wire: a quantised checkpoint cannot hold NaN, so nan_policy cannot be 'propagate'")
    if isinstance(paths, (str, bytes, os.PathLike)):
        raise TypeError("paths: expected a sequence of paths, got a single one")
    inputs, output = [Path(path) for path in paths], Path(output)
    if not inputs:
        raise ValueError("paths: expected at least one, got none")
    numbers = check_weights(weights, inputs, allow_negative)
    combine(numbers, normalize)
    check_output(output, wire, force)
    with ExitStack() as opened:
        checkpoints = [opened.enter_context(open_checkpoint(path)) for path in inputs]
        leaves = leaves_of_mean(checkpoints, target)
        used = [index for index, weight in enumerate(numbers) if weight]
        if integer_policy is None:
            for index in used:
                check_integers(checkpoints[index])
        meter = _Meter(checkpoints, used, progress, passes=2 if nan_policy == "drop" else 1)
        dropped = _drop(checkpoints, used, meter) if nan_policy == "drop" else {}
        combination = combine([numbers[index] for index in used], normalize)
        files = Files([checkpoints[index] for index in used], meter.add)
        means = Means(files, combination, integer_policy, check=nan_policy != "propagate")
        lost = not_kept(output, checkpoints[0])
        for sentence in lost:
            warnings.warn(sentence, NotKeptWarning, stacklevel=2)
        with (
            open_output(output, checkpoints[0], leaves, wire, force) as writer,
            OneThread("fastagg-files") as background,
        ):
            written = background.submit(_write, writer, [], [])
            for batch in batches(leaves, len(used)):
                arrays = means.of(batch, leaves)
                written.result()
                written = background.submit(_write, writer, batch, arrays)
            written.result()
            writer.finish()
            files.check_whole()
    return Averaged(output, len(leaves), meter.done, time.perf_counter() - begin, dropped, lost)


def _write(writer: Writer, batch: list[Piece], arrays: list[np.ndarray]) -> None:
    for piece, array in zip(batch, arrays, strict=True):
        writer.write(piece.name, piece.begin, array)


class _Meter:
    """Counts bytes read, and tells."""

    def __init__(self, checkpoints: Sequence[Checkpoint], used: list[int], progress: Progress | None, passes: int):
        self.done = 0
        self._total = passes * sum(checkpoints[index].nbytes for index in used)
        self._progress = progress

    def add(self, nbytes: int) -> None:
        """Bytes that have been read."""
        self.done += nbytes
        if self._progress is not None:
            self._progress(self.done, self._total)


def _drop(checkpoints: Sequence[Checkpoint], used: list[int], meter: _Meter) -> dict[Path, str]:
    """Takes the files with a NaN or an infinity from those that are used, and warns.

    Raises:
        ValueError: none is left.
    """
    dropped: dict[Path, str] = {}
    for index in list(used):
        checkpoint = checkpoints[index]
        leaf = first_nonfinite(Files([checkpoint], meter.add), checkpoint.leaves)
        if leaf is not None:
            dropped[checkpoint.path] = leaf
            used.remove(index)
            text = f"{checkpoint.path} dropped: leaf {quoted(leaf)} holds a NaN or an infinity"
            warnings.warn(text, DroppedUpdateWarning, stacklevel=3)
    if not used:
        raise ValueError("every contributing file holds a NaN or an infinity, so none is left to average")
    return dropped
