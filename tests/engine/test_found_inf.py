"""Steps that must change nothing: non-finite gradients, a hidden first call with zero gradients, a scaler's skip."""

from __future__ import annotations

import copy
import logging
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from shampoo_deepspeed import Shampoo
from tests.support.stepping import drive, made_up, parameter, same_bits, shampoo, snapshot, state_of

VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "coupled_decay": {"decoupled_weight_decay": False},
    "sums": {"betas": (0.0, 1.0), "grafting": "adagrad"},
    "normalized": {"grafting": "normalized_rmsprop", "momentum": 0.9},
    "normalize_gradients": {"normalize_gradients": True, "elementwise": "normalized_adam"},
    "normalize_gradients_soap": {"normalize_gradients": True, "preconditioner": "soap"},
    "no_grafting": {"grafting": "none", "elementwise": "sgd"},
    "rms": {"grafting": "rms"},
    "soap_rms": {"preconditioner": "soap", "grafting": "rms"},
    "tensor_lr": {"lr": torch.tensor(0.01)},
    "soap": {"preconditioner": "soap"},
    "soap_grafted": {"preconditioner": "soap", "grafting": "adam", "refresh_tolerance": 0.5},
    "kl_shampoo": {"preconditioner": "kl_shampoo"},
    "kept_bases": {"refresh_tolerance": 0.5},
    "background": {"refresh": "background"},
    "background_soap": {"refresh": "background", "preconditioner": "soap"},
    "background_kl_shampoo": {"refresh": "background", "preconditioner": "kl_shampoo"},
}
# Refreshes are at steps 3 and 6. The bad steps are the very first one, one between refreshes, and one at a refresh.
WHEN = {"first_step": 0, "at_a_refresh": 5, "at_the_first_refresh": 2, "between_refreshes": 4}


def three() -> list[nn.Parameter]:
    """Return a matrix of several blocks, one of another shape, and a vector."""
    return [parameter(12, 10), parameter(4, 6), parameter(5)]


