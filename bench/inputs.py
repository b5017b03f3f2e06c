"""The inputs of a case: clients' updates, their weights, and room for the result."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

import fastagg
from cases import Case

SMALL_LEAF = 128  # elements of each of the many small leaves


class Inputs:
    """A case's data, every page of it touched."""

    def __init__(self, case: Case) -> None:
        self.case = case
        shapes = _shapes(case)
        self.updates = [_update(case, shapes, seed) for seed in range(case.clients)]
        self.weights = [float(100 + 37 * client % 91) for client in range(case.clients)]
        self.out = _room(case, self.updates[0])

    @property
    def result_bytes(self) -> int:
        """Bytes of one result: a model, in the dtype of its leaves."""
        return bytes_of(self.out)


def leaves_of(update: Any) -> list[Any]:
    """The arrays of an update."""
    return list(update.values()) if isinstance(update, Mapping) else [update]


def bytes_of(update: Any) -> int:
    """Bytes of an update's arrays."""
    return sum(int(leaf.nbytes) for leaf in leaves_of(update))


def _update(case: Case, shapes: dict[str, tuple[int, ...]], seed: int) -> Any:
    """One client's update, or what a cast reads."""
    leaves = {name: _leaf(case, shape, seed) for name, shape in shapes.items()}
    return leaves[""] if case.layout == "array" else leaves


def _leaf(case: Case, shape: tuple[int, ...], seed: int) -> Any:
    if case.layout == "ResNet-50" and shape == ():
        import torch

        return torch.tensor(1000 + seed)  # a BatchNorm's num_batches_tracked
    values: Any = _values(math.prod(shape), seed).reshape(shape)
    if case.library == "torch":
        import torch

        # A copy, for memory that torch allocates has smaller pages than NumPy's.
        values = torch.from_numpy(values).to(getattr(torch, case.dtype), copy=True)
    elif case.dtype != "float32":
        values = values.astype(case.dtype)
    encodes = case.wire is not None and case.operation != "quantize"
    return fastagg.quantize(values, case.wire) if encodes else values


def _values(count: int, seed: int) -> np.ndarray:
    """Numbers in [-0.5, 0.5) in fresh memory: their values do not matter to the speed, their pages do."""
    values = np.empty(count, np.float32)
    np.random.default_rng(seed).random(dtype=np.float32, out=values)
    values -= np.float32(0.5)
    return values


def _room(case: Case, update: Any) -> Any:
    """Arrays for `out=`, written once so that their pages are there."""
    if case.operation == "quantize":
        return fastagg.quantize(update, case.wire)
    if isinstance(update, dict):
        return {name: array.clone() for name, array in update.items()}
    if isinstance(update, fastagg.Quantized):
        return fastagg.dequantize(update)
    return update.clone() if case.library == "torch" else update.copy()


def _shapes(case: Case) -> dict[str, tuple[int, ...]]:
    if case.layout == "ResNet-50":
        return dict(resnet50(width=64 if case.elements > 10_000_000 else 8))
    if case.layout == "small leaves":
        return {f"leaf{index}": (SMALL_LEAF,) for index in range(case.elements // SMALL_LEAF)}
    return {"": (case.elements,)}


def resnet50(width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """A ResNet-50's 161 parameters and 53 integer scalars: 24,999,704 elements at width 64, with 728 classes."""
    yield from _convolution("conv1", 3, width, 7)
    channels = width
    for stage, blocks in enumerate((3, 4, 6, 3)):
        inner = width << stage
        for block in range(blocks):
            name = f"layer{stage + 1}.{block}"
            yield from _convolution(f"{name}.conv1", channels, inner, 1)
            yield from _convolution(f"{name}.conv2", inner, inner, 3)
            yield from _convolution(f"{name}.conv3", inner, 4 * inner, 1)
            if block == 0:
                yield from _convolution(f"{name}.downsample", channels, 4 * inner, 1)
            channels = 4 * inner
    classes = 728 * width // 64
    yield "fc.weight", (classes, channels)
    yield "fc.bias", (classes,)


def _convolution(name: str, inputs: int, outputs: int, size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """A convolution and its BatchNorm."""
    yield f"{name}.weight", (outputs, inputs, size, size)
    yield f"{name}.norm.weight", (outputs,)
    yield f"{name}.norm.bias", (outputs,)
    yield f"{name}.norm.num_batches_tracked", ()
