"""An error on one rank is raised on all ranks, and a decision of the first rank reaches all ranks."""

from __future__ import annotations

import pytest

from shampoo_deepspeed.distributed.collectives import (
    all_gather_numbers,
    all_gather_objects,
    decide_on_first_rank,
    first_rank_that,
    object_of_rank,
    on_all_ranks,
)
from tests.support.launch import Ask, Check

SHARED = Check("shared_errors", 2, "collectives:shared_errors", None)


@pytest.mark.parametrize("check", [SHARED], ids=["shared"])
def test_an_error_of_one_rank_is_raised_on_all(check: Check, ask: Ask) -> None:
    for rank, seen in enumerate(ask(check)):
        own = rank == 1
        assert seen["checkpoint"] == ("CheckpointError", "damaged", own)
        assert seen["system"] == ("OSError", "[Errno 28] No space left", own)
        assert seen["key"] == ("LookupError", "'w'", own)  # the message of a KeyError has quotes of its own
        assert seen["unicode"][0] == "UnicodeError" and "no such byte" in seen["unicode"][1]
        assert seen["two"] == ("ValueError", "block: too large", own)
        assert seen["both"] == ("of rank 0", f"of rank {rank}")
        assert seen["decided"] == 1 and seen["gathered"] == [0, 1]
        assert "nothing" in seen["undecided"]
        assert seen["numbers"] == [[7], [7, 7, 7]] and seen["of the second"] == "of rank 1"
        assert seen["first"] == [None, 1, 0]
        refused = seen["layouts"]
        first = "ranks 0 and 1 disagree: options of parameter group 0, which all ranks must give alike: "
        assert refused["options"].startswith(f"{first}'max_preconditioner_dim' = 4 against 8; 'factor_format' = ")
        assert "'moment_format' = 'float32' against 'int8'" in refused["options"]
        assert refused["lr"] == f"{first}'lr' = 0.001 against 0.5"
        assert refused["rules"].startswith(f"{first}'rules' = [") and "'factor_beta': 0.5" in refused["rules"]
        left, right = refused["kinds"].split(" against ")
        assert left.startswith("ranks 0 and 1 disagree: parameter 'w': policy Policy(") and "reason=None" in left
        assert "excluded by 'kind:embedding'" in right
        assert refused["problem"] == "rank 1: it is damaged"
        assert "w (8, 8): 48 of 64 elements are covered" in refused["rows"]


@pytest.mark.parametrize("error", [ValueError("wrong"), KeyboardInterrupt()], ids=repr)
def test_a_process_alone_raises_the_error_itself(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, on_all_ranks(None):
        raise error
    assert caught.value is error
    assert decide_on_first_rank(3, list, None) == [3] and all_gather_objects(3, None) == [3]
    assert all_gather_numbers([3], None) == [[3]] and object_of_rank(0, 3, None) == 3
    assert (first_rank_that(True, None), first_rank_that(False, None)) == (0, None)
