"""Grafting methods equal plain formulas and torch's own optimizers, and each block's update gets their norm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shampoo_deepspeed.algorithm import grafting
from shampoo_deepspeed.algorithm.found_inf import FoundInf
from shampoo_deepspeed.engine import shard_update as shards
from shampoo_deepspeed.options.choices import ELEMENTWISE_METHODS, GRAFTING_METHODS
from tests.support.bare import BARE
from tests.support.stepping import drive, made_up, parameter, same_bits, shampoo, snapshot
from tests.support.zoo import relative_error

F64 = torch.float64
BETA2, EPS = 0.9, 1e-3
ACCEPTED, REJECTED = (FoundInf(torch.tensor(flag), F64) for flag in (False, True))
WITH_MOMENT = [method for method in ELEMENTWISE_METHODS if method not in ("none", "sgd")]


def gradients(steps: int = 5) -> list[Tensor]:
    return [made_up(torch.empty(3, 4, dtype=F64), step) for step in range(steps)]


def plain_second_moment(method: str, history: list[Tensor]) -> Tensor:
    """Return the second moment as a sum over all gradients, without recurrence."""
    terms = [(g / g.norm() if method.startswith("normalized_") else g).square() for g in history]
    if method.endswith("adagrad"):
        return torch.stack(terms).sum(0)
    last = len(terms) - 1
    return torch.stack([(1 - BETA2) * BETA2 ** (last - n) * term for n, term in enumerate(terms)]).sum(0)


@pytest.mark.parametrize("method", WITH_MOMENT)
def test_second_moments_and_updates_are_those_of_the_plain_formulas(method: str) -> None:
    second, history = [torch.zeros(3, 4, dtype=F64)], gradients()
    moment = made_up(torch.empty(3, 4, dtype=F64), 99)
    for step, g in enumerate(history, start=1):
        own = grafting.normalized(g, g.norm()) if grafting.is_normalized(method) else g
        grafting.accumulate(method, second, [own], BETA2, ACCEPTED)
        v = plain_second_moment(method, history[:step])
        torch.testing.assert_close(second[0], v, rtol=1e-13, atol=0)
        corrected = v / (1 - BETA2**step) if method.endswith("adam") else v
        (found,), factor = grafting.update(method, [moment], second, step, BETA2, EPS)
        torch.testing.assert_close(found * factor, moment / (corrected.sqrt() + EPS), rtol=1e-13, atol=0)


@pytest.mark.parametrize("method", ["none", "sgd"])
def test_without_a_second_moment_the_update_is_the_first_moment(method: str) -> None:
    assert not grafting.has_second_moment(method)
    moment = made_up(torch.empty(3, 4), 0)
    grafting.accumulate(method, [], [moment], BETA2, ACCEPTED)
    (found,), factor = grafting.update(method, [moment], [], 1, BETA2, EPS)
    assert torch.equal(found, moment) and factor == 1.0


@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("beta1", [0.0, 0.5])
def test_first_moments_are_those_of_the_plain_formula(beta1: float, corrected: bool) -> None:
    state, history = [torch.zeros(3, 4, dtype=F64)], gradients()
    for step, g in enumerate(history, start=1):
        (found,), factor = grafting.first_moment(state, [g], beta1, step, corrected, ACCEPTED)
        terms = [(1 - beta1) * beta1 ** (step - 1 - n) * h for n, h in enumerate(history[:step])]
        expected = torch.stack(terms).sum(0) / (1 - beta1**step if corrected else 1.0)
        torch.testing.assert_close(found * factor, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("method", ["sgd", "adam"])
def test_operations_after_the_update_do_not_change_the_first_moment(method: str, corrected: bool) -> None:
    """Without bias correction SGD's update is the stored moment itself, and decay, momentum and lr work in place."""
    p, bias = parameter(6, 5, dtype=F64), parameter(5, dtype=F64)
    optimizer = shampoo([p, bias], grafting=method, use_bias_correction=corrected, momentum=0.9, nesterov=True)
    drive(optimizer, [p, bias], range(5))
    own = optimizer.state_dict()["shampoo"]
    for part, like, salt in ((own["stacks"][0], p, 0), (own["elementwise"][0], bias, 1)):
        drawn = [made_up(like, step, salt) for step in range(5)]
        expected = sum(0.1 * 0.9 ** (4 - step) * g / g.square().mean().sqrt() for step, g in enumerate(drawn))
        torch.testing.assert_close(part["tensors"]["exp_avg"].view_as(like), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("method", WITH_MOMENT)
def test_with_an_epsilon_of_zero_elements_without_any_gradient_get_zero(method: str) -> None:
    """0 / 0 must not become NaN, and other elements are as usual."""
    moment, second = torch.tensor([0.0, 5.0, 2.0]), torch.tensor([0.0, 0.0, 4.0])
    (found,), factor = grafting.update(method, [moment], [second], 1, 0.75, 0.0)
    scale = 0.5 if method.endswith("adam") else 1.0
    assert torch.equal(found * factor, torch.tensor([0.0, 0.0, scale]))


def test_a_zero_gradient_normalizes_to_zero() -> None:
    g = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    norms = torch.linalg.vector_norm(g, dim=1, keepdim=True)
    assert torch.equal(grafting.normalized(g, norms), torch.tensor([[3.0 / 5, 4.0 / 5], [0.0, 0.0]]))


@pytest.mark.parametrize("method", WITH_MOMENT)
def test_a_rejected_step_keeps_every_bit_of_the_moments(method: str) -> None:
    second, first = [made_up(torch.empty(3, 4, dtype=F64), 0).abs()], [made_up(torch.empty(3, 4, dtype=F64), 1)]
    before = [second[0].clone(), first[0].clone()]
    cleaned = [torch.full((3, 4), torch.nan, dtype=F64)]
    REJECTED.mask_(cleaned)
    grafting.accumulate(method, second, cleaned, BETA2, REJECTED)
    grafting.first_moment(first, cleaned, 0.9, 3, True, REJECTED)
    assert same_bits([second[0], first[0]], before)


TORCHS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}, {"grafting": "sgd", "betas": (0.0, 0.9)}),
    "sgd_momentum": (
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9},
        {"grafting": "sgd", "betas": (0.0, 0.9), "momentum": 0.9},
    ),
    "nesterov": (
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "nesterov": True},
        {"grafting": "sgd", "betas": (0.0, 0.9), "momentum": 0.9, "nesterov": True},
    ),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.1, "eps": EPS}, {"grafting": "adagrad", "betas": (0.0, 0.9)}),
    "rmsprop": (
        torch.optim.RMSprop,
        {"lr": 0.1, "alpha": 0.9, "eps": EPS},
        {"grafting": "rmsprop", "betas": (0.0, 0.9)},
    ),
    "adam": (
        torch.optim.Adam,
        {"lr": 0.1, "betas": (0.8, 0.9), "eps": EPS, "weight_decay": 0.1},
        {"grafting": "adam", "betas": (0.8, 0.9), "weight_decay": 0.1, "decoupled_weight_decay": False},
    ),
    "adamw": (
        torch.optim.AdamW,
        {"lr": 0.1, "betas": (0.8, 0.9), "eps": EPS, "weight_decay": 0.1},
        {"grafting": "adam", "betas": (0.8, 0.9), "weight_decay": 0.1},
    ),
}


