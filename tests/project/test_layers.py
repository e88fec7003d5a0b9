"""The package's folders: the level of each, what it may import, and that there are no modules outside them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from configparser import ConfigParser
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import shampoo_deepspeed

CORE = Path(shampoo_deepspeed.__file__).parent
ROOT = CORE.parent
MODULES = sorted(CORE.rglob("*.py"))
FACE = {"__init__", "__main__", "_autoload"}
FLOORS = [  # the levels from the lowest up; each imports itself and lower ones
    {"_version"},
    {"geometry", "linalg", "runtime"},
    {"options", "distributed"},
    {"algorithm"},
    {"engine"},
    {"state", "estimate"},
    {"checkpoint", "optimizer"},
    FACE,
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
ALONE = {"optimizer", "_version"}  # files in the package's root that are no part of its face
FOLDERS = sorted(set(FLOOR) - FACE - ALONE)
FOREIGN = {"deepspeed", "transformers", "accelerate", "datasets", "integrations"}
README_LINES = 40


def imported(path: Path) -> Iterator[str]:
    """Yield the full dotted names of all that a file imports, anywhere in it; relative imports are resolved."""
    package = [*path.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def place(path: Path) -> str:
    """Return the folder of a module, or the module's name if it is in the package's root."""
    return path.relative_to(CORE).parts[0].removesuffix(".py")


def places_imported(path: Path) -> dict[str, str]:
    """Return the places in the package that a module imports, each with one of the names imported from it."""
    names = (name.split(".") for name in imported(path))
    own = [(parts + ["__init__"])[1] for parts in names if parts[0] == "shampoo_deepspeed"]
    return {name if name in FLOOR else "__init__": name for name in own}


def relative(path: Path) -> str:
    return str(path.relative_to(CORE))


def test_modules_are_in_folders_except_a_few_in_the_root() -> None:
    """Modules are in folders; only the public names, the hooks, the version and the
    optimizer are in the root."""
    assert {path.name for path in CORE.glob("*.py")} == {f"{name}.py" for name in FACE | ALONE}
    assert {path.parent.name for path in CORE.glob("*/__init__.py")} == set(FOLDERS)
    assert (CORE / "py.typed").is_file()


def test_imports_are_found() -> None:
    assert "shampoo_deepspeed.engine.step_unit.StepUnit" in set(imported(CORE / "optimizer.py"))
    assert "engine" in places_imported(CORE / "optimizer.py")
    assert "algorithm" in places_imported(CORE / "engine" / "step_unit.py")


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_a_folder_imports_only_itself_and_lower_levels(path: Path) -> None:
    own = place(path)
    for other, name in places_imported(path).items():
        assert other == own or FLOOR[other] < FLOOR[own] or {own, other} <= FACE, f"{relative(path)} imports {name}"


@pytest.mark.parametrize("path", [p for p in MODULES if place(p) in ("algorithm", "distributed")], ids=relative)
def test_mathematics_and_ranks_know_nothing_of_each_other(path: Path) -> None:
    other = {"algorithm": "distributed", "distributed": "algorithm"}[place(path)]
    assert other not in places_imported(path)


@pytest.mark.parametrize("path", [p for p in MODULES if place(p) == "geometry"], ids=relative)
def test_geometry_imports_no_torch(path: Path) -> None:
    """Plans for a thousand ranks are made and tested on integers alone."""
    assert not {name.split(".")[0] for name in imported(path)} & {"torch", "numpy"}


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_the_package_imports_no_framework_and_no_adapter(path: Path) -> None:
    for name in imported(path):
        assert name.split(".")[0] not in FOREIGN, name
        assert not name.startswith("shampoo_deepspeed.integrations"), name


def test_folders_import_each_other_without_cycles() -> None:
    graph: dict[str, set[str]] = {}
    for path in MODULES:
        graph.setdefault(place(path), set()).update(set(places_imported(path)) - {place(path)} - FACE)
    order = list(TopologicalSorter(graph).static_order())
    assert order.index("geometry") < order.index("engine") < order.index("optimizer")


def test_what_is_installed_is_every_folder() -> None:
    parser = ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    found = {f"shampoo_deepspeed.{'.'.join(p.parent.relative_to(CORE).parts)}" for p in CORE.rglob("*/__init__.py")}
    adapters = (ROOT / "integrations").rglob("__init__.py")
    found |= {".".join(["shampoo_deepspeed", *p.parent.relative_to(ROOT).parts]) for p in adapters}
    assert set(parser["options"]["packages"].split()) == found | {"shampoo_deepspeed"}
    assert not [path for path in CORE.rglob("*.py") if not (path.parent / "__init__.py").is_file()]


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_folder_has_a_short_readme(folder: str) -> None:
    lines = (CORE / folder / "README.md").read_text(encoding="utf-8").splitlines()
    assert 0 < len(lines) <= README_LINES
