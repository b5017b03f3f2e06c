"""`make gpu-check` without a GPU: its steps, pytest's --backend, the benchmark's report and its targets."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import gpu_check
import gpu_report
from fastagg import _core
from gpu_cases import ARRAY, CALLS, CASTS, FASTAGG, FEDAVG, HOOK, RESNET50, Case, fedavg
from gpu_check import Outcome, Step
from gpu_rows import Results, Row
from gpu_targets import targets
from processes import run

TESTS = Path(__file__).resolve().parent

# The option

THREE_TESTS = """
def test_everywhere(backend):
    pass

def test_processors(cpu):
    pass

def test_without():
    pass
"""


def verdicts(folder: Path, *options: str) -> tuple[str, str]:
    """What pytest says of three tests under this suite's conftest: its last line, and all of it, errors included."""
    (folder / "test_three.py").write_text(THREE_TESTS)
    arguments = ["-p", "conftest", "-p", "no:cacheprovider", "-c", "/dev/null", *options, str(folder)]
    program = f"import sys; sys.path.insert(0, {str(TESTS)!r}); import pytest; pytest.main({arguments!r})"
    done = run(program, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    printed = done.stdout + done.stderr
    return printed.splitlines()[-1], printed


def test_backend_restricts_both_fixtures(tmp_path: Path) -> None:
    last, printed = verdicts(tmp_path, "-v", "--backend", "cpu-scalar")
    assert "3 passed" in last
    assert "test_everywhere[cpu-scalar] PASSED" in printed
    assert "test_processors[cpu-scalar] PASSED" in printed
    assert "[cuda" not in printed


def test_backend_may_be_repeated_and_leaves_processors_out(tmp_path: Path) -> None:
    last, printed = verdicts(tmp_path, "--backend", "cuda", "--backend", "cuda-on-cpu", "--collect-only", "-q")
    names = [line.partition("::")[2] for line in printed.splitlines() if "::" in line]
    assert names == ["test_everywhere[cuda-on-cpu]", "test_everywhere[cuda]", "test_without"], last


def test_a_backend_that_is_asked_for_must_be_there(tmp_path: Path) -> None:
    missing = next(name for name in ("neon", "avx2") if name not in _core.available_isas())
    skipped = verdicts(tmp_path, "-k", missing)[0]
    assert "2 skipped" in skipped
    assert "error" not in skipped
    last, printed = verdicts(tmp_path, "--backend", f"cpu-{missing}")
    assert "1 passed" in last
    assert "2 errors" in last
    assert f"this processor or this build has no {missing}" in printed


def test_a_backend_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    assert "invalid choice: 'rocm'" in verdicts(tmp_path, "--backend", "rocm")[1]


def test_every_process_names_the_tests_alike(request: pytest.FixtureRequest) -> None:
    # pytest-xdist refuses workers that do not.
    assert not [item.nodeid for item in request.session.items if " at 0x" in item.nodeid]


# The steps


def outcome(tmp_path: Path, program: str, **options: Any) -> Outcome:
    """What becomes of a step that runs some Python."""
    step = Step("step", [sys.executable, "-c", program], **{"seconds": 30, **options})
    return gpu_check.run(step, tmp_path / "log", step.seconds)


def test_a_step_passes_or_fails_and_says_its_last_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    passed = outcome(tmp_path, "print('all of it'); print('== 3 passed ==')")
    failed = outcome(tmp_path, "import sys; print('one broke'); sys.exit('1 failed')")
    assert (passed.verdict, passed.remark) == ("passed", "3 passed")
    assert (failed.verdict, failed.remark) == ("failed", "1 failed")
    assert capfd.readouterr().out == "one broke\n1 failed\n"  # of the failed one alone
    assert "all of it" in (tmp_path / "log").read_text()


def test_a_step_without_an_end_is_ended_with_what_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "_LAST_WORDS", 0.5)
    program = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], stdout=subprocess.PIPE)
