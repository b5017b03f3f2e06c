"""What a wire would gain for your training, before you turn one on: put your own model and batch into `main`.

Run it on as many ranks as you train on:

    torchrun --nproc-per-node 2 examples/headroom.py
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
import torch.distributed.nn  # now: optimizers load it, and loaded beside a group it would keep that to the very end
from torch import nn

from fastagg.ddp import report


def network(width: int) -> nn.Module:
    """A small CNN for 8x8 digits."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(576, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=2048, help="of the hidden layers (2048: 22 MB of gradients)")
    parser.add_argument("--batch", type=int, default=64, help="images of a rank's batch")
    parser.add_argument("--steps", type=int, default=10, help="measured steps of each contender")
    parser.add_argument("--wires", nargs="*", default=["fp32", "fp16", "int8"])
    arguments = parser.parse_args()

    dist.init_process_group("gloo")
    torch.manual_seed(dist.get_rank())
    images, labels = torch.rand(arguments.batch, 1, 8, 8), torch.randint(10, (arguments.batch,))

    def step(model: nn.Module) -> None:
        nn.functional.cross_entropy(model(images), labels).backward()

    measured = report(network(arguments.width), step, wires=arguments.wires, steps=arguments.steps)
    if dist.get_rank() == 0:
        print(measured)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
