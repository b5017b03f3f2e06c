"""Trains on digits under torchrun; after a restart it goes on from the newest checkpoint, hook state included.

TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --standalone --nproc-per-node 2 --max-restarts 3 \
    examples/elastic/train.py --folder checkpoints
"""

from __future__ import annotations

import argparse
import datetime
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn  # now: optimizers load it, and loaded beside a group it would keep that to the very end
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from fastagg.ddp import AllReduceState, all_reduce_hook

BATCH = 32  # images a step and rank


def main() -> None:
    options = parse_options()
    options.folder.mkdir(parents=True, exist_ok=True)
    dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=1))
    (options.folder / f"rank-{dist.get_rank()}.pid").write_text(str(os.getpid()))

    images, labels = digits()
    model = DistributedDataParallel(network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    state = AllReduceState(wire=options.wire, error_feedback=True, named_parameters=model.module.named_parameters())
    model.register_comm_hook(state, all_reduce_hook)

    start = newest(options.folder)
    if start:
        # DDP rearranges its buckets after the first step, and scales and the owners of slices follow the buckets: with
        # that step behind it, overwritten by the checkpoint, training has the buckets that it had before.
        cross_entropy(model(images[:BATCH]), labels[:BATCH]).backward()
        load(options.folder, start, model.module, optimizer, state)
    report(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)} from step {start}")
    for step in range(start, options.steps):
        chosen = batch(step, len(images))
        optimizer.zero_grad()
        cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
        if (step + 1) % options.every == 0:
            save(options.folder, step + 1, model.module, optimizer, state)
        time.sleep(options.pause)
    with torch.no_grad():
        loss = cross_entropy(model.module(images), labels).item()
    report(f"loss {loss:.6f} after {options.steps} steps, all its bits: {loss.hex()}")
    dist.destroy_process_group()


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for checkpoints; all ranks must see it")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints")
    parser.add_argument("--wire", default="int8")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds to sleep after each step")
    return parser.parse_args()


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    found = load_digits()
    return torch.tensor(found.images[:, None] / 16, dtype=torch.float32), torch.tensor(found.target)


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 3),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(16 * 6 * 6, 64),
        torch.nn.ReLU(),
        torch.nn.Linear(64, 10),
    )


def batch(step: int, count: int) -> torch.Tensor:
    """This rank's images of a step. Their order follows from the step alone: no checkpoint need hold it."""
    world, rank = dist.get_world_size(), dist.get_rank()
    epoch, place = divmod(step, count // (BATCH * world))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(epoch))
    begin = (place * world + rank) * BATCH
    return order[begin : begin + BATCH]


def save(
    folder: Path, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: AllReduceState
) -> None:
    """Writes a checkpoint: each rank its hook's state, then rank 0 the rest, which makes it complete."""
    checkpoint = checkpoint_of(folder, step)
    checkpoint.mkdir(exist_ok=True)
    write(checkpoint / f"hook-{dist.get_rank()}.pt", state.state_dict())
    dist.barrier()
    if dist.get_rank() == 0:
        write(checkpoint / "model.pt", {"model": model.state_dict(), "optimizer": optimizer.state_dict()})


def write(path: Path, contents: dict[str, Any]) -> None:
    """Writes a file wholly or not at all, whenever the process is killed."""
    partial = path.with_suffix(".partial")
    torch.save(contents, partial)
    os.replace(partial, path)


def newest(folder: Path) -> int:
    """The step of the newest complete checkpoint that all ranks see; 0 without one."""
    steps = [int(path.parent.name.removeprefix("step-")) for path in folder.glob("step-*/model.pt")]
    newest_of_all = torch.tensor(max(steps, default=0))
    dist.all_reduce(newest_of_all, op=dist.ReduceOp.MIN)
    return int(newest_of_all)


def load(
    folder: Path, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: AllReduceState
) -> None:
    checkpoint = checkpoint_of(folder, step)
    common = torch.load(checkpoint / "model.pt")
    model.load_state_dict(common["model"])
    optimizer.load_state_dict(common["optimizer"])
    state.load_state_dict(torch.load(checkpoint / f"hook-{dist.get_rank()}.pt"))


def checkpoint_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06}"


def report(line: str) -> None:
    if dist.get_rank() == 0:
        print(line, flush=True)


if __name__ == "__main__":
    main()
