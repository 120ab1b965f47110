"""The package's rooms: imports go down only, no circles, nothing loose, no long file, nothing heavy at import."""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import hywia_kernels

ROOT = Path(hywia_kernels.__file__).parent
# A room imports from lower floors and from itself; on the ground floor any file from any. Files at the top are rooms of
# their own, and so is the table of devices: selecting units needs to know what the device at hand likes.
FLOORS = [
    {"errors", "settings", "versions", "progress", "_moved"},
    {"types"},
    {"arch"},
    {"ops"},
    {"engine"},
    {"checkpoint"},
    {"deploy.device_profiles"},
    {"method"},
    {"scale"},
    {"deploy", "evaluation"},
    {"recipe"},
    {"compression"},
    {"integrations"},
    {"cli"},
    {"__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(f for f in ROOT.rglob("*.py") if f.parent != ROOT or f.name != "__init__.py")


def _module(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_module(f): f for f in FILES}


def _imports(file: Path, tree: ast.AST) -> set[str]:
    """Modules of the package that a file imports, anywhere in it, but for annotations alone."""
    here = _module(file).split(".") if file.name == "__init__.py" else _module(file).split(".")[:-1]
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    names: set[str] = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or id(node) in skipped:
            continue
        if node.level:
            base = [p for p in here if p]
            base = base[: len(base) - node.level + 1] + (node.module or "").split(".")
        elif node.module and node.module.split(".")[0] == "hywia_kernels":
            base = node.module.split(".")[1:]
        else:
            continue
        parent = ".".join(p for p in base if p)
        for alias in node.names:
            inner = f"{parent}.{alias.name}".strip(".")
            names.add(inner if inner in MODULES else parent)
    return names - {"", _module(file)}


GRAPH = {name: _imports(file, ast.parse(file.read_text())) for name, file in MODULES.items()}


def _room(module: str) -> str:
    return module if module in LEVEL else module.split(".")[0]


def _wrong(name: str, imported: set[str]) -> set[str]:
    """Of the modules that one imports, those above it, and those in another room of its floor."""
    room = _room(name)
    others = {other for other in imported if _room(other) != room}
    return {other for other in others if LEVEL[_room(other)] >= LEVEL[room] > 0}


@pytest.mark.parametrize("name", sorted(GRAPH))
def test_imports_go_down(name):
    assert _wrong(name, GRAPH[name]) == set()


@pytest.mark.parametrize(
    ("line", "imported", "wrong"),
    [
        ("from ..cli import console", "cli.console", True),
        ("from ..deploy.cost import Cost", "deploy.cost", True),
        ("from ..deploy import device_profiles", "deploy.device_profiles", False),
        ("from ..arch.views import view", "arch.views", False),
        ("from hywia_kernels.compression import compress", "compression", True),
        ("from . import scores", "method.scores", False),
    ],
)
def test_planted_imports_are_seen_anywhere_in_a_file(line, imported, wrong):
    names = _imports(ROOT / "method" / "selection.py", ast.parse(f"def f():\n    {line}\n"))
    assert names == {imported}
    assert bool(_wrong("method.selection", names)) is wrong


def _circle(graph: dict[str, set[str]]) -> list[str]:
    state: dict[str, int] = {}

    def visit(name: str, path: list[str]) -> list[str]:
        state[name] = 1
        for other in sorted(graph.get(name, ())):
            if other.startswith(name + ".") or name.startswith(other + "."):
                continue  # a package and what is in it
            if state.get(other) == 1:
                return [*path[path.index(other) :], other] if other in path else [name, other]
            if state.get(other) is None and (circle := visit(other, [*path, other])):
                return circle
        state[name] = 2
        return []

    for name in sorted(graph):
        if state.get(name) is None and (circle := visit(name, [name])):
            return circle
    return []


def test_no_circles():
    assert _circle(GRAPH) == []


def test_a_planted_circle_is_seen():
    assert _circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]


def test_files_are_short_and_few_are_loose():
    lengths = {f: len(f.read_text().splitlines()) for f in ROOT.rglob("*.py")}
    too_long = {str(f.relative_to(ROOT)): n for f, n in lengths.items() if n > 400}
    assert too_long == {}
    assert statistics.median(lengths.values()) < 150
    assert len(list(ROOT.glob("*.py"))) <= 9


def test_no_public_function_shadows_a_module():
    assert [name for name in hywia_kernels.__all__ if (ROOT / f"{name}.py").exists()] == []


def _run(program: str) -> list[str]:
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return result.stdout.splitlines()


def test_importing_the_package_is_light():
    """Neither torch nor transformers until something is asked for, and less than 0.3 s of a processor's time."""
    heavy, seconds, later = _run(
        "import sys, time\n"
        "start = time.process_time()\n"
        "import hywia_kernels\n"
        "seconds = time.process_time() - start\n"
        "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])\n"
        "print(seconds)\n"
        "hywia_kernels.compress\n"
        "print('torch' in sys.modules)"
    )
    assert (heavy, later) == ("[]", "True")
    assert float(seconds) < 0.3


def test_help_loads_no_torch():
    lines = _run(
        "import sys\n"
        "from hywia_kernels.cli import main\n"
        "try:\n    main(['prune', '--help'])\n"
        "except SystemExit as stop:\n    print(stop.code, [m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    assert lines[0].startswith("usage: hywia prune")
    assert lines[-1] == "0 []"
