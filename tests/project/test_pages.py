"""Links within the README and the docs work, and so does the code of pages that the distributed tests do not run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from shampoo_deepspeed import Shampoo, ShampooConfig
from shampoo_deepspeed.__main__ import main
from tests.support.snippets import blocks

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    [*(ROOT / "docs").glob("*.md"), *(ROOT / "shampoo_deepspeed").rglob("*.md"), *(ROOT / "integrations").rglob("*.md")]
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def text_of(page: str) -> str:
    return (ROOT / "docs" / page).read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"", text):
        link = "".join(link)
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link} has no such heading"


def test_the_page_on_checkpoints_saves_and_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = [block for language, block in FENCE.findall(text_of("checkpoints.md")) if language == "python"]
    monkeypatch.chdir(tmp_path)
    model = torch.nn.Linear(4, 3)
    optimizer = Shampoo(model.named_parameters(), precondition_frequency=1)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    names = {"optimizer": optimizer}
    exec(compile(code, "checkpoints.md", "exec"), names)
    assert names["report"].loaded == ("bias", "weight") and not names["report"].left_out  # type: ignore[attr-defined]


def test_the_start_page_shows_code_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code for frameworks equals blocks that other tests run on ranks; its lines about checkpoints run here."""
    monkeypatch.chdir(tmp_path)
    run_by_ranks = {block.text for block in blocks() if block.name}
    python = [block for language, block in FENCE.findall(text_of("start.md")) if language == "python"]
    rest = [block for block in python if block not in run_by_ranks]
    assert len(python) == 3 and len(rest) == 1
    model = torch.nn.Linear(4, 3)
    optimizer = Shampoo(model.named_parameters(), precondition_frequency=1)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    exec(compile(rest[0], "start.md", "exec"), {"optimizer": optimizer})
    assert (tmp_path / "checkpoint" / "manifest.json").is_file()


def test_the_start_page_has_a_json_that_the_planner_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (text,) = [block for language, block in FENCE.findall(text_of("start.md")) if language == "json"]
    config = json.loads(text)
    given = {name: value for name, value in config["optimizer"]["params"].items() if value != "auto"}
    assert ShampooConfig.from_options(given).precondition_frequency == 10
    (tmp_path / "ds.json").write_text(text)
    assert main(["estimate", "--model", "llama-3.2-1b", "--world-size", "8", "--ds-config", f"{tmp_path}/ds.json"]) == 0
    assert "llama-3.2-1b under zero3 on 8 ranks" in capsys.readouterr().out
