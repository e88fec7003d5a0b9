"""The README's table of options is the code's: every option, its default and its meaning."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

from shampoo_deepspeed import ShampooConfig

README = Path(__file__).parent.parent / "README.md"


def options_table() -> str:
    """The table as the README must show it."""
    lines = ["| option | default | meaning |", "|---|---|---|"]
    for option in fields(ShampooConfig):
        default = list(option.default) if isinstance(option.default, tuple) else option.default
        lines.append(f"| `{option.name}` | `{json.dumps(default)}` | {option.metadata['doc']} |")
    return "\n".join(lines)


def test_the_readme_lists_every_option_with_its_default() -> None:
    assert options_table() in README.read_text(encoding="utf-8")
