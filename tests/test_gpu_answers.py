"""The GPU benchmark's answers, on the CPU: whoever is right is timed, whoever is not is left out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

import gpu
import gpu_machine
from gpu_cases import ARRAY, HOOK, RESNET50, SMALL_LEAVES, WIRES, Case, fedavg
from gpu_rows import Row
from gpu_subject import Contender, Subject, prepared
from gpu_timing import Call

CASES = [
    *(fedavg(2, kind, ARRAY) for kind in ("fp32", "fp16", "bf16", "int8")),
    fedavg(10, "int8", RESNET50),
    Case("call", clients=2, layout=SMALL_LEAVES),
    *(Case(operation, wire) for operation in ("quantize", "dequantize") for wire in WIRES),
    HOOK,
]
by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.key)


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_machine, "DEVICE", "cpu")
    monkeypatch.setattr(Case, "elements", lambda self, quick: 8192)


def subject_of(case: Case) -> Any:
    return gpu._SUBJECTS[case.operation](case, 1, True)


def plain_contenders(case: Case) -> list[Contender]:
    """fastagg and eager torch."""
    return [c for c in gpu._CONTENDERS[case.operation] if (c.is_fastagg or c.is_eager) and c.fits(case)]


@by_case
def test_fastagg_and_eager_torch_are_right(case: Case) -> None:
    subjects: list[Subject] = [subject_of(case), subject_of(case)]
    contenders = plain_contenders(case)
    assert len(contenders) >= 2
    for contender in contenders:
        call = prepared(contender, subjects)
        subjects[1].spoil()
        call()
        call()  # the second set's turn
        subjects[1].check(contender.tolerance)


@by_case
def test_a_call_that_does_nothing_is_wrong(case: Case) -> None:
    contender = plain_contenders(case)[0]
    with pytest.raises(AssertionError):
        prepared(replace(contender, prepare=lambda subject: lambda: None), [subject_of(case)])


def spoiling(prepare: Callable[[Any], Call], spoil: Callable[[Any], Any]) -> Callable[[Any], Call]:
    """A contender's call and a small fault behind it."""

    def with_fault(subject: Any) -> Call:
        call = prepare(subject)
        return lambda: (call(), spoil(subject))

    return with_fault


@pytest.mark.parametrize(
    ("case", "fault"),
    [
        (fedavg(2, "fp32", ARRAY), lambda updates: updates.outs[0][5:6].mul_(1 + 1e-5)),
        (fedavg(2, "bf16", ARRAY), lambda updates: updates.outs[0][-1:].mul_(1.02)),
        (fedavg(10, "int8", RESNET50), lambda updates: updates.outs[-1][-1:].fill_(float("nan"))),
        (Case("quantize", "fp16"), lambda cast: cast.codes.data.view(torch.int16)[-1:].add_(2)),
        (Case("quantize", "int8"), lambda cast: cast.codes.data[3:4].add_(2)),
        (Case("quantize", "int4"), lambda cast: cast.codes.scales[1:2].mul_(2)),
        (Case("dequantize", "int4"), lambda cast: cast.decoded[7:8].mul_(1.0001)),
        (HOOK, lambda gradients: gradients.flat[-1:].add_(1e-3)),
        (HOOK, lambda gradients: setattr(gradients, "norm", gradients.norm * 1.001)),
        (HOOK, lambda gradients: setattr(gradients, "found_inf", True)),
    ],
)
def test_a_small_fault_is_found(case: Case, fault: Callable[[Any], Any]) -> None:
    contender = plain_contenders(case)[0]
    with pytest.raises(AssertionError):
        prepared(replace(contender, prepare=spoiling(contender.prepare, fault)), [subject_of(case)])


def test_an_interruption_keeps_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def measure(benchmark: gpu.Benchmark, case: Case) -> None:
        if case == gpu.CASES[1]:
            raise KeyboardInterrupt
        benchmark.rows.append(Row("fedavg", case.key, "torch", "torch", True, 8, [2e-3], 8, [1e-3]))

    monkeypatch.setattr(gpu, "Copy", object)
    monkeypatch.setattr(gpu, "release", lambda: None)
    monkeypatch.setattr(gpu.Benchmark, "measure", measure)
    results = gpu.measure_all(60, quick=True)
    assert [row.key for row in results.rows] == [gpu.CASES[0].key]
    assert results.missing == dict.fromkeys([case.key for case in gpu.CASES[1:]], "interrupted")
    assert "2000.0 us  torch" in capfd.readouterr().out
    assert set(gpu.measure_all(-1, quick=True).missing.values()) == {"-1 seconds were over"}
