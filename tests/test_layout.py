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
# A room may import those before it, and itself. Files at the top are rooms of their own.
FLOORS = [
    {"errors", "settings", "versions", "progress"},
    {"types"},
    {"arch"},
    {"ops"},
    {"engine"},
    {"checkpoint"},
    {"method"},
    {"deploy", "evaluation"},
    {"recipe"},
    {"compression"},
    {"integrations"},
    {"cli"},
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


@pytest.mark.parametrize("name", sorted(GRAPH))
def test_imports_go_down(name):
    room = name.split(".")[0]
    above = {other for other in GRAPH[name] if LEVEL[other.split(".")[0]] > LEVEL[room]}
    beside = {
        other
        for other in GRAPH[name]
        if LEVEL[other.split(".")[0]] == LEVEL[room] and other.split(".")[0] != room and room not in ("errors",)
    }
    assert not above, f"{name} imports what lies above it"
    assert all(LEVEL[o.split(".")[0]] == 0 for o in beside), f"{name} imports a room beside it: {beside}"


def test_a_planted_import_upwards_is_seen():
    tree = ast.parse("def f():\n    from ..cli import console\n")
    assert _imports(ROOT / "method" / "selection.py", tree) == {"cli.console"}


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
    shadowed = [name for name in hywia_kernels.__all__ if (ROOT / f"{name}.py").exists()]
    assert shadowed == []


def test_importing_the_package_is_light():
    """Neither torch nor transformers, until something is asked for."""
    program = (
        "import sys, hywia_kernels; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules]); "
        "hywia_kernels.compress; print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.split("\n")[:2] == ["[]", "True"]


def test_help_loads_no_torch():
    program = (
        "import sys\nfrom hywia_kernels.cli import main\n"
        "try:\n    main(['prune', '--help'])\nexcept SystemExit as e:\n    print(e.code, 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "0 False"
