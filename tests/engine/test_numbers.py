"""No option and no finite gradient, however large or small, ends a run or leaves state that is of no use."""

from __future__ import annotations

import math
import re
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from shampoo_deepspeed import OptionError, Shampoo, ShampooConfig
from shampoo_deepspeed.algorithm.block_stack import LONGEST_RMS
from shampoo_deepspeed.distributed.frameworks import Parameter
from shampoo_deepspeed.engine.agreement import SPIKE, SPIKES
from shampoo_deepspeed.estimate import estimate
from shampoo_deepspeed.options import choices
from shampoo_deepspeed.options.config import OPTION_NAMES
from tests.support.stepping import drive, made_up, parameter, same_bits, shampoo, snapshot, state_of
from tests.torture import numbers, options

pytestmark = pytest.mark.slow


def test_shocks_of_any_pattern_and_scale_leave_finite_state() -> None:
    numbers.run(20, derandomize=True)


def test_any_options_train_or_are_refused() -> None:
    assert options.USUAL.keys() == set(OPTION_NAMES)
    results = options.run(40, derandomize=True)
    assert min(results["trained"], results["refused"]) > 5


RUNS: dict[str, tuple[dict[str, Any], str, float, torch.dtype]] = {
    "default": ({}, "whole", 1e20, torch.float32),
    "paper": ({"preset": "paper"}, "whole", 1e20, torch.float32),
    "kl_ungrafted": ({"grafting": "none", "normalize_gradients": False}, "scaled", 1e3, torch.float32),
    "soap": ({"preconditioner": "soap", "normalize_gradients": False}, "one_huge", 3.4e38, torch.float32),
    "sgd": ({"grafting": "sgd", "normalize_gradients": False, "lr": 0.3}, "scaled", 1e6, torch.float32),
    "power": (
        {"preconditioner": "shampoo", "exponent_override": 2.0, "refresh": "background", "root_dtype": "bfloat16"},
        "rank_one", 1e38, torch.float32,
    ),
    "bfloat16": ({"preset": "paper", "factor_dtype": "float64"}, "mixed", 1e30, torch.bfloat16),
}  # fmt: skip


@cache
def undisturbed(name: str) -> tuple[float, float]:
    given, _, _, dtype = RUNS[name]
    return numbers.losses(None, 1.0, dtype, **given)


@pytest.mark.parametrize("name", RUNS)
def test_a_hundred_steps_after_a_shock_the_loss_is_that_of_a_run_without(name: str) -> None:
    given, pattern, scale, dtype = RUNS[name]
    before, calm = undisturbed(name)
    assert before > 1.03 * calm, "these steps make a difference"
    assert numbers.losses(pattern, scale, dtype, **given)[1] <= 1.02 * calm


def paper(params: list[nn.Parameter], **given: Any) -> Shampoo:
    return shampoo(params, normalize_gradients=False, failure_limit=30, **given)


def stepped(optimizer: Shampoo, params: list[nn.Parameter], step: int, factor: float) -> bool:
    """Take a step with the usual gradients times the factor; return whether it was accepted."""
    before = snapshot(params)
    for number, p in enumerate(params):
        p.grad = made_up(p, step, number) * factor
    optimizer.step()
    return not same_bits(snapshot(params), before)


@pytest.mark.parametrize("preconditioner", ["shampoo", "kl_shampoo", "soap"])
@pytest.mark.parametrize("elementwise", ["adam", "adagrad", "sgd", "normalized_adam"])
def test_a_spike_is_rejected_and_another_scale_of_gradients_is_not(preconditioner: str, elementwise: str) -> None:
    params = [parameter(12, 10), parameter(4, 6), parameter(5)]
    optimizer = paper(params, preconditioner=preconditioner, elementwise=elementwise)
    drive(optimizer, params, range(6))
    state = state_of(optimizer)
    assert not stepped(optimizer, params, 6, 4.0 * SPIKE)
    assert same_bits(state_of(optimizer), state)
    assert stepped(optimizer, params, 6, SPIKE / 4.0)
    drive(optimizer, params, range(7, 10))
    accepted = [stepped(optimizer, params, step, 1e6) for step in range(10, 16)]
    assert accepted == [False] * SPIKES + [True] * (6 - SPIKES)


def test_a_first_gradient_and_one_after_zeros_are_no_spikes() -> None:
    params = [parameter(12, 10), parameter(5)]
    optimizer = paper(params)
    assert stepped(optimizer, params, 0, 1e6)
    params = [parameter(12, 10), parameter(5)]
    optimizer = paper(params)
    assert stepped(optimizer, params, 0, 1e-12)
    for step in range(3):
        stepped(optimizer, params, 1 + step, 0.0)
    assert stepped(optimizer, params, 4, 1e-12)


