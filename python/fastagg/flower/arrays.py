"""Flower's serialised arrays, read where their bytes lie and written without a copy.

An `Array` holds the bytes of an .npy file. bf16 and quantised leaves, which .npy cannot hold, travel as
`Array(dtype, shape, stype="fastagg.<wire>" or "fastagg.<wire>.<block>", data=scales + codes)`, dtype and shape being
the leaf's own. Codes that were rounded stochastically add ".seed.<seed>.<step>.<tensor>" to the stype: whoever steps
from the model that was sent rounds that with the same numbers.
"""

from __future__ import annotations

import ctypes
import io
import math
import re
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import Array, ArrayRecord

from fastagg._arguments import as_shape
from fastagg._arrays.registry import kind_named
from fastagg._arrays.torch import HUGE
from fastagg._native import core
from fastagg._native.codes import FLOATS, WIRES, Code, code_of_dtype, name_of, wire_name
from fastagg._npy import NpyHeader, npy_header, read_npy_header
from fastagg._quoting import printable, quoted
from fastagg._updates.buffers import is_buffer
from fastagg._updates.integer_codes import IntegerLeaf, refuse_codes
from fastagg._updates.sent import rounded_like
from fastagg.quantization.cast import dequantize
from fastagg.quantization.quantized import Quantized, codes_layout

if TYPE_CHECKING:
    import torch

Leaf = np.ndarray | Quantized

_CHUNK = 1 << 16  # elements of a temporary that stays in the cache
_LONGEST_ERROR = 150  # characters of NumPy's, which repeats the header
_NUMPY = "numpy.ndarray"
_OURS = "fastagg"
_STYPE = re.compile(r"fastagg\.(\w+)(?:\.([0-9]{1,9}))?(?:\.seed\.([0-9]{1,20})\.([0-9]{1,10})\.([0-9]{1,10}))?")


class FreshArrays:
    """New arrays for a record: `views` are NumPy arrays to write, `record()` is what is sent."""

    def __init__(self, like: Mapping[str, Any]) -> None:
        """Arrays of the names, shapes and dtypes of other leaves; the contents are undefined."""
        self._arrays: dict[str, Array] = {}
        self.views: dict[str, np.ndarray] = {}
        for name, leaf in like.items():
            self._arrays[name], self.views[name] = _fresh(tuple(leaf.shape), np.dtype(leaf.dtype).newbyteorder("="))

    def read_only(self) -> dict[str, np.ndarray]:
        """The arrays, for whoever is to look at what is sent."""
        arrays = {name: view[...] for name, view in self.views.items()}
        for array in arrays.values():
            array.flags.writeable = False
        return arrays

    def record(self) -> ArrayRecord:
        """The arrays as they are now."""
        return ArrayRecord(self._arrays)


def _fresh(shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[Array, np.ndarray]:
    count = math.prod(shape)
    if name_of(dtype) == "bfloat16":
        stype, header = f"{_OURS}.bf16", b""
    else:
        stype, header = _NUMPY, npy_header(dtype, shape)
    data, view = _writable_bytes(len(header) + count * dtype.itemsize)
    view[: len(header)] = np.frombuffer(header, np.uint8)
    return Array(str(dtype), shape, stype, data), view[len(header) :].view(dtype).reshape(shape)


def _writable_bytes(size: int) -> tuple[bytes, np.ndarray]:
    """New bytes and their memory: C's API lets whoever makes a bytes object write it before others see it.

    The array keeps the bytes alive.
    """
    make, address_of = ctypes.pythonapi.PyBytes_FromStringAndSize, ctypes.pythonapi.PyBytes_AsString
    make.restype, address_of.restype = ctypes.py_object, ctypes.c_void_p
    data: bytes = make(None, ctypes.c_ssize_t(size))
    address: int = address_of(ctypes.py_object(data))
    if size >= HUGE:
        core.advise_huge_pages(address, size)
    memory = (ctypes.c_uint8 * size).from_address(address)
    memory.owner = data  # type: ignore[attr-defined]
    return data, np.frombuffer(memoryview(memory), np.uint8)


def read_leaf(array: Array) -> Leaf:
    """An array's elements where its bytes lie: a read-only NumPy array, or a `Quantized`.

    Raises:
        TypeError: it is serialised in another way, or holds elements that cannot be averaged.
        ValueError: its bytes are not what its header promises.
    """
    stype = array.stype
    if stype == _NUMPY:
        return read_npy(array.data)
    if isinstance(stype, str) and stype.split(".", 1)[0] == _OURS:
        return _read_quantized(array)
    raise TypeError(f"expected an array serialised by numpy.ndarray or fastagg, got {quoted(stype)}")


def read_record(record: ArrayRecord) -> dict[str, Leaf]:
    """All leaves of a record, as `read_leaf` reads them; an error names the leaf."""
    leaves = {}
    for name, array in record.items():
        try:
            leaves[name] = read_leaf(array)
        except Exception as error:  # an overflow, for one: bytes can claim to be anything
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"leaf {quoted(name)}: {error}") from None
    return leaves


