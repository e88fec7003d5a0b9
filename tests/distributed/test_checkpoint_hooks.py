"""Checkpoints through the Trainer, accelerate and torch's own helpers: a resumed run is the uninterrupted one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.distributed.conftest import Ask
from tests.distributed.launch import Check
from tests.distributed.ranks.checkpoints import SAVED, STOP, TRAINING, Run, Seen
from tests.distributed.test_zero import named
from tests.zoo import relative_error

SHARDED = "SHARDED_STATE_DICT"
# FSDP1 writes no full model on CPUs in this torch: it crashes.
RUNS = [Run("ours", "ddp"), Run("ours", "fsdp1", SHARDED), Run("ours", "fsdp2"), Run("ours", "fsdp2", SHARDED)]
STOCK = [Run("stock", "ddp"), Run("stock", "fsdp2"), Run("stock", "fsdp2", SHARDED)]


def check(function: str, run: Run) -> Check:
    return Check(f"{function}_{run.trainer}_{run.host}_{run.form[0]}", 2, f"checkpoints:{function}", run, seconds=180)


OURS = [check("trained", run) for run in (*RUNS, Run("ours", "fsdp1_flat", SHARDED))]
TRAINED = OURS + [check("trained", run) for run in STOCK]
REFUSED = check("refused", Run("stock", "fsdp1", SHARDED))
LOOPS = [check("accelerated", run) for run in RUNS]
HELPERS = [
    Check(f"helpers_{layout}_{gathered}_{flat}_{ranks}ranks", ranks, "checkpoints:helpers", (layout, gathered, flat))
    for layout, ranks in (("fsdp2", 2), ("ddp", 2), ("hsdp", 4))
    for gathered, flat in ((False, False), (True, False), (False, True))
    if layout == "fsdp2" or not flat
]


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


@pytest.mark.parametrize("check", TRAINED, ids=named)
def test_a_killed_and_resumed_trainer_is_the_uninterrupted_one_to_the_bit(check: Check, ask: Ask) -> None:
    for seen in ask(check):
        uninterrupted, killed, resumed = (seen[name] for name in ("uninterrupted", "killed", "resumed"))
        assert seen["error"] == "" and len(uninterrupted.losses) == TRAINING.steps
        assert killed.losses == uninterrupted.losses[:STOP]
        assert resumed.losses == uninterrupted.losses[SAVED:]
        assert same(resumed.parameters, uninterrupted.parameters)


@pytest.mark.parametrize("check", OURS, ids=named)
def test_the_half_written_newest_checkpoint_is_skipped_and_old_ones_are_removed(check: Check, ask: Ask) -> None:
    for seen in ask(check):
        assert seen["left"] == [f"checkpoint-{n}" for n in (2, SAVED, STOP)]  # it died before the oldest went
        assert "shampoo" in seen["parts"]
        (warning,) = [message for message in seen["messages"] if message.startswith("not resumed from")]
        assert f"checkpoint-{STOP}: its saving was interrupted" in warning
        assert seen["finally"] == [f"checkpoint-{n}" for n in (STOP, TRAINING.steps)]


@pytest.mark.parametrize("check", [REFUSED], ids=named)
def test_the_stock_trainer_under_fsdp1_says_that_it_cannot_save(check: Check, ask: Ask) -> None:
    for seen, error in ask(check):
        assert "cannot carry Shampoo's state: use ShampooTrainer" in error and not seen.losses


@pytest.mark.parametrize("check", LOOPS, ids=named)
def test_a_loaded_accelerate_loop_is_the_uninterrupted_one_to_the_bit(check: Check, ask: Ask) -> None:
    for uninterrupted, resumed in ask(check):
        assert isinstance(resumed, Seen) and resumed.losses == uninterrupted.losses[SAVED:]
        assert same(resumed.parameters, uninterrupted.parameters)


@pytest.mark.parametrize("check", HELPERS, ids=named)
def test_torchs_helpers_let_a_run_go_on(check: Check, ask: Ask) -> None:
    """To the bit where it is sharded as before; unsharded within rounding."""
    for uninterrupted, resumed, *whole in ask(check):
        assert same(resumed, uninterrupted)
        for parameters in whole:
            assert max(relative_error(p, uninterrupted[n]) for n, p in parameters.items()) <= 1e-5
