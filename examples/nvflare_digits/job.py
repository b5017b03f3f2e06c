"""Trains the digits network on simulated sites: NVFlare's recipe, with fastagg as its aggregator.

`python job.py` runs it; `--aggregator nvflare` is the same run under NVFlare's own FedAvg, and with `--wire int8` the
sites send codes, which the aggregator decodes while it adds. NVFlare's own options `--export --export-dir jobs` write
the job in place of running it.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from digits import Network, accuracy, share_of
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.client.config import ExchangeFormat
from nvflare.recipe import SimEnv

from fastagg.nvflare import FedAvgAggregator, QuantizeFilter

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--aggregator", choices=("fastagg", "nvflare"), default="fastagg")
    parser.add_argument("--wire", help="quantise what sites send: fp16, bf16, fp8_e4m3, int8, int4, ...")
    parser.add_argument("--workspace", type=Path, default=Path("workspace"))
    arguments = parser.parse_args()

    workspace = arguments.workspace.resolve()
    os.chdir(HERE)  # NVFlare looks for the script here
    recipe = FedAvgRecipe(
        name="digits",
        model=Network(),
        min_clients=arguments.sites,
        num_rounds=arguments.rounds,
        train_script="client.py",
        train_args=f"--sites {arguments.sites}",
        server_expected_format=ExchangeFormat.PYTORCH,
        aggregator=FedAvgAggregator() if arguments.aggregator == "fastagg" else None,
    )
    if arguments.wire:
        recipe.add_client_output_filter(QuantizeFilter(wire=arguments.wire), tasks=["train"])
    recipe.execute(SimEnv(num_clients=arguments.sites, workspace_root=str(workspace)))
    report(workspace)


def report(workspace: Path) -> None:
    """Prints the accuracy of the last global model."""
    path = next(workspace.rglob("FL_global_model.pt"))
    model = Network()
    model.load_state_dict(torch.load(path, weights_only=True)["model"])
    print(f"accuracy {accuracy(model, *share_of(0, 1)[2:]):.4f} of {path}")


if __name__ == "__main__":
    main()
