"""Unusual situations under DeepSpeed: client optimizers, shuffled or damaged state, freezing, several engines."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from shampoo_deepspeed import Shampoo
from shampoo_deepspeed.options.choices import TRAINER_NO_DECAY
from tests.support.exactness import assert_on_trajectory, assert_ranks_agree
from tests.support.launch import Ask, Check, named
from tests.support.scenarios import FROZEN_STEPS, SECOND_GROUP, Scenario, new_weights, reference_run
from tests.support.zoo import gradients, make_batch, make_model, relative_error

CLIENT = [
    Check(f"client_optimizer_zero{stage}", 2, "situations:client_optimizer", Scenario(stage=stage))
    for stage in range(4)
]
OTHER_PLACES = [
    Check(f"state_elsewhere_{name}_zero{stage}", 2, "situations:with_state_elsewhere", Scenario(stage=stage, options=o))
    for stage in (1, 2, 3)
    for name, o in (("plain", {}), ("momentum", {"momentum": 0.8, "nesterov": True}))
]
LOST = [Check(f"lost_block_zero{s}", 2, "situations:with_a_lost_block", Scenario(stage=s)) for s in (2, 3)]
FROZEN = [
    Check(f"frozen_{name}_zero{stage}", 2, "situations:frozen_for_a_while", (Scenario(model="wide", stage=stage), name))
    for stage in (1, 2)
    for name in ("qkv.weight", "up.weight")
]
HALF: dict[str, Any] = {"model": "wide", "half": "bf16", "steps": 3}
IN_TURN = Check(
    "engines_in_turn",
    2,
    "situations:engines_in_turn",
    [Scenario(stage=stage, **HALF) for stage in (2, 0, 1)],
)
NARROW = [
    Check(
        f"narrow_wire_zero{s}",
        2,
        "zero:final_parameters",
        Scenario(stage=s, options={"communication_dtype": "bfloat16"}),
    )
    for s in (0, 1, 2, 3)
]
RESUMED = [Check(f"resumed_groups_zero{s}", 2, "situations:resumed", Scenario(stage=s)) for s in range(4)]
AFTERWARDS = [
    Check(f"plain_afterwards_zero{s}", 2, "situations:plain_after_an_engine", Scenario(stage=s)) for s in (0, 2)
]
NEW = "situations:with_new_weights"
NEW_WEIGHTS = [
    Check(f"weights_by_{way}_zero{scenario.stage}{'_groups' * scenario.groups}", 2, NEW, (scenario, way))
    for way, scenario in (
        *(("set_full", Scenario(stage=stage)) for stage in (1, 2, 3)),
        ("set_full", Scenario(stage=2, groups=True)),
        ("set_local", Scenario(stage=3, zero={"sub_group_size": 100})),
        *(("load_checkpoint", Scenario(stage=stage)) for stage in (0, 1)),
        *(("load_module", Scenario(stage=stage)) for stage in (0, 2)),
    )
]
NEW_MASTERS = [
    Check(f"masters_by_set_full_{name}", 2, NEW, (scenario, "set_full"))
    for name, scenario in (
        ("zero1", Scenario(stage=1, half="bf16", model="wide", steps=1)),
        ("zero3", Scenario(stage=3, half="bf16", model="wide", steps=1)),
        ("bf16_optimizer", Scenario(
            stage=1, half="bf16", model="wide", steps=1, config={"data_types": {"grad_accum_dtype": "fp32"}}
        )),
    )
]  # fmt: skip
ALONE = Check("alone_without_collectives", 1, "situations:plain_collectives", None)


@pytest.mark.parametrize("check", CLIENT, ids=named)
def test_an_optimizer_that_the_user_built_takes_the_same_trajectory(check: Check, ask: Ask) -> None:
    assert_on_trajectory(check, ask)


@pytest.mark.parametrize("check", OTHER_PLACES, ids=named)
def test_blocks_find_their_owners_again(check: Check, ask: Ask) -> None:
    """A later version may choose other owners: state on another rank is then sent to the owner and not lost."""
    assert_on_trajectory(check, ask)


@pytest.mark.parametrize("check", LOST, ids=named)
def test_a_lost_block_is_an_error_on_all_ranks(check: Check, ask: Ask) -> None:
    first, second = ask(check)
    assert first == second
    assert "the saved state has steps of" in first and "but not its block" in first


@pytest.mark.parametrize("check", FROZEN, ids=named)
def test_a_layer_frozen_for_a_while_trains_again(check: Check, ask: Ask) -> None:
    """While it is frozen, ZeRO gives it zeros, as any parameter without a gradient."""
    scenario, name = check.argument
    values = ask(check)
    assert_ranks_agree(values)
    wanted = reference_run(scenario, without={name: range(FROZEN_STEPS)})
    found = {n: relative_error(values[0][n], wanted[n]) for n in wanted}
    assert max(found.values()) <= 1e-5, found


@pytest.mark.parametrize("check", [IN_TURN], ids=named)
def test_engines_of_other_stages_train_one_model_one_after_another(check: Check, ask: Ask) -> None:
    """Attributes that an engine leaves on the parameters must not mislead the next engine's optimizer."""
    values = ask(check)
    for attempt in range(3):
        assert_ranks_agree([v[attempt] for v in values])
    for before, after in zip(values[0], values[0][1:], strict=False):
        assert all(not torch.equal(before[n], after[n]) for n in before if n != "norm.bias")


