"""The command line: what it prints, how it ends, and what it says where a package is missing."""

import os
import re
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

from typer.testing import CliRunner

import fastagg
import scripts
from fastagg import _extras
from fastagg.cli import commands
from fastagg.cli.commands import application

NO_PLUGINS = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}

# Runs the command line where some packages cannot be imported.
WITHOUT = """
import sys
from importlib.abc import MetaPathFinder

hidden = {hidden!r}

class Hide(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name in hidden:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hide())
sys.argv = ["fastagg", *{arguments!r}]
from fastagg.cli import main
main()
"""


def invoke(*arguments):
    return CliRunner().invoke(application, arguments)


def run_without(hidden, *arguments):
    program = WITHOUT.format(hidden=hidden, arguments=arguments)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


def test_info_shows_versions_and_instruction_sets():
    result = invoke("info")
    assert result.exit_code == 0
    assert fastagg.__version__ in result.output
    assert fastagg.build_info()["isa"] in result.output


def test_info_tells_how_ranks_of_this_host_would_exchange(monkeypatch):
    assert "shared memory" in invoke("info").output
    monkeypatch.setenv("FASTAGG_TRANSPORT", "backend")
    assert "FASTAGG_TRANSPORT asks for it" in invoke("info").output


def test_info_names_the_command_for_what_is_missing(monkeypatch):
    missing = _extras.Extra("flower", "Flower strategies", ("no_such_module",))
    monkeypatch.setitem(_extras.EXTRAS, "flower", missing)
    assert "pip install 'fastagg[flower]'" in invoke("info").output


@pytest.mark.parametrize("hidden", ["typer", "rich"])
def test_without_the_cli_packages_one_sentence(hidden):
    result = run_without([hidden], "info")
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr == "The command line of fastagg needs typer and rich: pip install 'fastagg[cli]'\n"


@pytest.mark.parametrize(("command", "module"), [("demo", "no_matplotlib"), ("bench", "no_benchmark")])
def test_without_a_command_s_packages_one_sentence(monkeypatch, command, module):
    extra = _extras.EXTRAS[command]._replace(modules=(module,))
    monkeypatch.setitem(_extras.EXTRAS, command, extra)
    with pytest.raises(SystemExit) as ended:
        commands._require(command)
    assert ended.value.code == f"fastagg {command} needs {module}: pip install 'fastagg[{command}]'"


def test_without_numpy_s_companions_nothing_else_is_hidden():
    result = run_without(["numpy"], "info")
    assert result.returncode == 1
    assert "No module named 'numpy'" in result.stderr


@pytest.mark.parametrize("arguments", [("demo", "--rounds", "0"), ("demo", "--nonsense"), ("nonsense",)])
def test_a_wrong_option_is_refused_without_a_traceback(arguments):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_demo_prints_its_tables_and_draws_its_figure(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    output = tmp_path / "figure.png"
    result = invoke("demo", "--rounds", "2", "--clients", "4", "--output", str(output))
    assert result.exit_code == 0
    for expected in ("Test accuracy", "round 2", "fp32", "fp16", "int8", "NumPy loop"):
        assert expected in result.output
    assert output.stat().st_size > 20_000


BENCH_CONFTEST = """
from pathlib import Path

def pytest_addoption(parser):
    parser.addoption("--results")
    parser.addoption("--quick", action="store_true")
    parser.addoption("--benchmark-only", action="store_true")

def pytest_configure(config):
    Path("ran").write_text(config.getoption("--results"))
"""
BENCH_RANKS = """
import sys
from pathlib import Path
Path("ran-ranks").write_text(" ".join(sys.argv[1:]))
sys.exit(3)
"""
RUN_BENCH = """
import sys
from pathlib import Path
from fastagg import _extras
from fastagg.cli import commands
_extras.EXTRAS["bench"] = _extras.EXTRAS["bench"]._replace(modules=())
commands._bench_folder = lambda: Path(sys.argv[1])
commands.application(["bench", "--quick", "--output", sys.argv[2]])
"""


def test_bench_runs_the_benchmarks_wherever_the_results_go(tmp_path):
    # A checkout's results lie in the checkout's own benchmarks, which are not the installed ones that run.
    installed, checkout = tmp_path / "installed", tmp_path / "checkout"
    (checkout / "bench" / "results").mkdir(parents=True)
    installed.mkdir()
    for folder in (installed, checkout / "bench"):
        (folder / "conftest.py").write_text(BENCH_CONFTEST)
        (folder / "all_reduce.py").write_text(BENCH_RANKS)
        (folder / "federated.py").write_text(BENCH_RANKS.replace("ran-ranks", "ran-rounds"))
    (installed / "test_nothing.py").write_text("def test_nothing(): pass")
    command = [sys.executable, "-c", RUN_BENCH, str(installed), "bench/results"]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, env={**os.environ, **NO_PLUGINS})
    assert done.returncode == 3, done.stdout + done.stderr  # as the ranks' part ended
    assert (checkout / "ran").read_text() == "bench/results"
    assert (checkout / "ran-ranks").read_text() == "--results=bench/results --quick"
    frameworks = find_spec("flwr") is not None and find_spec("nvflare") is not None
    assert (checkout / "ran-rounds").exists() == frameworks
    assert ("no federated rounds" in done.stdout) != frameworks


