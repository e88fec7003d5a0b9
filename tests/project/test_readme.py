"""The README's table of options is the code's (every option, its default and its meaning), its versions setup.cfg's."""

from __future__ import annotations

import json
import re
from configparser import ConfigParser
from dataclasses import fields
from pathlib import Path

from shampoo_deepspeed import ShampooConfig

README = Path(__file__).parents[2] / "README.md"


def options_table() -> str:
    """The table as the README must show it."""
    lines = ["| option | default | meaning |", "|---|---|---|"]
    for option in fields(ShampooConfig):
        default = list(option.default) if isinstance(option.default, tuple) else option.default
        lines.append(f"| `{option.name}` | `{json.dumps(default)}` | {option.metadata['doc']} |")
    return "\n".join(lines)


def test_the_readme_lists_every_option_with_its_default() -> None:
    assert options_table() in README.read_text(encoding="utf-8")


def test_the_readme_names_the_oldest_versions_that_may_be_installed() -> None:
    config = ConfigParser()
    config.read(README.parent / "setup.cfg")
    extras = config["options.extras_require"]
    needed = " ".join([config["options"]["install_requires"], extras["deepspeed"], extras["transformers"]])
    text = " ".join(README.read_text(encoding="utf-8").split("## Install")[1].split("## ")[0].split())
    bounds = dict(re.findall(r"(\w+)>=([\d.]+)", needed))
    assert bounds.keys() == {"torch", "deepspeed", "transformers", "accelerate"}
    for name, version in bounds.items():
        assert re.search(rf"{name} (must be )?{re.escape(version)} or newer", text, re.IGNORECASE), name
    for line in extras["examples"].split():
        name, _, version = line.partition(">=")
        assert bounds.get(name, version) == version
