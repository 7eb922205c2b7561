"""The floors of the package below its layers and optimisers: a module imports from its own floor or a lower one."""

from __future__ import annotations

import ast
import pathlib

PACKAGE = pathlib.Path(__file__).parents[1] / "ulr_kernels"
FLOORS = (
    ("noise_tables", "noise_contract", "baselines"),
    ("dispatch", "onednn"),
    ("ops",),
    ("backends",),
)


def floor(module: str) -> int:
    """The floor of `ulr_kernels.<name>...`; all that is not named above lies on top."""
    name = module.split(".")[1]
    return next((i for i, names in enumerate(FLOORS) if name in names), len(FLOORS))


def imported(path: pathlib.Path) -> set[str]:
    """The modules of the package that a file imports, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "ulr_kernels":
            found |= {f"ulr_kernels.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module))
    return {module for module in found if module.startswith("ulr_kernels.")}


def test_nothing_is_imported_from_above() -> None:
    arrows = 0
    for path in sorted(PACKAGE.rglob("*.py")):
        here = floor("ulr_kernels." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts))
        if here < len(FLOORS):
            modules = imported(path)
            arrows += len(modules)
            above = {module for module in modules if floor(module) > here and module != "ulr_kernels._C"}
            assert not above, f"{path.relative_to(PACKAGE)} imports {above}"
    assert arrows > 100
