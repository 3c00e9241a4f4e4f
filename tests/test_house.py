"""The house rules of CONTRIBUTING.md that a machine can check: who imports what, sizes, places, what is pinned."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pipeline.core.compose import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SOURCES = sorted(ROOT.glob("pipeline/**/*.py"))
LONGEST = 450
LONGER: dict[str, str] = {
    "tests/test_sweep.py": "one module's tests stay in one file",
}
"""Files that are longer -> why."""
FLOORS = {
    **dict.fromkeys(("core", "measure", "stats"), 1),
    **dict.fromkeys(("data", "records"), 2),
    "models": 3,
    **dict.fromkeys(("engine", "methods"), 4),
    "scoring": 5,
    **dict.fromkeys(("objectives", "teachers"), 6),
    **dict.fromkeys(("training", "serving"), 7),
    "cell": 8,
    "fan": 9,
    **dict.fromkeys(("search", "forecasting"), 10),
    "reporting": 11,
    "intake": 12,
    "racing": 13,
}
"""Room -> its floor. A room imports itself and rooms on lower floors; commands stand above all of them."""
CLOCKS = {"time", "timeit", "resource", "psutil", "pynvml", "zeus", "tracemalloc"}
HEAVY = {
    "torch",
    "transformers",
    "datasets",
    "mlflow",
    "evaluate",
    "peft",
    "bitsandbytes",
    "accelerate",
    "trl",
    "optuna",
    "ray",
    "submitit",
    "sklearn",
    "scipy",
    "pandas",
}


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module(p): p for p in SOURCES}
COMMANDS = {name for name, path in MODULES.items() if path.parent == ROOT / "pipeline" and path.stem != "__init__"}
ENTRIES = {name for name, path in MODULES.items() if 'if __name__ == "__main__":' in path.read_text()}
TORCH_FIRST = ("pipeline.engine", "pipeline.methods.modules", "pipeline.training.pack", "pipeline.training.adapter_init")
WITHOUT = ("pipeline.engine.families", "pipeline.engine.layout", "pipeline.engine.options", "pipeline.engine.streams")
"""Members of these packages that a forecast asks, too, and that therefore do without torch."""
FAMILIES = ("pipeline.methods", "pipeline.objectives", "pipeline.teachers")
SHARED = {
    *(f"pipeline.methods.peft_{name}" for name in ("adapter", "options", "start")),
    *(f"pipeline.teachers.{name}" for name in ("writers", "demonstrations", "api_client", "rationales")),
}
"""Of a family beside its base.py, what members build on and others may use: no member itself. Nor are the files of a room inside it."""
CHOOSING = "pipeline.methods.peft_from_file"
"""The member that makes other members' methods: which one a file of PEFT's says."""


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def imports(path: Path, at_top: bool = False) -> frozenset[str]:
    """Modules that a file imports anywhere (or outside functions and TYPE_CHECKING), a name of the project's as a module if it is one."""
    tree = parsed(path)
    found: set[str] = set()
    for node in _outside_functions(tree) if at_top else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names} & set(MODULES)
            found |= names if len(names) == len(node.names) else names | {node.module}
    return frozenset(found)


