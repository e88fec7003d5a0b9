"""Short forms of the torture's parts that need ranks: `make torture` runs the long ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.ranks.failing_ranks import Case
from tests.support.launch import Ask, Check
from tests.torture.failing_ranks import fault
from tests.torture.kills import torture

DISK = Check("torture_disk", 2, "torture:disk", ("", 97))


@pytest.mark.parametrize("check", [DISK], ids=["disk"])
def test_both_ranks_say_the_same_of_a_save_on_a_failing_disk(check: Check, ask: Ask) -> None:
    for rank in ask(check):
        assert not rank["faults"] and rank["tried"] > 5


def test_a_run_that_was_killed_resumes_to_the_bit(tmp_path: Path) -> None:
    run = torture("ddp", "asynchronous", 1, tmp_path, seed=3)
    assert run.figures.tried == 1 and not run.figures.faults


@pytest.mark.parametrize(("phase", "what"), [("step", "dies"), ("save", "hangs")])
def test_a_rank_that_fails_in_a_collective_ends_the_others(phase: str, what: str, tmp_path: Path) -> None:
    assert fault(Case("ddp", "ddp", "default", "", phase, 1, what), tmp_path / "job") is None
