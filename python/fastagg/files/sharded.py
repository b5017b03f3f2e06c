"""Checkpoints in several .safetensors files with an index of which leaf is in which."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastagg.files.checkpoints import Checkpoint
from fastagg.files.safetensors import SafetensorsCheckpoint

INDEX_SUFFIX = ".safetensors.index.json"


class ShardedCheckpoint(Checkpoint):
    """The shards of an index as one checkpoint.

    Attributes:
        index_name: the file name of the index.
        index_metadata: what the index says besides.
        shards: the open shards by file name, in the order of their names.
    """

    def __init__(self, path: Path) -> None:
        """Opens an index, or the one index of a directory, and all of its shards.

        Raises:
            OSError: a file cannot be read.
            ValueError: the index or a shard is wrong, or they do not agree.
        """
        super().__init__(path)
        index = _index_of(path) if path.is_dir() else path
        self.index_name = index.name
        self.index_metadata, weight_map = _read_index(index)
        self.shards = {name: SafetensorsCheckpoint(index.parent / name) for name in sorted(set(weight_map.values()))}
        self._shard_of: dict[str, SafetensorsCheckpoint] = {}
        for name, shard in self.shards.items():
            _check_shard(index, name, shard, weight_map)
            self.leaves.update(shard.leaves)
            self.mapped += shard.mapped
            self._shard_of.update(dict.fromkeys(shard, shard))

    def __getitem__(self, name: str) -> Any:
        return self._shard_of[name][name]


def _index_of(folder: Path) -> Path:
    found = sorted(folder.glob(f"*{INDEX_SUFFIX}"))
    if len(found) != 1:
        raise ValueError(f"{folder}: expected one *{INDEX_SUFFIX} in the directory, found {len(found)}")
    return found[0]


def _read_index(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The metadata and the weight map."""
    try:
        index = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: the index is no valid JSON: {error}") from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    metadata = index.get("metadata", {}) if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not isinstance(metadata, dict):
        raise ValueError(f"{path}: expected an object with a weight_map from leaves to files")
    for leaf, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_file_name(shard):
            raise ValueError(
                f"{path}: leaf {leaf!r}: expected the name of a .safetensors file beside the index, got {shard!r}"
            )
    return metadata, weight_map


def _is_file_name(shard: str) -> bool:
    return Path(shard).name == shard and shard.endswith(".safetensors") and shard.isprintable()


def _check_shard(index: Path, name: str, shard: SafetensorsCheckpoint, weight_map: dict[str, str]) -> None:
    """Raises ValueError unless a shard holds just the tensors that the index says."""
    expected = {tensor for tensor, file in weight_map.items() if file == name}
    if missing := expected - shard.tensor_names:
        raise ValueError(f"{shard.path}: lacks {min(missing)!r}, which {index} says it holds")
    if unexpected := shard.tensor_names - expected:
        raise ValueError(f"{shard.path}: holds {min(unexpected)!r}, which {index} does not say")
