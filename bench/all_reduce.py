"""The benchmark of all-reduce and of DDP with it: `python bench/all_reduce.py [--quick] [--results FOLDER]`.

Ranks are processes of their own, started here; what `all_reduce_ranks.py` and `ddp_steps.py` measure in them becomes
the report. Open MPI takes part where mpirun and mpi4py are installed, two hosts where root and iproute2 are there to
make network namespaces.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import all_reduce_report
import fastagg
import scripts
from all_reduce_cases import EXCHANGES, Exchange
from all_reduce_rows import ExchangeRow, Results, StepRow
from launch import launch, open_mpi
from namespaces import NotAvailableError, two_hosts


def measure(exchange: Exchange, *options: str) -> list[ExchangeRow]:
    """The rows of one exchange.

    Raises:
        NotAvailableError: this machine cannot have it.
    """
    program = ("all_reduce_ranks.py", exchange.world, exchange.key, *options)
    if exchange.hosts > 1:
        with two_hosts() as hosts:
            rows = launch(*program, hosts=hosts)
    else:
        rows = launch(*program, mpirun=open_mpi() if exchange.by_mpirun else ())
    return [ExchangeRow(**row) for row in rows]


def measure_all(*options: str) -> Results:
    """Everything that this machine can have, and the reasons why it cannot have the rest."""
    rows, missing = list[ExchangeRow](), dict[str, str]()
    for exchange in EXCHANGES:
        print(f"all_reduce: {exchange.key}", flush=True)
        try:
            rows += measure(exchange, *options)
        except NotAvailableError as error:
            missing[exchange.key] = str(error)
    print("training steps", flush=True)
    return Results(rows, [StepRow(**row) for row in launch("ddp_steps.py", 2, *options)], missing)


def main() -> None:
    """Measures, and writes the report."""
    parser = argparse.ArgumentParser(description="Time fastagg.all_reduce against what people use instead.")
    parser.add_argument("--results", type=Path, default=Path("fastagg-bench"), help="folder of the report")
    parser.add_argument("--quick", action="store_true", help="small tensors and few rounds: a smoke test")
    chosen = parser.parse_args()
    fastagg.set_num_threads(1)  # as in every rank: the report tells it
    results = measure_all(*(["--quick"] if chosen.quick else []))
    command = shlex.join(["python", "bench/all_reduce.py", *sys.argv[1:]])
    all_reduce_report.write(results, chosen.results, command, chosen.quick)
    print(all_reduce_report.summary(results, chosen.quick))
    print(f"report: {chosen.results / all_reduce_report.stem(chosen.quick)}.md")


if __name__ == "__main__":
    scripts.end_with(main)
