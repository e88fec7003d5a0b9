"""What scripts expect of any torch.optim optimizer when it steps: groups, rates, schedulers, closures, hooks."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR, StepLR

from shampoo_deepspeed import OptionError, Shampoo
from tests.support.stepping import drive, made_up, parameter, same_bits, shampoo, snapshot, state_of, train
from tests.support.zoo import make_model

GROUP_OPTIONS: dict[str, dict[str, Any]] = {
    "lr": {"lr": 3e-3},
    "weight_decay": {"weight_decay": 0.5},
    "coupled_decay": {"weight_decay": 0.5, "decoupled_weight_decay": False},
    "precondition_frequency": {"precondition_frequency": 2},
    "max_preconditioner_dim": {"max_preconditioner_dim": 5},
    "grafting": {"grafting": "rmsprop"},
    "betas": {"betas": (0.0, 0.9)},
    "momentum": {"momentum": 0.8, "nesterov": True},
    "aliases": {"grafting_type": "sgd", "use_decoupled_weight_decay": False},
}


@pytest.mark.parametrize("name", list(GROUP_OPTIONS))
def test_a_group_with_its_own_options_moves_as_under_an_optimizer_of_its_own(name: str) -> None:
    left, right, alone_left, alone_right = (parameter(12, 10) for _ in range(4))
    together = shampoo([{"params": [left]}, {"params": [right], **GROUP_OPTIONS[name]}])
    drive(together, [left, right], range(8))
    drive(shampoo([alone_left]), [alone_left], range(8))
    drive(shampoo([alone_right], **GROUP_OPTIONS[name]), [alone_right], range(8), salt=1)
    assert same_bits([left, right], [alone_left, alone_right])
    assert not torch.equal(left, right)


def test_a_group_added_later_starts_at_step_one_and_leaves_the_others_alone() -> None:
    old, new, old_alone, new_alone = (parameter(12, 10) for _ in range(4))
    optimizer = shampoo([old])
    drive(optimizer, [old], range(5))
    before = state_of(optimizer)
    optimizer.add_param_group({"params": [new], "lr": 5e-3})
    assert same_bits(state_of(optimizer), before)
    drive(optimizer, [old, new], range(5, 10))
    drive(shampoo([old_alone]), [old_alone], range(10))
    drive(shampoo([new_alone], lr=5e-3), [new_alone], range(5, 10), salt=1)
    assert same_bits([old, new], [old_alone, new_alone])
    assert steps_of(optimizer, "group0.0") == 10
    assert steps_of(optimizer, "group1.0") == 5


def test_a_group_that_is_refused_leaves_no_trace() -> None:
    first = parameter(12, 10)
    optimizer = shampoo([("same", first)])
    with pytest.raises(OptionError, match="two parameters have the name 'same'"):
        optimizer.add_param_group({"params": [("other", parameter(3)), ("same", parameter(12, 10))]})
    assert [group["params"] for group in optimizer.param_groups] == [[first]]
    added = parameter(4, 4)
    optimizer.add_param_group({"params": [("other", added)]})
    drive(optimizer, [first, added], range(4))
    assert steps_of(optimizer, "other") == 4


def test_a_parameter_that_is_unfrozen_later_starts_then() -> None:
    early, late, alone = parameter(12, 10), parameter(12, 10), parameter(12, 10)
    late.requires_grad_(False)
    optimizer = shampoo([early, late])

    def step(number: int) -> None:
        optimizer.zero_grad()
        x = torch.randn(6, 10, generator=torch.Generator().manual_seed(number))
        (torch.tanh(x @ early.T).square().sum() + torch.tanh(x @ late.T).square().sum()).backward()
        optimizer.step()

    for number in range(4):
        step(number)
    assert torch.equal(late, alone)
    late.requires_grad_(True)
    copy = shampoo([alone])
    for number in range(4, 9):
        step(number)
        alone.grad = late.grad
        copy.step()
    assert torch.equal(late, alone)
    assert not torch.equal(late, parameter(12, 10))


def test_a_parameter_that_is_frozen_again_keeps_its_state_for_later() -> None:
    p, resting = parameter(12, 10), parameter(12, 10)
    optimizer = shampoo([p, resting])
    drive(optimizer, [p, resting], range(4))
    held = resting.detach().clone()
    resting.grad = None
    drive(optimizer, [p], range(4, 9))
    assert torch.equal(resting, held)
    assert (steps_of(optimizer, "group0.0"), steps_of(optimizer, "group0.1")) == (9, 4)


def test_a_tensor_learning_rate_is_the_same_as_a_number() -> None:
    tensor, number = parameter(12, 10), parameter(12, 10)
    drive(shampoo([tensor], lr=torch.tensor(0.01)), [tensor], range(5))
    drive(shampoo([number], lr=0.01), [number], range(5))
    assert torch.equal(tensor, number)


def test_a_tensor_learning_rate_changed_in_place_holds_from_the_next_step() -> None:
    tensor, number = parameter(12, 10), parameter(12, 10)
    rate = torch.tensor([0.01])
    by_tensor, by_number = shampoo([tensor], lr=rate), shampoo([number])
    drive(by_tensor, [tensor], range(2))
    drive(by_number, [number], range(2))
    rate.fill_(0.002)
    by_number.param_groups[0]["lr"] = 0.002
    drive(by_tensor, [tensor], range(2, 5))
    drive(by_number, [number], range(2, 5))
    assert torch.equal(tensor, number)


def test_a_tensor_learning_rate_of_several_elements_is_refused() -> None:
    with pytest.raises(OptionError, match="'lr'.*one such element"):
        Shampoo([parameter(3)], lr=torch.ones(2))


def one_cycle(optimizer: Shampoo) -> LRScheduler:
    return OneCycleLR(optimizer, max_lr=0.02, total_steps=10, cycle_momentum=True)


SCHEDULERS: dict[str, Callable[[Shampoo], LRScheduler]] = {
    "StepLR": lambda o: StepLR(o, step_size=2, gamma=0.5),
    "LambdaLR": lambda o: LambdaLR(o, lambda n: 1.0 / (n + 1)),
    "OneCycleLR": one_cycle,
}


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_a_scheduler_does_what_setting_its_values_by_hand_does(name: str, tensor_lr: bool) -> None:
    scheduled, by_hand = parameter(12, 10), parameter(12, 10)
    optimizer = shampoo([scheduled], lr=torch.tensor(0.01) if tensor_lr else 0.01)
    scheduler = SCHEDULERS[name](optimizer)
    other = shampoo([by_hand])
    seen = set()
    for step in range(8):
        rate, betas = float(optimizer.param_groups[0]["lr"]), optimizer.param_groups[0]["betas"]
        other.param_groups[0].update(lr=rate, betas=betas)
        seen.add((rate, betas))
        drive(optimizer, [scheduled], [step])
        drive(other, [by_hand], [step])
        scheduler.step()
    assert torch.equal(scheduled, by_hand)
    assert len({rate for rate, _ in seen}) > 2
    if name == "OneCycleLR":
        assert len({betas for _, betas in seen}) > 2


def test_a_closure_runs_with_gradients_on_and_its_loss_is_given_back() -> None:
    p, twin = parameter(6, 5), parameter(6, 5)
    optimizer, other = shampoo([p]), shampoo([twin])
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))

    def closure() -> torch.Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = (p @ x).square().mean()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    expected = (twin @ x).square().mean()
    expected.backward()
    assert other.step() is None
    assert torch.equal(torch.as_tensor(loss), expected)
    assert torch.equal(p, twin)


def test_a_step_leaves_gradients_as_they_are() -> None:
    """This holds with coupled decay and momentum too, whose terms are added to other tensors."""
    p, bias = parameter(12, 10), parameter(5)
    optimizer = shampoo([p, bias], decoupled_weight_decay=False, momentum=0.9)
    drive(optimizer, [p, bias], range(4))
    assert same_bits([p.grad, bias.grad], [made_up(p, 3, 0), made_up(bias, 3, 1)])


def test_zero_grad_clears_gradients_either_way() -> None:
    p = parameter(6, 5)
    optimizer = shampoo([p])
    drive(optimizer, [p], range(2))
    optimizer.zero_grad(set_to_none=False)
    assert p.grad is not None and not p.grad.any()
    optimizer.zero_grad()
    assert p.grad is None


def test_step_hooks_run_around_every_step() -> None:
    p = parameter(6, 5)
    optimizer = shampoo([p])
    seen: list[tuple[str, torch.Tensor]] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(("before", p.detach().clone())))
    optimizer.register_step_post_hook(lambda *_: seen.append(("after", p.detach().clone())))
    drive(optimizer, [p], range(2))
    assert [name for name, _ in seen] == ["before", "after"] * 2
    assert not torch.equal(seen[0][1], seen[1][1])
    assert torch.equal(seen[1][1], seen[2][1])


@pytest.mark.parametrize("name", ["foreach", "fused"])
def test_fused_and_foreach_are_accepted_and_logged(name: str, caplog: pytest.LogCaptureFixture) -> None:
    p, twin = parameter(6, 5), parameter(6, 5)
    with caplog.at_level(logging.INFO, logger="shampoo_deepspeed"):
        optimizer = shampoo([p], **{name: True})
    assert f"ignores {name!r}" in caplog.text
    drive(optimizer, [p], range(4))
    drive(shampoo([twin], **{name: False}), [twin], range(4))
    assert torch.equal(p, twin)


@pytest.mark.parametrize("name", ["maximize", "differentiable", "capturable"])
def test_an_unsupported_mode_is_refused(name: str) -> None:
    options: dict[str, Any] = {name: False}
    Shampoo([parameter(3)], **options)
    with pytest.raises(OptionError, match=f"{name!r} = True is not allowed: false"):
        options |= {name: True}
        Shampoo([parameter(3)], **options)
    with pytest.raises(OptionError, match=f"{name!r} = True is not allowed: false"):
        Shampoo([{"params": [parameter(3)], name: True}])


def test_the_first_step_logs_once_what_is_preconditioned(caplog: pytest.LogCaptureFixture) -> None:
    """The log has all trained parameters, including the layer that has its first gradient in the second step."""
    model = make_model("odd")
    optimizer = shampoo(model.named_parameters())
    with caplog.at_level(logging.INFO, logger="shampoo_deepspeed"):
        train(model, optimizer, [2, 0, 1], sometimes=True)
    tables = [r for r in caplog.records if "Shampoo preconditions" in r.getMessage()]
    assert [(r.name, r.levelno) for r in tables] == [("shampoo_deepspeed", logging.INFO)]
    text = tables[0].getMessage()
    lines = {line.split()[0]: line for line in text.splitlines()}
    assert "6 blocks of at most 8x8" in lines["up.weight"]
    assert "element-wise" in lines["embed.weight"] and "kind:embedding" in lines["embed.weight"]
    assert "element-wise" in lines["row.weight"] and "fewer than two dims" in lines["row.weight"]
    assert "sometimes.weight" in lines and "frozen.weight" not in text
    assert "elements" in text.splitlines()[-1]


def test_torch_sees_an_ordinary_optimizer() -> None:
    """Wrappers look at the class, at `defaults` and at the printed form."""
    optimizer = shampoo([{"params": [parameter(6, 5)]}, {"params": nn.Linear(3, 3).parameters(), "lr": 0.5}])
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert {"lr", "betas", "eps", "weight_decay", "momentum"} <= optimizer.defaults.keys()
    assert "    lr: 0.5" in repr(optimizer).splitlines()
    assert snapshot(optimizer.param_groups[1]["params"])[0].shape == (3, 3)


def test_the_printed_form_fits_on_a_screen() -> None:
    """It shows what is not at its default, for each group, and not forty options."""
    groups = [{"params": [parameter(6, 5)]}, {"params": [parameter(3), parameter(4)], "lr": 0.5, "weight_decay": 0.0}]
    optimizer = Shampoo(groups, lr=0.1, weight_decay=0.1, precondition_frequency=5)
    assert repr(optimizer).splitlines() == [
        "Shampoo (",
        "Parameter Group 0: 1 tensor",
        "    lr: 0.1",
        "    weight_decay: 0.1",
        "    precondition_frequency: 5",
        "Parameter Group 1: 2 tensors",
        "    lr: 0.5",
        "    precondition_frequency: 5",
        "other options are at their defaults",
        ")",
    ]


def steps_of(optimizer: Shampoo, key: str) -> int:
    """Return how many steps a parameter has taken, according to the saved state."""
    return int(optimizer.state_dict()["shampoo"]["steps"][key])


def test_a_compiled_training_step_leaves_the_optimizer_s_as_it_is() -> None:
    """torch's compiler cannot trace it, and does not try to."""
    found = []
    for compiled in (False, True):
        model = nn.Linear(6, 5)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(made_up(p, 0))
        optimizer = shampoo(model.named_parameters(), precondition_frequency=1)

        def train_step(inputs: Tensor, model: nn.Module = model, optimizer: Shampoo = optimizer) -> None:
            model(inputs).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

        step = torch.compile(train_step, backend="aot_eager") if compiled else train_step
        for number in range(3):
            step(made_up(torch.empty(4, 6), number))
        found.append(snapshot(model.parameters()))
    assert same_bits(*found)
