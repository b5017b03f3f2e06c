"""The DDP hook's arithmetic on one device, and what torch does in its place: gradients, the right answer, contenders.

Between encoding and decoding stands the exchange with other ranks, which is left out: this is a world of one. What is
compared comes to the same gradients, unscaled, with their norm and whether one is not finite. The norm stays below the
limit of clipping. A loop that knows it need not multiply then; `clip_grad_norm_` multiplies by 1.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch

import gpu_machine
from fastagg._arrays.registry import kind_named
from fastagg._native.backend import backend_for
from fastagg._native.codes import Code
from fastagg.distributed.exchange.arithmetic import Arithmetic, DeviceArithmetic, HostArithmetic
from fastagg.distributed.exchange.exchange import NO_KEY
from gpu_cases import FASTAGG, Case
from gpu_subject import Contender
from gpu_timing import Call
from inputs import resnet50

_WORLD = 1
# Gradients stay where they are from call to call: another scale would shrink them to zeros.
_LOSS_SCALE = 1.0
_MAXIMUM_NORM = 1e6
_BUCKET_BYTES = 25 << 20  # DDP's default
_BYTES_AN_ELEMENT = 4 + 2 + 2 + 4  # to encode and to decode

_NO_FEEDBACK = (0, 0.0, 0, 0.0, False)


def arithmetic() -> Arithmetic:
    """The operations on the device, which add to what they have found."""
    backend = backend_for(gpu_machine.DEVICE)
    if backend is None:  # the CPU, in the tests
        return HostArithmetic()
    return DeviceArithmetic(backend, torch.device(gpu_machine.DEVICE), kind_named("torch").stream(gpu_machine.DEVICE))


def encode_and_decode(operations: Arithmetic, bucket: torch.Tensor, codes: torch.Tensor, loss_scale: float) -> None:
    """What the hook computes for a bucket in a world of one; the only place here that knows how fastagg does it.

    ``bucket = decode(encode(bucket)) / loss_scale``

    Args:
        operations: receives whether the result is finite, and its sum of squares.
        bucket: float32 gradients on the device, replaced.
        codes: room for as many float16 codes.
        loss_scale: what the gradients are too large by.
    """
    count = bucket.numel()
    given, sent = (bucket.data_ptr(), 0, Code.FLOAT32, 0), (codes.data_ptr(), 0, Code.FLOAT16, 0)
    encoded = (given, Code.FLOAT16, 0, codes.data_ptr(), 0, count, False, NO_KEY, 1.0)
    operations.reduce(([given], float(_WORLD), *_NO_FEEDBACK, encoded, 0, ()), norm=False, check=False)
    decoded = (sent, Code.FLOAT32, 0, bucket.data_ptr(), 0, count, False, NO_KEY, 1.0)
    operations.reduce(([sent], loss_scale, *_NO_FEEDBACK, decoded, 0, ()), norm=True, check=True)


class Gradients:
    """A ResNet-50's gradients in DDP's buckets, and what a step finds in them."""

    def __init__(self, case: Case, seed: int, quick: bool) -> None:
        generator = torch.Generator(gpu_machine.DEVICE).manual_seed(seed)
        shapes = [shape for _, shape in resnet50(8 if quick else 64) if shape != ()]
        counts = [math.prod(shape) for shape in shapes]
        ends = _bucket_ends(counts)
        self.given = torch.empty(sum(counts), device=gpu_machine.DEVICE).normal_(std=0.01, generator=generator)
        flat = self.given.clone()
        offsets = [sum(counts[:end]) for end in ends]
        self.buckets = [flat[begin:end] for begin, end in pairwise([0, *offsets])]
        self.codes = [torch.empty_like(bucket, dtype=torch.float16) for bucket in self.buckets]
        parts: tuple[torch.Tensor, ...] = torch.split(flat, counts)
        self.gradients = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        self.parameters = [torch.nn.Parameter(torch.empty_like(gradient)) for gradient in self.gradients]
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        self.flat, self.found_inf = flat, True
        self.norm: float | torch.Tensor = math.nan

    @property
    def bytes(self) -> int:
        """Of gradients read and codes written, and back."""
        return _BYTES_AN_ELEMENT * self.flat.numel()

    def spoil(self) -> None:
        """See `Subject`."""
        self.flat.copy_(self.given)
        self.norm, self.found_inf = math.nan, True

    def check(self, tolerance: float) -> None:
        """See `Subject`."""
        expected = self.given.half().float() / _LOSS_SCALE
        assert torch.equal(self.flat, expected), "the gradients are not those that fp16 leaves"
        norm = float(expected.double().norm())
        assert abs(float(self.norm) - norm) <= tolerance * norm, f"norm: expected {norm}, got {float(self.norm)}"
        assert not self.found_inf, "an infinity was found where there is none"


def _bucket_ends(counts: list[int]) -> list[int]:
    """Behind which of the gradients a bucket is full."""
    ends, held = [], 0
    for index, count in enumerate(counts):
        held += 4 * count
        if held >= _BUCKET_BYTES or index + 1 == len(counts):
            ends.append(index + 1)
            held = 0
    return ends


def _fastagg(gradients: Gradients) -> Call:
    def step() -> None:
        operations = arithmetic()
        for bucket, codes in zip(gradients.buckets, gradients.codes, strict=True):
            encode_and_decode(operations, bucket, codes, _LOSS_SCALE)
        gradients.norm, gradients.found_inf = math.sqrt(float(operations.squares)), not bool(operations.finite)
        if gradients.norm > _MAXIMUM_NORM:
            torch._foreach_mul_(gradients.gradients, _MAXIMUM_NORM / gradients.norm)

    return step


def _torch(gradients: Gradients) -> Call:
    """The arithmetic of fp16_compress_hook, then GradScaler's and clipping's passes."""
    inverse = torch.tensor(1 / _LOSS_SCALE, device=gpu_machine.DEVICE)
    found_inf = torch.zeros((), device=gpu_machine.DEVICE)

    def step() -> None:
        for bucket in gradients.buckets:
            bucket.copy_(bucket.to(torch.float16).div_(_WORLD))
        found_inf.zero_()
        torch._amp_foreach_non_finite_check_and_unscale_(gradients.gradients, found_inf, inverse)
        gradients.found_inf = bool(found_inf.item())  # as GradScaler.step does
        gradients.norm = torch.nn.utils.clip_grad_norm_(gradients.parameters, _MAXIMUM_NORM)

    return step


CONTENDERS = [
    Contender(FASTAGG, FASTAGG, _fastagg),
    Contender("torch: fp16 hook, unscale, clip", "torch", _torch, is_eager=True),
]
