"""Finds the marked code blocks of the README and the docs: `<!-- snippet: name -->` is right before each fence."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tests.support.launch import ROOT

PAGES = ("README.md", "docs/frameworks.md", "docs/tuning.md")
FENCE = re.compile(r"^(?:<!-- snippet: ([\w-]+) -->\n)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Snippet:
    """One block; `line` is the line of the page where its text begins."""

    page: str
    line: int
    name: str
    language: str
    text: str


def blocks() -> list[Snippet]:
    """Return all fenced blocks; those without a marker have an empty name."""
    found = []
    for page in PAGES:
        text = (ROOT / Path(page)).read_text(encoding="utf-8")
        for match in FENCE.finditer(text):
            line = text.count("\n", 0, match.start(3)) + 1
            found.append(Snippet(page, line, match[1] or "", match[2], match[3]))
    return found