print(child.pid, flush=True)
time.sleep(60)
"""
    ended = outcome(tmp_path, program, seconds=3)
    assert ended.verdict == "failed"
    assert ended.remark.startswith("ended after 3 s: ")
    assert ended.seconds < 20
    child = Path("/proc") / ended.remark.rpartition(" ")[2]
    for _ in range(100):  # a process that was killed takes a moment to end
        if _has_ended(child):
            return
        time.sleep(0.1)
    pytest.fail("the step's child lives on")


def _has_ended(process: Path) -> bool:
    try:
        return "(zombie)" in (process / "status").read_text()
    except OSError:
        return True


def test_what_a_machine_lacks_is_not_available(tmp_path: Path) -> None:
    lacking = outcome(tmp_path, "raise SystemExit(1)", missing="there is no tool")
    refused = outcome(tmp_path, "print('Device not supported'); raise SystemExit(1)", refusals=gpu_check.REFUSALS)
    assert (lacking.verdict, lacking.remark) == ("not available", "there is no tool")
    assert refused.verdict == "not available"
    found = outcome(tmp_path, "print('an error'); raise SystemExit(1)", refusals=gpu_check.REFUSALS)
    assert found.verdict == "failed"


def test_steps_see_the_build_and_not_other_plugins(tmp_path: Path) -> None:
    seen = outcome(tmp_path, "import sys, os; print(sys.path[1], os.environ['PYTEST_DISABLE_PLUGIN_AUTOLOAD'])")
    assert seen.remark == f"{gpu_check.SITE} 1"


def test_what_a_step_leaves_of_its_time_is_the_next_ones(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    long = [sys.executable, "-c", "import time; time.sleep(1); print('done')"]
    missing = Step("tool", [], 30, missing="there is none")
    outcomes = gpu_check.run_all([missing, Step("long", long, 0.1), Step("cut", long, -28.5)], tmp_path / "log", 1)
    assert [outcome.verdict for outcome in outcomes] == ["not available", "passed", "failed"]
    assert capfd.readouterr().out.splitlines()[1] == "tool: not available after 0 s: there is none"


def test_the_tests_of_ranks_are_a_step_of_their_own() -> None:
    step = gpu_check.ranks(devices=1)
    options = [option for option in step.command[3:] if not option.startswith(("--backend", "-n"))]
    chosen = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", *(option for option in options if option != "xdist")],
        capture_output=True,
        text=True,
        cwd=gpu_check.ROOT,
    ).stdout
    assert "test_integers_are_reduced_exactly[4-peer memory]" in chosen
    assert "test_ddp_over_nccl_and_over_peer_memory[nccl backend]" in chosen
    assert "test_integers_are_reduced_exactly[4-backend]" not in chosen
    assert "collectives" not in chosen
    assert gpu_check.RANK_TESTS in gpu_check.ranks(devices=4).command
    commands = [each.command for each in gpu_check.steps("90", 1, gpu_check.ROOT)]
    assert any(f"not ({gpu_check.RANK_TESTS})" in command for command in commands)


def test_all_steps_fit_into_nine_minutes() -> None:
    assert sum(step.seconds for step in gpu_check.steps("90", 1, gpu_check.ROOT)) <= 9 * 60


def test_without_a_gpu_it_is_one_sentence() -> None:
    program = f"import runpy; runpy.run_path({gpu_check.__file__!r}, run_name='__main__')"
    done = run(program, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == "make gpu-check needs a CUDA GPU, and torch finds none\n"


def test_without_nvcc_it_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match="needs nvcc on the PATH"):
        gpu_check.found_devices()


def test_without_packages_they_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "PACKAGES", ("json", "no_such_package"))
    with pytest.raises(SystemExit, match="needs no_such_package in"):
        gpu_check.found_devices()


# The benchmark

COPY_BYTES = 1000
# A copy takes a second, so that bytes over seconds are thousandths of its bandwidth.
TURNS = 3


def row(case: Case, contender: str, seconds: float, is_eager: bool = False) -> Row:
    """A row of 1000 bytes whose turns are as long as each other."""
    size, package = (None if case.operation == "call" else COPY_BYTES), contender.split()[0]
    return Row(
        case.operation, case.key, contender, package, is_eager, size, [seconds] * TURNS, COPY_BYTES, [1.0] * TURNS
    )


def verdicts_of(rows: list[Row]) -> dict[str, tuple[str, str]]:
    """What every target shows and says."""
    return {target.text: (target.measured, target.verdict) for target in targets(Results(rows, {}))}


def test_a_fraction_is_that_of_the_turns_neighbours() -> None:
    slow_machine = Row("fedavg", "key", FASTAGG, FASTAGG, False, 500, [1.0, 2.0, 4.0], 1000, [1.0, 2.0, 4.0])
    assert slow_machine.fraction_of_copy == 0.5
    assert slow_machine.median == 2
    assert slow_machine.spread == 1.5
    assert slow_machine.gigabytes_per_second == 250e-9


def test_targets_of_one_case() -> None:
    case = fedavg(10, "fp32", ARRAY)
    rows = [row(case, FASTAGG, 1.25), row(case, "torch loop", 2.0, True), row(case, "torch stack", 2.5, True)]
    found = verdicts_of(rows)
    assert found[f"{case.key}: of the copy's bandwidth"] == ("0.80", "not reached")
    assert found[f"{case.key}: times the best eager torch"] == ("1.60", "reached")
    assert found["fedavg: times any contender, the least of all cases"] == ("1.60", "reached")
    found = verdicts_of([*rows, row(case, "triton", 1.2)])
    assert found[f"{case.key}: times the best eager torch"] == ("1.60", "reached")
    assert found["fedavg: times any contender, the least of all cases"] == ("0.96", "not reached")


def test_the_worst_case_of_a_kind_counts_and_none_may_be_missing() -> None:
    cases = [fedavg(clients, "int8", layout) for clients in (10, 100) for layout in (ARRAY, RESNET50)]
    rows = [row(case, FASTAGG, seconds) for case, seconds in zip(cases, (1.0, 1.0, 1.05, 1.25), strict=True)]
    text = "fedavg: int8, the least of K=10, 100 and both layouts: of the copy's bandwidth"
    assert verdicts_of(rows)[text] == ("0.80", "not reached")
    assert verdicts_of(rows[1:])[text] == ("", "not measured")


def test_targets_of_casts_hook_and_calls() -> None:
    rows = [row(case, FASTAGG, 1.1) for case in (*CASTS, HOOK)] + [row(case, FASTAGG, 59e-6) for case in CALLS]
    rows.append(row(HOOK, "torch hook", 2.7, True))
    found = verdicts_of(rows)
    assert found["quantize: int4: of the copy's bandwidth"] == ("0.91", "reached")
    assert found[f"{HOOK.key}: times torch's fp16 hook, unscaling and clipping"] == ("2.45", "not reached")
    assert found[f"{CALLS[0].key}: microseconds until it returns"] == ("59.0", "reached")


def test_without_rows_nothing_is_judged() -> None:
    assert {verdict for _, verdict in verdicts_of([]).values()} == {"not measured"}


MACHINE = {
    "device": "NVIDIA Example 80GB",
    "memory_gigabytes": 80.0,
    "compute_capability": "9.0",
    "multiprocessors": 132,
    "cache_bytes": 50 << 20,
    "driver": None,
    "cuda_driver": "13.0",
    "cuda_runtime": "13.0",
    "cuda_of_torch": "13.0",
    "python": "3.12.3",
    "fastagg": "0.1.0",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "cupy": None,
}


@pytest.mark.parametrize("quick", [False, True])
def test_the_report_holds_what_was_measured_and_what_was_not(tmp_path: Path, quick: bool) -> None:
    rows = [row(case, FASTAGG, 1.25) for case in (*FEDAVG, *CASTS, HOOK, *CALLS)]
    rows.append(row(FEDAVG[0], "torch loop", 2.5, True))
    results = Results(rows, {"CuPy": "cupy | is not installed"})
    path = gpu_report.write(results, tmp_path, MACHINE, "python bench/gpu.py", quick)
    assert path.name == ("gpu-example-80gb-quick.md" if quick else "gpu-example-80gb.md")
    page = path.read_text()
    assert ("## Targets" in page) is not quick
    assert f"| {FEDAVG[0].key.partition(': ')[2]} | torch loop | 2500.0 ms | 0% | 0 | 0.40 | – | 2.00 |" in page
    assert "| CuPy | cupy \\| is not installed |" in page
    assert path.with_suffix(".png").stat().st_size > 20_000
    written = json.loads(path.with_suffix(".json").read_text())
    assert written["machine"] == MACHINE
    assert len(written["rows"]) == len(rows)
    assert written["rows"][-1]["times_fastagg"] == 2
    assert bool(written["targets"]) is not quick
