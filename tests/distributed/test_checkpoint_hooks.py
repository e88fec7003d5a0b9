"""Checkpoints through the Trainer, accelerate and torch's own helpers: a resumed run equals the uninterrupted one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shampoo_deepspeed import ShampooConfig
from tests.distributed.ranks.checkpoints import SAVED, STOP, TRAINING, Run, Seen, dies_in
from tests.support.launch import Ask, Check, named
from tests.support.zoo import relative_error

FULL, SHARDED = "FULL_STATE_DICT", "SHARDED_STATE_DICT"
SHARDINGS = [(framework, form) for framework in ("fsdp1", "fsdp2") for form in (FULL, SHARDED)]
RUNS = [Run("ours", "ddp"), *(Run("ours", *sharding) for sharding in SHARDINGS)]
# Every pair of a trainer, a framework and a form of state dict is in some run.
OWN = [Run("ours", "ddp"), Run("ours", "fsdp1", SHARDED), Run("ours", "fsdp2", FULL)]
STOCK = [Run("stock", "ddp"), Run("stock", "fsdp1", FULL), Run("stock", "fsdp2", SHARDED)]
FLAT = [Run("ours", "fsdp1_flat", SHARDED), Run("stock", "fsdp1_flat", FULL)]
MIXED = Run("mixed", "ddp")
ZERO = [Run("stock", "zero3"), Run("ours", "zero2")]


def check(function: str, run: Run) -> Check:
    return Check(
        f"{function}_{run.trainer}_{run.framework}_{run.form[0]}", 2, f"checkpoints:{function}", run, seconds=180
    )


TRAINED = [check("trained", run) for run in (*OWN, *STOCK, *FLAT, MIXED, *ZERO)]
IN_THE_FOLDER = [check for check in TRAINED if check.argument.framework.startswith("fsdp1")]
ROBBED = check("robbed", Run("stock", "fsdp1", SHARDED))
OURS = [check for check in TRAINED if check.argument.trainer != "stock"]
BETWEEN = [check for check in TRAINED if dies_in(check.argument) == "step"]
# If accelerate alone saves, DDP's replicas divide nothing and FSDP2 needs our hook; FSDP1 needs none.
LOOPS = [check("accelerated", run) for run in (*RUNS, Run("stock", "fsdp1", FULL), Run("stock", "fsdp1", SHARDED))]
HELPERS = [
    Check(f"helpers_{layout}_{gathered}_{flat}_{ranks}ranks", ranks, "torch_helpers:helpers", (layout, gathered, flat))
    for layout, ranks in (("fsdp2", 2), ("ddp", 2), ("hsdp", 4))
    for gathered, flat in ((False, False), (True, False), (False, True))
    if layout == "fsdp2" or not flat
]
HALF = {"memory": "half"}
CONVERTED = [
    Check(f"formats_{layout}_{gathered}_{name}", 2, "torch_helpers:into_other_formats", (layout, gathered, *formats))
    for layout, gathered in (("fsdp2", False), ("fsdp2", True))
    for name, formats in {"narrower": ({}, HALF), "wider": (HALF, {})}.items()
]
MOVED = [Check(f"moved_twice_{layout}", 2, "torch_helpers:moved_twice", layout) for layout in ("fsdp2", "ddp")]
REFUSED = Check("zero_redundancy", 2, "torch_helpers:zero_redundancy")


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


@pytest.mark.parametrize("check", TRAINED, ids=named)
def test_a_killed_and_resumed_trainer_is_the_uninterrupted_one_to_the_bit(check: Check, ask: Ask) -> None:
    for seen in ask(check):
        uninterrupted, killed, resumed = (seen[name] for name in ("uninterrupted", "killed", "resumed"))
        assert seen["error"] == "" and len(uninterrupted.losses) == TRAINING.steps
        assert killed.losses == uninterrupted.losses[: STOP - (dies_in(check.argument) == "step")]
        assert resumed.losses == uninterrupted.losses[SAVED:]
        assert same(resumed.parameters, uninterrupted.parameters)


@pytest.mark.parametrize("check", OURS, ids=named)
def test_the_half_written_newest_checkpoint_is_skipped_and_old_ones_are_removed(check: Check, ask: Ask) -> None:
    for seen in ask(check):
        assert seen["left"] == [f"checkpoint-{n}" for n in (2, SAVED, STOP)]  # it died before the oldest went
        assert "shampoo" in seen["parts"] or check.argument in ZERO
        (warning,) = [message for message in seen["messages"] if message.startswith("not resumed from")]
        assert f"checkpoint-{STOP}: its save was interrupted" in warning
        assert seen["finally"] == [f"checkpoint-{n}" for n in (STOP, TRAINING.steps)]


@pytest.mark.parametrize("check", BETWEEN, ids=named)
def test_a_stock_trainer_under_deepspeed_finds_its_newest_checkpoint_and_removes_old_ones(
    check: Check, ask: Ask
) -> None:
    for seen in ask(check):
        assert seen["left"] == [f"checkpoint-{n}" for n in (2, SAVED)]
        assert f"global_step{SAVED}" in seen["parts"]
        assert seen["finally"] == [f"checkpoint-{n}" for n in (STOP, TRAINING.steps)]


@pytest.mark.parametrize("check", IN_THE_FOLDER, ids=named)
def test_under_fsdp1_any_trainer_s_checkpoint_has_a_folder_of_ours(check: Check, ask: Ask) -> None:
    assert all("shampoo" in seen["parts"] for seen in ask(check))


@pytest.mark.parametrize("check", [ROBBED], ids=named)
def test_a_stock_trainer_under_fsdp1_raises_if_the_state_is_missing(check: Check, ask: Ask) -> None:
    assert all("from step 4, but its checkpoint has no Shampoo state" in error for error in ask(check))


@pytest.mark.parametrize("check", LOOPS, ids=named)
def test_a_loaded_accelerate_loop_is_the_uninterrupted_one_to_the_bit(check: Check, ask: Ask) -> None:
    for uninterrupted, resumed in ask(check):
        assert isinstance(resumed, Seen) and resumed.losses == uninterrupted.losses[SAVED:]
        assert same(resumed.parameters, uninterrupted.parameters)


@pytest.mark.parametrize("check", HELPERS, ids=named)
def test_a_run_resumes_through_torchs_helpers(check: Check, ask: Ask) -> None:
    """The result is equal to the bit if sharded as before, and up to rounding if unsharded."""
    for uninterrupted, resumed, *whole in ask(check):
        assert same(resumed, uninterrupted)
        for parameters in whole:
            assert max(relative_error(p, uninterrupted[n]) for n, p in parameters.items()) <= 1e-5


@pytest.mark.parametrize("check", CONVERTED, ids=named)
def test_torchs_helpers_load_into_other_formats_which_converts_and_says_so(check: Check, ask: Ask) -> None:
    _, gathered, before, after = check.argument
    for seen in ask(check):
        assert seen["options"] == {
            n: v for n, v in ShampooConfig.from_options(after).to_json().items() if "_format" in n
        }
        assert ("torch.int8" in seen["dtypes"], "torch.bfloat16" in seen["dtypes"]) == (bool(after), bool(after))
        (said,) = [text for text in seen["messages"] if text.startswith("the state was saved with ")]
        for name in ("factor_format", "root_format", "moment_format", "elementwise_format"):
            was, now = (getattr(ShampooConfig.from_options(options), name) for options in (before, after))
            assert f"{name}={was!r}" in said.partition("; ")[0] and f"{name}={now!r}" in said.partition("; ")[2]
        for name, converted in seen["converted"].items():
            moved = (seen["uninterrupted"][name] - seen["saved"][name]).norm()
            error = (converted - seen["uninterrupted"][name]).norm()
            assert (error > 0.0 or not after) and error <= 0.15 * moved, name  # wider formats hold the same numbers
        assert gathered or "Size mismatch" in seen["error"]  # of torch's default planner


@pytest.mark.parametrize("check", MOVED, ids=named)
def test_a_state_moved_twice_without_a_step_between_continues_to_the_bit(check: Check, ask: Ask) -> None:
    for found in ask(check):
        assert len(found) > 3
        for case, parameters in found.items():
            whole = found["uninterrupted up.weight" if case.endswith("up.weight") else "uninterrupted"]
            assert same(parameters, whole), case


@pytest.mark.parametrize("check", [REFUSED], ids=named)
def test_zero_redundancy_optimizer_is_refused_with_what_to_use_instead(check: Check, ask: Ask) -> None:
    for errors in ask(check):
        assert len(errors) == 3
        assert all("Shampoo(model.named_parameters(), model=model, ...) with the DDP-wrapped" in e for e in errors)
