"""Weighted sums of open checkpoints, a few megabytes of every file at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastagg._arrays.registry import kind_named
from fastagg._native import core
from fastagg._native.backend import weighted_sum
from fastagg._native.codes import FLOATS, Code, encoded_bytes
from fastagg._native.operands import MAXIMUM, MEAN, LeafOperands, SourceOperands
from fastagg._quoting import quoted
from fastagg.files.checkpoints import Checkpoint, LeafDescription
from fastagg.files.mapped_file import span_of
from fastagg.files.weights import Combination
from fastagg.quantization.quantized import Quantized, source_operands

# Bytes of one file's part of a batch, and of all files'. From 4 MB on, sums would be stored around the cache from which
# they are written to the file.
_PIECE_BYTES = 3 << 20
_BATCH_BYTES = 128 << 20

_NARROW = (Code.FLOAT16, Code.BFLOAT16)

Span = tuple[int, int]


class Piece(NamedTuple):
    """The elements [begin, end) of a leaf; `begin` is a multiple of every block of scales."""

    name: str
    begin: int
    end: int


def batches(leaves: dict[str, LeafDescription], files: int) -> Iterator[list[Piece]]:
    """All elements in order: large leaves in pieces, small ones together."""
    room = min(_PIECE_BYTES, _BATCH_BYTES // files)
    batch: list[Piece] = []
    used = 0
    for name, leaf in leaves.items():
        size = leaf.element_bytes
        step = max(room // size // core.MAXIMUM_BLOCK, 1) * core.MAXIMUM_BLOCK
        for begin in range(0, max(leaf.elements, 1), step):
            piece = Piece(name, begin, min(begin + step, leaf.elements))
            nbytes = (piece.end - begin) * size
            if batch and used + nbytes > room:
                yield batch
                batch, used = [], 0
            batch.append(piece)
            used += nbytes
    if batch:
        yield batch


class Files:
    """Open checkpoints of the same leaves, read piece by piece; pages that have been read are given back."""

    def __init__(self, checkpoints: Sequence[Checkpoint], progress: Callable[[int], None]) -> None:
        self.checkpoints = checkpoints
        self._progress = progress
        self._name: str | None = None
        self._leaves: list[Any] = []
        self._read: list[tuple[Checkpoint, Span, Any]] = []

    def sources(self, piece: Piece) -> list[SourceOperands]:
        """Where every file's part of a piece lies, until `forget`."""
        if piece.name != self._name:  # what had to be inflated whole is kept as long as its leaf is the one at hand
            self._leaves = []
            self._leaves, self._name = [_leaf_of(checkpoint, piece.name) for checkpoint in self.checkpoints], piece.name
        return [
            self._source(checkpoint, leaf, piece)
            for checkpoint, leaf in zip(self.checkpoints, self._leaves, strict=True)
        ]

    def _source(self, checkpoint: Checkpoint, leaf: Any, piece: Piece) -> SourceOperands:
        if isinstance(leaf, Quantized):
            address, scales, code, shift = source_operands(leaf)
            begin, end = (address + encoded_bytes(Code(code), place) for place in (piece.begin, piece.end))
            self._read.append((checkpoint, (begin, end), leaf))
            return begin, scales and scales + 4 * (piece.begin >> shift), code, shift
        part = _part_of(leaf, piece)
        view = kind_named("numpy").view(part)  # a copy of what is not aligned
        self._read.append((checkpoint, span_of(part), view.owner))
        return view.address, 0, view.code, 0

    def check_whole(self) -> None:
        """Raises ValueError if a file was cut off since it was opened."""
        for checkpoint in self.checkpoints:
            checkpoint.check_whole()

    def forget(self) -> None:
        """Gives back what `sources` has told since the last time."""
        for checkpoint, span, _ in self._read:
            checkpoint.release(span)
        self._progress(sum(end - begin for _, (begin, end), _ in self._read))
        self._read = []


def _leaf_of(checkpoint: Checkpoint, name: str) -> Any:
    """A leaf that is as large as its description, which tells how much of it is read."""
    leaf, described = checkpoint.leaf(name), checkpoint.leaves[name]
    if isinstance(leaf, (np.ndarray, Quantized)) and tuple(leaf.shape) != described.shape:
        raise ValueError(f"{checkpoint.path}: leaf {quoted(name)}: expected shape {described.shape}, got {leaf.shape}")
    return leaf


def _part_of(leaf: Any, piece: Piece) -> np.ndarray:
    """A piece's elements, in one row and in the machine's order of bytes."""
    if not isinstance(leaf, np.ndarray):
        part: np.ndarray = leaf.part(piece.begin, piece.end)
    elif leaf.flags.c_contiguous:
        part = leaf.reshape(-1)[piece.begin : piece.end]
    else:  # copied piece by piece: as a whole it could be much larger than what it is a view of
        part = leaf.flat[piece.begin : piece.end]
    return part if part.dtype.isnative else part.astype(part.dtype.newbyteorder("="))


