"""Type checking covers everything, and adapters say what they are given: an object of a framework is never `Any`."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest brings

ROOT = Path(__file__).parents[2]
ADAPTERS = sorted((ROOT / "integrations").rglob("*.py"))
# Of functions that pass on what they do not look at, and of Optuna's trials, which the Trainer takes in two forms.
PASSED_ON = {"args", "kwargs", "_", "__", "trial", "objects"}


def test_type_checking_covers_every_folder_with_code() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]
    folders = {path.relative_to(ROOT).parts[0] for path in ROOT.glob("*/**/*.py") if ".venv" not in path.parts[-3:]}
    folders = {name for name in folders if not name.startswith(".") and name not in ("build", "dist", "docs")}
    assert {"tests", "benchmarks", "examples", "integrations"} <= folders <= set(config["files"])
    relaxed = [entry for entry in config["overrides"] if entry.get("ignore_errors")]
    assert not relaxed and config["disallow_untyped_defs"]


@pytest.mark.parametrize("path", ADAPTERS, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_argument_of_an_adapter_is_of_any_type(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            spec = node.args
            arguments = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs]
            loose = {a.arg for a in arguments if a.annotation is not None and ast.unparse(a.annotation) == "Any"}
            assert loose <= PASSED_ON, f"{path.name}: {node.name}({', '.join(loose)})"
