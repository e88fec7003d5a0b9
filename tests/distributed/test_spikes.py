"""Without ``normalize_gradients``, all ranks reject the same gradients: those that one process rejects."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.ranks.spikes import trained
from tests.support.launch import Ask, Check, named

SPIKES = Check("spikes_2ranks", 2, "spikes:spikes", ("ddp", "fsdp2"))


@pytest.mark.parametrize("check", [SPIKES], ids=named)
def test_ranks_reject_the_gradients_that_one_process_rejects(check: Check, ask: Ask) -> None:
    rejected, weights = trained("whole")
    assert rejected == 3
    for layouts in ask(check):
        for count, found in layouts:
            assert count == rejected
            assert all(torch.equal(a, b) for a, b in zip(found, weights, strict=True))
