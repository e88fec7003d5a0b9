"""What tests share lies in tests/support: nobody imports a test module."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(path for folder in ("tests", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Dotted names of all that a file imports, anywhere in it, and of the names that it takes from there."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module or ''}.{alias.name}" for alias in node.names)


def test_imports_are_found() -> None:
    assert "tests.support.launch.Check" in set(imported(ROOT / "tests/distributed/test_zero.py"))
    assert len(FILES) > 100


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_test_module_is_imported(path: Path) -> None:
    modules = [name for name in imported(path) if name.startswith(("tests.", "."))]
    assert not [name for name in modules if any(part.startswith("test_") for part in name.split("."))]
    assert not [name for name in modules if "conftest" in name.split(".")]
