"""Under DeepSpeed in bf16 and fp16, the float32 masters take the same trajectory at all ZeRO stages."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.support.exactness import assert_ranks_agree, deviations
from tests.support.launch import Ask, Check, named
from tests.support.scenarios import BOUND, BadStep, Scenario, reference_run
from tests.support.zero_checks import OFFLOADED, OFFLOADED_ALL, SMALL_PIECES

# Stage 0 divides gradients by the loss scale without scaling the loss, so it equals the others only without a scale.
UNSCALED: dict[str, Any] = {"fp16": {"enabled": True, "loss_scale": 1.0}}
SCALED: dict[str, Any] = {"fp16": {"enabled": True, "loss_scale": 1024.0}}
FLOAT32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}  # at stage 1: BF16_Optimizer
# The step by which all blocks have been refreshed twice: early refreshes are of all blocks, from step 2 on.
ALL_REFRESHED = 3

Pair = tuple[Check, Check]


def at_stage(scenario: Scenario, stage: int, **zero: Any) -> Scenario:
    """ZeRO-3's own linear layer would round the forward pass differently."""
    return replace(scenario, stage=stage, zero={**zero, **({"memory_efficient_linear": False} if stage == 3 else {})})


def watched(scenario: Scenario, name: str) -> Check:
    return Check(f"{name}_zero{scenario.stage}", 2, "zero:every_step", scenario)


def family(name: str, first: Scenario, others: dict[str, Scenario]) -> list[Pair]:
    baseline = watched(first, name)
    return [(watched(other, f"{name}{suffix}"), baseline) for suffix, other in others.items()]


def pairs() -> list[Pair]:
    """Return pairs of runs: each ZeRO setting on one of the two models, and partitioned parameters on both."""
    odd, wide = (Scenario(model=model, half="bf16", stage=1) for model in ("odd", "wide"))
    found = family(
        "bf16_odd",
        odd,
        {
            "_plain": at_stage(odd, 0),
            "_gradients": at_stage(odd, 2),
            "_parameters": at_stage(odd, 3),
            "_offload_all": at_stage(odd, 3, **OFFLOADED_ALL),
            "_float32_sums": replace(odd, config=FLOAT32_SUMS),
        },
    )
    found += family(
        "bf16_wide",
        wide,
        {
            "_parameters": at_stage(wide, 3),
            "_offload": at_stage(wide, 2, **OFFLOADED),
            "_sub_groups": at_stage(wide, 3, **SMALL_PIECES),
            "_float32_sums": replace(wide, config=FLOAT32_SUMS),
        },
    )
    coupled = replace(odd, options={"decoupled_weight_decay": False})
    found += family("bf16_odd_coupled", coupled, {"_plain": at_stage(coupled, 0)})
    scaled, large = (Scenario(model=m, half="fp16", stage=1, config=SCALED, groups=True) for m in ("odd", "wide"))
    found += family(
        "fp16_odd", scaled, {"_gradients": at_stage(scaled, 2), "_offload": at_stage(scaled, 2, **OFFLOADED)}
    )
    found += family("fp16_wide", large, {"_parameters": at_stage(large, 3)})
    # Stages 0 and 1 round sums of micro-batches before the mean over ranks, stages 2 and 3 after it.
    early = Scenario(half="bf16", stage=1, accumulate=2, clip=0.5)
    found += family(
        "bf16_accumulate", early, {"_plain": at_stage(early, 0), "_float32_sums": replace(early, config=FLOAT32_SUMS)}
    )
    late = replace(early, clip=0.0)  # the norms of 16-bit gradients differ as well
    found += family("bf16_accumulate_late", at_stage(late, 2), {"_parameters": at_stage(late, 3)})
    unscaled = Scenario(half="fp16", stage=1, config=UNSCALED)
    return found + family(
        "fp16_unscaled", unscaled, {"_plain": at_stage(unscaled, 0), "_gradients": at_stage(unscaled, 2)}
    )


PAIRS = pairs()
SIMPLE = {c.name: c for pair in PAIRS for c in pair if c.argument.accumulate == 1 or c.argument.stage < 2}
BAD = [
    (Check(f"bad_{name}", 2, "zero:reject", BadStep(scenario, float("nan"))), watched(scenario, name))
    for name, scenario in {
        "bf16_plain": Scenario(half="bf16"),
        "bf16_gradients": Scenario(half="bf16", stage=2),
        "bf16_float32_sums": Scenario(half="bf16", stage=1, config=FLOAT32_SUMS),
        "fp16_plain": Scenario(half="fp16", config=UNSCALED),
        "fp16_partitions": Scenario(half="fp16", stage=1, config=SCALED),
        "fp16_parameters": at_stage(Scenario(half="fp16", config=SCALED), 3),
    }.items()
]


@pytest.mark.parametrize("check, baseline", PAIRS, ids=named)
def test_all_stages_take_one_trajectory(check: Check, baseline: Check, ask: Ask) -> None:
    """This holds until two masters that differ in the eighth digit round to different weights."""
    values, wanted = ask(check), ask(baseline)[0]
    assert_ranks_agree([run[-1]["masters"] for run in values])
    worst, agreed = 0.0, 0
    for step, other in zip(values[0], wanted, strict=True):
        worst = max(worst, *deviations(step["masters"], other["masters"]).values())
        agreed += 1
        if not all(torch.equal(w, other["weights"][n]) for n, w in step["weights"].items()):
            break
    print(f"deviates by {worst:.1e} in {agreed} steps")  # shown by pytest -rP
    assert worst <= BOUND["strict"] and agreed >= ALL_REFRESHED


@pytest.mark.parametrize("check", SIMPLE.values(), ids=named)
def test_the_trajectory_is_that_of_the_reference(check: Check, ask: Ask) -> None:
    """The reference keeps float64 masters and computes its gradients at the run's own 16-bit weights.

    With its own weights it would deviate from the run by up to 5e-4 once a weight rounds the other way. The reference
    itself moves as much if its masters are perturbed in the eighth digit.
    """
    run = ask(check)[0]
    for step in run:
        for name, master in step["masters"].items():
            assert torch.equal(master.to(check.argument.dtype), step["weights"][name])
    wanted = reference_run(check.argument, weights=[step["weights"] for step in run])
    found = deviations(run[-1]["masters"], {n: wanted[n] for n in run[-1]["masters"]})
    print(f"deviates by {max(found.values()):.1e}")  # shown by pytest -rP
    assert max(found.values()) <= BOUND["strict"], found


@pytest.mark.parametrize("check, baseline", BAD, ids=named)
def test_a_step_that_overflows_changes_nothing(check: Check, baseline: Check, ask: Ask) -> None:
    values, wanted = ask(check), ask(baseline)
    assert all(v["unchanged"] for v in values)
    found = deviations(values[0]["final"], wanted[0][-1]["masters"])
    assert max(found.values()) <= BOUND["strict"], found