def _outside_functions(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _outside_functions(child)


def tops(path: Path, at_top: bool = False) -> set[str]:
    return {name.partition(".")[0] for name in imports(path, at_top)}


@functools.cache
def files() -> list[Path]:
    """Everything that is, or would be, in git."""
    listed = subprocess.run(["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


# who imports what


def room(name: str) -> str | None:
    """The room of a module; None for a command."""
    return None if name in COMMANDS or name == "pipeline" else name.split(".")[1]


def test_the_rules_have_something_to_look_at():
    assert {"pipeline.train", "pipeline.cells", "pipeline.report", "pipeline.tracking"} <= COMMANDS
    assert "torch" in tops(ROOT / "pipeline/training/loop.py") and "torch" not in tops(ROOT / "pipeline/training/loop.py", at_top=True)
    assert "pipeline.measure.clock" in imports(ROOT / "pipeline/cell/run.py")


def test_a_file_at_the_top_is_a_command_and_a_folder_a_room():
    assert COMMANDS == ENTRIES
    assert {room(name) for name in MODULES} - {None} == set(FLOORS)
    assert all(ast.get_docstring(ast.parse((ROOT / f"pipeline/{name}/__init__.py").read_text())) for name in FLOORS)


def test_a_command_is_short():
    assert not [name for name in COMMANDS if len(MODULES[name].read_text().splitlines()) > 80]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_nothing_imports_a_command(name):
    assert not imports(MODULES[name]) & COMMANDS


def upward() -> set[tuple[str, str]]:
    """(importer, imported) of a room on the same or a higher floor."""
    pairs = {(name, other) for name, path in MODULES.items() if room(name) for other in imports(path) & set(MODULES) if room(other)}
    return {(a, b) for a, b in pairs if room(a) != room(b) and FLOORS[room(b) or ""] >= FLOORS[room(a) or ""]}


def test_a_room_imports_rooms_on_lower_floors():
    assert upward() == set()


def test_only_measure_reads_clocks_memory_and_energy():
    readers = {name for name, path in MODULES.items() if tops(path) & CLOCKS}
    counters = re.compile(r"max_memory|memory_stats|(?<!accelerator_)memory_reserved|mem_get_info|datetime\.now|utcnow|/proc/")
    readers |= {name for name, path in MODULES.items() if counters.search(path.read_text())}
    assert readers and {room(name) for name in readers} == {"measure"}


def test_only_the_mirror_imports_mlflow():
    assert {name for name, path in MODULES.items() if "mlflow" in tops(path)} == {"pipeline.records.mlflow"}


def member_of(name: str) -> str | None:
    """The family that a module is a file of, its base among them; the files of a room inside a family are not."""
    family = name.rpartition(".")[0]
    return family if family in FAMILIES and name in MODULES and MODULES[name].stem != "__init__" else None


@pytest.mark.parametrize("family", FAMILIES)
def test_members_of_a_family_import_its_base_and_not_each_other(family):
    members = [name for name in MODULES if member_of(name) == family and name not in SHARED]
    assert f"{family}.base" in members and len(members) > 2
    for name in members:
        assert name == CHOOSING or {i for i in imports(MODULES[name]) if member_of(i) == family} <= {f"{family}.base", *SHARED}, name


def test_a_config_alone_names_a_member_of_a_family():
    for name, path in MODULES.items():
        if not name.startswith(FAMILIES):
            foreign = {i for i in imports(path) if member_of(i) and not i.endswith(".base")} - SHARED
            assert not foreign, name


def test_there_is_no_circle_of_imports():
    state: dict[str, int] = {}

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert state.get(name) != 1, " -> ".join((*trail, name))
        if name in state:
            return
        state[name] = 1
        for further in sorted(imports(MODULES[name]) & set(MODULES) - {name}):
            visit(further, (*trail, name))
        state[name] = 2

    for name in MODULES:
        visit(name, ())


def test_the_loop_names_no_technique():
    words = set(re.findall(r"\w+", (ROOT / "pipeline/training/loop.py").read_text().lower()))
    names = {p.stem for p in ROOT.glob("conf/technique/*.yaml")} | {p.stem for p in ROOT.glob("pipeline/methods/*.py")}
    assert not words & (names - {"full", "none", "base", "__init__", "teacher"} | {"peft", "adapter"})


@pytest.mark.parametrize("name", sorted(n for n in MODULES if not n.startswith(("pipeline.scoring.metrics.", *TORCH_FIRST))))
def test_heavy_libraries_are_imported_where_they_are_needed(name):
    assert not tops(MODULES[name], at_top=True) & HEAVY


@pytest.mark.parametrize("package", TORCH_FIRST)
def test_a_package_may_begin_with_torch_because_nothing_begins_with_it(package):
    for name, path in MODULES.items():
        if not name.startswith(TORCH_FIRST):
            assert not [i for i in imports(path, at_top=True) if i.startswith(package) and i not in WITHOUT], name
    assert not any(tops(MODULES[name], at_top=True) & HEAVY for name in WITHOUT)


def test_no_entry_loads_a_heavy_library_to_start():
    code = f"import sys, {', '.join(sorted(ENTRIES))}; print(sorted(set(sys.modules) & {HEAVY}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# what a file looks like


@pytest.mark.parametrize("path", sorted({*SOURCES, *ROOT.glob("tests/*.py"), *ROOT.glob("benchmarks/*.py")}), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_a_file_opens_with_what_it_is_and_is_short(path):
    text = path.read_text()
    about = ast.get_docstring(parsed(path))
    assert about, "a file opens by saying what it is"
    if module(path) in ENTRIES:
        assert f"python -m {module(path)}" in about, "an entry's docstring has the command that runs it"
    if path.relative_to(ROOT).as_posix() not in LONGER:
        assert len(text.splitlines()) <= LONGEST, "split it, or give the reason in LONGER"


def test_no_reason_outlives_its_file():
    assert all(len((ROOT / path).read_text().splitlines()) > LONGEST for path in LONGER)


# what stands in the repository


def test_no_machine_path_and_no_registry_host_is_tracked():
    places = ("work", "root", "home", "opt", "tmp/venv", "tmp/w")
    words = [f"/{place}/" for place in places] + ["pypi" + ".org", "python" + "hosted", "registry.npm" + "js", "deb.deb" + "ian"]
    bad = {f"{p.relative_to(ROOT)}: {w}" for p in files() for w in words if w in p.read_bytes().decode("utf-8", "ignore") and p.name != "dvc.lock"}
    assert not bad


def test_nothing_large_or_made_is_tracked():
    made = {"data", "models", "rationales", "synthetic", "plans", "results", "report", "sweeps", "evaluations", "mlartifacts", ".venv", ".work"}
    for path in files():
        assert path.relative_to(ROOT).parts[0] not in made, path
        assert path.stat().st_size < 1_000_000, path


# what is installed


def locked() -> dict[str, str]:
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.lock").read_text().splitlines()]
    pins = [line.partition("==") for line in lines if line]
    assert all(sep and re.fullmatch(r"[\w.!]+", version) for _, sep, version in pins), "every line pins one public version"
    return {canonicalize_name(name): version for name, _, version in pins}


def requirements() -> list[Requirement]:
    return [Requirement(r) for r in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]]


def test_the_lock_pins_what_pyproject_asks_for():
    pins = locked()
    for wanted in requirements():
        assert wanted.specifier.contains(pins[canonicalize_name(wanted.name)]), wanted
    assert pins["torch"] == "2.13.0"
    assert not {n for n in pins if n.startswith(("nvidia-", "cuda", "triton"))} - {"nvidia-ml-py"}, "torch brings its own CUDA where there is one"


def test_what_is_imported_is_asked_for():
    extras = [Requirement(r) for extra in ("energy", "lm-eval") for r in PROJECT["optional-dependencies"][extra]]
    asked = {canonicalize_name(r.name) for r in [*requirements(), *extras]}
    owners = importlib.metadata.packages_distributions()
    sources = {*SOURCES, *ROOT.glob("tests/*.py"), *ROOT.glob("benchmarks/*.py")}
    foreign = {top for path in sources for top in tops(path)} - set(sys.stdlib_module_names) - {"pipeline", "benchmarks"}
    foreign -= {p.stem for p in ROOT.glob("tests/*.py")} | {"__future__", "triton"}  # triton comes with torch where there is CUDA
    optional = {"zeus": "zeus", "lm_eval": "lm-eval"}  # need not be installed
    assert not {top for top in foreign if not {canonicalize_name(o) for o in owners.get(top, [optional.get(top, "")])} & asked}


def test_the_version_is_said_once():
    import pipeline

    assert pipeline.__version__ == PROJECT["version"]
