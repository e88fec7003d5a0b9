"""With grafting "rms", the update of every block has a root mean square of 0.4, in the direction of its own rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from shampoo_deepspeed import ShampooConfig
from shampoo_deepspeed.algorithm.block_stack import BlockStack
from shampoo_deepspeed.options.choices import PRECONDITIONERS
from tests.support.stepping import drive, made_up, parameter, shampoo, snapshot
from tests.support.zoo import relative_error

pytestmark = pytest.mark.slow

F64 = torch.float64
FLOAT64: dict[str, Any] = {"factor_dtype": "float64", "root_dtype": "float64"}
NO_EPSILON: dict[str, Any] = {"eps": 0.0, "epsilon": 0.0, "relative_epsilon": 0.0, "early_relative_epsilon": 0.0}


def updates(gradients: list[Tensor], dtype: torch.dtype = F64, **options: Any) -> list[Tensor]:
    """Return the updates of a stack in the steps with these gradients [B, *shape]."""
    config = ShampooConfig(grafting="rms", **({"precondition_frequency": 3} | FLOAT64 | options))
    shape = tuple(gradients[0].shape[1:])
    stack = BlockStack([f"w/{n}" for n in range(len(gradients[0]))], shape, config, torch.device("cpu"), dtype)
    return [
        stack.step(0, g.to(dtype, copy=True), [step] * len(g), config, None).clone()
        for step, g in enumerate(gradients, start=1)
    ]


def drawn(steps: int = 9) -> list[Tensor]:
    return [made_up(torch.empty(2, 6, 4, dtype=F64), step) for step in range(steps)]


def rms(update: Tensor) -> Tensor:
    """Return the root mean square of each block."""
    return update.square().mean(dim=tuple(range(1, update.ndim))).sqrt()


# By hand, for G = diag(3, 4) in the first step with sums as factors. Shampoo: roots diag(9, 16)^(-1/4) on both sides
# make diag(1, 1). KL-Shampoo: roots of diag(9, 16) / 2 to -1/2 on both sides make diag(2/3, 1/2). SOAP: Adam's first
# step in a basis of unit vectors makes signs, so diag(1, 1). These have the norms sqrt(2), 5/6 and sqrt(2), and 4
# elements of root mean square 0.4 have the norm 0.8.
# Muon's polynomial maps (3, 4) / 5 to (0.7229, 1.1192) in five steps.
EQUAL = (0.8 / 2**0.5, 0.8 / 2**0.5)
BY_HAND = {"shampoo": EQUAL, "kl_shampoo": (0.64, 0.48), "soap": EQUAL, "kl_soap": EQUAL, "soap_muon": EQUAL}
BY_HAND["muon"] = (0.43404448, 0.67201591)


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_an_update_by_hand(preconditioner: str, dtype: torch.dtype) -> None:
    options = {"preconditioner": preconditioner, "betas": (0.0, 1.0), "factor_beta": None, **NO_EPSILON}
    options |= {"precondition_frequency": 1, "start_preconditioning_step": 1}
    (found,) = updates([torch.diag(torch.tensor([3.0, 4.0])).unsqueeze(0)], dtype, **options)
    expected = torch.diag(torch.tensor(BY_HAND[preconditioner], dtype=dtype))
    torch.testing.assert_close(found[0], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_only_the_length_differs_from_updates_without_grafting(preconditioner: str) -> None:
    options = {"preconditioner": preconditioner, "precondition_frequency": 3}
    p, twin = parameter(6, 4, dtype=F64), parameter(6, 4, dtype=F64)
    own, free = ({**options, **FLOAT64, "grafting": g, "weight_decay": 0.0, "lr": 1.0} for g in ("rms", "none"))
    optimizers = [(shampoo([p], **own), p), (shampoo([twin], **free), twin)]
    for step in range(9):
        moved = []
        for optimizer, tensor in optimizers:
            before = snapshot([tensor])[0]
            drive(optimizer, [tensor], [step])
            moved.append(tensor.detach() - before)
        if step == 0 or (step == 1 and preconditioner != "kl_shampoo"):
            continue  # not preconditioned yet
        assert relative_error(moved[0], moved[1] * 0.4 / moved[1].square().mean().sqrt()) < 1e-12, step


@pytest.mark.parametrize("elementwise", [None, "sgd", "normalized_rmsprop"])
@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_the_length_is_the_same_from_the_first_step_on(preconditioner: str, elementwise: str | None) -> None:
    """Blocks refresh first at step 3, KL-Shampoo's at step 2; until then, updates follow the first moment."""
    for update in updates(drawn(), preconditioner=preconditioner, elementwise=elementwise):
        torch.testing.assert_close(rms(update), torch.full((2,), 0.4, dtype=F64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_gradients_of_another_scale_give_preconditioned_blocks_the_same_updates(preconditioner: str) -> None:
    """With the default epsilons, of which one does not follow the scale, that of Adam in a basis: eps."""
    options: dict[str, Any] = {"preconditioner": preconditioner, "normalize_gradients": False}
    scaled = updates([1000.0 * g for g in drawn()], **options)
    bound = 1e-10 if preconditioner in ("shampoo", "kl_shampoo", "muon") else 1e-5
    for found, expected in list(zip(scaled, updates(drawn(), **options), strict=True))[2:]:
        assert relative_error(found, expected) < bound


@pytest.mark.parametrize("frequency", [1, 3])
@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_a_block_without_a_gradient_gets_no_update(preconditioner: str, frequency: int) -> None:
    gradients = drawn()
    for g in gradients:
        g[0] = 0.0
    for options in ({}, NO_EPSILON):
        for found in updates(gradients, preconditioner=preconditioner, precondition_frequency=frequency, **options):
            assert not found[0].any() and found[1].all()


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_a_moment_that_decays_to_nothing_never_gives_a_longer_update(preconditioner: str, dtype: torch.dtype) -> None:
    """When gradients end, the moment becomes so small that its squares underflow; its norm is then wrong."""
    ended = [torch.zeros(2, 6, 4)] * (200 if dtype == torch.float32 else 1200)
    made = updates([*drawn(4), *ended], dtype, preconditioner=preconditioner, betas=(0.5, 0.9))
    assert all((rms(update) <= 0.4 * (1 + 1e-6)).all() for update in made)
    assert not made[-1].any()


@pytest.mark.parametrize("name", ["bias", "matrix"])
def test_element_wise_parameters_take_adams_steps(name: str) -> None:
    shape = (10,) if name == "bias" else (12, 10)
    p, twin = parameter(*shape, dtype=F64), parameter(*shape, dtype=F64)
    options: dict[str, Any] = {"normalize_gradients": False, "elementwise_lr": 1.0}
    drive(shampoo([(name, p)], grafting="rms", exclude=["matrix"], **options), [p], range(7))
    drive(torch.optim.AdamW([twin], lr=1e-2, weight_decay=0.1), [twin], range(7))
    assert relative_error(p.detach(), twin.detach()) < 1e-13


def test_soap_keeps_no_second_moment_of_its_own_for_first_updates() -> None:
    p = parameter(6, 4)
    optimizer = shampoo([p], preconditioner="soap", grafting="rms")
    drive(optimizer, [p], range(4))
    (stack,) = optimizer.units[0].stacks
    moments = {name for name in stack.tensors if "moment" in name or "exp_avg" in name}
    assert moments == {"rotated_second_moment", "rotated_exp_avg"}
