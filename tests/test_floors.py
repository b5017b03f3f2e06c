"""The floors of the house: who may include, import and link whom."""

from __future__ import annotations

import ast
import graphlib
import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastagg
from fastagg import _core
from fastagg._extras import EXTRAS

ROOT = Path(__file__).resolve().parent.parent
NATIVE = ROOT / "csrc"
PYTHON = ROOT / "python" / "fastagg"

# The folders whose headers a folder may include, its own among them. cpu and cuda never see each other.
MAY_INCLUDE = {
    "core": {"core"},
    "cpu": {"core", "cpu"},
    "cuda": {"core", "cuda"},
    "comm": {"core", "cpu", "cuda", "comm"},
    "bindings": {"core", "cpu", "cuda", "comm", "bindings"},
}

# The rooms of the package, lower floors first: a folder or a module, for the modules that no other name fits better. A
# module imports its own room and floors below. Whoever adds a room says here where it stands.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("_errors", "_extras", "_one_thread", "_public", "_quoting", "statistics"),
    ("_arguments", "_npy"),
    ("_native",),
    ("_arrays", "distributed/exchange", "distributed/rendezvous"),
    ("quantization", "distributed/transports"),
    ("_updates", "distributed"),
    ("averaging", "ddp", "files", "horovod", "plots"),
    ("nvflare", "ranks", "robust", "server", "trees"),
    ("asynchronous", "flower", "outliers", "ray"),
    ("report",),
    ("cli",),
    ("__init__", "__main__"),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# Who may know an array library. All that stands on the process groups of torch may know it too.
KNOW_A_LIBRARY = {"_arrays/plain_tensors", "_arrays/torch", "_arrays/cupy", "server/proximal"}
NUMPY_ALONE = ("_arguments", "_arrays", "_native", "_updates", "averaging", "quantization", "server", "statistics")
ARRAY_LIBRARIES = {"torch", "cupy", "jax", "tensorflow"}


def native_sources() -> list[Path]:
    """Every C++ and CUDA file."""
    return [path for path in sorted(NATIVE.rglob("*")) if path.suffix in {".h", ".cpp", ".cu", ".cuh"}]


def without_comments(path: Path) -> str:
    """A C++ file without its comments."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)


def code_of(path: Path) -> str:
    """A C++ file without its comments and string literals."""
    return re.sub(r'"(?:\\.|[^"\\\n])*"', '""', without_comments(path))


def name_of(path: Path) -> str:
    """A file as the failures name it."""
    return str(path.relative_to(ROOT))


by_source = pytest.mark.parametrize("path", native_sources(), ids=name_of)


def test_there_is_something_to_look_at() -> None:
    assert len(native_sources()) > 20
    assert {path.parent.name for path in native_sources()} <= set(MAY_INCLUDE)


@by_source
def test_a_floor_includes_only_floors_below(path: Path) -> None:
    floor = path.parent.name
    for included in re.findall(r'#\s*include\s+"([^"]+)"', without_comments(path)):
        if included == "cuda_on_cpu.h":  # the tests' own, in the place of CUDA's
            assert path.name == "launch.cuh"
            continue
        beside = path.parent / included
        target = beside if beside.is_file() else NATIVE / included
        assert target.is_file(), f"{included} is nowhere"
        assert target.resolve().parent.name in MAY_INCLUDE[floor], f"{floor} may not include {included}"


@by_source
def test_only_bindings_know_python(path: Path) -> None:
    if path.parent.name == "bindings":
        return
    found = re.findall(r"pybind11|Python\.h|PyObject|Py_\w+|PyGILState\w*", without_comments(path))
    assert not found


@by_source
def test_nothing_native_knows_torch(path: Path) -> None:
    assert not re.findall(r"\b(?:torch|ATen|c10|libtorch)\b", code_of(path))
    assert not re.findall(r'#\s*include\s+[<"](?:torch|ATen|c10)', without_comments(path))


@by_source
def test_core_is_headers_only(path: Path) -> None:
    assert path.parent.name != "core" or path.suffix == ".h"


@by_source
def test_only_launch_knows_how_kernels_start(path: Path) -> None:
    assert path.name == "launch.cuh" or "<<<" not in code_of(path)


@by_source
def test_native_code_never_prints_and_never_exits(path: Path) -> None:
    code = code_of(path)
    assert not re.findall(r"\b(?:printf|fprintf|puts|putchar|perror|cout|cerr|clog)\b", code)
    assert not re.findall(r"\b(?:exit|_exit|_Exit|quick_exit|abort|terminate|assert)\s*\(", code)


@by_source
def test_no_fast_math(path: Path) -> None:
    exact = re.sub(r"multiply_add\(D x, D y, D sum\) \{[^}]*\}", "", code_of(path))  # see the next test
    assert not re.findall(r"fast.?math|__fmaf?\w*|\bfmaf?\s*\(|_mm\d*_fn?m(?:add|sub)\w*|vfmaq?\w*", exact)


def test_only_exact_products_are_fused_with_their_sum() -> None:
    """And what a rounded product lacks, which is what float64 sums of pairs are made of."""
    sources = [path for path in native_sources() if path != NATIVE / "core" / "pair.h"]
    lines = [line for path in sources for line in code_of(path).splitlines()]
    callers = [line for line in lines if re.search(r"(?<!D )multiply_add\(", line) and "D multiply_add(D" not in line]
    assert len(callers) == 1
    assert "add_exact_product" in callers[0]
    uses = [line for line in lines if re.search(r"::add_exact_product\(", line)]
    assert len(uses) == 1
    assert "exact ? " in uses[0]


def test_builds_turn_contraction_off() -> None:
    flags = (ROOT / "CMakeLists.txt").read_text()
    assert "-ffp-contract=off" in flags
    assert not re.findall(r"-ffast-math|-Ofast|--use_fast_math|-march=native", flags)
    if (NATIVE / "cuda").is_dir() and "csrc/cuda" in flags:
        assert "-fmad=false" in flags


def imports_of(path: Path) -> tuple[set[str], set[str]]:
    """The modules of fastagg that a module imports, and everything else: those needed only for types left out."""
    inside, outside = set(), set()
    tree = ast.parse(path.read_text())
    for_types = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute"
            plain = node.module == "fastagg"
            names = [f"fastagg.{alias.name}" for alias in node.names] if plain else [str(node.module)]
        else:
            continue
        for name in names:
            (inside if name.split(".")[0] == "fastagg" else outside).add(name.removeprefix("fastagg."))
    return inside, {name.split(".")[0] for name in outside}


MODULES = {
    str(path.relative_to(PYTHON).with_suffix("")).removesuffix("/__init__"): path
    for path in sorted(PYTHON.rglob("*.py"))
}
NATIVE_MODULES = {"_core", "_cuda"}
by_module = pytest.mark.parametrize("module", MODULES)


def room_of(module: str) -> str:
    """The narrowest room that a module stands in."""
    rooms = [room for room in FLOOR_OF if f"{module}/".startswith(f"{room}/")]
    assert rooms, f"{module} stands on no floor: FLOORS has no room for it"
    return max(rooms, key=len)


def modules_imported_by(module: str) -> set[str]:
    """The modules of fastagg that a module imports: for types only, or at first use, they count as well."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in (name for name in names if name.split(".")[0] == "fastagg"):
            path = name.replace(".", "/").removeprefix("fastagg").removeprefix("/") or "__init__"
            if path not in NATIVE_MODULES:
                found.add(path if path in MODULES else path.rpartition("/")[0] or "__init__")
    return found - {module}


