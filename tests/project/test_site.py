"""The documentation site, without mkdocs: its navigation, its links into the code, and its API reference."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import shampoo_deepspeed
from shampoo_deepspeed import checkpoint, estimate
from shampoo_deepspeed.__main__ import _parser
from tests.support.snippets import blocks

ROOT = Path(__file__).parents[2]
CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
REFERENCE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
REFERRED = set(re.findall(r"^::: ([\w.]+)$", REFERENCE, re.MULTILINE))


def load_hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "site" / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HOOKS = load_hooks()


def in_navigation(items: list[Any]) -> Iterator[str]:
    for item in items:
        for target in item.values() if isinstance(item, dict) else [item]:
            yield from in_navigation(target) if isinstance(target, list) else [target]


def exported(file: Path) -> list[str]:
    """``__all__`` of a module that would import a framework."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names: list[str] = ast.literal_eval(node.value)
            return names
    return []


def test_the_navigation_has_every_page_once() -> None:
    assert sorted(in_navigation(CONFIG["nav"])) == sorted(HOOKS.page_of(page) for page in HOOKS.pages())


def test_a_broken_link_fails_the_build_and_nothing_is_fetched() -> None:
    assert CONFIG["theme"]["font"] is False
    kinds = CONFIG["validation"]["nav"] | CONFIG["validation"]["links"]
    assert kinds.keys() >= {"omitted_files", "not_found", "anchors", "absolute_links", "unrecognized_links"}
    assert set(kinds.values()) == {"warn"}
    assert "mkdocs build --strict" in (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "make docs" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    with pytest.raises(HOOKS.LinkError, match="leads nowhere"):
        HOOKS.rewritten("[a](gone.md)", "docs/options.md")
    assert HOOKS.FETCHED.search('<script src="https://example.com/a.js"></script>')
    assert not HOOKS.FETCHED.search('<a href="https://example.com">')


@pytest.mark.parametrize("page", [*HOOKS.pages(), *[f for f in HOOKS.shown_files() if f.endswith(".md")]])
def test_links_become_links_of_the_site(page: str) -> None:
    """Files exist, and a link whose text is a name leads to its definition."""
    text = HOOKS.rewritten((ROOT / page).read_text(encoding="utf-8"), page)
    assert "<picture>" not in text
    for match in HOOKS.links(text):
        assert not match["target"].endswith((".py", "/")), match[0]


def test_a_link_to_a_name_leads_to_its_line() -> None:
    name = "[`Shampoo.step`](../shampoo_deepspeed/optimizer.py)"
    line = re.search(r"#__span-0-(\d+)\)$", HOOKS.rewritten(name, "docs/options.md"))
    source = (ROOT / "shampoo_deepspeed" / "optimizer.py").read_text(encoding="utf-8").splitlines()
    assert line is not None and source[int(line[1]) - 1].startswith("    def step(")
    with pytest.raises(HOOKS.LinkError, match="defines 0 times"):
        HOOKS.rewritten("[`Shampoo.stop`](../shampoo_deepspeed/optimizer.py)", "docs/options.md")


def test_each_number_of_the_rule_leads_to_its_function_and_to_the_oracle() -> None:
    text = (ROOT / "docs" / "how-a-step-works.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \d \|.*\|$", text, re.MULTILINE)
    assert len(rows) == 8
    for row in rows:
        function, oracle = row.split(" | ")[-2:]
        assert "](../shampoo_deepspeed/" in function and "](../tests/support/reference.py)" in oracle


def test_every_public_name_is_in_the_api_reference() -> None:
    package = "shampoo_deepspeed"
    public = {f"{package}.{name}" for name in shampoo_deepspeed.__all__}
    public |= {f"{package}.estimate.{name}" for name in estimate.__all__}
    public |= {f"{package}.checkpoint.{name}" for name in set(checkpoint.__all__) - set(shampoo_deepspeed.__all__)}
    for file in sorted((ROOT / "integrations").glob("*.py")):
        public |= {f"{package}.integrations.{file.stem}.{name}" for name in exported(file)}
    public |= {f"{package}.distributed.frameworks.Adapter"}
    assert len(public) > 20 and public - REFERRED == set()


def test_every_name_in_the_api_reference_exists() -> None:
    for name in sorted(REFERRED):
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name


def test_what_the_pages_import_is_in_the_api_reference() -> None:
    found = set()
    for block in blocks():
        if block.language != "python":
            continue
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("shampoo_deepspeed"):
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
    assert len(found) > 5 and found - REFERRED == set()


def test_every_argument_of_the_planner_is_on_its_page() -> None:
    page = (ROOT / "docs" / "planner.md").read_text(encoding="utf-8")
    (commands,) = [action for action in _parser()._actions if action.dest == "command"]
    assert commands.choices is not None
    for name, parser in commands.choices.items():  # type: ignore[attr-defined]
        assert f"python -m shampoo_deepspeed {name}" in REFERENCE
        for action in parser._actions if name == "estimate" else []:
            assert action.dest == "help" or f"`{action.option_strings[0]}" in page, action.dest
