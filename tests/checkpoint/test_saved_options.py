"""Options from a checkpoint: those that groups share, weight decay by its effect, and allowed combinations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from shampoo_deepspeed import Shampoo, load_shampoo, save_shampoo
from shampoo_deepspeed.options.choices import TRAINER_NO_DECAY
from tests.support.stepping import drive, parameter, same_bits, shampoo

Groups = tuple[dict[str, Any], ...]


def test_a_group_merged_from_several_keeps_its_own_options(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    w, b = parameter(8, 6), parameter(6)
    optimizer = Shampoo([{"params": [("w", w)], "lr": 0.25}, {"params": [("b", b)], "lr": 0.5}])
    drive(optimizer, [w, b], range(1))
    save_shampoo(optimizer, tmp_path)
    one = Shampoo([("w", w), ("b", b)], lr=0.75)
    load_shampoo(one, tmp_path)
    assert one.param_groups[0]["lr"] == 0.75
    assert "group 0 keeps its own lr: its parameters were in the groups 0, 1 of the checkpoint" in caplog.text


NAMES = ("weight", "norm.weight")
BY_PATTERN = ({"params": NAMES, "weight_decay": 0.25, "no_decay": ["*norm*"]},)
BY_GROUP = ({"params": NAMES[:1], "weight_decay": 0.25}, {"params": NAMES[1:], "weight_decay": 0.0})


@pytest.mark.parametrize("before, after", [(BY_PATTERN, BY_GROUP), (BY_GROUP, BY_PATTERN)])
def test_no_decay_and_groups_without_decay_continue_each_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, before: Groups, after: Groups
) -> None:
    """Patterns in a DeepSpeed JSON, and otherwise the Trainer's two groups, say which parameters do not decay."""
    params = [parameter(8, 6), parameter(6)]
    optimizer = in_groups(params, before, lr=0.125)
    drive(optimizer, params, range(2))
    save_shampoo(optimizer, tmp_path)
    own = [nn.Parameter(p.detach().clone()) for p in params]
    again = in_groups(own, after, lr=0.5)
    for group in again.param_groups:
        group["weight_decay"] *= 3
    load_shampoo(again, tmp_path)
    assert [group["weight_decay"] for group in again.param_groups] == [group["weight_decay"] for group in after]
    assert all(group["lr"] == 0.125 for group in again.param_groups)
    assert "weight decay" not in caplog.text and "keeps its own" not in caplog.text
    for with_, given in ((optimizer, params), (again, own)):
        drive(with_, given, range(2, 4))
    assert same_bits([p.detach() for p in params], [p.detach() for p in own])


def test_a_changed_weight_decay_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    params = [parameter(8, 6), parameter(6)]
    optimizer = in_groups(params, BY_PATTERN)
    drive(optimizer, params, range(1))
    save_shampoo(optimizer, tmp_path)
    load_shampoo(in_groups(params, ({"params": NAMES, "weight_decay": 0.5},)), tmp_path, options=False)
    assert "weight decay" not in caplog.text
    again = in_groups(params, ({"params": NAMES, "weight_decay": 0.5},))
    load_shampoo(again, tmp_path)
    assert again.param_groups[0]["weight_decay"] == 0.5
    assert "2 parameters have a different weight decay than in the" in caplog.text
    assert "such as weight: 0.25 there, 0.5 here" in caplog.text


def test_options_that_differ_in_the_checkpoint_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    params = [parameter(8, 6), parameter(6)]
    named = list(zip("wb", params, strict=True))
    drive(optimizer := shampoo(named, lr=0.5, refresh="sync", precondition_frequency=2), params, range(3))
    save_shampoo(optimizer, tmp_path)
    load_shampoo(shampoo(named, lr=0.25, refresh="sync", precondition_frequency=2), tmp_path)
    assert "now uses" not in caplog.text  # a schedule's rate differs at most resumptions
    again = shampoo(named, refresh="sync", precondition_frequency=5)
    load_shampoo(again, tmp_path)
    assert "now uses the checkpoint's precondition_frequency = 2 (given here: 5)" in caplog.text
    assert again.param_groups[0]["precondition_frequency"] == 2