@by_module
def test_a_module_imports_its_own_room_and_those_below(module: str) -> None:
    room = room_of(module)
    for imported in modules_imported_by(module):
        other = room_of(imported)
        assert other == room or FLOOR_OF[other] < FLOOR_OF[room], f"{module} may not import {imported}"


def test_imports_have_no_circles() -> None:
    inside = [module for module in MODULES if module != "__init__"]
    graph = {module: modules_imported_by(module) - {"__init__"} for module in inside}
    graphlib.TopologicalSorter(graph).prepare()  # a CycleError names the circle


@pytest.mark.parametrize("module", [name for name in MODULES if room_of(name) in NUMPY_ALONE or name == "__init__"])
def test_only_array_libraries_know_array_libraries(module: str) -> None:
    if module not in KNOW_A_LIBRARY:
        assert not imports_of(MODULES[module])[1] & ARRAY_LIBRARIES


def test_only_native_knows_the_native_modules() -> None:
    for module, path in MODULES.items():
        if room_of(module) != "_native":
            assert not re.findall(r"fastagg import .*_(?:core|cuda)\b|fastagg\._(?:core|cuda)\b", path.read_text()), (
                module
            )


def test_importing_fastagg_imports_no_optional_package() -> None:
    from processes import output_of

    program = """
import sys, fastagg
optional = {"torch", "cupy", "ml_dtypes", "rich", "typer", "matplotlib", "sklearn", "flwr", "nvflare", "ray", "pytest"}
print(sorted(optional & set(sys.modules)))
"""
    assert output_of(program) == "[]"


def test_submodules_are_there_without_an_import_of_their_own() -> None:
    from processes import output_of

    assert output_of("import fastagg; print(fastagg.server.FedAdam().beta_2, fastagg.files.average.__name__)") == (
        "0.99 average"
    )


SUBMODULES = [name for name, extra in fastagg._SUBMODULES.items() if extra is None or not EXTRAS[extra].missing]
QUICK_SUBMODULES = [name for name in SUBMODULES if name not in ("flower", "nvflare", "ray")]  # others import for long


