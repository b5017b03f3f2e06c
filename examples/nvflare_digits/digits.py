"""The data and the network: scikit-learn's handwritten digits, 8x8 pixels, and two layers."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn

TEST_IMAGES = 360


class Network(nn.Module):
    """Its BatchNorm has an integer buffer, which the mean must keep an integer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """A score for each digit."""
        return self.layers(pixels)


def share_of(site: int, sites: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A site's training images and labels, and the test images and labels, which all sites share."""
    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images, dtype=torch.float32) / 16
    classes = torch.tensor(labels)
    mine = slice(TEST_IMAGES + site, None, sites)
    return pixels[mine], classes[mine], pixels[:TEST_IMAGES], classes[:TEST_IMAGES]


def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """The share of images that the model names correctly."""
    model.eval()
    with torch.no_grad():
        return float((model(images).argmax(dim=1) == labels).float().mean())