def test_a_gradient_whose_squares_overflow_is_rejected_at_any_step() -> None:
    params = [parameter(12, 10), parameter(5)]
    optimizer = paper(params)
    assert not any(stepped(optimizer, params, step, 1e19) for step in range(5))
    assert stepped(optimizer, params, 5, 1.0)


@pytest.mark.parametrize("masters", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("method", choices.ELEMENTWISE_METHODS)
def test_no_finite_gradient_makes_weights_infinite(method: str, dtype: torch.dtype, masters: bool) -> None:
    """At the first step nothing shows yet that a gradient is a shock. Methods in units of the gradient overshoot."""
    for grafting in (method, "none", "rms"):
        params = [parameter(6, 5, dtype=dtype), parameter(7, dtype=dtype), parameter(dtype=dtype)]
        optimizer = shampoo(
            params, lr=10.0, weight_decay=0.0, momentum=0.9, grafting=grafting, elementwise=method,
            normalize_gradients=False, master_weights=masters, failure_limit=30,
        )  # fmt: skip
        largest = min(torch.finfo(dtype).max, 1e9)
        for step in range(8):
            for number, p in enumerate(params):
                p.grad = made_up(p, step, number).sign() * (1.0 if step else largest)
            optimizer.step()
            assert all(p.isfinite().all() for p in params), (grafting, step)
        assert optimizer.rejected_steps == 0
        state = optimizer.state_dict()["shampoo"]
        assert all(tensor.isfinite().all() for _, tensor in options.tensors_in(state))


def test_a_weight_that_is_infinite_already_stays_so() -> None:
    """The bound of narrow weights hides nothing that was wrong before."""
    p = parameter(6, 5, dtype=torch.float16)
    with torch.no_grad():
        p[0, 0], p[1, 1] = math.inf, math.nan
    optimizer = shampoo([p], weight_decay=0.0)
    drive(optimizer, [p], range(3))
    assert p[0, 0].isinf() and p[1, 1].isnan()
    assert p.isfinite().sum() == p.numel() - 2


def test_decay_that_makes_a_gradient_infinite_rejects_the_step() -> None:
    p = nn.Parameter(torch.full((4, 3), 3e38))
    optimizer = Shampoo([p], lr=1e-6, weight_decay=10.0, weight_decay_type="l2")
    assert not stepped(optimizer, [p], 0, 1.0)


@pytest.mark.parametrize("first", [1e-38, 1e-25])
@pytest.mark.parametrize("factors", ["float32", "float64"])
@pytest.mark.parametrize("preconditioner", choices.PRECONDITIONERS)
def test_tiny_first_gradients_are_forgotten(preconditioner: str, factors: str, first: float) -> None:
    """They are all that the first factor matrices know; later gradients must still get in."""
    moved = []
    for scale in (first, 0.0):
        params = [parameter(6, 5), parameter(3, 4, 2)]
        optimizer = shampoo(
            params, preconditioner=preconditioner, factor_dtype=factors, normalize_gradients=False, grafting="rms",
            weight_decay=0.0, precondition_frequency=3, statistics_frequency=1, factor_beta=0.8, failure_limit=90,
        )  # fmt: skip
        for _ in range(3):
            for p in params:
                p.grad = torch.zeros_like(p)
                p.grad[0] = scale
            optimizer.step()
        drive(optimizer, params, range(3, 36))
        assert optimizer.rejected_steps <= SPIKES
        before = snapshot(params)
        drive(optimizer, params, range(36, 39))
        moved.append([p - b for p, b in zip(snapshot(params), before, strict=True)])
    for one, other in zip(*moved, strict=True):
        assert torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.95


@pytest.mark.parametrize("tiny", [1e-46, 1e-40, 5e-324])
@pytest.mark.parametrize("grafting", ["adam", "rmsprop", "adagrad", "none", "rms"])
@pytest.mark.parametrize("normalizes", [True, False])
def test_an_eps_that_underflows_is_0(tiny: float, grafting: str, normalizes: bool) -> None:
    """Also where a row has never had a gradient."""
    found = []
    for eps in (0.0, tiny):
        params = [parameter(6, 5), parameter(7)]
        given = {name: eps for name in ("eps", "epsilon", "relative_epsilon", "early_relative_epsilon")}
        optimizer = shampoo(params, grafting=grafting, normalize_gradients=normalizes, **given)
        for step in range(7):
            for number, p in enumerate(params):
                p.grad = made_up(p, step, number)
                p.grad[0] = 0.0
            optimizer.step()
        found.append(snapshot(params))
    assert same_bits(*found)
    assert all(p.isfinite().all() for p in found[0])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            (name, 1e39)
            for name in ("epsilon", "eps", "weight_decay", "lr", "shrinkage", "elementwise_lr", "bucket_mb")
        ),
        *((name, 1.7e308) for name in ("embedding_lr", "peak_lr", "eps", "lr")),
        *(
            (name, 10**400)
            for name in ("statistics_frequency", "precondition_frequency", "start_preconditioning_step", "lr", "eps")
        ),
        ("max_preconditioner_dim", 10**5000),
        ("failure_limit", 2**53 + 1),
        ("root_dtype", 10**5000),
        ("split", [10**400, 1]),
        ("lr", torch.tensor(1e39, dtype=torch.float64)),
    ],
    ids=lambda v: f"{v:g}" if isinstance(v, float) else "",
)
def test_a_number_that_leaves_float32_is_an_option_error(name: str, value: Any) -> None:
    for build in (
        lambda: Shampoo([parameter(3)], **{name: value}),
        lambda: Shampoo([{"params": [parameter(3)], name: value}]),
        lambda: Shampoo([parameter(3)], rules=[{"match": "*", name: value}]),
    ):
        with pytest.raises(OptionError, match=repr(name)):
            build()


