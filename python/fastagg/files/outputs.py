"""Where a checkpoint is written, and as what: the name of the output says it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fastagg._quoting import quoted, quoted_list
from fastagg.files.atomic import atomic_directory, atomic_file, check_place, keep_permissions, new_mode
from fastagg.files.checkpoints import Checkpoint, LeafDescription
from fastagg.files.quantized import METADATA_KEY
from fastagg.files.sharded import INDEX_SUFFIX, ShardedCheckpoint
from fastagg.files.writers import NpzWriter, SafetensorsWriter, TorchWriter, Writer, write_all

FILE_SUFFIXES = (".safetensors", ".npz", ".pt", ".pth")


def check_output(output: Path, wire: str | None, force: bool) -> None:
    """Refuses an output that cannot be written, before any input is opened.

    Raises:
        FileExistsError, FileNotFoundError: something is there, and not `force`; or its directory is not.
        ValueError: its format is none that is written, or holds no codes; or it would replace something else.
    """
    check_place(output, force, is_directory=output.suffix not in FILE_SUFFIXES)
    if output.name.endswith(INDEX_SUFFIX):
        raise ValueError(f"{output}: name the directory of the shards, not their index")
    if wire is not None and output.suffix in FILE_SUFFIXES[1:]:
        raise ValueError(f"{output}: only .safetensors files hold quantised leaves")
    if output.suffix not in FILE_SUFFIXES and os.path.lexists(output):
        _check_replaceable(output)


def _check_replaceable(folder: Path) -> None:
    """Raises ValueError unless a directory holds nothing but a sharded checkpoint."""
    if not folder.is_dir() or folder.is_symlink():
        raise ValueError(f"{folder}: expected a directory to replace")
    for path in folder.iterdir():
        if not path.is_file() or not path.name.endswith((".safetensors", INDEX_SUFFIX)):
            raise ValueError(f"{folder}: not replaced, for it holds {quoted(path.name)} beside its shards")


def not_kept(output: Path, first: Checkpoint) -> list[str]:
    """What stands in the first input, or beside its shards, and will not be in the output: a sentence for each."""
    sentences = []
    if output.suffix not in FILE_SUFFIXES and isinstance(first, ShardedCheckpoint):
        others = sorted(entry.name for entry in first.folder.iterdir() if not _is_part(entry.name))
        if others:
            sentences.append(
                f"{first.folder}: what lies beside the shards is not copied: {quoted_list(others)}; copy what belongs "
                "to the result"
            )
    elif isinstance(first, ShardedCheckpoint):
        lost = sorted(first.index_metadata.keys() - {"total_size"} - first.metadata.keys())
        if lost:
            sentences.append(f"{first.path}: these metadata of its index are not kept: {quoted_list(lost)}")
    texts = sorted(first.metadata.keys() - {METADATA_KEY, "format"})
    if texts and output.suffix in FILE_SUFFIXES[1:]:
        sentences.append(
            f"{first.path}: its metadata are not kept, for which {output.suffix} has no place: {quoted_list(texts)}"
        )
    if output.suffix not in FILE_SUFFIXES[2:] and _has_versions(first.module_versions):
        sentences.append(
            f"{first.path}: the versions of its modules (_metadata of a state_dict) are not kept: only .pt has them"
        )
    return sentences


def _is_part(name: str) -> bool:
    """Whether a file of a sharded checkpoint's directory is one of its own; hidden ones are nobody's."""
    return name.endswith((".safetensors", INDEX_SUFFIX)) or name.startswith(".")


def _has_versions(module_versions: Any) -> bool:
    """Whether the modules of a state_dict have versions that loading asks for: 1 is as good as none."""
    versions = module_versions.values() if isinstance(module_versions, Mapping) else ()
    known = (one.get("version") for one in versions if isinstance(one, Mapping))
    return any(version is not None and not (isinstance(version, int) and version == 1) for version in known)


@contextmanager
def open_output(
    output: Path, first: Checkpoint, leaves: dict[str, LeafDescription], wire: str | None, force: bool
) -> Iterator[Writer]:
    """A writer; what it has finished takes its place when the block ends.

    Raises:
        ValueError: the output is a directory, but the first input has no shards to be like.
        OSError: it cannot be written.
    """
    if output.suffix in FILE_SUFFIXES:
        with (
            atomic_file(output, force) as descriptor,
            closing(_writer(output, descriptor, first, leaves, wire)) as file,
        ):
            yield file
        return
    if not isinstance(first, ShardedCheckpoint):
        raise ValueError(
            f"{output}: expected a name that ends in {', '.join(FILE_SUFFIXES)}; a directory is written only where the "
            f"first input is sharded, and {first.path} is not"
        )
    with (
        atomic_directory(output, force) as folder,
        closing(ShardedWriter(folder, output, first, leaves, wire)) as shards,
    ):
        yield shards


def _writer(
    output: Path, descriptor: int, first: Checkpoint, leaves: dict[str, LeafDescription], wire: str | None
) -> Writer:
    if output.suffix == ".safetensors":
        return SafetensorsWriter(descriptor, leaves, first.metadata, wire)
    if output.suffix == ".npz":
        return NpzWriter(descriptor, leaves)
    return TorchWriter(descriptor, output.parent, leaves, first.module_versions)


class ShardedWriter:
    """A directory of .safetensors files and their index; the leaves come shard by shard."""

    def __init__(
        self,
        folder: Path,
        output: Path,
        like: ShardedCheckpoint,
        leaves: dict[str, LeafDescription],
        wire: str | None,
    ) -> None:
        """Nothing is written yet; `output` is what the folder will be."""
        self._folder, self._output, self._like, self._leaves, self._wire = folder, output, like, leaves, wire
        self._shard_of = {name: shard for shard, opened in like.shards.items() for name in opened}
        self._weight_map: dict[str, str] = {}
        self._nbytes = 0
        self._shard, self._descriptor = "", -1
        self._writer: SafetensorsWriter | None = None

    def write(self, name: str, begin: int, array: np.ndarray) -> None:
        """See `Writer`."""
        shard = self._shard_of[name]
        if shard != self._shard or self._writer is None:
            self._writer = self._begin(shard)
        self._writer.write(name, begin, array)

    def finish(self) -> None:
        """See `Writer`. The index, if there is one, comes last."""
        self._end_shard()
        if self._like.index_name is None:
            return
        metadata = {**self._like.index_metadata, "total_size": self._nbytes}
        index = json.dumps({"metadata": metadata, "weight_map": dict(sorted(self._weight_map.items()))}, indent=2)
        descriptor = self._create(self._like.index_name)
        try:
            write_all(descriptor, f"{index}\n".encode(), 0)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """See `Writer`."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def _begin(self, shard: str) -> SafetensorsWriter:
        self._end_shard()
        self._shard, self._descriptor = shard, self._create(shard)
        opened = self._like.shards[shard]
        leaves = {name: self._leaves[name] for name in opened}
        writer = SafetensorsWriter(self._descriptor, leaves, opened.metadata, self._wire)
        self._weight_map.update(dict.fromkeys(writer.tensors, shard))
        self._nbytes += writer.nbytes
        return writer

    def _end_shard(self) -> None:
        if self._descriptor >= 0:
            os.fsync(self._descriptor)
        self.close()

    def _create(self, name: str) -> int:
        replaced = self._output / name
        descriptor = os.open(self._folder / name, os.O_RDWR | os.O_CREAT | os.O_EXCL, new_mode(replaced, 0o666))
        keep_permissions(descriptor, replaced)
        return descriptor
