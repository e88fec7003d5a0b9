"""Under DeepSpeed in bf16 and fp16 all ZeRO stages take one trajectory of float32 masters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.distributed.conftest import Ask
from tests.distributed.launch import Check
from tests.distributed.scenarios import BadStep, Scenario, expected
from tests.distributed.test_zero import (
    OFFLOADED,
    OFFLOADED_ALL,
    SMALL_PIECES,
    assert_ranks_agree,
    deviations,
    final,
    named,
)

# Stage 0 does not scale the loss, but divides gradients by the scale; so only without a scale it trains as the others.
UNSCALED: dict[str, Any] = {"fp16": {"enabled": True, "loss_scale": 1.0}}
SCALED: dict[str, Any] = {"fp16": {"enabled": True, "loss_scale": 1024.0}}
FLOAT32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}  # at stage 1: BF16_Optimizer
BOUND_OF_STAGES = 1e-5
# Masters that differ in the eighth digit may round to 16-bit weights that differ in the third.
BOUND_OF_ROUNDING = 2e-3

Pair = tuple[Check, Check]


def at_stage(scenario: Scenario, stage: int, **zero: Any) -> Scenario:
    """ZeRO-3's own linear layer would round the forward pass differently."""
    return replace(scenario, stage=stage, zero={**zero, **({"memory_efficient_linear": False} if stage == 3 else {})})


def family(name: str, first: Scenario, others: dict[str, Scenario]) -> list[Pair]:
    baseline = final(first, name)
    return [(final(other, f"{name}{suffix}"), baseline) for suffix, other in others.items()]


def pairs() -> list[Pair]:
    found = []
    for model in ("odd", "wide"):
        bf16 = Scenario(model=model, half="bf16", stage=1)
        found += family(
            f"bf16_{model}",
            bf16,
            {
                "_plain": at_stage(bf16, 0),
                "_gradients": at_stage(bf16, 2),
                "_parameters": at_stage(bf16, 3),
                "_float32_sums": replace(bf16, config=FLOAT32_SUMS),
                "_offload": at_stage(bf16, 2, **OFFLOADED),
                "_offload_all": at_stage(bf16, 3, **OFFLOADED_ALL),
                "_sub_groups": at_stage(bf16, 3, **SMALL_PIECES),
            },
        )
        coupled = replace(bf16, options={"decoupled_weight_decay": False})
        found += family(f"bf16_{model}_coupled", coupled, {"_plain": at_stage(coupled, 0)})
        scaled = Scenario(model=model, half="fp16", stage=1, config=SCALED, groups=True)
        found += family(
            f"fp16_{model}",
            scaled,
            {
                "_gradients": at_stage(scaled, 2),
                "_parameters": at_stage(scaled, 3),
                "_offload": at_stage(scaled, 2, **OFFLOADED),
            },
        )
    # Sums of micro-batches are rounded before the ranks' mean in stages 0 and 1, after it in 2 and 3.
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
SIMPLE = {c.name: c for pair in PAIRS for c in pair if c.argument.accumulate == 1}
BAD = [
    (Check(f"bad_{name}", 2, "zero:reject", BadStep(scenario, float("nan"))), final(scenario, name))
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
    values, wanted = ask(check), ask(baseline)
    assert_ranks_agree(values)
    found = deviations(values[0], wanted[0])
    print(f"deviates by {max(found.values()):.1e}")  # shown by pytest -rP
    assert max(found.values()) <= BOUND_OF_STAGES, found


@pytest.mark.parametrize("check", SIMPLE.values(), ids=named)
def test_the_trajectory_is_near_the_reference(check: Check, ask: Ask) -> None:
    """The reference gets the ranks' 16-bit gradients and keeps float64 masters."""
    wanted = expected(check.argument)
    found = deviations(ask(check)[0], {n: wanted[n] for n in ask(check)[0]})
    print(f"deviates by {max(found.values()):.1e}")  # shown by pytest -rP
    assert max(found.values()) <= BOUND_OF_ROUNDING, found


@pytest.mark.parametrize("check, baseline", BAD, ids=named)
def test_a_step_that_overflows_changes_nothing(check: Check, baseline: Check, ask: Ask) -> None:
    values, wanted = ask(check), ask(baseline)
    assert all(v["unchanged"] for v in values)
    found = deviations(values[0]["final"], wanted[0])
    assert max(found.values()) <= BOUND_OF_STAGES, found