def test_every_submodule_can_be_fetched() -> None:
    from processes import output_of

    assert {"horovod", "outliers", "plots", "ranks", "trees"} <= set(fastagg._SUBMODULES)
    program = f"import fastagg; print(*[getattr(fastagg, name).__name__ for name in {QUICK_SUBMODULES}])"
    assert output_of(program).split() == [f"fastagg.{name}" for name in QUICK_SUBMODULES]


def test_completion_shows_what_would_be_fetched() -> None:
    from processes import output_of

    shown = set(output_of("import fastagg; print(*dir(fastagg))").split())
    assert {*SUBMODULES, "fedavg", "__version__"} <= shown
    assert set(fastagg.__all__) <= shown or EXTRAS["torch"].missing


def test_what_lacks_its_packages_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXTRAS, "torch", EXTRAS["torch"]._replace(modules=("no_such_module",)))
    shown = {name for name in dir(fastagg) if name not in vars(fastagg)}  # others may have been fetched before
    assert not shown & {"all_reduce", "horovod", "ranks", "DistributedOptimizer"}


@pytest.mark.parametrize("name", ["asynchronous", "outliers", "plots", "ranks", "ray", "robust", "statistics", "trees"])
def test_a_submodule_says_what_is_public(name: str) -> None:
    path = next(path for path in (PYTHON / f"{name}.py", PYTHON / name / "__init__.py") if path.is_file())
    public = next(
        ast.literal_eval(node.value)
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__"
    )
    assert public
    if name in SUBMODULES:
        assert all(hasattr(getattr(fastagg, name), one) for one in public)


@pytest.mark.parametrize("name", ["", *QUICK_SUBMODULES])
def test_public_classes_name_the_module_that_users_import(name: str) -> None:
    """As pickles do, which must outlive a move of files."""
    module = importlib.import_module(f"fastagg.{name}".rstrip("."))
    for public in (getattr(module, one) for one in getattr(module, "__all__", ())):
        if isinstance(public, type) and public.__module__.split(".")[0] == "fastagg":
            assert getattr(importlib.import_module(public.__module__), public.__name__) is public
            assert public.__module__ in ("fastagg", module.__name__)


TYPED = """
import fastagg
from fastagg.server import FedAdam

optimizer: FedAdam = fastagg.server.FedAdam()
fastagg.horovod.init
fastagg.trees.average
fastagg.all_reduce
fastagg.fedvag
fastagg.trees.as_weights
"""
# Other people's packages are not looked at: that takes long, and says nothing of our names.
CHECKED = """
[mypy]
strict = true
[mypy-torch.*,numpy.*,flwr.*,nvflare.*,ray.*,matplotlib.*,sklearn.*,jinja2.*,typer.*,rich.*]
follow_imports = skip
ignore_missing_imports = true
"""


def test_type_checkers_know_every_name_and_no_other(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "typed.py").write_text(TYPED)
    (tmp_path / "mypy.ini").write_text(CHECKED)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--follow-imports=silent", "typed.py"],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(PYTHON.parent)},
        capture_output=True,
        text=True,
    )
    wrong = re.findall(r"typed.py:\d+: error: .*(fedvag|as_weights)", done.stdout)
    assert wrong == ["fedvag", "as_weights"], done.stdout + done.stderr
    assert done.stdout.count("error:") == 2


def test_the_version_has_one_home() -> None:
    declared = re.search(r'^version = "([^"]+)"', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    assert declared is not None
    assert fastagg.__version__ == declared.group(1)
    assert fastagg.build_info()["version"] == declared.group(1)


def test_everything_public_is_there() -> None:
    for name in fastagg.__all__:
        assert hasattr(fastagg, name)


def test_the_module_links_neither_torch_nor_cuda() -> None:
    tool = shutil.which("readelf")
    if tool is None:
        pytest.skip("no readelf")
    done = subprocess.run([tool, "-d", _core.__file__], capture_output=True, text=True, check=True)
    needed = re.findall(r"NEEDED.*\[([^\]]+)\]", done.stdout)
    assert needed
    assert not [name for name in needed if re.search(r"torch|c10|cuda|nvidia|python", name)]


def weak_functions(path: Path) -> set[str]:
    """The functions of an object file that the linker may take from any other instead."""
    done = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True)
    return {line.split(maxsplit=2)[2] for line in done.stdout.splitlines() if re.match(r"[0-9a-f]+ W ", line)}


def test_no_loop_of_an_instruction_set_can_serve_another() -> None:
    # A function emitted by two object files is one symbol: the linker could keep the copy made for AVX-512.
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    build = Path(os.environ.get("FASTAGG_BUILD", ROOT / "build"))
    objects = {path.name.split(".")[0]: path for path in build.rglob("csrc/cpu/*.cpp.o")}
    special = {"avx2", "avx512", "neon"} & set(objects)
    if not special or "scalar" not in objects:
        pytest.skip("no object files: FASTAGG_BUILD names the folder of a build")
    weak = {name: weak_functions(path) for name, path in objects.items()}
    for name in special:
        others = set().union(*(functions for other, functions in weak.items() if other != name))
        assert not weak[name] & others