# With which updates of sgd are at most as long as gradients.
SLOW = {"normalize_gradients": False, "elementwise_lr": 1.0, "embedding_lr": None, "tied_embedding_lr": None}


@pytest.mark.parametrize(
    "given",
    [
        {"lr": 1.0, "weight_decay": 2.0},
        {"lr": 1.0, "weight_decay": 2.0, "weight_decay_type": "corrected"},
        {"lr": 1e-3, "weight_decay": 2.0, "weight_decay_type": "independent"},
        {"lr": 0.1, "peak_lr": 1e-3, "weight_decay": 0.1, "weight_decay_type": "independent"},
        {"lr": 1.0, "weight_decay": 1.5, "momentum": 0.9, "nesterov": True},
        *(
            {"lr": 0.1, "weight_decay": 0.5, "weight_decay_type": "l2", "elementwise": "sgd", **SLOW, name: 50.0}
            for name in SLOW
            if name != "normalize_gradients"
        ),
    ],
)
def test_a_decay_that_would_let_weights_grow_is_an_option_error(given: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=r"'weight_decay' = .* less than \S+ with this learning rate"):
        Shampoo([parameter(3)], **given)


def largest_decay(given: dict[str, Any]) -> float:
    """The weight decay from which on the optimizer is refused with these options."""
    with pytest.raises(OptionError, match="weights would change sign and grow") as refusal:
        Shampoo([parameter(3)], weight_decay=1.99, **given)
    found = re.search(r"less than (\S+) with", str(refusal.value))
    assert found
    return float(found[1])


def shrinks(decay: float, gradient: float, given: dict[str, Any]) -> bool:
    """Whether weights become less than half as large with this decay and these gradients."""
    weights = parameter(3)
    before = weights.detach().norm()
    optimizer = Shampoo([weights], weight_decay=decay, **given)
    for _ in range(1000):
        weights.grad = torch.full_like(weights, gradient)
        optimizer.step()
    return bool(weights.detach().norm() < 0.5 * before)


@pytest.mark.parametrize("momentum, nesterov", [(0.0, False), (0.9, False), (0.9, True)])
@pytest.mark.parametrize("beta1, beta3", [(0.5, 0.99), (0.9, 0.99), (0.9, None), (0.9, 0.8)])
def test_the_largest_l2_decay_through_moments_is_where_weights_begin_to_grow(
    beta1: float, beta3: float | None, momentum: float, nesterov: bool
) -> None:
    """SGD's first moment and momentum both delay the decay; with 0.9 and 0.9 weights grow from 0.023 on."""
    given: dict[str, Any] = {"lr": 1.0, "elementwise": "sgd", "weight_decay_type": "l2", **SLOW, "beta3": beta3}
    given |= {"betas": (beta1, 0.9), "use_bias_correction": False, "momentum": momentum, "nesterov": nesterov}
    if momentum == 0.0 and (beta3 or 0.0) <= beta1:  # then only the usual limit holds
        with pytest.raises(OptionError, match="less than 2 with"):
            Shampoo([parameter(3)], weight_decay=2.0, **given)
        return
    limit = largest_decay(given)
    assert shrinks(0.8 * limit, 1e-9, given)
    # Somewhat less would not grow and somewhat more would: eigenvalues of a step of weights, first moment and momentum.
    late = beta1 if beta3 is None else beta3
    update = torch.tensor([1.0 - late, late, 0.0], dtype=torch.float64)
    buffer = update + torch.tensor([0.0, 0.0, momentum])
    change = update + momentum * buffer if nesterov else buffer
    kept = torch.tensor([[1.0, 0.0, 0.0], [1.0 - beta1, beta1, 0.0]], dtype=torch.float64)
    for decay, grows in ((0.99 * limit, False), (1.01 * limit, True)):
        step = torch.stack([kept[0] - decay * change, kept[1], buffer])
        assert bool(torch.linalg.eigvals(step).abs().max() > 1.0) == grows
    # Without a first moment of element-wise parameters, beta3 changes nothing.
    if momentum == 0.0:
        Shampoo([parameter(3)], weight_decay=1.99, elementwise_betas=(0.0, 0.9), **given)