class Normed(nn.Module):
    """A model with a norm whose name does not show it, as in GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.ln_1 = parameter(8, 6), nn.LayerNorm(6, bias=False)


def test_decay_by_kind_is_known_to_a_loop_that_gives_names_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = Normed()
    params = list(model.parameters())
    options: dict[str, Any] = {"weight_decay": 0.25, "no_decay": TRAINER_NO_DECAY}
    drive(optimizer := Shampoo(model.named_parameters(), model=model, **options), params, range(1))
    save_shampoo(optimizer, tmp_path)
    weight, norm = model.named_parameters()
    apart = Shampoo([{"params": [weight], "weight_decay": 0.25}, {"params": [norm], "weight_decay": 0.0}])
    load_shampoo(apart, tmp_path)
    assert [group["weight_decay"] for group in apart.param_groups] == [0.25, 0.0]
    assert "weight decay" not in caplog.text
    load_shampoo(Shampoo(model.named_parameters(), weight_decay=0.25), tmp_path)
    assert "such as ln_1.weight: 0 there, 0.25 here" in caplog.text


def test_a_group_of_parameters_that_decayed_differently_keeps_its_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    params = [parameter(8, 6), parameter(6)]
    drive(optimizer := in_groups(params, BY_PATTERN), params, range(1))
    save_shampoo(optimizer, tmp_path)
    again = in_groups(params, ({"params": NAMES, "weight_decay": 0.0},))
    load_shampoo(again, tmp_path)
    assert again.param_groups[0]["weight_decay"] == 0.0
    assert "such as weight: 0.25 there, 0 here" in caplog.text
    params[1].requires_grad_(False)  # the decay of frozen parameters has no effect
    caplog.clear()
    again = in_groups(params, ({"params": NAMES, "weight_decay": 0.0},))
    load_shampoo(again, tmp_path)
    assert again.param_groups[0]["weight_decay"] == 0.25 and "weight decay" not in caplog.text


def apart(first: dict[str, Any], second: dict[str, Any]) -> Groups:
    return ({"params": NAMES[:1], **first}, {"params": NAMES[1:], **second})


PLAIN: dict[str, Any] = {"preconditioner": "shampoo"}
OPTIONS_THAT_CLASH: list[tuple[Groups, dict[str, Any], str]] = [
    (
        apart({"momentum": 0.9, "nesterov": True}, {"momentum": 0.8, "nesterov": True}),
        {},
        "group 0 keeps its own momentum: its parameters were in the groups 0, 1",
    ),
    (({"params": NAMES, "start_preconditioning_step": 10},), {"precondition_frequency": 50}, ""),
    (
        apart(
            PLAIN | {"solver": "coupled_newton", "exponent_override": 8},
            PLAIN | {"solver": "coupled_newton", "exponent_override": 4},
        ),
        PLAIN | {"exponent_override": 2.5},
        "group 0 keeps its own options except lr, as the checkpoint's do not fit them: Shampoo option 'solver'",
    ),
]


@pytest.mark.parametrize("before, today, warning", OPTIONS_THAT_CLASH)
def test_options_are_loaded_only_in_allowed_combinations(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, before: Groups, today: dict[str, Any], warning: str
) -> None:
    """The next step finds no forbidden combination."""
    params = [parameter(8, 6), parameter(6)]
    drive(optimizer := in_groups(params, before, lr=0.125), params, range(1))
    save_shampoo(optimizer, tmp_path)
    again = in_groups(params, ({"params": NAMES},), **today)
    load_shampoo(again, tmp_path)
    assert again.param_groups[0]["lr"] == 0.125
    assert warning in caplog.text and not again.param_groups[0]["nesterov"]
    drive(again, params, range(1, 3))


def in_groups(params: list[nn.Parameter], groups: Groups, **options: Any) -> Shampoo:
    by_name = dict(zip(NAMES, params, strict=True))
    return Shampoo([{**group, "params": [(n, by_name[n]) for n in group["params"]]} for group in groups], **options)
