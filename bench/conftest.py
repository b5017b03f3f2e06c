"""Options of the benchmark, and the fixture that times a contender beside the machine's limit and fastagg."""

from __future__ import annotations

import gc
import shlex
import time
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import machine
import memory
import report
from cases import Case
from contenders import CONTENDERS, FASTAGG, Call, Contender, rival_of
from inputs import Inputs
from machine import Limit, seconds
from rows import Row

_HERE = Path(__file__).resolve().parent
_ROWS = pytest.StashKey[list[Row]]()

Measure = Callable[..., None]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastagg")
    group.addoption("--results", type=Path, help="folder of the report (default: bench/results, or ./fastagg-bench)")
    group.addoption("--quick", action="store_true", help="small arrays and few rounds: a smoke test")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_ROWS] = []


class Subject:
    """A case's inputs and limit, and how it is timed."""

    def __init__(self, case: Case, quick: bool) -> None:
        self.case, self.quick = case, quick
        self.inputs = Inputs(case)
        self.limit = Limit(self.inputs, quick) if case.iterations == 1 else None
        self.rounds, self.warmup_rounds = (3, 1) if quick else (9, 2)


class _Workbench:
    """Holds one subject at a time: pytest's own wider scopes would reorder the contenders of a case."""

    def __init__(self, quick: bool) -> None:
        self.quick = quick
        self.subject: Subject | None = None

    def lay_out(self, case: Case) -> Subject:
        """The subject of a case; the last case's inputs are released before new ones are made."""
        if self.subject is None or self.subject.case != case:
            self.subject = None
            gc.collect()
            self.subject = Subject(case, self.quick)
        return self.subject


@pytest.fixture(scope="session")
def workbench(request: pytest.FixtureRequest) -> _Workbench:
    """What the cases are laid out on."""
    machine.use_all_processors()
    return _Workbench(request.config.getoption("--quick"))


@pytest.fixture
def subject(request: pytest.FixtureRequest, workbench: _Workbench) -> Subject:
    """The case of a test, shared with the tests of the same case."""
    return workbench.lay_out(request.param.at_size(workbench.quick))


@pytest.fixture
def measure(benchmark: Any, request: pytest.FixtureRequest, subject: Subject) -> Measure:
    """Times a contender and keeps the row."""

    def time_it(contender: Contender, call: Call, twin: Call | None = None) -> None:
        beside = _Beside(subject, contender, twin)
        benchmark.group = f"{subject.case.operation}: {subject.case.title}"
        repeats = subject.case.iterations > 1
        if repeats:
            beside.time_rival_alone()
        begin, processor_begin = time.perf_counter(), time.process_time()
        benchmark.pedantic(
            call,
            setup=None if repeats else beside.take_turn,
            rounds=subject.rounds,
            warmup_rounds=subject.warmup_rounds,
            iterations=subject.case.iterations,
        )
        if repeats:  # one thread, and no limit to tell
            beside.shares = [(time.process_time() - processor_begin) / (time.perf_counter() - begin)]
        if benchmark.stats is not None:  # None under --benchmark-disable
            extra = _extra_memory(subject, contender)
            row = beside.row(list(benchmark.stats.stats.data), extra)
            benchmark.extra_info.update(limit_seconds=row.limit_seconds, extra_bytes=extra)
            request.config.stash[_ROWS].append(row)

    return time_it


class _Beside:
    """What is timed in turn with a contender, so that each of its rounds has neighbours from the same moment."""

    def __init__(self, subject: Subject, contender: Contender, twin: Call | None) -> None:
        self.subject, self.contender, self.twin = subject, contender, twin
        rival = rival_of(contender, CONTENDERS[subject.case.operation])
        self.rival = None if contender.is_fastagg else rival.prepare(subject.inputs)
        self.limits: list[float] = []
        self.shares: list[float] = []
        self.rivals: list[float] = []
        self.twins: list[float] = []

    def take_turn(self) -> None:
        """Runs the limit, fastagg and the twin before a round."""
        time.sleep(0.02)  # threads of the last round's library may still be spinning
        if self.subject.limit is not None:
            elapsed, share = self.subject.limit.timed()
            self.limits.append(elapsed)
            self.shares.append(share)
        if self.rival is not None:
            self.rivals.append(seconds(self.rival))
        if self.twin is not None:
            self.twins.append(seconds(self.twin))

    def time_rival_alone(self) -> None:
        """For calls too short for the clock: fastagg's rounds before the contender's."""
        if self.rival is not None:
            number = self.subject.case.iterations
            times = timeit.repeat(self.rival, number=number, repeat=self.subject.rounds)
            self.rivals = [time / number for time in times]

    def row(self, times: list[float], extra_bytes: int | None) -> Row:
        """The measured row; the turns before the warm-up rounds do not count."""
        case, inputs = self.subject.case, self.subject.inputs
        cold = self.subject.warmup_rounds if case.iterations == 1 else 0
        limit = self.subject.limit
        return Row(
            operation=case.operation,
            key=case.key,
            case=case.title,
            contender=self.contender.name,
            package=self.contender.package,
            seconds=times,
            limit_seconds=self.limits[cold:],
            processor_shares=self.shares[cold:],
            rival_seconds=self.rivals[cold:],
            twin_seconds=self.twins[cold:],
            bytes=limit.bytes if limit is not None else None,
            extra_models=None if extra_bytes is None else extra_bytes / inputs.result_bytes,
        )


def _extra_memory(subject: Subject, contender: Contender) -> int | None:
    """Peak extra bytes of one call; a quick run asks only for the first case's."""
    case = subject.case
    wanted = case.key == "array" and contender.name == FASTAGG if subject.quick else case.measures_memory
    if not wanted or not memory.is_measurable():
        return None
    return memory.extra_bytes(case, contender.name, subject.quick)


@pytest.fixture
def add_note(request: pytest.FixtureRequest) -> Callable[[str, Any], None]:
    """Adds a named value to the row that was measured last."""

    def add(name: str, value: Any) -> None:
        rows = request.config.stash[_ROWS]
        if rows:
            rows[-1].notes[name] = value

    return add


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    config = session.config
    rows = config.stash[_ROWS]
    if exitstatus == pytest.ExitCode.INTERRUPTED:
        rows.clear()  # half a report is none
    if rows:
        report.write(rows, _results_folder(config), _command(config), config.getoption("--quick"))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if config.stash[_ROWS]:
        terminalreporter.section("fastagg")
        quick = config.getoption("--quick")
        terminalreporter.write_line(report.summary(config.stash[_ROWS], quick))
        terminalreporter.write_line(f"report: {_results_folder(config) / report.stem(quick)}.md")


def _results_folder(config: pytest.Config) -> Path:
    chosen: Path | None = config.getoption("--results")
    if chosen is not None:
        return chosen
    is_checkout = (_HERE.parent / "pyproject.toml").exists()
    return _HERE / "results" if is_checkout else Path("fastagg-bench")


def _command(config: pytest.Config) -> str:
    """The command as anyone can repeat it: this folder is called bench wherever it is."""
    arguments = [str(argument) for argument in config.invocation_params.args]
    return shlex.join(["pytest", *("bench" if Path(one).resolve() == _HERE else one for one in arguments)])
