"""If one rank cannot continue a save or a load, all ranks raise an error, and none waits for it."""

from __future__ import annotations

import pytest

from tests.distributed.ranks.checkpoint_faults import FIRST, LOADING, SAVING
from tests.support.launch import Ask, Check

FAULTS = Check("checkpoint_faults", 2, "checkpoint_faults:faults", None)


@pytest.mark.parametrize("check", [FAULTS], ids=["faults"])
def test_a_fault_of_one_rank_is_raised_on_all(check: Check, ask: Ask) -> None:
    heard = ask(check)
    for name in [*SAVING, *(f"{name} in the background" for name in SAVING), *FIRST, "wrong", *LOADING]:
        for rank in heard:
            assert "Input/output error" in rank[name], name
    # What all ranks know is sent by only one: otherwise the first of a thousand ranks would get a thousand copies.
    assert [rank["parameters"] for rank in heard] == [2, 0]
    for rank in heard:
        assert rank["loaded"] == ("a", "b")
        assert rank["steps"] == [2, 2]  # one before the first save, and one after the load
        assert rank["left"] == 2