def read_npy(data: bytes) -> np.ndarray:
    """An .npy file's array where its bytes lie.

    Raises:
        TypeError, ValueError: as `read_leaf`.
    """
    prefix = 10 if data[6:7] == b"\x01" else 12  # magic, version, and the header's length in 2 or 4 bytes
    size = prefix + int.from_bytes(data[8:prefix], "little")
    header = _parse_header(data[:size])
    got = len(data) - size
    if got != header.nbytes:
        promised = f"{quoted(header.nbytes)} bytes of {header.dtype} {quoted(header.shape)}"
        raise ValueError(f"its header promises {promised}, got {got}")
    flat = np.frombuffer(data, header.dtype, offset=size) if got else np.empty(0, header.dtype)
    if header.dtype == np.bool_ and flat.view(np.uint8).max(initial=0) > 1:
        raise ValueError("its bytes are not those of bools")
    return flat.reshape(header.shape, order="F" if header.is_fortran else "C")


@lru_cache(maxsize=4096)
def _parse_header(header: bytes) -> NpyHeader:
    """A header of elements that can be averaged; all clients' arrays of a leaf begin with the same bytes."""
    try:
        parsed = read_npy_header(io.BytesIO(header))
    except ValueError as error:
        raise ValueError(printable(str(error), _LONGEST_ERROR)) from None
    if code_of_dtype(parsed.dtype) is None:
        expected = "expected a real floating, integer or bool dtype"
        raise TypeError(f"dtype {printable(str(parsed.dtype))} is not supported ({expected})")
    return parsed


def _read_quantized(array: Array) -> Leaf:
    wire, block, seed = _parse_stype(array.stype)
    shape = as_shape(array.shape)
    layout = codes_layout(kind_named("numpy"), wire, shape, block)
    scales_size = 4 * layout.scales
    expected = scales_size + math.prod(layout.shape) * layout.dtype.itemsize
    if len(array.data) != expected:
        raise ValueError(f"expected {expected} bytes of {wire} codes for {quoted(shape)}, got {len(array.data)}")
    memory = np.frombuffer(array.data, np.uint8)
    scales = memory[:scales_size].view(np.float32) if block is not None else None
    codes = memory[scales_size:].view(layout.dtype).reshape(layout.shape)
    if wire == "bf16" and array.dtype == "bfloat16":
        brain: np.ndarray = codes.view(kind_named("numpy").dtype_named("bfloat16"))
        return brain
    return Quantized(codes, scales, wire=wire, shape=shape, dtype=array.dtype, block=block, seed=seed)


def _parse_stype(stype: str) -> tuple[str, int | None, tuple[int, int, int] | None]:
    """The wire, the block and the key of stochastic rounding."""
    match = _STYPE.fullmatch(stype)
    if match is None or match[1] not in WIRES:
        raise ValueError(f"expected a stype such as fastagg.int8.256, got {quoted(stype)}")
    block = None if match[2] is None else int(match[2])
    seed = None if match[3] is None else (int(match[3]), int(match[4]), int(match[5]))
    return wire_name(match[1]), block, seed


def as_array(leaf: Leaf) -> np.ndarray:
    """A leaf's elements, decoded where it is quantised, in the machine's order of bytes."""
    return dequantize(leaf) if isinstance(leaf, Quantized) else leaf.astype(leaf.dtype.newbyteorder("="), copy=False)


