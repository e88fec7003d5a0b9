"""With ``normalize_gradients``, training does not depend on the scale of gradients, however large or small."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shampoo_deepspeed import Shampoo
from shampoo_deepspeed.algorithm.elementwise import NORM_ROW, _flat_norms
from tests.support.stepping import made_up, parameter, same_bits, shampoo, snapshot, state_of
from tests.support.zoo import relative_error

pytestmark = pytest.mark.slow

STEPS = 9  # refreshes are at steps 3, 6 and 9, for SOAP from step 6 on
FACTORS = [1e-3, 1e6, 1.0, 30.0, 1e-3, 1e5, 0.7, 1e6, 1e-2]
PRECONDITIONERS = ("shampoo", "kl_shampoo", "soap")
# The steps' rounding is not amplified much. SOAP starts when its factor matrices have full rank. An eps would be an
# absolute scale of gradients.
STRICT: dict[str, Any] = {"relative_epsilon": 1e-3, "eps": 0.0}
OPTIONS: dict[str, dict[str, Any]] = {
    "shampoo": STRICT,
    "kl_shampoo": STRICT | {"preconditioner": "kl_shampoo"},
    "soap": STRICT | {"preconditioner": "soap", "start_preconditioning_step": 6},
    "ungrafted": STRICT | {"grafting": "none", "elementwise": "sgd"},
    "normalized_too": STRICT | {"grafting": "normalized_adam"},
    "sgd": STRICT | {"grafting": "sgd"},
}


def four(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    """Return a matrix of four blocks, another one, an embedding, which is element-wise, and a vector."""
    shapes = {"matrix": (12, 10), "other": (4, 6), "embed": (11, 3), "vector": (5,)}
    return {name: parameter(*shape, seed=n, dtype=dtype) for n, (name, shape) in enumerate(shapes.items())}


def run(
    factors: Sequence[float], dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[list[Tensor], dict[str, Any]]:
    """Return parameters and state after a step with each of the factors on the usual gradients."""
    params = four(dtype)
    wide = "float64" if dtype == torch.float64 else "float32"
    given = {"factor_dtype": wide, "root_dtype": wide, **options}
    optimizer = shampoo(params.items(), **given)
    for step, factor in enumerate(factors):
        for number, p in enumerate(params.values()):
            p.grad = made_up(p, step, number) * factor
        optimizer.step()
    return snapshot(params.values()), state_of(optimizer)


def deviation(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    return max(relative_error(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", OPTIONS)
def test_another_scale_of_each_steps_gradient_changes_nothing(name: str) -> None:
    expected, _ = run([1.0] * STEPS, **OPTIONS[name])
    assert deviation(run(FACTORS, **OPTIONS[name])[0], expected) < 1e-11
    unlike = run(FACTORS, **OPTIONS[name], normalize_gradients=False)[0]
    assert deviation(unlike, run([1.0] * STEPS, **OPTIONS[name], normalize_gradients=False)[0]) > 1e-2


@pytest.mark.parametrize("name", OPTIONS)
def test_a_scale_that_is_a_power_of_two_changes_no_bit(name: str) -> None:
    """This is what a loss scale does."""
    expected, state = run([1.0] * STEPS, torch.float32, **OPTIONS[name])
    scaled, state_of_scaled = run([2.0**n for n in (16, 16, 15, 15, 16, 17, 17, -4, 0)], torch.float32, **OPTIONS[name])
    assert same_bits(scaled, expected) and same_bits(state_of_scaled, state)


@pytest.mark.parametrize("name", PRECONDITIONERS)
@pytest.mark.parametrize("at", [1, 4, 5])
def test_a_spike_changes_nothing(name: str, at: int) -> None:
    spike = [1000.0 if step == at else 1.0 for step in range(STEPS)]
    assert deviation(run(spike, **OPTIONS[name])[0], run([1.0] * STEPS, **OPTIONS[name])[0]) < 1e-11


@pytest.mark.parametrize("name", PRECONDITIONERS)
def test_squares_of_gradients_may_overflow_or_underflow(name: str) -> None:
    expected, _ = run([1.0] * STEPS, torch.float32, **OPTIONS[name])
    for factors in ([1e20] * STEPS, [1e-30] * STEPS, [1e20, 1.0, 1e-30] * (STEPS // 3)):
        assert deviation(run(factors, torch.float32, **OPTIONS[name])[0], expected) < 2e-5


@pytest.mark.parametrize("name", PRECONDITIONERS)
def test_a_gradient_of_zeros_stays_zero(name: str) -> None:
    """Also if only one of the four blocks of a matrix has it."""
    params = four(torch.float32)
    optimizer = shampoo(params.items(), weight_decay=0.0, **OPTIONS[name])
    before = snapshot(params.values())
    for step in range(STEPS):
        for number, p in enumerate(params.values()):
            p.grad = torch.zeros_like(p)
            if number == 0:
                p.grad[:8, :8] = made_up(p, step)[:8, :8]
        optimizer.step()
    now = snapshot(params.values())
    assert same_bits(now[1:], before[1:])
    assert torch.equal(now[0][8:], before[0][8:]) and torch.equal(now[0][:, 8:], before[0][:, 8:])
    assert (now[0][:8, :8] != before[0][:8, :8]).all() and now[0].isfinite().all()


def sgd(params: dict[str, nn.Parameter], **options: Any) -> Shampoo:
    """Return an optimizer whose update is the (normalized) gradient."""
    return Shampoo(params.items(), lr=1.0, grafting="sgd", betas=(0.0, 0.9), elementwise_lr=1.0, **options)


def moved(params: dict[str, nn.Parameter], optimizer: Shampoo) -> list[float]:
    """Return the root mean squares of the updates for gradients of about 100."""
    before = snapshot(params.values())
    for p in params.values():
        p.grad = 100.0 * made_up(p, 1)
    optimizer.step()
    return [float((p.detach() - old).square().mean().sqrt()) for p, old in zip(params.values(), before, strict=True)]


def test_it_may_change_between_steps() -> None:
    params = {"matrix": parameter(6, 5), "vector": parameter(5)}
    optimizer = sgd(params)
    for on in (False, True, False):
        optimizer.param_groups[0]["normalize_gradients"] = on
        found = moved(params, optimizer)
        assert found == pytest.approx([1.0, 1.0], rel=1e-5) if on else min(found) > 50.0


def test_it_may_differ_by_rule() -> None:
    params = {"a": parameter(6, 5), "b": parameter(6, 5), "v": parameter(5), "w": parameter(5)}
    found = moved(params, sgd(params, rules=[{"match": ["a", "v"], "normalize_gradients": False}]))
    assert min(found[0], found[2]) > 50.0
    assert found[1::2] == pytest.approx([1.0, 1.0], rel=1e-5)


def test_decay_in_the_gradient_is_added_before() -> None:
    """With L2 decay and no gradient, what is normalized is the weight itself."""
    params = {"matrix": parameter(6, 5), "vector": parameter(5)}
    optimizer = sgd(params, weight_decay=0.1, weight_decay_type="l2")
    before = snapshot(params.values())
    for p in params.values():
        p.grad = torch.full_like(p, 1e-30)  # with zeros the first call would be taken for a tool's hidden one
    optimizer.step()
    for p, old in zip(params.values(), before, strict=True):
        torch.testing.assert_close(p.detach(), old - old / old.square().mean().sqrt())


@pytest.mark.parametrize("scale", [1.0, 1e25, 1e-30])
def test_norms_of_long_vectors_do_not_depend_on_how_they_are_cut(scale: float) -> None:
    """One float32 sum of so many squares is wrong in the fifth digit."""
    values = torch.randn(3_000_001, generator=torch.Generator().manual_seed(0)) * scale
    exact = values.double().norm()
    for size in (len(values), 1_000_003, 40_000, NORM_ROW):
        norm = _flat_norms(values.split(size)).norm()
        assert abs(norm / exact - 1.0) < 1e-7
    assert _flat_norms([values[:0], torch.zeros(7), values[:1]]).tolist() == [0.0, 0.0, abs(values[0].item())]
