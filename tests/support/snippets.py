"""Finds the marked code blocks of the README and the docs: `<!-- snippet: name -->` is right before each fence."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.launch import ROOT

STACKS = "docs/stacks.md"  # whose blocks are run by the tests that name them, one for each stack
PAGES = ("README.md", "docs/frameworks.md", "docs/how-a-step-works.md", "docs/tuning.md")
FENCE = re.compile(r"^(?:<!-- snippet: ([\w-]+) -->\n)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Snippet:
    """One block; `line` is the line of the page where its text begins."""

    page: str
    line: int
    name: str
    language: str
    text: str


def blocks(pages: Sequence[str] = PAGES) -> list[Snippet]:
    """Return all fenced blocks; those without a marker have an empty name."""
    found = []
    for page in pages:
        text = (ROOT / Path(page)).read_text(encoding="utf-8")
        for match in FENCE.finditer(text):
            line = text.count("\n", 0, match.start(3)) + 1
            found.append(Snippet(page, line, match[1] or "", match[2], match[3]))
    return found


def stack_block(name: str) -> str:
    """Return the text of the block of this name on the page about training stacks."""
    (found,) = [block.text for block in blocks([STACKS]) if block.name == name]
    return found


def run_stack_block(name: str, **names: Any) -> dict[str, Any]:
    """Execute such a block, which finds these names as in a script; return all names that there are then."""
    exec(compile(stack_block(name), STACKS, "exec"), names)
    return names
