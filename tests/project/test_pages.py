"""Links within the README and the docs lead somewhere, and the code of the page on checkpoints runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from shampoo_deepspeed import Shampoo

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text(encoding="utf-8"))):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link} has no such heading"


def test_the_page_on_checkpoints_saves_and_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    (code,) = [block for language, block in FENCE.findall(text) if language == "python"]
    monkeypatch.chdir(tmp_path)
    model = torch.nn.Linear(4, 3)
    optimizer = Shampoo(model.named_parameters(), precondition_frequency=1)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    names = {"optimizer": optimizer}
    exec(compile(code, "checkpoints.md", "exec"), names)
    assert names["report"].loaded == ("bias", "weight") and not names["report"].left_out  # type: ignore[attr-defined]