@pytest.mark.parametrize("preconditioned", [True, False])
@pytest.mark.parametrize("name", list(TORCHS))
def test_before_the_start_step_and_element_wise_it_is_torchs_own_optimizer(name: str, preconditioned: bool) -> None:
    make, torchs, ours = TORCHS[name]
    p, twin = parameter(12, 10, dtype=F64), parameter(12, 10, dtype=F64)
    exclude = [] if preconditioned else ["w"]
    options = {"lr": 0.1, "eps": EPS, "weight_decay": 0.0, "exclude": exclude, "start_preconditioning_step": 100}
    options |= {"normalize_gradients": False, "elementwise_lr": 1.0}
    drive(shampoo([("w", p)], **(options | ours)), [p], range(8))
    drive(make([twin], **torchs), [twin], range(8))
    # With Nesterov momentum, torch starts its buffer with the first gradient; ours does so without dampening.
    assert relative_error(p.detach(), twin.detach()) < 1e-13


GRAFTED = [method for method in GRAFTING_METHODS if method != "none"]


@pytest.mark.parametrize("preconditioner", ["kl_shampoo", "shampoo"])
@pytest.mark.parametrize("method", GRAFTED)
def test_each_block_s_update_has_the_norm_of_its_grafting_method(method: str, preconditioner: str) -> None:
    """With the same moments, a preconditioned and an unpreconditioned update differ, but their norms are equal."""
    p, warm = parameter(12, 10), parameter(12, 10)
    options: dict[str, Any] = {"preconditioner": preconditioner, "grafting": method, "weight_decay": 0.0}
    grafted = shampoo([p], **options, start_preconditioning_step=3)
    other = shampoo([warm], **options, start_preconditioning_step=100)
    drive(grafted, [p], range(2))
    drive(other, [warm], range(2))
    assert torch.equal(p, warm)
    before = p.detach().clone()
    drive(grafted, [p], [2])
    drive(other, [warm], [2])
    for rows in (slice(0, 8), slice(8, 12)):
        for columns in (slice(0, 8), slice(8, 10)):
            moved, length = ((x.detach() - before)[rows, columns] for x in (p, warm))
            assert moved.norm().item() == pytest.approx(length.norm().item(), rel=1e-4)
            cosine = nn.functional.cosine_similarity(moved.flatten(), length.flatten(), dim=0)
            assert 0.1 < cosine.item() < 0.999


