"""Tables of options and versions agree with the code: docs/options.md has every option, the README some of them."""

from __future__ import annotations

import json
import re
from configparser import ConfigParser
from dataclasses import fields
from pathlib import Path

import pytest

from shampoo_deepspeed import ShampooConfig

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
HEADER = "| option | default | meaning |\n|---|---|---|\n"


def options_table() -> list[str]:
    """Return the rows of the table as the page must show them."""
    rows = []
    for option in fields(ShampooConfig):
        default = list(option.default) if isinstance(option.default, tuple) else option.default
        rows.append(f"| `{option.name}` | `{json.dumps(default)}` | {option.metadata['doc']} |")
    return rows


def shown(page: Path) -> list[str]:
    """Return the rows of a page's only table of options."""
    (table,) = page.read_text(encoding="utf-8").split(HEADER)[1:]
    return table.split("\n\n")[0].splitlines()


def test_the_page_on_options_lists_every_option_with_its_default() -> None:
    assert shown(ROOT / "docs" / "options.md") == options_table()


def test_the_readme_lists_about_a_dozen_options() -> None:
    rows, all_rows = shown(README), options_table()
    assert 10 <= len(rows) <= 14 and [row for row in rows if row not in all_rows] == []
    assert "docs/options.md#all-options" in README.read_text(encoding="utf-8")


def test_the_readme_is_short_and_begins_with_the_essentials() -> None:
    """It is short, and the first screen has the picture, the JSON and the two commands."""
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) < 200
    first = "\n".join(lines[:50])
    for wanted in ("prefers-color-scheme: dark", '"type": "Shampoo"', "make demo", "make test", "pip install"):
        assert wanted in first


@pytest.mark.parametrize("page", [README, ROOT / "docs" / "start.md"], ids=lambda p: p.name)
def test_pages_name_the_oldest_versions_that_may_be_installed(page: Path) -> None:
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    extras = config["options.extras_require"]
    needed = " ".join([config["options"]["install_requires"], extras["deepspeed"], extras["transformers"]])
    text = " ".join(
        re.split(r"^## .*Install$", page.read_text(encoding="utf-8"), flags=re.M)[1].split("## ")[0].split()
    )
    bounds = dict(re.findall(r"(\w+)>=([\d.]+)", needed))
    assert bounds.keys() == {"torch", "safetensors", "deepspeed", "transformers", "accelerate"}
    for name, version in bounds.items():
        assert re.search(rf"{name} (must be )?{re.escape(version)} or newer", text, re.IGNORECASE), name
    for line in extras["examples"].split():
        name, _, version = line.partition(">=")
        assert bounds.get(name, version) == version


def test_the_start_page_names_the_pinned_versions() -> None:
    text = (ROOT / "docs" / "start.md").read_text(encoding="utf-8")
    needed = (ROOT / "constraints.txt").read_text(encoding="utf-8").partition("# Tools")[0]
    pins = re.findall(r"^(\w+)==([\d.]+)$", needed, re.MULTILINE)
    assert pins and all(f"{name} {version}" in text for name, version in pins)
