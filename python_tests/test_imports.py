"""Packages import from those below them alone, and no two modules import each other."""

import ast
import graphlib
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLOORS = {"nn": 1, "estimators": 2, "optim": 2, "check": 3}  # contract, errors, baselines, ops and back ends: below, 0


def part(module: str) -> str:
    return (*module.split("."), "")[1]


def imports(path: Path, modules: set[str]) -> set[str]:
    """The modules of this package that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "ulr_kernels":
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inner & modules) or {node.module}
    return found


def test_imports_go_down_and_in_no_circle():
    names = {}
    for path in (ROOT / "ulr_kernels").rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if part(name) in FLOORS:
            names[name] = path
    graph = {name: imports(path, set(names)) for name, path in names.items()}
    for name, others in graph.items():
        for other in others:
            down = FLOORS.get(part(other), 0) < FLOORS[part(name)]
            assert down or part(other) == part(name), f"{name} imports {other}"
    assert {"ulr_kernels.nn", "ulr_kernels.check"} <= set(graphlib.TopologicalSorter(graph).static_order())
