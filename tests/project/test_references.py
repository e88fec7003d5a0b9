"""References in docstrings and comments exist: our modules and names, files, steps of the numbered rule."""

from __future__ import annotations

import ast
import importlib
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted([*(ROOT / "integrations").rglob("*.py"), *(ROOT / "shampoo_deepspeed").rglob("*.py")])
QUOTED = re.compile(r"`+([^`\n]+)`+")
DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+(\(\))?$")
FILE = re.compile(r"[\w./-]+\.(py|md)$")
PATH = re.compile(r"\b(?:docs|tests|examples|benchmarks|integrations)/[\w/.-]+\.\w+")
STEP = re.compile(r"\bsteps? (\d)(?:(?:,| to| and) (\d))* of the rule")
RULE = ROOT / "docs" / "how-a-step-works.md"
# Variables and other packages have these names too.
NOT_OURS = {"deepspeed", "engine", "optimizer", "runtime"}
ENTRY_POINTS = {"shampoo_deepspeed.frameworks", "shampoo_deepspeed.models"}  # groups, in setup.cfg


def dotted_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(["shampoo_deepspeed", *parts] if parts[0] == "integrations" else parts)


MODULES = {name.rpartition(".")[2]: name for name in map(dotted_name, FILES) if not name.endswith("__main__")}


def prose(path: Path) -> Iterator[str]:
    """Yield docstrings and comments."""
    text = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            yield ast.get_docstring(node) or ""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.string


def leads_somewhere(name: str, path: Path) -> bool:
    """Whether a dotted name that begins with a module or class of ours exists."""
    first, *rest = name.removesuffix("()").split(".")
    here = importlib.import_module(dotted_name(path))
    if name in ENTRY_POINTS:
        return True
    if first == "shampoo_deepspeed":
        found: object = importlib.import_module("shampoo_deepspeed")
    elif isinstance(getattr(here, first, None), type):
        found = getattr(here, first)
    elif first in MODULES and first not in NOT_OURS:
        found = importlib.import_module(MODULES[first])
    else:
        return True  # a name of another package, or of an instance
    for part in rest:
        if isinstance(found, ModuleType) and not hasattr(found, part):
            try:
                found = importlib.import_module(f"{found.__name__}.{part}")
            except ImportError:
                return False
        elif isinstance(found, type) and part in getattr(found, "__annotations__", {}):
            return True
        elif not hasattr(found, part):
            return False
        else:
            found = getattr(found, part)
    return True


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_references_lead_somewhere(path: Path) -> None:
    for text in prose(path):
        for quoted in QUOTED.findall(text):
            if FILE.fullmatch(quoted):
                assert any(ROOT.glob(f"*/**/{quoted}")) or (ROOT / quoted).exists(), quoted
            elif DOTTED.fullmatch(quoted):
                assert leads_somewhere(quoted, path), quoted
        for file in PATH.findall(text):
            assert (ROOT / file).is_file(), file


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_steps_of_the_rule_are_on_its_page(path: Path) -> None:
    numbers = set(re.findall(r"^\| (\d+) \|", RULE.read_text(encoding="utf-8"), re.MULTILINE))
    for text in prose(path):
        for match in STEP.finditer(text):
            assert set(re.findall(r"\d", match[0])) <= numbers, match[0]


def test_a_dead_reference_is_found() -> None:
    path = ROOT / "shampoo_deepspeed" / "optimizer.py"
    assert not leads_somewhere("preconditioners.modes.symmetric", path)
    assert leads_somewhere("inverse_root.inverse_root", path) and leads_somewhere("torch.whatever", path)


@pytest.mark.parametrize(
    "path",
    [
        p
        for p in sorted(ROOT.rglob("*.md"))
        if not set(p.relative_to(ROOT).parts[:1]) & {".venv", ".venv-docs", "build"}
    ],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_no_page_has_the_marks_of_an_unfinished_merge(path: Path) -> None:
    marks = [line for line in path.read_text(encoding="utf-8").splitlines() if re.match(r"(<{7}|={7}|>{7})( |$)", line)]
    assert not marks
