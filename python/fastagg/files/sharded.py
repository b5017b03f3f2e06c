"""Checkpoints in several .safetensors files with an index of which leaf is in which."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from fastagg._quoting import quoted
from fastagg.files.checkpoints import Checkpoint
from fastagg.files.plain_file import read_plain
from fastagg.files.quantized import METADATA_KEY
from fastagg.files.safetensors import LARGEST_HEADER, SafetensorsCheckpoint

INDEX_SUFFIX = ".safetensors.index.json"


class ShardedCheckpoint(Checkpoint):
    """The shards of a directory as one checkpoint.

    Attributes:
        folder: the directory.
        index_name: the file name of the index; None for a directory with one .safetensors file and no index.
        index_metadata: what the index says besides.
        shards: the open shards by file name, in the order of their names.
    """

    def __init__(self, path: Path, file: Path) -> None:
        """Opens what a path stands for: an index and all of its shards, or a single .safetensors file.

        Raises:
            OSError: a file cannot be read.
            ValueError: the index or a shard is wrong, or they do not agree.
        """
        super().__init__(path)
        self.folder = file.parent
        self.index_name: str | None = None
        self.index_metadata: dict[str, Any] = {}
        weight_map: dict[str, str] | None = None
        names = [file.name]
        if file.name.endswith(INDEX_SUFFIX):
            self.index_name = file.name
            self.index_metadata, weight_map = _read_index(file)
            names = sorted(set(weight_map.values()))
        self.shards = {name: SafetensorsCheckpoint(self.folder / name) for name in names}
        if weight_map is not None:
            _check_shards(file, self.shards, weight_map)
        self._shard_of: dict[str, SafetensorsCheckpoint] = {}
        for shard in self.shards.values():
            if twice := self.leaves.keys() & shard.leaves.keys():
                raise ValueError(f"{shard.path}: leaf {quoted(min(twice))} is in another shard, too")
            self.leaves.update(shard.leaves)
            self.files += shard.files
            self.mapped += shard.mapped
            self._shard_of.update(dict.fromkeys(shard, shard))
        self.metadata = self._common_metadata()

    def __getitem__(self, name: str) -> Any:
        return self._shard_of[name][name]

    def _common_metadata(self) -> dict[str, str]:
        """What the metadata of all shards say."""
        first, *others = (shard.metadata.items() for shard in self.shards.values())
        return {
            name: text for name, text in first if name != METADATA_KEY and all((name, text) in one for one in others)
        }


def _read_index(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The metadata and the weight map."""
    try:
        index = json.loads(read_plain(path, LARGEST_HEADER).decode())
    except RecursionError:
        raise ValueError(f"{path}: the index is no valid JSON: it is nested too deeply") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: the index is no valid JSON: it is not UTF-8") from None
    except ValueError as error:  # a number of thousands of digits, too
        raise ValueError(f"{path}: the index is no valid JSON: {error}") from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    metadata = (index.get("metadata") or {}) if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not isinstance(metadata, dict):
        raise ValueError(f"{path}: expected an object with a weight_map from leaves to files")
    for leaf, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_file_name(shard):
            raise ValueError(
                f"{path}: leaf {quoted(leaf)}: expected the name of a .safetensors file beside the index, got "
                f"{quoted(shard)}"
            )
    return metadata, weight_map


def _is_file_name(shard: str) -> bool:
    return Path(shard).name == shard and shard.endswith(".safetensors") and shard.isprintable()


def _check_shards(index: Path, shards: dict[str, SafetensorsCheckpoint], weight_map: dict[str, str]) -> None:
    """Raises ValueError unless the shards hold just the tensors that the index says."""
    expected = defaultdict(set)
    for tensor, file in weight_map.items():
        expected[file].add(tensor)
    for name, shard in shards.items():
        if missing := expected[name] - shard.tensor_names:
            raise ValueError(f"{shard.path}: lacks {quoted(min(missing))}, which {index} says it holds")
        if unexpected := shard.tensor_names - expected[name]:
            raise ValueError(f"{shard.path}: holds {quoted(min(unexpected))}, which {index} does not say")
