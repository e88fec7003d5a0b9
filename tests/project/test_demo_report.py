"""The README's pictures: the same runs give the same files, for a light and for a dark background."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_pictures_are_drawn_alike_and_differ_in_colours_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from demo_report import DARK, LIGHT, WINDOW, Run, draw, trailing_mean

    steps = list(range(1, WINDOW + 5))
    losses = [[7.0 - number * 0.01 * step for step in steps] for number in (2, 1)]
    runs = [
        Run(name, 1e-3, steps, [0.5 * step for step in steps], loss, trailing_mean(loss, WINDOW), loss[-1])
        for name, loss in zip(("Shampoo", "AdamW"), losses, strict=True)
    ]
    drawn = []
    for name, background in (("light", LIGHT), ("dark", DARK), ("again", DARK)):
        draw(runs, "a title", tmp_path / f"{name}.svg", background)
        drawn.append((tmp_path / f"{name}.svg").read_text())
    light, dark, again = drawn
    assert dark == again and light != dark

    def uncoloured(svg: str) -> str:
        return re.sub(r"#[0-9a-f]{6}|\bp[0-9a-f]{10}\b|\bm[0-9a-f]{10}\b", "", svg)

    assert uncoloured(light) == uncoloured(dark)


@pytest.mark.parametrize("name", ["light", "dark"])
def test_committed_pictures_have_no_background(name: str) -> None:
    svg = (ROOT / "docs" / "images" / f"demo_{name}.svg").read_text()
    (patch,) = re.findall(r'<g id="patch_1">\s*<path [^>]*style="([^"]*)"', svg)
    assert "fill: none" in patch or "opacity: 0" in patch
