"""Imports run downwards, in functions too, and in no circle: who reads a file need not know what is above it."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the bottom up. A name stands for a module, or a package and what is in it where no longer name does. What is in
# one layer may be imported by the layers above it, and within one package.
LAYERS = (
    ("varkern._version", "varkern._kept", "varkern.atomic", "varkern.assets"),
    ("varkern.kernels",),
    ("varkern.ops",),
    ("varkern.modules",),
    ("varkern.engine",),
    ("varkern.models",),
    ("varkern.images",),
    ("varkern.data",),
    ("varkern.train",),
    ("varkern.eval",),
    ("varkern.assets.recipe", "varkern.edit", "varkern.info", "varkern.sampling"),
    ("varkern.photograph",),
    ("varkern",),
    ("varkern.commands", "varkern.demo"),
    ("varkern.cli",),
    ("varkern.__main__",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


class Import(NamedTuple):
    """A line of a module that imports another."""

    module: str
    line: int
    target: str


def sources(root: Path) -> dict[str, Path]:
    """The modules of a checkout by their names; a package's is that of its ``__init__``."""
    found = {}
    for package in ("varkern", "kernels"):
        for path in (root / package).rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found["varkern." + name if package == "kernels" else name] = path
    return found


def imports_of(name: str, path: Path, modules: Mapping[str, Path]) -> Iterator[Import]:
    """What of the package a module imports, wherever it does."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(name, node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            source = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*source, *([node.module] if node.module else [])])
            for alias in node.names:
                submodule = f"{source}.{alias.name}"
                yield Import(name, node.lineno, submodule if submodule in modules else source)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("import_module", "importlib.import_module"):
            target = node.args[0]
            if isinstance(target, ast.Constant) and isinstance(target.value, str):
                yield Import(name, node.lineno, target.value)


def internal_imports(root: Path) -> list[Import]:
    modules = sources(root)
    found = {one for name, path in modules.items() for one in imports_of(name, path, modules)}
    return sorted(one for one in found if one.target in modules)


def layer_of(module: str) -> str | None:
    """The name in `LAYERS` that a module belongs to, if any; ``varkern`` stands for its ``__init__`` alone."""
    parts = module.split(".")
    names = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((name for name in names if name in RANK and (name != "varkern" or module == "varkern")), None)


def upwards(imports: list[Import]) -> list[str]:
    """A sentence for each import that does not run downwards."""
    wrong = []
    for module, line, target in imports:
        above, below = layer_of(module), layer_of(target)
        if above and below and above != below and RANK[below] >= RANK[above]:
            wrong.append(f"{module}, line {line}, imports {target}, which is not below it")
    return sorted(wrong)


def circles(imports: list[Import]) -> list[list[str]]:
    """The sets of modules that import each other, directly or through others of the set (Tarjan 1972)."""
    graph: dict[str, set[str]] = {}
    for module, _, target in imports:
        graph.setdefault(module, set()).add(target)
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    path: list[str] = []
    found = []

    def visit(module: str) -> None:
        order[module] = low[module] = len(order)
        path.append(module)
        for target in graph.get(module, ()):
            if target not in order:
                visit(target)
            if target in path:
                low[module] = min(low[module], low[target])
        if low[module] == order[module]:
            members = path[path.index(module) :]
            del path[path.index(module) :]
            if len(members) > 1 or module in graph.get(module, ()):
                found.append(sorted(members))

    for module in graph:
        if module not in order:
            visit(module)
    return found


@pytest.fixture(scope="module")
def imports() -> list[Import]:
    found = internal_imports(ROOT)
    assert len(found) > 200
    return found


def test_every_module_has_a_layer() -> None:
    modules = sources(ROOT)
    assert [name for name in RANK if name not in modules] == []
    assert [module for module in modules if layer_of(module) is None] == [], "put it into LAYERS"


def test_imports_run_downwards(imports: list[Import]) -> None:
    assert upwards(imports) == []


def test_there_is_no_circle(imports: list[Import]) -> None:
    assert circles(imports) == []


def test_every_package_is_shipped() -> None:
    """Packages are listed by hand, and what is not would be missing from an installation alone."""
    tomllib = pytest.importorskip("tomllib", reason="from Python 3.11 on")
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    assert sorted(name for name, path in sources(ROOT).items() if path.name == "__init__.py") == listed


def test_imports_in_functions_and_relative_ones_are_seen(tmp_path: Path) -> None:
    """On a tree in which an op imports a model inside a function, and two modules import each other."""
    files = {
        "varkern/__init__.py": "from varkern.models import VAR",
        "varkern/ops/__init__.py": "from .norm import op",
        "varkern/ops/norm.py": "import torch\ndef op():\n    from ..models import VAR",
        "varkern/models/__init__.py": "import importlib\nkernels = importlib.import_module('varkern.kernels.one')",
        "kernels/__init__.py": "",
        "kernels/one.py": "from . import two",
        "kernels/two.py": "if False:\n    import varkern.kernels.one",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = internal_imports(tmp_path)
    assert set(found) == {
        ("varkern", 1, "varkern.models"),
        ("varkern.ops", 1, "varkern.ops.norm"),
        ("varkern.ops.norm", 3, "varkern.models"),
        ("varkern.models", 2, "varkern.kernels.one"),
        ("varkern.kernels.one", 1, "varkern.kernels.two"),
        ("varkern.kernels.two", 2, "varkern.kernels.one"),
    }
    assert upwards(found) == ["varkern.ops.norm, line 3, imports varkern.models, which is not below it"]
    assert circles(found) == [["varkern.kernels.one", "varkern.kernels.two"]]
