"""The table of deviations in docs/frameworks.md has a row for every framework that is tested, within the bounds."""

from __future__ import annotations

from pathlib import Path

from benchmarks.exactness import SETTINGS, checks, framework, settings
from tests.support.fsdp_checks import BOUND

PAGE = Path(__file__).parents[2] / "docs" / "frameworks.md"


def rows() -> dict[tuple[str, int], list[str]]:
    """Return the numbers of each framework and number of ranks, in the order of SETTINGS."""
    lines = PAGE.read_text(encoding="utf-8").split("| framework |")[1].split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {(name, int(ranks)): numbers for name, ranks, _, *numbers in cells}


def test_every_framework_has_its_numbers_within_the_bounds() -> None:
    run = {(framework(c), c.ranks, settings(c)) for c in checks()}
    shown = rows()
    assert {(*key, s) for key, cells in shown.items() for s, n in zip(SETTINGS, cells, strict=True) if n != "-"} == run
    for cells in shown.values():
        for setting, number in zip(SETTINGS, cells, strict=True):
            assert number == "-" or 0.0 < float(number) <= BOUND[tuple(setting.split())]  # type: ignore[index]
