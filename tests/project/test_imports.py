"""Code that tests share is in tests/support: no test module is imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(path for folder in ("tests", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Yield the dotted names of all modules that a file imports, anywhere in it, and of names imported from them."""
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