@pytest.mark.parametrize("dampening", [0.0, 0.2])
def test_the_largest_decay_with_nesterov_is_where_weights_begin_to_grow(dampening: float) -> None:
    given: dict[str, Any] = {"lr": 1.0, "elementwise_lr": 0.0, "momentum": 0.9, "nesterov": True}
    given["dampening"] = dampening
    limit = largest_decay(given)
    assert shrinks(0.99 * limit, 1.0, given)
    # A little more would grow, by the eigenvalues of the step on weights and momentum.
    decay = 1.01 * limit * (1.0 - dampening)
    step = torch.tensor([[1.0 - decay * 1.9, -0.81], [decay, 0.9]])
    assert torch.linalg.eigvals(step).abs().max() > 1.0


@pytest.mark.parametrize(
    "name", ["precondition_frequency", "statistics_frequency", "start_preconditioning_step", "failure_limit"]
)
@pytest.mark.parametrize("refresh", ["sync", "staggered", "background"])
def test_never_again_costs_nothing(name: str, refresh: str) -> None:
    given: dict[str, Any] = {"precondition_frequency": 3, "refresh": refresh, "refresh_growth": 0.25, name: 10**12}
    params = [parameter(12, 10)]
    optimizer = Shampoo(params, max_preconditioner_dim=8, **given)
    drive(optimizer, params, range(4))
    assert params[0].isfinite().all()
    Shampoo([parameter(4, 4)], precondition_frequency=2**53, refresh=refresh)


def test_the_planner_knows_a_window_of_any_length() -> None:
    parameters = [Parameter(f"layer{n}", (12, 10), 0, f"layer{n}") for n in range(2)]
    made = estimate(parameters, 1, "zero2", ShampooConfig(precondition_frequency=10**12))
    assert made.mean_step == pytest.approx(made.fastest_step)
    assert made.fastest_step < made.slowest_step


@pytest.mark.parametrize("preconditioner", ["shampoo", "kl_shampoo", "soap"])
@pytest.mark.parametrize("normalizes", [True, False])
def test_updates_without_grafting_are_bounded(preconditioner: str, normalizes: bool) -> None:
    """Along directions that factor matrices have never seen, with a small ridge and old roots."""
    p = parameter(8, 8)
    optimizer = Shampoo(
        [p], lr=1.0, preconditioner=preconditioner, grafting="none", normalize_gradients=normalizes,
        relative_epsilon=1e-12, early_relative_epsilon=0.0, precondition_frequency=20, start_preconditioning_step=2,
        refresh="sync", refresh_growth=0.0,
    )  # fmt: skip
    seen, new = torch.zeros(8, 8), torch.zeros(8, 8)
    seen[:4, :4], new[4:, 4:] = 1.0, torch.eye(4)
    for step in range(6):
        before = p.detach().clone()
        p.grad = seen + 1e-6 * made_up(p, step) if step < 4 else new * 20.0
        optimizer.step()
        assert (p.detach() - before).square().mean().sqrt() <= LONGEST_RMS * 1.001


@pytest.mark.parametrize("root", [1e-3, 0.1, 0.5, 1.0, 1000.0])
@pytest.mark.parametrize("preconditioner", ["shampoo", "soap"])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e-12])
@pytest.mark.parametrize("ridge", [1e-4, 0.0])
def test_any_root_trains(root: float, preconditioner: str, scale: float, ridge: float) -> None:
    """Of factors that are exactly of rank one too, and where second moments underflow."""
    params = [parameter(6, 5), parameter(7, 6)]
    before = snapshot(params)
    optimizer = Shampoo(
        params, lr=1e-3, preconditioner=preconditioner, exponent_override=root, grafting="none", epsilon=0.0, eps=0.0,
        relative_epsilon=ridge, precondition_frequency=2, failure_limit=1,
    )  # fmt: skip
    for step in range(8):
        for number, p in enumerate(params):
            g = made_up(p, step, number)
            p.grad = scale * (g[:, :1] * torch.ones_like(p) if number else g)
        optimizer.step()
    optimizer.finish_step()
    for p, old in zip(params, before, strict=True):
        moved = (p.detach() - old).square().mean().sqrt().item()
        assert 0.0 < moved < 8 * 1e-3 * LONGEST_RMS * 1.01 and math.isfinite(moved)