@pytest.mark.parametrize("check", NARROW, ids=named)
def test_a_narrow_communication_dtype_keeps_replicas_equal(check: Check, ask: Ask) -> None:
    """An owner's own updates must be rounded like those that it sends, or replicas drift apart."""
    values = ask(check)
    assert_ranks_agree(values)
    wide = reference_run(replace(check.argument, options={}))
    found = {n: relative_error(values[0][n], wide[n]) for n in wide}
    assert 1e-6 < max(found.values()) < 2e-2, found


@pytest.mark.parametrize("check", RESUMED, ids=named)
def test_a_checkpoint_of_mixed_groups_goes_on_to_the_bit(check: Check, ask: Ask) -> None:
    for value in ask(check):
        assert all(torch.equal(value["whole"][n], value["again"][n]) for n in value["whole"])


@pytest.mark.parametrize("check", AFTERWARDS, ids=named)
def test_a_finished_engine_does_not_capture_a_plain_optimizer(check: Check, ask: Ask) -> None:
    """Only one rank steps it, which would hang if the optimizer were treated as the engine's."""
    stepped, untouched = ask(check)
    assert all(not torch.equal(stepped[n], untouched[n]) for n in ("up.weight", "down.weight", "norm.weight"))


@pytest.mark.parametrize("check", NEW_WEIGHTS, ids=named)
def test_weights_that_are_set_before_the_first_step_are_trained(check: Check, ask: Ask) -> None:
    """As with DeepSpeed's own optimizers: the first gradients are those of the module's weights, and masters step."""
    scenario, way = check.argument
    values = ask(check)
    assert_ranks_agree([v["final"] for v in values])
    master_only, module_only = way.startswith("set"), way == "load_module" and scenario.stage > 0
    model, new = make_model(scenario.model), new_weights(scenario)
    old = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = Shampoo(groups_of(scenario, model), model=model, **scenario.optimizer_options())
    put(model, old if master_only else new)
    for step in range(scenario.steps):
        gradients(model, make_batch(scenario.model, step))
        if step == 0:
            put(model, old if module_only else new)
        optimizer.step()
        optimizer.zero_grad()
    found = {n: relative_error(values[0]["final"][n], p.detach()) for n, p in model.named_parameters()}
    assert max(found.values()) <= 1e-5, found
    assert any(v["warned"] for v in values) == (master_only or module_only)


@pytest.mark.parametrize("check", NEW_MASTERS, ids=named)
def test_masters_of_16_bit_weights_are_set_before_the_first_step(check: Check, ask: Ask) -> None:
    """One step moves an element by a few times the learning rate; the new weights differ by up to 0.2."""
    scenario, _ = check.argument
    new = new_weights(scenario)
    for seen in ask(check):
        assert max(float((value - new[n]).abs().max()) for n, value in seen["final"].items()) < 0.05


def groups_of(scenario: Scenario, model: nn.Module) -> Any:
    """Return the parameters as an engine of the scenario gives them, with the Trainer's rule for one list."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    second = scenario.second_group([n for n, _ in named])
    if not second:
        return [{"params": named, "no_decay": TRAINER_NO_DECAY}]
    return [
        {"params": [(n, p) for n, p in named if n not in second]},
        {"params": [(n, p) for n, p in named if n in second], **SECOND_GROUP},
    ]


def put(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])


@pytest.mark.parametrize("check", [ALONE], ids=named)
def test_one_rank_issues_no_collective(check: Check, ask: Ask) -> None:
    assert ask(check) == [{"calls": 0}]
