"""Who may import whom: the table in CONTRIBUTING.md, the core knows no framework, and geometry knows no tensors."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import shampoo_deepspeed

CORE = Path(shampoo_deepspeed.__file__).parent
MODULES = sorted(CORE.rglob("*.py"))
FRAMEWORKS = {"deepspeed", "transformers", "accelerate", "datasets", "integrations"}
ADAPTERS = CORE.parent / "integrations"
TABLE = (CORE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8").split("| layer |")[1].split("\n\n")[0]
ROWS = [re.findall(r"`(\w+/?)`", row.split("|")[2]) for row in TABLE.splitlines()[2:]]
LEVELS = {name.rstrip("/"): level for level, names in enumerate(ROWS[2:]) for name in names}
GEOMETRY = ["boxes.py", "blocks.py", "holders.py", "layouts.py", "owners.py", "plan.py", "refresh.py"]


def imported(path: Path) -> Iterator[str]:
    """Full dotted names of all that a file imports, anywhere in it; relative imports are resolved."""
    package = ["shampoo_deepspeed", *path.relative_to(CORE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def test_the_core_is_found() -> None:
    assert {"optimizer.py", "plan.py", "shampoo.py"} <= {path.name for path in MODULES}
    assert "shampoo_deepspeed.engine.step_unit.StepUnit" in set(imported(CORE / "optimizer.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(CORE)))
def test_the_core_imports_no_host_and_no_adapter(path: Path) -> None:
    for name in imported(path):
        assert name.split(".")[0] not in FRAMEWORKS, name
        assert not name.startswith("shampoo_deepspeed.integrations"), name


@pytest.mark.parametrize("name", GEOMETRY)
def test_geometry_imports_no_torch_and_only_geometry(name: str) -> None:
    """Plans for a thousand ranks are made and tested on integers alone."""
    own = {f"shampoo_deepspeed.{module.removesuffix('.py')}" for module in GEOMETRY}
    for found in imported(CORE / name):
        assert found.split(".")[0] not in ("torch", "numpy"), found
        assert not found.startswith("shampoo_deepspeed") or found.rpartition(".")[0] in own, found


def test_the_table_of_layers_names_every_module() -> None:
    packages = [f"{p.parent.name}/" for p in CORE.glob("*/__init__.py")]
    assert sorted(name for names in ROWS[2:] for name in names) == sorted(
        [p.stem for p in CORE.glob("*.py")] + packages
    )
    adapters = {p.stem for p in ADAPTERS.glob("*.py")} - {"__init__"}
    assert sorted(name for name in ROWS[1] if "/" not in name) == sorted(adapters)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(CORE)))
def test_layers_look_downward(path: Path) -> None:
    own = LEVELS[path.relative_to(CORE).parts[0].removesuffix(".py")]
    for name in imported(path):
        if name.startswith("shampoo_deepspeed."):
            assert LEVELS.get(name.split(".")[1], -1) >= own, f"{path.stem} imports {name}, which is not below it"
