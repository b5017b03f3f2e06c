"""Clients' updates on the device, room for their mean, and the right answer in float64."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import torch

import fastagg
import gpu_machine
from answers import HALF_ULPS, SMALLEST
from gpu_cases import ARRAY, RESNET50, Case
from inputs import SMALL_LEAF, bytes_of, leaves_of, resnet50

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.float32}
_SMALL_LEAVES = 214
_QUICK_WIDTH = 8  # of the ResNet


class Updates:
    """One set of clients' updates.

    Attributes:
        columns: for every floating leaf what each client sent. A ResNet's integer scalars are left to fastagg.
        outs: room for the floating leaves of the mean.
        shares: the weights, normalised.
    """

    def __init__(self, case: Case, seed: int, quick: bool) -> None:
        self.case = case
        generator = torch.Generator(gpu_machine.DEVICE).manual_seed(seed)
        shapes = _shapes(case, quick)
        self.updates = [_update(case, shapes, generator) for _ in range(case.clients)]
        self.weights = [float(100 + 37 * client % 91) for client in range(case.clients)]
        self.shares = [weight / sum(self.weights) for weight in self.weights]
        self.out = _room(self.updates[0])
        columns = zip(*(leaves_of(update) for update in self.updates), strict=True)
        floating = [pair for pair in zip(columns, leaves_of(self.out), strict=True) if pair[1].is_floating_point()]
        self.columns = [list(column) for column, _ in floating]
        self.outs: list[torch.Tensor] = [out for _, out in floating]

    @property
    def bytes(self) -> int:
        """Of every update, read once, and of one mean."""
        return sum(bytes_of(update) for update in self.updates) + bytes_of(self.out)

    def spoil(self) -> None:
        """See `Subject`."""
        for out in self.outs:
            out.fill_(math.nan)

    def check(self, tolerance: float) -> None:
        """See `Subject`."""
        for out, (mean, magnitude) in zip(self.outs, self._expected, strict=True):
            dtype = str(out.dtype).removeprefix("torch.")
            allowed = tolerance * magnitude + SMALLEST[dtype]
            if dtype != "float32":
                allowed += HALF_ULPS[dtype] * mean.abs()
            error = (out.double() - mean).abs()
            assert bool((error <= allowed).all()), f"off by {float(error.max()):.3g}"

    @cached_property
    def _expected(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The weighted mean of every leaf, and that of its magnitudes."""
        found = []
        for column in self.columns:
            values = decoded(column[0], torch.float64)
            mean, magnitude = values * self.shares[0], values.abs_() * self.shares[0]
            for share, leaf in zip(self.shares[1:], column[1:], strict=True):
                values = decoded(leaf, torch.float64)
                mean.add_(values, alpha=share)
                magnitude.add_(values.abs_(), alpha=share)
            found.append((mean, magnitude))
        return found


def decoded(leaf: Any, dtype: torch.dtype) -> torch.Tensor:
    """A leaf's values in fresh memory: as torch decodes int8 codes with a scale a block."""
    if not isinstance(leaf, fastagg.Quantized):
        return leaf.to(dtype, copy=True)  # type: ignore[no-any-return]
    codes, scales, block = leaf.data, leaf.scales.to(dtype), leaf.block
    if codes.numel() % block == 0:
        return (codes.view(-1, block) * scales[:, None]).view(leaf.shape)  # type: ignore[no-any-return]
    return codes * scales.repeat_interleave(block)[: codes.numel()].view(leaf.shape)  # type: ignore[no-any-return]


def _shapes(case: Case, quick: bool) -> dict[str, tuple[int, ...]]:
    if case.layout == ARRAY:
        return {"": (case.elements(quick),)}
    if case.layout == RESNET50:
        return dict(resnet50(_QUICK_WIDTH if quick else 64))
    return {f"leaf{index}": (SMALL_LEAF,) for index in range(_SMALL_LEAVES)}


def _update(case: Case, shapes: dict[str, tuple[int, ...]], generator: torch.Generator) -> Any:
    leaves = {name: _leaf(case, shape, generator) for name, shape in shapes.items()}
    return leaves[""] if case.layout == ARRAY else leaves


def _leaf(case: Case, shape: tuple[int, ...], generator: torch.Generator) -> Any:
    if shape == ():
        return torch.tensor(1000, device=gpu_machine.DEVICE)  # a BatchNorm's num_batches_tracked
    values = torch.empty(shape, dtype=_DTYPES[case.kind], device=gpu_machine.DEVICE).normal_(generator=generator)
    return fastagg.quantize(values, "int8") if case.kind == "int8" else values


def _room(update: Any) -> Any:
    """Tensors for a mean like an update."""
    if isinstance(update, dict):
        return {name: _room(leaf) for name, leaf in update.items()}
    if isinstance(update, fastagg.Quantized):
        return torch.empty(update.shape, device=gpu_machine.DEVICE)
    return torch.empty_like(update)