@pytest.mark.parametrize("method", GRAFTED)
def test_a_block_whose_gradient_is_always_zero_stays_where_it_is(method: str) -> None:
    """Rows of an unused expert have no norm to take and nothing to divide by; there is no decay here."""
    p = parameter(16, 8)
    optimizer = shampoo([p], grafting=method, weight_decay=0.0, eps=0.0)
    before = snapshot([p])[0]
    for step in range(7):
        p.grad = made_up(p, step)
        p.grad[:8] = 0.0
        optimizer.step()
    assert torch.equal(p[:8], before[:8])
    assert torch.isfinite(p).all() and (p[8:] != before[8:]).all()


class Counted:
    """A torch kernel that counts its calls."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.calls = kernel, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.kernel(*args, **kwargs)


FUSING: list[tuple[dict[str, Any], bool, bool]] = [
    ({}, True, True),
    ({"grafting": "adam"}, True, True),
    (BARE, True, True),
    ({"use_bias_correction": False}, True, True),
    ({"weight_decay_type": "corrected", "peak_lr": 0.05}, True, True),
    ({"weight_decay_type": "independent", "peak_lr": 0.05}, True, True),
    ({"decoupled_weight_decay": False}, True, True),
    ({"lr": torch.tensor(0.01, dtype=F64)}, True, True),
    ({"grafting_beta2": 0.9}, True, True),
    ({"grafting": "none"}, True, True),
    ({"grafting": "rms"}, True, True),
    ({"preconditioner": "shampoo"}, True, True),
    ({"preconditioner": "shampoo", "grafting": "adam"}, True, True),
    ({"preconditioner": "soap"}, True, True),
    ({"preconditioner": "soap", "grafting": "adam"}, True, True),
    ({"momentum": 0.9}, True, False),
    ({"eps": 0.0}, False, True),
    ({"beta3": 0.5}, False, True),
    ({"betas": (0.0, 0.9)}, False, True),
    ({"grafting": "rmsprop"}, False, True),
    ({"grafting": "normalized_adam"}, False, True),
    ({"grafting": "sgd"}, False, True),
]


@pytest.mark.parametrize("options, moments, weights", FUSING)
def test_torchs_fused_kernels_do_what_the_plain_passes_do(
    options: dict[str, Any], moments: bool, weights: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """State and weights are equal for blocks, a vector, and a weight with strides that no kernel accepts.

    Kernels are used whenever possible. A step is rejected in between.
    """

    def trained() -> tuple[list[Tensor], int, int]:
        turned = nn.Parameter(parameter(10, 12, seed=1, dtype=F64).detach().mT)
        params = [parameter(12, 10, dtype=F64), parameter(7, seed=2, dtype=F64), turned]
        adam, sgd = Counted(torch._fused_adam_), Counted(torch._fused_sgd_)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "_fused_adam_", adam)
            patch.setattr(torch, "_fused_sgd_", sgd)
            optimizer = shampoo(params, **({"eps": EPS} | options))
            drive(optimizer, params, range(4))
            before = snapshot(params)
            for p in params:
                p.grad = torch.full_like(p, torch.inf)
            optimizer.step()
            assert same_bits(params, before)
            drive(optimizer, params, range(4, 8))
        state = optimizer.state_dict()["shampoo"]
        parts = [*state["stacks"], *state["elementwise"]]
        return [*snapshot(params), *(t for part in parts for t in part["tensors"].values())], adam.calls, sgd.calls

    fused, adam, sgd = trained()
    assert (adam > 0, sgd > 0) == (moments, weights)
    monkeypatch.setattr(grafting, "FUSED_DEVICES", ())
    monkeypatch.setattr(shards, "FUSED_DEVICES", ())
    plain, *calls = trained()
    assert calls == [0, 0]
    for one, other in zip(fused, plain, strict=True):
        assert relative_error(one, other) < 1e-12


def test_the_fused_kernel_gets_its_step_in_float32_whatever_torchs_default_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, the kernel reads these bytes as float32 without a check."""
    seen: list[torch.dtype] = []
    kernel = torch._fused_adam_

    def noted(*args: Any, **kwargs: Any) -> None:
        seen.extend(step.dtype for step in args[5])
        kernel(*args, **kwargs)

    monkeypatch.setattr(torch, "_fused_adam_", noted)
    default = torch.get_default_dtype()
    torch.set_default_dtype(F64)
    try:
        p = parameter(12, 10, dtype=F64)
        drive(shampoo([p], grafting="adam"), [p], range(2))
    finally:
        torch.set_default_dtype(default)
    assert set(seen) == {torch.float32}
