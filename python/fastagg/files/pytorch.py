"""Reading .pt and .pth files: state_dicts of plain tensors, loaded without running what the file says."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fastagg._arrays.library import unsupported
from fastagg._arrays.registry import kind_named
from fastagg._extras import needing
from fastagg._native.codes import Code, code_of_dtype, name_of
from fastagg._quoting import printable, quoted
from fastagg.files.checkpoints import Checkpoint, LeafDescription
from fastagg.files.mapped_file import MappedFile, spans_of_mapping

_MAGIC = b"PK\3\4"  # of an archive
_SMALL = 64 << 20  # bytes, which any file may ask for
_LARGEST_INFLATION = 8  # times the file: numbers are hardly compressed at all


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
        self._file = MappedFile(path)
        self.files = [self._file]
        self._tensors = _load(path, self._file)
        self.module_versions = getattr(self._tensors, "_metadata", None)
        self.mapped = spans_of_mapping(path)
        for span in self.mapped:
            self._file.guard(span)
        for name, tensor in self._tensors.items():
            self.leaves[name] = _describe(path, name, tensor, len(self._file))

    def __getitem__(self, name: str) -> np.ndarray:
        array = np.ascontiguousarray(self.leaf(name)).reshape(self.leaves[name].shape)
        array.flags.writeable = False
        return array

    def leaf(self, name: str) -> np.ndarray:
        """A view of the file, strided where the tensor is."""
        import torch

        tensor = self._tensors[name].detach().resolve_neg()
        if code_of_dtype(tensor.dtype) == Code.BFLOAT16:
            array = tensor.view(torch.int16).numpy().view(kind_named("numpy").dtype_for(Code.BFLOAT16))
        else:
            array = tensor.numpy()
        return np.asarray(array)


def _load(path: Path, file: MappedFile) -> Mapping[str, Any]:
    if file.bytes[: len(_MAGIC)].tobytes() != _MAGIC:
        raise ValueError(f"{path}: no valid .pt file: expected an archive as torch.save has written since torch 1.6")
    is_stored = _check_archive(path, len(file))
    with needing("torch", f"{path}: fastagg for .pt files"):
        import torch
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=is_stored)
    except pickle.UnpicklingError:
        if _names_dtensors(path):
            raise TypeError(f"{path}: expected plain tensors, got DTensors: save their full_tensor()") from None
        raise ValueError(
            f"{path}: not loaded, for it is damaged or holds more than tensors and plain values (expected a "
            "state_dict that torch.save wrote)"
        ) from None
    except UnicodeEncodeError:
        raise ValueError(f"{path}: torch opens no file whose name is not UTF-8: rename it") from None
    except Exception as error:  # torch raises what it likes for a damaged archive
        reason = printable(str(error).partition("\n")[0] or type(error).__name__)
        raise ValueError(f"{path}: no valid .pt file: {reason}") from None
    if not isinstance(loaded, Mapping):
        raise TypeError(f"{path}: expected a state_dict, got {type(loaded).__name__}")
    return loaded


def _names_dtensors(path: Path) -> bool:
    """Whether a file that weights_only refuses holds DTensors."""
    import torch

    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # torch raises what it likes for a damaged one
        return False
    return any(name.endswith(".DTensor") for name in names)


def _check_archive(path: Path, file_bytes: int) -> bool:
    """Whether an archive's records are stored as they are: torch would map compressed ones as if they were numbers.

    Raises:
        ValueError: it is damaged, names a record twice, or would inflate to much more than its size.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path}: no valid .pt file: {printable(str(error))}") from None
    if len({record.filename for record in records}) < len(records):
        raise ValueError(f"{path}: no valid .pt file: a record is there twice")
    if all(record.compress_type == zipfile.ZIP_STORED for record in records):
        return True
    total = sum(record.file_size for record in records)
    if total > max(_LARGEST_INFLATION * file_bytes, _SMALL):
        raise ValueError(f"{path}: {file_bytes} bytes that would inflate to {total}: expected what torch.save wrote")
    return False


def _describe(path: Path, name: Any, tensor: Any, file_bytes: int) -> LeafDescription:
    import torch

    from fastagg._arrays.plain_tensors import check_plain

    who = f"{path}: leaf {quoted(name)}"
    if not isinstance(tensor, torch.Tensor):
        hint = f": save the state_dict under {quoted(name)} alone" if isinstance(tensor, Mapping) else ""
        raise TypeError(f"{who}: expected a tensor, got {type(tensor).__name__}{hint}")
    if not isinstance(name, str):
        raise TypeError(f"{who}: expected a text as its name")
    try:
        check_plain(tensor)
    except TypeError as error:
        raise TypeError(f"{who}: {error}") from None
    if code_of_dtype(tensor.dtype) is None:
        raise TypeError(f"{who}: {unsupported(tensor.dtype)}")
    storage_bytes = tensor.untyped_storage().nbytes()
    if tensor.numel() * tensor.element_size() > max(file_bytes, storage_bytes, _SMALL):
        raise ValueError(
            f"{who}: {tensor.numel()} elements, and its storage holds {storage_bytes // tensor.element_size()}: it was "
            "expanded; save its clone()"
        )
    if storage_bytes > max(file_bytes, _SMALL):
        raise ValueError(f"{who}: its storage of {storage_bytes} bytes is larger than the file, which has {file_bytes}")
    if code_of_dtype(tensor.dtype) == Code.BFLOAT16:
        kind_named("numpy").dtype_for(Code.BFLOAT16)  # may be missing
    return LeafDescription(name_of(tensor.dtype), tuple(tensor.shape))
