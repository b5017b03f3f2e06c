"""Trains a small network on scikit-learn's digits with the lines of a Horovod script; the import is fastagg's.

torchrun --nproc-per-node 2 examples/horovod_style.py
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import fastagg.horovod as hvd

EPOCHS = 8
TRAINING_IMAGES = 1500


def main() -> None:
    hvd.init()
    torch.manual_seed(hvd.rank())

    digits = load_digits()
    pixels, labels = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    training = TensorDataset(pixels[:TRAINING_IMAGES], labels[:TRAINING_IMAGES])
    sampler: DistributedSampler[tuple[torch.Tensor, ...]] = DistributedSampler(training, hvd.size(), hvd.rank())
    loader = DataLoader(training, batch_size=16, sampler=sampler)

    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.02 * hvd.size(), momentum=0.9),
        named_parameters=model.named_parameters(),
        compression=hvd.Compression.fp16,
    )
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)

    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        for images, digit in loader:
            optimizer.zero_grad()
            cross_entropy(model(images), digit).backward()
            optimizer.synchronize()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            with optimizer.skip_synchronize():
                optimizer.step()
        accuracy = hvd.allreduce(share_read_right(model, pixels, labels), op=hvd.Average)
        if hvd.rank() == 0:
            print(f"epoch {epoch + 1}: accuracy {accuracy.item():.3f}")
    hvd.shutdown()


def share_read_right(model: torch.nn.Module, pixels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Of this rank's part of the test images."""
    mine = slice(TRAINING_IMAGES + hvd.rank(), None, hvd.size())
    with torch.no_grad():
        return (model(pixels[mine]).argmax(dim=1) == labels[mine]).float().mean()


if __name__ == "__main__":
    main()