def in_dtype(leaf: Leaf, dtype: Any) -> Leaf:
    """A floating leaf in another floating dtype; all others as they are.

    fp64 arrays are cast. Everything narrower becomes codes of a wire, which are decoded while they are added up.
    """
    wanted, own = code_of_dtype(dtype), code_of_dtype(leaf.dtype)
    if wanted == own or wanted not in FLOATS or own not in FLOATS:
        return leaf
    if isinstance(leaf, Quantized):
        return Quantized(
            leaf.data,
            leaf.scales,
            wire=leaf.wire,
            shape=leaf.shape,
            dtype=name_of(dtype),
            block=leaf.block,
            seed=leaf.seed,
        )
    array = np.asarray(as_array(leaf), order="C")
    if own == Code.FLOAT64:
        with np.errstate(over="ignore"):  # the infinity is looked for where all others are
            return array.astype(np.dtype(name_of(dtype)))
    return Quantized(array, None, wire=wire_name(array.dtype), shape=array.shape, dtype=name_of(dtype))


def squared_distance(one: Mapping[str, Leaf], other: Mapping[str, Leaf], buffers: Collection[str]) -> float:
    """``sum((one - other)^2)`` over the parameters of two models of the same leaves, in float64.

    A leaf that is quantised in the other is compared with this one's as the same wire rounds it; equal infinities have
    no distance.
    """
    total = 0.0
    for name, leaf in one.items():
        if is_buffer(name, leaf.dtype, buffers):
            continue
        first, second = rounded_like(as_array(leaf), other[name]).reshape(-1), as_array(other[name]).reshape(-1)
        for begin in range(0, first.size, _CHUNK):
            with np.errstate(over="ignore", invalid="ignore"):  # the caller looks at the sum
                parts = first[begin : begin + _CHUNK], second[begin : begin + _CHUNK]
                difference = np.subtract(*parts, dtype=np.float64)
                square = float(difference @ difference)
                if math.isnan(square):
                    difference[parts[0] == parts[1]] = 0
                    square = float(difference @ difference)
                total += square
    return total


def check_integer_leaves(model: Mapping[str, Leaf]) -> None:
    """Raises ValueError where a model's integer leaves look like another quantiser's codes, or like bytes."""
    names, leaves = tuple(model), list(model.values())
    integers = tuple(
        IntegerLeaf(place, leaf.dtype, tuple(leaf.shape))
        for place, leaf in enumerate(leaves)
        if code_of_dtype(leaf.dtype) not in FLOATS
    )
    refuse_codes(names, integers, lambda place: [("", as_array(leaves[place]))])


def write_leaf(leaf: Any) -> Array:
    """A NumPy array, torch tensor or `Quantized` as an `Array`."""
    if isinstance(leaf, Quantized):
        seed = () if leaf.seed is None else ("seed", *leaf.seed)
        stype = ".".join(map(str, (_OURS, leaf.wire, *(() if leaf.block is None else (leaf.block,)), *seed)))
        parts = [part for part in (leaf.scales, leaf.data) if part is not None]
        data = b"".join(_bytes_of(part) for part in parts)
        return Array(name_of(leaf.dtype), tuple(leaf.shape), stype, data)
    leaf = leaf if isinstance(leaf, np.ndarray) else _on_host(leaf)
    if name_of(leaf.dtype) == "bfloat16":
        return Array("bfloat16", tuple(leaf.shape), f"{_OURS}.bf16", _bytes_of(leaf))
    array, view = _fresh(tuple(leaf.shape), np.dtype(name_of(leaf.dtype)))
    view[...] = leaf if isinstance(leaf, np.ndarray) else leaf.numpy()
    return array


def _bytes_of(array: Any) -> bytes:
    if isinstance(array, np.ndarray):
        return array.tobytes()
    import torch

    elements: np.ndarray = _on_host(array).reshape(-1).view(torch.uint8).numpy()
    return elements.tobytes()


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's values in the host's memory; raises TypeError if they are not plain."""
    from fastagg._arrays.plain_tensors import check_plain, in_order

    check_plain(tensor)
    return in_order(tensor).cpu()