def first_nonfinite(files: Files, leaves: dict[str, LeafDescription]) -> str | None:
    """The first leaf of a single file with a NaN or an infinity."""
    floats = {name: leaf for name, leaf in leaves.items() if leaf.code in FLOATS}
    for batch in batches(floats, 1):
        for piece in batch:
            is_finite = _is_finite(files.sources(piece)[0], piece)
            files.check_whole()
            if not is_finite:
                return piece.name
        files.forget()
    return None


def _is_finite(source: SourceOperands, piece: Piece) -> bool:
    operands = LeafOperands([source], None, [1.0], 1.0, piece.end - piece.begin)
    return not weighted_sum([operands], "cpu", 0, True)


class Means:
    """The weighted sums of batches of pieces; they stay valid until the batch after the next."""

    def __init__(self, files: Files, combination: Combination, integer_policy: str | None, check: bool) -> None:
        self._files, self._combination = files, combination
        self._integer_policy, self._check = integer_policy, check
        self._rooms = [np.empty(0, np.uint8), np.empty(0, np.uint8)]

    def of(self, batch: list[Piece], results: dict[str, LeafDescription]) -> list[np.ndarray]:
        """One array of one dimension for each piece.

        Raises:
            ValueError: a file holds a NaN or an infinity, or a result is too large for its dtype, and `check` is set.
        """
        arrays = self._allocate(batch, results)
        leaves = [self._operands(piece, results[piece.name], array) for piece, array in zip(batch, arrays, strict=True)]
        nonfinite = weighted_sum(leaves, "cpu", 0, self._check)
        self._files.check_whole()
        for index in nonfinite:
            self._raise(batch[index], leaves[index].sources, results[batch[index].name])
        if self._check:
            self._check_narrow(batch, leaves)
        for array in arrays:
            if array.dtype == np.bool_:  # a rounded sum may be more than True
                np.minimum(array.view(np.uint8), 1, out=array.view(np.uint8))
        self._files.forget()
        return arrays

    def _operands(self, piece: Piece, result: LeafDescription, array: np.ndarray) -> LeafOperands:
        sources: list[Any] = self._files.sources(piece)
        weights, divisor, rest = self._combination
        fold = MEAN
        if result.code not in FLOATS and self._integer_policy != "round":
            fold = MAXIMUM
            sources = sources[:1] if self._integer_policy == "first" else sources
        count = piece.end - piece.begin
        out = array.ctypes.data
        return LeafOperands(sources, None, weights, divisor, count, fold, out, result_code=result.code, rest=rest)

    def _check_narrow(self, batch: list[Piece], leaves: list[LeafOperands]) -> None:
        """Raises ValueError where a sum was finite, and is too large for the 16 bits of its result."""
        for piece, operands in zip(batch, leaves, strict=True):
            address, code = operands.out, Code(operands.result_code)
            if code in _NARROW and not _is_finite((address, 0, code, 0), piece):
                raise _too_large(piece, code)

    def _allocate(self, batch: list[Piece], results: dict[str, LeafDescription]) -> list[np.ndarray]:
        """Arrays one behind the other, each from the beginning of a cache line on."""
        ends = [0]
        for piece in batch:
            nbytes = (piece.end - piece.begin) * results[piece.name].element_bytes
            ends.append(-(-(ends[-1] + nbytes) // 64) * 64)
        room, other = self._rooms
        if room.size < ends[-1]:
            room = np.empty(ends[-1], np.uint8)
        self._rooms = [other, room]
        arrays = []
        for piece, begin in zip(batch, ends, strict=False):
            result = results[piece.name]
            nbytes = (piece.end - piece.begin) * result.element_bytes
            arrays.append(room[begin : begin + nbytes].view(kind_named("numpy").dtype_named(result.dtype)))
        return arrays

    def _raise(self, piece: Piece, sources: list[SourceOperands], result: LeafDescription) -> None:
        """Raises ValueError for the first file that holds a NaN or an infinity, or else for the result."""
        for checkpoint, source in zip(self._files.checkpoints, sources, strict=False):
            if not _is_finite(source, piece):
                raise ValueError(f"{checkpoint.path}: leaf {quoted(piece.name)} holds a NaN or an infinity")
        raise _too_large(piece, result.code)


def _too_large(piece: Piece, code: Code) -> ValueError:
    return ValueError(f"leaf {quoted(piece.name)}: the result is too large for {code.name.lower()}")
