"""All ranks reject the gradients and the learning rates that one process rejects, and autograd sees their steps."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.ranks.spikes import faulty_rates, seen_by_autograd, trained
from tests.support.launch import Ask, Check, named

SPIKES = Check("spikes_2ranks", 2, "spikes:spikes", ("ddp", "fsdp2"))
SEEN = Check("seen_by_autograd_2ranks", 2, "spikes:seen_by_autograd", ("ddp", "fsdp2"))
RATES = Check("faulty_rates_2ranks", 2, "spikes:faulty_rates", ("ddp", "fsdp2"))


@pytest.mark.parametrize("check", [SPIKES], ids=named)
def test_ranks_reject_the_gradients_that_one_process_rejects(check: Check, ask: Ask) -> None:
    rejected, weights = trained("whole")
    assert rejected == 3
    for layouts in ask(check):
        for count, found in layouts:
            assert count == rejected
            assert all(torch.equal(a, b) for a, b in zip(found, weights, strict=True))


@pytest.mark.parametrize("check", [SEEN], ids=named)
def test_autograd_sees_the_steps_of_all_ranks(check: Check, ask: Ask) -> None:
    assert all(seen_by_autograd(("whole",)))
    for found in ask(check):
        assert found == [True] * 8


@pytest.mark.parametrize("check", [RATES], ids=named)
def test_ranks_refuse_a_faulty_rate_and_go_on(check: Check, ask: Ask) -> None:
    ((same, weights),) = faulty_rates(("whole",))
    assert same
    for layouts in ask(check):
        for unchanged, found in layouts:
            assert unchanged
            assert all(torch.equal(a, b) for a, b in zip(found, weights, strict=True))
