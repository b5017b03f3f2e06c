"""Which tensors may be read and written as plain memory: the one decision for everything that takes tensors."""

from __future__ import annotations

from typing import Any

import torch

# Of tensors that define operations of their own, what turns them into plain ones.
_AS_PLAIN = {
    "DTensor": "pass its full_tensor()",
    "FakeTensor": "it has no values",
    "MaskedTensor": "pass its to_tensor(value)",
    "NestedTensor": "pass its to_padded_tensor(value)",
}
_NO_DISPATCH = torch.Tensor.__torch_dispatch__


def check_plain(tensor: torch.Tensor) -> None:
    """Raises TypeError unless the values of a tensor lie in memory of a CPU or CUDA device, one to an element.

    The message says what to pass instead. Tensors that are not contiguous, and views with a negative bit, are plain:
    `in_order` makes their copies.
    """
    name = type(tensor).__name__
    if type(tensor).__torch_dispatch__ is not _NO_DISPATCH:  # its memory, if it has any, means what it says alone
        raise TypeError(f"expected a plain tensor, got a {name}: {_AS_PLAIN.get(name, 'pass its values as one')}")
    if torch.nn.parameter.is_lazy(tensor):
        raise TypeError(f"expected a plain tensor, got a {name}: run the model once, which makes its parameters")
    if tensor.is_nested:
        raise TypeError("expected a dense tensor, got a nested one: pass its to_padded_tensor(value), or its parts")
    if tensor.layout is not torch.strided:
        raise TypeError(f"expected a dense tensor, got layout {tensor.layout}: pass its to_dense()")
    if not (tensor.is_cpu or tensor.is_cuda):
        hint = "it has no values" if tensor.is_meta else "pass its cpu()"
        raise TypeError(f"expected a tensor on a CPU or CUDA device, got {tensor.device}: {hint}")
    if tensor.is_quantized:
        raise TypeError(f"expected plain numbers, got {tensor.dtype}: pass its dequantize()")
    if tensor.is_conj():
        raise TypeError("expected a plain tensor, got a conjugate view: pass its resolve_conj()")
    try:
        has_memory = tensor.data_ptr() != 0 or tensor.numel() == 0
    except RuntimeError:  # vmap's and grad's stand for others
        hint = "call this outside vmap and grad"
        raise TypeError(f"expected a tensor with memory, got one of torch.func: {hint}") from None
    if not has_memory or _end(tensor) > tensor.untyped_storage().nbytes():
        raise TypeError(
            "expected a tensor with memory, got one without: clone it first (of FSDP: inside summon_full_params)"
        )


def check_writable(tensor: torch.Tensor) -> None:
    """Raises ValueError where two elements of a tensor share memory, such as those of an expanded one."""
    if tensor.is_contiguous():
        return
    reached = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reached:
            raise ValueError("expected an element at each place, got a tensor whose elements share memory: clone it")
        reached += stride * (size - 1)


def in_order(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without its graph; a copy where its memory does not hold its values one behind the other."""
    return tensor.detach().resolve_neg().contiguous()


def _end(tensor: torch.Tensor) -> int:
    """The byte of the storage behind the last element."""
    if tensor.numel() == 0:
        return 0
    if tensor.is_contiguous():
        elements: Any = tensor.numel()
    else:
        elements = 1 + sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return int(tensor.storage_offset() + elements) * tensor.itemsize