WAIT = """
import os, time
from pathlib import Path
Path("begun.part").write_text(str(os.getpid()))
Path("begun.part").rename("begun")
time.sleep(60)
"""
WAIT_IN_A_SCRIPT = f"import scripts\ndef main():{WAIT.replace(chr(10), chr(10) + '    ')}\nscripts.end_with(main)\n"


@pytest.mark.parametrize("where", ["test_nothing.py", "all_reduce.py"])
@pytest.mark.parametrize(
    ("send", "number"),
    [(os.killpg, signal.SIGINT), (os.kill, signal.SIGINT), (os.kill, signal.SIGTERM)],
    ids=["terminal", "program", "terminated"],
)
def test_an_interrupt_ends_bench_and_what_it_started(tmp_path, where, send, number):
    (tmp_path / "conftest.py").write_text(BENCH_CONFTEST)
    (tmp_path / "scripts.py").write_text(Path(scripts.__file__).read_text())
    in_a_test = where == "test_nothing.py"
    (tmp_path / "test_nothing.py").write_text(WAIT if in_a_test else "")
    (tmp_path / "all_reduce.py").write_text("" if in_a_test else WAIT_IN_A_SCRIPT)
    (tmp_path / "average_files.py").write_text("from pathlib import Path; Path('went-on').touch()")
    command = [sys.executable, "-c", RUN_BENCH, str(tmp_path), "results"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env={**os.environ, **NO_PLUGINS},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        while not (tmp_path / "begun").exists():
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.02)
        send(process.pid, number)
        output, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert not (tmp_path / "went-on").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "begun").read_text()), 0)


def help_of(*arguments):
    """What the command line says of a command, without frames and line breaks."""
    result = invoke(*arguments, "--help")
    assert result.exit_code == 0, result.output
    return " ".join(re.sub(r"\x1b\[[0-9;]*m|[│╭╰─╮╯]", " ", result.output).split())


def test_help_says_what_the_files_are():
    text = help_of("average")
    assert "FILES are .safetensors, .npz, .pt or .pth files, or directories with an index of shards" in text
    assert "A .safetensors, .npz, .pt or .pth file; a directory if the first input is sharded." in text
    assert "RUN is a file that `fastagg.report.Run.save` wrote." in help_of("report")


@pytest.mark.parametrize(
    "choices",
    [
        "raise, drop or propagate",
        "max, first or round",
        "fp64, fp32, fp16 or bf16",
        "fp32, bf16, fp16, fp8_e4m3, fp8_e5m2, int8, int4 or sign",
    ],
)
def test_help_lists_what_an_option_takes(choices):
    assert choices in help_of("average")


def test_the_command_line_tells_the_version():
    result = invoke("--version")
    assert (result.exit_code, result.output) == (0, f"fastagg {fastagg.__version__}\n")


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "fastagg", "info"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert fastagg.__version__ in done.stdout


IMPORTS = """
import pkgutil, sys
from importlib import import_module
from importlib.abc import MetaPathFinder

class Hide(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in sys.argv[1:]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hide())
import fastagg
names = [found.name for found in pkgutil.iter_modules(fastagg.__path__) if not found.name.startswith("_")]
for name in names:
    if name == "bench":  # which `make` may have put there
        continue
    try:
        import_module(f"fastagg.{name}")
    except ImportError as error:
        print(error)
"""


def test_what_lacks_its_packages_says_which_to_install():
    hidden = ("torch", "flwr", "nvflare", "ray", "matplotlib", "sklearn", "jinja2")
    done = subprocess.run([sys.executable, "-c", IMPORTS, *hidden], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert {"ddp", "flower", "horovod", "nvflare", "ranks", "ray"} <= {line.split()[0][8:] for line in lines}
    for line in lines:
        assert re.fullmatch(r"fastagg\.\w+ needs [\w. ]+: pip install 'fastagg\[\w+\]'", line), line


def test_what_installs_the_cuda_backend_installs_it_anew():
    for option in ("--force-reinstall", "--no-cache-dir", "--no-binary fastagg", "FASTAGG_CUDA=ON"):
        assert option in _extras.CUDA_COMMAND
