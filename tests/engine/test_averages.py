"""Moving averages of the weights: their rule, what has none, and what may not happen while they are in use."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from shampoo_deepspeed import OptionError, Shampoo, load_shampoo, save_shampoo
from tests.support.stepping import drive, parameter, same_bits, shampoo, snapshot, state_of

DECAY = 0.9


def averages_by_hand(shape: tuple[int, ...], steps: int, **options: Any) -> tuple[Shampoo, nn.Parameter, torch.Tensor]:
    """An optimizer after some steps, its parameter, and the average computed from the weights of each step."""
    p = parameter(*shape)
    optimizer = shampoo([("w", p)], ema_decay=DECAY, **options)
    average = p.detach().double()
    for step in range(1, steps + 1):
        drive(optimizer, [p], range(step, step + 1))
        share = max(1.0 - DECAY, 9.0 / (10.0 + step))
        average = (1.0 - share) * average + share * p.detach().double()
    return optimizer, p, average


@pytest.mark.parametrize("shape", [(6, 4), (5,), ()])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.5}, {"lr": torch.tensor(1e-2)}], ids=str)
def test_the_average_follows_the_weights(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    optimizer, p, average = averages_by_hand(shape, 12, **options)
    weights = p.detach().clone()
    with optimizer.averaged_weights():
        torch.testing.assert_close(p.detach().double(), average, rtol=1e-6, atol=1e-8)
        assert not torch.equal(p, weights)
    assert same_bits([p.detach()], [weights])


def test_a_large_decay_forgets_the_first_weights() -> None:
    """With (1 + t) / (10 + t) as a bound, the weights before the first step count by less than 1e-6 after 20 steps."""
    p = parameter(6, 4)
    with torch.no_grad():
        p.fill_(1e3)
    optimizer = shampoo([("w", p)], ema_decay=0.999, lr=1e-3, weight_decay=0.0)
    drive(optimizer, [p], range(1, 2))
    with torch.no_grad():
        p.fill_(1.0)
    drive(optimizer, [p], range(2, 22))
    with optimizer.averaged_weights():
        assert (p - 1.0).abs().max() < 0.05


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_rejected_step_leaves_the_average(bad: float) -> None:
    optimizer, p, _ = averages_by_hand((6, 4), 5)
    with optimizer.averaged_weights():
        before = p.detach().clone()
    p.grad = torch.full_like(p, bad)
    optimizer.step()
    with optimizer.averaged_weights():
        assert same_bits([p.detach()], [before])
    assert optimizer.rejected_steps == 1


def test_without_the_option_and_before_the_first_step_weights_stay() -> None:
    p, q = parameter(6, 4, seed=1), parameter(6, 4, seed=2)
    optimizer = Shampoo([{"params": [p], "ema_decay": DECAY}, {"params": [q]}], lr=1e-2)
    weights = snapshot([p, q])
    with optimizer.averaged_weights():
        assert same_bits(snapshot([p, q]), weights)
    drive(optimizer, [p, q], range(1, 5))
    weights = snapshot([p, q])
    with optimizer.averaged_weights():
        assert not torch.equal(p, weights[0]) and same_bits([q.detach()], weights[1:])


def test_a_group_that_turns_the_option_on_begins_with_its_weights() -> None:
    p = parameter(6, 4)
    optimizer = shampoo([("w", p)])
    drive(optimizer, [p], range(1, 6))
    before = p.detach().double()
    optimizer.param_groups[0]["ema_decay"] = DECAY
    drive(optimizer, [p], range(6, 7))
    now = p.detach().double()
    with optimizer.averaged_weights():
        share = max(1.0 - DECAY, 9.0 / 16.0)
        torch.testing.assert_close(p.detach().double(), (1.0 - share) * before + share * now, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("way", ["file", "state_dict", "deepcopy"])
def test_averages_are_saved_and_used_at_once_after_a_load(way: str, tmp_path: Path) -> None:
    optimizer, p, _ = averages_by_hand((6, 4), 6)
    again = nn.Parameter(p.detach().clone())
    resumed = shampoo([("w", again)], ema_decay=DECAY)
    if way == "file":
        save_shampoo(optimizer, tmp_path)
        load_shampoo(resumed, tmp_path)
    elif way == "state_dict":
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:
        resumed = copy.deepcopy(optimizer)
        (again,) = resumed.param_groups[0]["params"]
    for _ in range(2):
        with optimizer.averaged_weights(), resumed.averaged_weights():
            assert same_bits([p.detach()], [again.detach()])
        for current, tensor in ((optimizer, p), (resumed, again)):
            drive(current, [tensor], range(7, 10))
    assert same_bits([p.detach()], [again.detach()])


def test_a_parameter_that_was_frozen_before_the_load_gets_its_average(tmp_path: Path) -> None:
    optimizer, p, _ = averages_by_hand((6, 4), 6)
    save_shampoo(optimizer, tmp_path)
    again = nn.Parameter(p.detach().clone(), requires_grad=False)
    resumed = shampoo([("w", again)], ema_decay=DECAY)
    load_shampoo(resumed, tmp_path)
    with optimizer.averaged_weights(), resumed.averaged_weights():
        assert same_bits([p.detach()], [again.detach()])


def test_averages_of_a_loaded_state_without_its_tensors_are_an_error(tmp_path: Path) -> None:
    """A framework may put its tensors into the groups only while it steps."""
    optimizer, p, _ = averages_by_hand((6, 4), 6)
    save_shampoo(optimizer, tmp_path)
    resumed = shampoo([("w", nn.Parameter(p.detach().clone()))], ema_decay=DECAY)
    resumed.param_groups[0]["params"] = []
    with resumed.averaged_weights():  # nothing was loaded yet
        pass
    load_shampoo(resumed, tmp_path)
    with pytest.raises(RuntimeError, match=r"averages of the loaded state cannot be used yet.*take a training step"):
        resumed.use_averages()
    assert not resumed.averages_in_use


@pytest.mark.parametrize(
    "options",
    [{}, {"master_weights": False}, {"master_weights": False, "stochastic_rounding": True}],
    ids=str,
)
def test_bfloat16_weights_come_back_and_train_as_if_never_replaced(options: dict[str, Any]) -> None:
    p, q = parameter(12, 8, dtype=torch.bfloat16), parameter(12, 8, dtype=torch.bfloat16)
    looked_at, plain = (shampoo([("w", w)], lr=1e-3, ema_decay=DECAY, **options) for w in (p, q))
    for step in range(1, 7):
        drive(looked_at, [p], range(step, step + 1))
        drive(plain, [q], range(step, step + 1))
        looked_at.use_averages()
        assert looked_at.averages_in_use
        looked_at.use_averages()  # a second call changes nothing
        looked_at.use_weights()
        looked_at.use_weights()
        assert same_bits([p.detach()], [q.detach()])


class Failing(TorchDispatchMode):
    """Lets the n-th of some operators fail."""

    def __init__(self, operator: str, number: int, error: BaseException) -> None:
        super().__init__()
        self.operator, self.left, self.error = operator, number, error

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= func._schema.name == self.operator
        if not self.left and func._schema.name == self.operator:
            raise self.error
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("none left"), KeyboardInterrupt()], ids=type)
@pytest.mark.parametrize(("operator", "number"), [("aten::clone", 2), ("aten::copy_", 1), ("aten::copy_", 2)])
def test_averages_that_cannot_be_put_in_leave_all_weights(operator: str, number: int, error: BaseException) -> None:
    params = [parameter(6, 4), parameter(3, 5), parameter(7)]
    optimizer = shampoo(params, ema_decay=0.5)
    drive(optimizer, params, range(4))
    before = snapshot(params)
    with pytest.raises(type(error)), Failing(operator, number, error), optimizer.averaged_weights():
        raise AssertionError("averages are in use")
    assert same_bits(snapshot(params), before) and not optimizer.averages_in_use
    drive(optimizer, params, [4])
    after = snapshot(params)
    with optimizer.averaged_weights():
        assert not same_bits(snapshot(params), after)
    assert same_bits(snapshot(params), after)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_weights_that_could_not_be_put_back_are_not_lost(number: int) -> None:
    params = [parameter(6, 4), parameter(3, 5), parameter(7)]
    optimizer = shampoo(params, ema_decay=0.5)
    drive(optimizer, params, range(4))
    before = snapshot(params)
    optimizer.use_averages()
    with pytest.raises(KeyboardInterrupt), Failing("aten::copy_", number, KeyboardInterrupt()):
        optimizer.use_weights()
    optimizer.use_weights()
    assert same_bits(snapshot(params), before) and not optimizer.averages_in_use


def test_averages_that_a_closure_puts_in_are_noticed_before_the_step() -> None:
    p = parameter(6, 4)
    optimizer = shampoo([p], ema_decay=0.5)
    drive(optimizer, [p], range(3))
    steps = state_of(optimizer)["steps"]

    def closure() -> float:
        optimizer.use_averages()
        return 0.0

    with pytest.raises(RuntimeError, match="averaged weights"):
        optimizer.step(closure)
    optimizer.use_weights()
    assert state_of(optimizer)["steps"] == steps


def test_steps_saves_loads_and_copies_are_refused_while_averages_are_in_use(tmp_path: Path) -> None:
    optimizer, p, _ = averages_by_hand((6, 4), 3)
    state = copy.deepcopy(optimizer.state_dict())
    save_shampoo(optimizer, tmp_path)
    weights = p.detach().clone()
    optimizer.use_averages()
    p.grad = torch.ones_like(p)
    for call in (
        optimizer.step,
        optimizer.state_dict,
        lambda: save_shampoo(optimizer, tmp_path / "other"),
        lambda: load_shampoo(optimizer, tmp_path),
        lambda: optimizer.load_state_dict(state),
        lambda: copy.deepcopy(optimizer),
    ):
        with pytest.raises(RuntimeError, match=r"averaged weights: call optimizer\.use_weights\(\)"):
            call()
    optimizer.use_weights()
    assert same_bits([p.detach()], [weights])
    optimizer.step()


@pytest.mark.parametrize("value", [1.0, -0.1, "0.9", None, True])
def test_the_decay_is_checked(value: object) -> None:
    with pytest.raises(OptionError, match="'ema_decay'"):
        Shampoo([parameter(2)], ema_decay=value)  # type: ignore[arg-type]
