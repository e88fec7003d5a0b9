"""Replicas that divide the work but step with different gradients, or not all of them, get an error at once."""

from __future__ import annotations

import pytest
import torch

from tests.support.exactness import assert_ranks_agree
from tests.support.launch import Ask, Check, named

FIRST_UNEQUAL = {
    "no_sync": 2,
    "local_sgd": 0,
    "post_local_sgd": 2,
    "never_reduced": 0,
    "other_batches": 0,
    "unwrapped_root": 0,
}
UNEQUAL = [Check(f"unequal_{case}", 2, "replicas:unequal", case) for case in FIRST_UNEQUAL]
JOINED = [
    Check(f"joined_{case}", 2, "replicas:joined", case)
    for case in ("ddp", "accelerate", "both", "wrapped_later", "later")
]
AVERAGED = Check("local_sgd_undivided", 2, "replicas:averaged", 6)
UNDIVIDED = Check("joined_undivided", 2, "replicas:joined", "undivided")


@pytest.mark.parametrize("check", UNEQUAL, ids=named)
def test_unequal_gradients_are_an_error_before_they_change_anything(check: Check, ask: Ask) -> None:
    plain = check.argument in ("other_batches", "unwrapped_root")
    remedy = "call fully_shard on the root module too" if plain else "divided among"
    for message, step, changed in ask(check):
        assert "the gradients of replicas differ between ranks" in message and remedy in message
        assert (step, changed) == (FIRST_UNEQUAL[check.argument], False)


@pytest.mark.parametrize("check", JOINED, ids=named)
def test_uneven_inputs_are_an_error_at_the_first_step(check: Check, ask: Ask) -> None:
    """Without it, a rank with more inputs would wait for the others until its process group's timeout."""
    for seen in ask(check):
        assert "join" in seen["error"] and "model=ddp.module" in seen["error"]
        assert seen["steps"] == 0


@pytest.mark.parametrize("check", [UNDIVIDED], ids=named)
def test_uneven_inputs_train_if_each_rank_does_all_of_the_work(check: Check, ask: Ask) -> None:
    seen = ask(check)
    assert [(s["error"], s["steps"]) for s in seen] == [("", 2), ("", 3)]
    assert_ranks_agree([s["weights"] for s in seen])


@pytest.mark.parametrize("check", [AVERAGED], ids=named)
def test_local_sgd_trains_if_each_rank_does_all_of_the_work(check: Check, ask: Ask) -> None:
    first, second = seen = ask(check)
    assert not any(map(torch.equal, first["apart"], second["apart"])), "each rank steps by its own gradients"
    assert_ranks_agree([s["weights"] for s in seen])
    assert all(s["losses"][-1] < s["losses"][0] for s in seen)