def spoil(params: list[nn.Parameter], step: int, where: int, value: float) -> None:
    """Set gradients of which a single element is not finite."""
    for number, p in enumerate(params):
        p.grad = made_up(p, step, number)
        if number == where:
            p.grad.view(-1)[p.numel() // 2] = value


# Each variant at a refresh and at a step without one; variants with other kinds of refreshes at all these steps.
MOMENTS = [
    (name, when)
    for number, name in enumerate(VARIANTS)
    for place, when in enumerate(WHEN)
    if place // 2 == number % 2 or name in ("defaults", "background", "kept_bases")
]


@pytest.mark.parametrize("name, when", MOMENTS)
def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing(name: str, when: str) -> None:
    """No bit of any parameter, state tensor or counter changes, and later steps are as if the step had not happened."""
    options, at = VARIANTS[name], WHEN[when]
    params, twins = three(), three()
    optimizer, twin = shampoo(params, **options), shampoo(twins, **options)
    drive(optimizer, params, range(at))
    drive(twin, twins, range(at))
    values, before = snapshot(params), state_of(optimizer)
    for where, value in ((0, math.nan), (1, math.inf), (2, -math.inf), (2, math.nan)):
        spoil(params, 100, where, value)
        optimizer.step()
        assert same_bits(snapshot(params), values)
    if at:
        assert same_bits(state_of(optimizer), before)
    drive(optimizer, params, range(at, at + 5))
    drive(twin, twins, range(at, at + 5))
    assert same_bits(snapshot(params), snapshot(twins))
    assert same_bits(state_of(optimizer), state_of(twin))
    assert (optimizer.rejected_steps, twin.rejected_steps) == (4, 0)


def test_a_rejected_first_step_leaves_state_that_has_seen_nothing() -> None:
    params = three()
    optimizer = shampoo(params, momentum=0.9)
    spoil(params, 0, 1, math.nan)
    optimizer.step()
    own = state_of(optimizer)
    assert own["steps"] and not any(own["steps"].values())
    assert not any(any(s["refreshed"]) for s in own["stacks"])
    tensors = [item for part in own["stacks"] + own["elementwise"] for item in part["tensors"].items()]
    assert {name for name, _ in tensors} >= {"factor_0", "root_0", "scale", "exp_avg"}
    for name, tensor in tensors:
        start = torch.eye(tensor.shape[-1]) if name.startswith("root_") else torch.tensor(float(name == "scale"))
        assert torch.equal(tensor, start.expand_as(tensor)), name
    assert not any(m["buffer"].any() for m in own["buffers"])


def test_a_bad_gradient_of_one_parameter_rejects_those_of_all_groups_and_dtypes() -> None:
    params = [parameter(12, 10), parameter(12, 10, dtype=torch.float64), parameter(5, dtype=torch.bfloat16)]
    optimizer = shampoo([{"params": [p]} for p in params])
    drive(optimizer, params, range(3))
    values, before = snapshot(params), state_of(optimizer)
    spoil(params, 3, 2, math.inf)
    optimizer.step()
    assert same_bits(snapshot(params), values)
    assert same_bits(state_of(optimizer), before)
    assert optimizer.rejected_steps == 1


def test_rejected_steps_are_counted_logged_and_saved(caplog: pytest.LogCaptureFixture) -> None:
    params = three()
    optimizer = shampoo(zip("abc", params, strict=True))
    with caplog.at_level(logging.WARNING, logger="shampoo_deepspeed"):
        for step in range(6):
            spoil(params, step, 0, math.nan if step % 2 else 1.0)
            optimizer.step()
        saved = optimizer.state_dict()
    assert optimizer.rejected_steps == 3
    assert [r.getMessage()[-10:] for r in caplog.records] == ["(1 so far)", "(2 so far)", "(3 so far)"]
    other = shampoo(zip("abc", three(), strict=True))
    other.load_state_dict(saved)
    assert other.rejected_steps == 3


def test_rejections_in_a_row_become_an_error_and_single_ones_do_not() -> None:
    params = three()
    optimizer = shampoo(params, failure_limit=3)
    drive(optimizer, params, range(2))
    for bad in (True, True, False, True, True, False):
        spoil(params, 2, 0, math.nan if bad else 1.0)
        optimizer.step()
    for _ in range(3):
        spoil(params, 2, 0, math.nan)
        optimizer.step()
    values = snapshot(params)
    spoil(params, 2, 0, 1.0)
    with pytest.raises(RuntimeError, match="3 steps in a row were rejected because a gradient was not finite"):
        optimizer.step()
    assert same_bits(snapshot(params), values)


def test_a_hidden_first_call_with_zero_gradients_does_nothing() -> None:
    """Frameworks make such a call to create the state. A second call, and weight decay, make no difference."""
    params, twins = three(), three()
    optimizer, twin = shampoo(params, momentum=0.9, weight_decay=0.5), shampoo(twins, momentum=0.9, weight_decay=0.5)
    values = snapshot(params)
    for _ in range(2):
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        assert same_bits(snapshot(params), values)
    counts = state_of(optimizer)["steps"]
    assert counts and not any(counts.values())
    drive(optimizer, params, range(7))
    drive(twin, twins, range(7))
    assert same_bits(snapshot(params), snapshot(twins))
    assert same_bits(state_of(optimizer), state_of(twin))


def test_later_zero_gradients_are_ordinary_ones() -> None:
    p, bias = parameter(12, 10), parameter(5)
    optimizer = shampoo([p, bias], weight_decay=0.0)
    drive(optimizer, [p, bias], range(4))
    before = snapshot([p, bias])
    p.grad, bias.grad = torch.zeros_like(p), torch.zeros_like(bias)
    optimizer.step()
    own = state_of(optimizer)
    assert set(own["steps"].values()) == {5}
    assert (p != before[0]).all() and (bias != before[1]).all()


def test_a_parameter_that_joins_with_a_zero_gradient_steps_with_the_others() -> None:
    p, late = parameter(12, 10), parameter(12, 10)
    optimizer = shampoo([p, late])
    drive(optimizer, [p], range(2))
    before = late.detach().clone()
    p.grad, late.grad = made_up(p, 2), torch.zeros_like(late)
    optimizer.step()
    assert set(state_of(optimizer)["steps"].values()) == {1, 3}
    torch.testing.assert_close(late.detach(), before * (1 - 1e-2 * 0.1))  # a zero update, and the decay
    assert not torch.equal(late, before)


def scaled_training(params: list[nn.Parameter], scaler: torch.amp.GradScaler, bad: set[int]) -> Shampoo:
    optimizer = shampoo(params)
    for step in range(7):
        optimizer.zero_grad()
        loss = torch.stack([(p * made_up(p, step, number)).sum() for number, p in enumerate(params)]).sum()
        if step in bad:
            loss = loss * math.inf
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return optimizer


def test_a_gradient_scaler_changes_nothing_and_its_skips_are_no_steps() -> None:
    """Powers of two scale exactly. As with any torch optimizer, a skipped step does not reach it."""
    plain, scaled = three(), three()
    expected = shampoo(plain)
    drive(expected, plain, [0, 1, 3, 4, 6])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    optimizer = scaled_training(scaled, scaler, bad={2, 5})
    assert same_bits(snapshot(scaled), snapshot(plain))
    assert same_bits(state_of(optimizer), state_of(expected))
    assert optimizer.rejected_steps == 0


def test_a_disabled_gradient_scaler_leaves_rejection_to_the_optimizer() -> None:
    plain, scaled = three(), three()
    drive(shampoo(plain), plain, [0, 1, 3, 4, 6])
    optimizer = scaled_training(scaled, torch.amp.GradScaler("cpu", enabled=False), bad={2, 5})
    assert same_bits(snapshot(scaled), snapshot(plain))
    optimizer.state_dict()
    assert optimizer.rejected_steps == 2


def test_torchs_checkpoint_helper_takes_no_hidden_step_of_a_trained_optimizer() -> None:
    """If it finds no state, it makes one with zero gradients; the state of a trained optimizer must stay."""
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 4))
    optimizer = shampoo(model.named_parameters(), momentum=0.9)
    drive(optimizer, list(model.parameters()), range(4))
    optimizer.zero_grad()
    before, values = state_of(optimizer), snapshot(model.parameters())
    get_optimizer_state_dict(model, optimizer)
    assert same_bits(state_of(optimizer), before)
    assert same_bits(snapshot(model.parameters()), values)


@pytest.mark.parametrize("decoupled", [True, False])
def test_the_hidden_first_call_does_nothing_with_any_weight_decay(decoupled: bool) -> None:
    """L2 decay makes the decayed gradient non-zero, but only the framework's own gradient is checked."""
    p = parameter(12, 10)
    optimizer = shampoo([p], weight_decay=0.3, decoupled_weight_decay=decoupled)
    before = p.detach().clone()
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(p.detach(), before)
    assert set(state_of(optimizer)["steps"].values()) == {0}


def test_torchs_checkpoint_helper_takes_no_hidden_step_of_a_loaded_optimizer() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 4))
    optimizer = shampoo(model.named_parameters())
    drive(optimizer, list(model.parameters()), range(4))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.zero_grad()
    before = state_of(optimizer)
    get_optimizer_state_dict(model, optimizer)
    assert same_bits(state_of(optimizer), before)
