"""The communication hook that DistributedDataParallel calls with each bucket of gradients."""

# No annotations from the future: torch compares the hook's with its own class.

from fastagg._extras import needing

with needing("torch", "fastagg.ddp"):
    import torch
    import torch.distributed as dist

from fastagg._native.codes import FLOATS, code_of_dtype
from fastagg.ddp.state import AllReduceState
from fastagg.distributed.channels import channel_of, group_of


def all_reduce_hook(
    state: AllReduceState,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[torch.Tensor]:
    """Averages a bucket over the group's ranks in a thread of its own, or on a stream, in the order of the buckets.

    ``gradient = decode(encode(sum_r(decode(encode(gradient_r + residual_r))) / world))``

    As in `all_reduce`, the mean of two ranks, and of few elements, is not encoded.

    Raises:
        TypeError: the state is none; the gradients are sparse, or of a dtype without a wire; or torch.compile with
            optimize_ddp="python_reducer" hands over none.
        ValueError: the state belongs to another model.
        PeerError: in backward, if a rank has died or hung.
    """
    if not isinstance(bucket, dist.GradBucket):  # type: ignore[attr-defined]
        raise TypeError(f"expected a bucket of DDP's C++ reducer, got {type(bucket).__name__}: set optimize_ddp=True")
    if not isinstance(state, AllReduceState):
        raise TypeError(f"state: expected an AllReduceState, got {type(state).__name__}: register one with the hook")
    gradients = bucket.buffer()
    _check_gradients(state, gradients, bucket.parameters())
    group = group_of(state.process_group)
    channel = channel_of(group, gradients.device)
    begun = state.begin_bucket(group, bucket)

    def reduce() -> None:
        try:
            state.reduce_bucket(channel.transport, begun)
        except Exception:
            state.unscaled.forget()  # they are lost: the next step begins anew
            raise

    return channel.line.begin_future(reduce, gradients)


def _check_gradients(state: AllReduceState, gradients: torch.Tensor, parameters: list[torch.Tensor]) -> None:
    """Raises TypeError for gradients that the hook cannot reduce; every rank's bucket is the same."""
    first = state.name_of(parameters[0])
    if gradients.layout is not torch.strided:
        remedy = "build its layer with sparse=False, or leave it out of DDP's hook"
        raise TypeError(f"{first} has sparse gradients, which the hook does not reduce: {remedy}")
    if code_of_dtype(gradients.dtype) not in FLOATS or gradients.device.type not in ("cpu", "cuda"):
        got = f"{gradients.dtype} on {gradients.device} in the bucket of {first}"
        raise TypeError(f"expected floating gradients (fp32, fp16, bf16, fp64) on a CPU or CUDA device, got {got}")
