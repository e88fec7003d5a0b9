"""docs/internals.md has a row for every private API of another package that we use, and its files and tests exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "internals.md").read_text(encoding="utf-8")
FILES = sorted([*(ROOT / "integrations").rglob("*.py"), *(ROOT / "shampoo_deepspeed").rglob("*.py")])
PRIVATE = re.compile(r"_[a-zA-Z]\w*$")
UPSTREAM = re.compile(r"`((torch|deepspeed|accelerate|transformers)/[\w/]+\.py)(?::(\d+))?`")
VERSIONS = dict(re.findall(r"\b(torch|DeepSpeed|accelerate|Transformers) (\d+\.\d+\.\d+)", PAGE))


def defined(tree: ast.AST) -> Iterator[str]:
    """Yield the names that a module of ours defines or sets."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self":
            yield node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def used(tree: ast.AST) -> Iterator[str]:
    """Yield private names, also in strings, that a module reads, calls or sets on objects other than its ``self``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) != "self":
            name = node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            name = node.value
        else:
            continue
        if PRIVATE.fullmatch(name):
            yield name


TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
TYPES = ROOT / "integrations" / "deepspeed" / "engine.py"  # which describes DeepSpeed's objects and defines none
OWN = {name for path, tree in TREES.items() if path != TYPES for name in defined(tree)} | {"_shampoo_deepspeed"}
# Methods of the Trainer that the mixin overrides and calls are defined here and there.
OVERRIDDEN = {"_save_checkpoint", "_save_optimizer_and_scheduler", "_load_optimizer_and_scheduler"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_private_part_that_a_file_uses_is_on_the_page(path: Path) -> None:
    foreign = {name for name in used(TREES[path]) if name not in OWN - OVERRIDDEN}
    assert {name for name in foreign if not re.search(rf"\b{name}\b", PAGE)} == set()


def test_the_search_finds_what_is_known_to_be_there() -> None:
    found = {name for tree in TREES.values() for name in used(tree)} - (OWN - OVERRIDDEN)
    assert {"_getframe", "_dp_group", "_fused_adam_", "_take_model_step", "_save_checkpoint"} <= found
    searching = [path.name for path, tree in TREES.items() if "_getframe" in set(used(tree))]
    assert searching == ["frames.py"]


def test_our_files_and_tests_on_the_page_exist() -> None:
    paths = re.findall(r"`((?:integrations|shampoo_deepspeed|tests)/[\w/]+\.py)`", PAGE)
    assert len(paths) > 40 and [path for path in paths if not (ROOT / path).is_file()] == []


@pytest.mark.parametrize("package", ["torch", "deepspeed", "accelerate", "transformers"])
def test_upstream_files_have_the_lines_of_the_page(package: str) -> None:
    (stated,) = [number for name, number in VERSIONS.items() if name.lower() == package]
    spec = find_spec(package)
    assert spec is not None and spec.origin is not None
    if version(package).split("+")[0] != stated:
        return
    named = [(path, line) for path, owner, line in UPSTREAM.findall(PAGE) if owner == package]
    assert named
    for path, line in named:
        file = Path(spec.origin).parents[1] / path
        assert file.is_file(), path
        assert len(file.read_text(encoding="utf-8").splitlines()) >= int(line or 0), f"{path}:{line}"
