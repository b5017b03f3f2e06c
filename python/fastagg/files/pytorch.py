"""Reading .pt and .pth files: state_dicts of plain tensors, loaded without running what the file says."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from fastagg._codes import Code, code_of_dtype, name_of
from fastagg._kind import unsupported
from fastagg._tensor import kind_named
from fastagg.files.checkpoints import Checkpoint, LeafDescription
from fastagg.files.mapped_file import MappedFile, spans_of_mapping

_MAGIC = b"PK\3\4"  # of an archive


class TorchCheckpoint(Checkpoint):
    """One file that torch.save wrote of a state_dict, mapped; its tensors as NumPy arrays."""

    def __init__(self, path: Path) -> None:
        """Loads the names, with weights_only.

        Raises:
            ImportError: PyTorch is not installed.
            OSError: it cannot be read.
            TypeError: it holds something else than tensors, or a dtype that fastagg has no arithmetic for.
            ValueError: it is truncated, no such file, or needs code to run.
        """
        super().__init__(path)
        self._tensors = _load(path)
        self.mapped = spans_of_mapping(path)
        for name, tensor in self._tensors.items():
            self.leaves[name] = _describe(path, name, tensor)

    def __getitem__(self, name: str) -> np.ndarray:
        import torch

        from fastagg._plain_tensors import in_order

        tensor = in_order(self._tensors[name])
        if code_of_dtype(tensor.dtype) == Code.BFLOAT16:
            array = tensor.view(torch.int16).numpy().view(kind_named("numpy").dtype_for(Code.BFLOAT16))
        else:
            array = tensor.numpy()
        array.flags.writeable = False
        return np.asarray(array)


def _load(path: Path) -> Mapping[str, Any]:
    if MappedFile(path).bytes[: len(_MAGIC)].tobytes() != _MAGIC:  # what cannot be opened is said as for other files
        raise ValueError(f"{path}: no valid .pt file: expected an archive as torch.save has written since torch 1.6")
    try:
        import torch
    except ImportError:
        raise ModuleNotFoundError(f"{path}: .pt files need PyTorch: pip install 'fastagg[torch]'") from None
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        if _holds_dtensors(path):
            raise TypeError(f"{path}: expected plain tensors, got DTensors: save their full_tensor()") from None
        raise ValueError(
            f"{path}: not loaded, for it is damaged or holds more than tensors and plain values (expected a "
            "state_dict that torch.save wrote)"
        ) from None
    except Exception as error:  # torch raises what it likes for a damaged archive
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path}: no valid .pt file: {reason}") from None
    if not isinstance(loaded, Mapping):
        raise TypeError(f"{path}: expected a state_dict, got {type(loaded).__name__}")
    return loaded


def _holds_dtensors(path: Path) -> bool:
    """Whether a file that was not loaded names torch's DTensor, which only a process that uses them can load."""
    import torch

    names: list[str] = []
    with suppress(Exception):  # it may be damaged as well
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    return any(name.endswith(".DTensor") for name in names)


def _describe(path: Path, name: Any, tensor: Any) -> LeafDescription:
    import torch

    from fastagg._plain_tensors import check_plain

    if not isinstance(tensor, torch.Tensor):
        hint = f": save the state_dict under {name!r} alone" if isinstance(tensor, Mapping) else ""
        raise TypeError(f"{path}: leaf {name!r}: expected a tensor, got {type(tensor).__name__}{hint}")
    if not isinstance(name, str):
        raise TypeError(f"{path}: leaf {name!r}: expected a text as its name")
    try:
        check_plain(tensor)
    except TypeError as error:
        raise TypeError(f"{path}: leaf {name!r}: {error}") from None
    if code_of_dtype(tensor.dtype) is None:
        raise TypeError(f"{path}: leaf {name!r}: {unsupported(tensor.dtype)}")
    if code_of_dtype(tensor.dtype) == Code.BFLOAT16:
        kind_named("numpy").dtype_for(Code.BFLOAT16)  # may be missing
    return LeafDescription(name_of(tensor.dtype), tuple(tensor.shape))
