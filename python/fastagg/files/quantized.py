"""How a .safetensors file holds `Quantized` leaves: two tensors each, and one entry of the metadata.

docs/average.md describes the format.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from fastagg._arrays.registry import kind_named
from fastagg._native.codes import FLOATS, WIRES, code_of_dtype, name_of
from fastagg._quoting import printable, quoted
from fastagg.files.checkpoints import LeafDescription, checked_shape
from fastagg.quantization.quantized import codes_layout

METADATA_KEY = "fastagg.quantized"
VERSION = 1


class QuantizedLeaf(NamedTuple):
    """A leaf as codes and scales: the names of its tensors, and what it was."""

    codes: str
    scales: str | None
    wire: str
    block: int | None
    dtype: str
    shape: tuple[int, ...]

    def tensors(self) -> list[tuple[str, LeafDescription]]:
        """The tensors that hold it."""
        layout = codes_layout(kind_named("numpy"), self.wire, self.shape, self.block)
        tensors = [(self.codes, LeafDescription(name_of(layout.dtype), layout.shape))]
        if self.scales is not None:
            tensors.append((self.scales, LeafDescription("float32", (layout.scales,))))
        return tensors


def quantized_leaf(name: str, wire: str, block: int | None, dtype: str, shape: tuple[int, ...]) -> QuantizedLeaf:
    """The leaf of that name, with the names of its tensors."""
    return QuantizedLeaf(f"{name}.codes", None if block is None else f"{name}.scales", wire, block, dtype, shape)


def metadata_of_leaves(leaves: Mapping[str, QuantizedLeaf]) -> str:
    """The entry of the metadata that says which leaves are quantised, and how."""
    described = {
        name: {"wire": leaf.wire, "block": leaf.block, "dtype": leaf.dtype, "shape": leaf.shape}
        for name, leaf in leaves.items()
    }
    return json.dumps({"version": VERSION, "leaves": described}, separators=(",", ":"))


def leaves_of_metadata(metadata: Mapping[str, str]) -> dict[str, QuantizedLeaf]:
    """The quantised leaves that a file's metadata tells of; none where it has no such entry.

    Raises:
        ValueError: the entry cannot be understood.
    """
    if METADATA_KEY not in metadata:
        return {}
    try:
        described = json.loads(metadata[METADATA_KEY])
        if described["version"] != VERSION:
            raise ValueError(f"version {quoted(described['version'])}, expected {VERSION}")
        return {name: _leaf(name, entry) for name, entry in described["leaves"].items()}
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        reason = printable(str(error))
        raise ValueError(f"the metadata's {METADATA_KEY} cannot be understood: {reason}") from None


def _leaf(name: str, entry: dict[str, Any]) -> QuantizedLeaf:
    wire, block, dtype, shape = entry["wire"], entry["block"], entry["dtype"], checked_shape(entry["shape"])
    if wire not in WIRES or not isinstance(dtype, str) or code_of_dtype(dtype) not in FLOATS:
        raise ValueError(f"leaf {quoted(name)}: wire {quoted(wire)} or dtype {quoted(dtype)}")
    if not (block is None or type(block) is int):
        raise ValueError(f"leaf {quoted(name)}: block {quoted(block)}")
    return quantized_leaf(name, wire, block, dtype, shape)
