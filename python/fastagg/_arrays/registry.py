"""Which library an array belongs to: the one place where NumPy, PyTorch, CuPy and DLPack come together."""

from __future__ import annotations

import sys
from typing import Any, cast

import numpy as np

from fastagg._arrays.cupy import CuPy
from fastagg._arrays.library import Kept, Kind, View
from fastagg._arrays.numpy import NumPy
from fastagg._arrays.torch import HUGE, Torch

__all__ = ["HUGE", "Kept", "Kind", "View", "adopt", "kind_named", "kind_of"]

_kinds: dict[str, Kind] = {"numpy": NumPy()}
_MAKERS: dict[str, type[Torch] | type[CuPy]] = {"cupy": CuPy, "torch": Torch}
# Of the libraries' own types, which almost all arrays are.
_kinds_of_types: dict[type, Kind] = {np.ndarray: _kinds["numpy"]}


def kind_named(name: str) -> Kind:
    """The array library of that name."""
    if name not in _kinds:
        kind = _MAKERS[name]()
        _kinds[name] = kind
        _kinds_of_types.update(dict.fromkeys(kind.plain, kind))
    return _kinds[name]


def kind_of(array: Any) -> Kind | None:
    """The library that an array belongs to, or None if it is no array that fastagg takes as it is."""
    kind = _kinds_of_types.get(type(array))
    return kind if kind is not None else _kind_of_another_type(array)


def _kind_of_another_type(array: Any) -> Kind | None:
    if isinstance(array, (np.ndarray, np.generic)):
        return _kinds["numpy"]
    for name, type_name in (("torch", "Tensor"), ("cupy", "ndarray")):
        module = sys.modules.get(name)
        if module is not None and isinstance(array, getattr(module, type_name, ())):
            return kind_named(name)
    return None


def adopt(array: Any) -> tuple[Kind, Any]:
    """The array as one of a library we know: itself, or its memory seen through DLPack or the CUDA array interface.

    Raises:
        TypeError: it is no array.
    """
    kind = kind_of(array)
    if kind is not None:
        return kind, np.asarray(array) if isinstance(array, np.generic) else array
    on_cpu = hasattr(array, "__dlpack__") and int(array.__dlpack_device__()[0]) == 1
    if on_cpu:
        return _kinds["numpy"], _numpy_from_dlpack(array)
    if hasattr(array, "__dlpack__") or hasattr(array, "__cuda_array_interface__"):
        kind = _cuda_library()
        return kind, kind.adopt(array)
    hint = ": pass its state_dict()" if hasattr(array, "state_dict") else ""
    raise TypeError(f"expected an array (NumPy, PyTorch, CuPy or DLPack), got {type(array).__name__}{hint}")


def _numpy_from_dlpack(array: Any) -> np.ndarray:
    """An array in the host's memory, in place.

    Raises:
        TypeError: NumPy has no such dtype (bf16 among them).
    """
    try:
        return np.from_dlpack(array)
    except (RuntimeError, BufferError) as error:
        raise TypeError(f"NumPy cannot take this array through DLPack: {error}") from None


def _cuda_library() -> Torch | CuPy:
    """What holds CUDA memory that came through an interface: CuPy where installed, else torch."""
    for name in _MAKERS:
        try:
            kind_named(name)
        except ImportError:
            continue
        return cast("Torch | CuPy", _kinds[name])
    raise TypeError("CUDA arrays need CuPy or PyTorch: pip install cupy-cuda13x, or torch")
