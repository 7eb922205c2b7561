"""The reference: a page for each public name, made from its docstring. The sources are read, not imported."""

from __future__ import annotations

import ast
import dataclasses
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = {"ulr": "ulr_kernels", "ulr.ops": "ulr_kernels.ops", "ulr.optim": "ulr_kernels.optim"}
# Names outside every `__all__` that users need: the base and the settings of what is public, and what guides import.
ALSO = {
    "ulr.optim": ("ulr_kernels.optim.optimizer.ForwardOptimizer", "ulr_kernels.optim.optimizer.Common"),
    "ulr_kernels.finetune": (
        "ulr_kernels.finetune.trainer.ForwardTrainer",
        "ulr_kernels.finetune.trajectory.Header",
        "ulr_kernels.finetune.trajectory.Trajectory",
        "ulr_kernels.finetune.trajectory.Writer",
        "ulr_kernels.finetune.trajectory.read",
        "ulr_kernels.finetune.trajectory.weights_digest",
        "ulr_kernels.finetune.weights.load",
    ),
}
ON_PAGE_OF = {"ulr.check": ("ulr_kernels.check.Report", "ulr_kernels.check.LayerCheck")}  # what a function returns


@dataclasses.dataclass(frozen=True)
class Symbol:
    """A public name.

    Attributes:
        title: as users write it, `ulr.ops.noisy_linear`.
        path: where it is defined, `ulr_kernels.ops.noisy_linear.noisy_linear`.
    """

    title: str
    path: str

    @property
    def page(self) -> str:
        """The source URI of its page."""
        return f"reference/{self.title}.md"

    @property
    def summary(self) -> str:
        """The first line of its docstring."""
        module, _, name = self.path.rpartition(".")
        definitions = (ast.FunctionDef, ast.ClassDef)
        node = next(node for node in _tree(module).body if isinstance(node, definitions) and node.name == name)
        docstring = ast.get_docstring(node)
        if not docstring:
            raise ValueError(f"{self.path} has no docstring")
        return docstring.split("\n")[0]

    def markdown(self) -> str:
        """Its page."""
        blocks = [f"::: {self.path}\n    options:\n      heading: {self.title}\n      toc_label: {self.title}\n"]
        more = "::: {}\n    options:\n      heading_level: 2\n      show_root_full_path: false\n"
        return "\n".join(blocks + [more.format(path) for path in ON_PAGE_OF.get(self.title, ())])


def public_names(package: str) -> list[str]:
    """The `__all__` of a package, without `__version__`, which explains itself."""
    for node in _tree(package).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return [name for name in ast.literal_eval(node.value) if not name.startswith("__")]
    raise ValueError(f"{package} has no __all__")


def symbols() -> dict[str, list[Symbol]]:
    """The symbols of each package. A name that two packages export is in the first one."""
    found: dict[str, list[Symbol]] = {}
    seen: set[str] = set()
    for title, package in PACKAGES.items():
        defined = [
            _definition(package, name) for name in public_names(package) if f"{package}.{name}" not in PACKAGES.values()
        ]
        found[title] = [_symbol(title, path) for path in defined if path not in seen]
        seen.update(defined)
    for title, paths in ALSO.items():
        found.setdefault(title, []).extend(_symbol(title, path) for path in paths)
    return {title: sorted(group, key=lambda symbol: symbol.title.lower()) for title, group in found.items()}


def overview(groups: dict[str, list[Symbol]]) -> str:
    """The first page: a table of the symbols for each package."""
    lines = ["# Reference", "", "Every page is made from a docstring. In the examples `import ulr_kernels as ulr`."]
    for title, group in groups.items():
        lines += ["", f"## `{title}`", "", "| name | |", "| --- | --- |"]
        lines += [f"| [`{s.title}`]({Path(s.page).name}) | {s.summary.replace('|', chr(92) + '|')} |" for s in group]
    return "\n".join(lines) + "\n"


def navigation(groups: dict[str, list[Symbol]]) -> list[dict[str, list[dict[str, str]]]]:
    """The entries of the navigation after the first page, as in `mkdocs.yml`."""
    return [{title: [{s.title.removeprefix(f"{title}."): s.page} for s in group]} for title, group in groups.items()]


def _symbol(package: str, path: str) -> Symbol:
    """It has its bare name in a package that exports it, else its name from there, as `trajectory.read`."""
    name = path.rpartition(".")[2] if package in PACKAGES else path.removeprefix(f"{package}.")
    return Symbol(f"{package}.{name}", path)


def _source(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@functools.cache
def _tree(module: str) -> ast.Module:
    return ast.parse(_source(module).read_text())


def _imports(module: str) -> Iterator[tuple[str, str]]:
    """Each name that a module imports, and the module that it comes from."""
    body = _tree(module).body
    for node in itertools.chain(body, *(block.body for block in body if isinstance(block, ast.Try))):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            yield from ((alias.name, node.module) for alias in node.names)


def _definition(module: str, name: str) -> str:
    """The path at which a module's name is defined."""
    origin = dict(_imports(module)).get(name)
    return f"{module}.{name}" if origin is None else _definition(origin, name)
