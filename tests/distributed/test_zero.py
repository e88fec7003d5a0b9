"""Under DeepSpeed with its usual configuration, every ZeRO stage takes the trajectory of the unsharded reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from shampoo_deepspeed import Shampoo
from shampoo_deepspeed.options.choices import TRAINER_NO_DECAY
from tests.support.exactness import assert_exact, assert_on_trajectory, assert_ranks_agree
from tests.support.launch import Ask, Check, named
from tests.support.pipelines import SYNC, Stage, stage_data
from tests.support.scenarios import FAMILY, RULES, BadStep, Scenario, expected
from tests.support.zero_checks import EVERYTHING, NORMALIZED, OFFLOADED, covering, final
from tests.support.zoo import relative_error


def options() -> list[Check]:
    """Return runs with options that change what a rank keeps or exchanges.

    test_combinations.py has runs with all options of the rule at stages 2 and 3.
    """
    variants: dict[str, dict[str, Any]] = {
        "momentum": EVERYTHING,
        "coupled_decay": {"weight_decay": 0.3, "decoupled_weight_decay": False},
        "graft_none": {"grafting": "none", "lr": 1e-3},
        "graft_normalized": NORMALIZED,
        "one_block_each": {"max_preconditioner_dim": 1024},
        "sums": {"betas": [0.0, 1.0], "grafting": "adagrad", "precondition_frequency": 2},
        "large_diagonal": {"preconditioner": "shampoo", "large_dim": "diagonal", "beta3": 0.5},
        "statistics": {"statistics_frequency": 3, "betas": [0.9, 0.9]},
    }
    checks = [final(Scenario(stage=number % 3, options=o), name) for number, (name, o) in enumerate(variants.items())]
    of_ranks: dict[str, dict[str, Any]] = {
        "no_exclusion": {"exclude": []},
        "tiny_buckets": {"bucket_mb": 0.0005},
        "rules": {"rules": RULES},
    }
    checks += [final(Scenario(stage=stage, options=o), name) for name, o in of_ranks.items() for stage in (0, 2, 3)]
    checks += [
        final(Scenario(stage=(n + 1) % 3 + 1, options=o, steps=13), name) for n, (name, o) in enumerate(FAMILY.items())
    ]
    checks += [final(Scenario(stage=stage, unused=0, late_first=True), "late_group") for stage in (0, 1, 2)]
    scaled = {"preconditioner": "shampoo", "one_sided": "smaller", "weight_decay_type": "corrected"}
    checks += [final(Scenario(stage=stage, decay=0.8, options=scaled), "scaled_decay_one_side") for stage in (0, 1, 3)]
    return checks + [final(Scenario(stage=2, decay=0.8, groups=True), "learning_rate_decay")]


ALONE = [final(Scenario(ranks=1, stage=stage, zero=OFFLOADED if stage > 1 else {}), "alone") for stage in range(4)]
EXACT = covering() + options() + ALONE
CONTROL = [final(Scenario(stage=stage, optimizer="AdamW", groups=True), "control") for stage in range(4)]
BAD = [
    Check(f"bad_{name}_zero{bad.scenario.stage}", 2, "zero:reject", bad)
    for name, bad in {
        **{f"loss{stage}": BadStep(Scenario(stage=stage), float("nan")) for stage in range(4)},
        "matrix": BadStep(Scenario(), float("inf"), "up.weight"),
        "vector": BadStep(Scenario(options=EVERYTHING), float("nan"), "norm.bias"),
        "normalized": BadStep(Scenario(options=NORMALIZED), float("nan"), "up.bias"),
        "wide": BadStep(Scenario(model="wide"), float("-inf"), "down.weight"),
    }.items()
]
# DeepSpeed steps these groups one after another, and does not always look at all of them first.
UNSEEN: dict[str, Any] = {"compute_grad_norm": False}
SMALL: dict[str, Any] = {"sub_group_size": 100}
IN_TURN = [
    Check(f"bad_{name}_zero{bad.scenario.stage}", 2, "zero:reject", bad)
    for name, bad in {
        "second_group_seen": BadStep(Scenario(stage=1, groups=True), float("nan"), group=1),
        **{f"group{g}_of{s}": BadStep(Scenario(stage=s, groups=True, zero=UNSEEN), float("inf"), group=g)
           for s in (1, 2) for g in (0, 1)},
        "offloaded": BadStep(Scenario(stage=2, groups=True, zero=OFFLOADED), float("nan"), group=1),
        "sub_group": BadStep(Scenario(stage=3, zero=SMALL), float("nan"), group=-1),
    }.items()
]  # fmt: skip
PIPELINES = [
    Check(f"pipeline{bad}_{name}", 2, "zero:pipeline", (stage, zero, bad))
    for name, stage, zero in (("zero0", 0, {}), ("zero1", 1, UNSEEN), ("zero1_seen", 1, {}))
    for bad in (0, 1)
]
STAGES = [
    Check(f"pipeline_stages_{name}", 2, "zero:stages", saved) for name, saved in (("whole", False), ("resumed", True))
]
TRAFFIC = [
    Check(
        f"traffic_zero{stage}_{ranks}ranks",
        ranks,
        "zero:traffic",
        Scenario(ranks=ranks, stage=stage, groups=stage == 2),
    )
    for ranks in (2, 4)
    for stage in range(4)
]


@pytest.mark.parametrize("check", CONTROL, ids=named)
def test_the_harness_is_exact_for_adamw(check: Check, ask: Ask) -> None:
    assert_on_trajectory(check, ask)


@pytest.mark.parametrize("check", EXACT, ids=named)
def test_the_trajectory_is_that_of_the_reference(check: Check, ask: Ask) -> None:
    assert_on_trajectory(check, ask)


@pytest.mark.parametrize("check", PIPELINES, ids=named)
def test_a_non_finite_gradient_on_one_stage_rejects_the_step_of_all(check: Check, ask: Ask) -> None:
    for seen in ask(check):
        assert seen == {"moved": [True, True, False, True], "steps": [3], "finite": True}


@pytest.mark.parametrize("check", STAGES, ids=named)
def test_a_pipeline_of_two_stages_trains_as_one_process_and_continues(check: Check, ask: Ask) -> None:
    seen = ask(check)
    model = nn.ModuleDict({n.split(".")[0]: Stage() for s in seen for n in s["begin"]})
    model.load_state_dict({n: w for s in seen for n, w in s["begin"].items()})
    scenario = Scenario(ranks=1, options=SYNC)
    # Without `no_decay`, DeepSpeed's JSON decays neither norms nor biases, as the Trainer.
    optimizer = Shampoo(model.named_parameters(), no_decay=TRAINER_NO_DECAY, **scenario.optimizer_options())
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        found = [F.mse_loss(model["1"](model["0"](x)), y) for x, y in stage_data(2)]
        loss = torch.stack(found).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    weights = dict(model.named_parameters())
    assert sorted(n for s in seen for n in s["weights"]) == sorted(weights)
    assert all(relative_error(w, weights[n].detach()) <= 1e-5 for s in seen for n, w in s["weights"].items())
    assert all(s["losses"] == pytest.approx(losses, rel=1e-5) for s in seen) and losses[-1] < losses[0]
    assert [s["state"] for s in seen] == [[f"{n}.linear.bias", f"{n}.linear.weight"] for n in range(2)]


@pytest.mark.parametrize("check", BAD + IN_TURN, ids=named)
def test_a_non_finite_gradient_on_one_rank_rejects_the_step_on_all(check: Check, ask: Ask) -> None:
    """Parameters have not changed, nor, as the rest of the run shows, have state and counters."""
    values = ask(check)
    assert all(v["unchanged"] for v in values)
    assert_ranks_agree([v["final"] for v in values])
    assert_exact(values[0]["final"], check.argument.scenario)


@pytest.mark.parametrize("check", TRAFFIC, ids=named)
def test_the_bytes_that_move_are_those_of_the_plan(check: Check, ask: Ask) -> None:
    values = ask(check)
    for v in values:
        assert v["bytes_sent"] == v["planned_bytes_sent"] == v["seen_sent"]
        assert v["bytes_received"] == v["planned_bytes_received"] == v["seen_received"]
    assert sum(v["bytes_sent"] for v in values) == sum(v["bytes_received"] for v in values)
    scenario: Scenario = check.argument
    matrices = sum(w.numel() for w in expected(scenario).values() if w.ndim > 1)
    copies = scenario.ranks - 1 if scenario.stage == 0 else 2  # updates to all others, or gradient in and update out
    assert 0 < sum(v["bytes_received"] for v in values) <= 4 * copies * matrices
