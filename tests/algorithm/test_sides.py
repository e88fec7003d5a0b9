"""Dims without a factor, diagonal factors and split matrices: what a block keeps and applies, and the logged table."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from shampoo_deepspeed import OptionError, Shampoo
from shampoo_deepspeed.options.choices import PRECONDITIONERS
from tests.support.bare import BARE
from tests.support.stepping import drive, parameter, same_bits, shampoo, snapshot
from tests.support.zoo import relative_error

F64 = torch.float64
WIDE: dict[str, Any] = {"factor_dtype": "float64", "root_dtype": "float64"}


def kept(optimizer: Shampoo) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the factors that one stack keeps."""
    (stack,) = optimizer.state_dict()["shampoo"]["stacks"]
    return {name: tuple(t.shape) for name, t in stack["tensors"].items() if not name.startswith(("exp", "second"))}


def stepped(shape: tuple[int, ...], steps: int = 4, **options: Any) -> Shampoo:
    p = parameter(*shape)
    optimizer = shampoo([p], **options)
    drive(optimizer, [p], range(steps))
    optimizer.test_parameter = p  # type: ignore[attr-defined]  # the optimizer itself holds no strong reference
    return optimizer


def test_a_side_that_is_switched_off_has_no_factor_no_root_and_no_cut() -> None:
    """A LoRA matrix r x d has one small factor."""
    smaller: dict[str, Any] = {"preconditioner": "shampoo", "one_sided": "smaller"}
    identity: dict[str, Any] = {"preconditioner": "shampoo", "large_dim": "identity"}
    assert kept(stepped((4, 60), **smaller)) == {"factor_0": (1, 4, 4), "root_0": (1, 4, 4)}
    assert kept(stepped((60, 4), **smaller)) == {"factor_1": (1, 4, 4), "root_1": (1, 4, 4)}
    assert kept(stepped((4, 60), **identity)) == {"factor_0": (1, 4, 4), "root_0": (1, 4, 4)}


def test_a_large_dim_keeps_a_vector_of_its_own_length() -> None:
    found = kept(stepped((4, 60), preconditioner="shampoo", large_dim="diagonal"))
    assert found == {"factor_0": (1, 4, 4), "root_0": (1, 4, 4), "factor_1": (1, 60), "root_1": (1, 60)}


def test_one_sided_shampoo_on_one_gradient_is_its_polar_factor() -> None:
    """(G G^T)^(-1/2) G: with a single side the power is -1/2, so it does alone what two sides do together."""
    p = parameter(5, 9, dtype=F64)
    g = torch.randn(5, 9, dtype=F64, generator=torch.Generator().manual_seed(5))
    options: dict[str, Any] = {"one_sided": "left", "grafting": "none", "betas": (0.0, 1.0), "weight_decay": 0.0}
    options = BARE | options | {"epsilon": 0.0, "relative_epsilon": 0.0}
    optimizer = shampoo([p], precondition_frequency=1, lr=1.0, **options, **WIDE)
    before, p.grad = snapshot([p])[0], g
    optimizer.step()
    u, _, v = torch.linalg.svd(g, full_matrices=False)
    assert relative_error(before - p.detach(), u @ v) < 1e-10


def test_all_large_dims_without_anything_or_with_adagrad_are_element_wise() -> None:
    for preconditioner, large_dim, method in (
        ("shampoo", "identity", "adam"),
        ("shampoo", "adagrad", "adagrad"),
        ("kl_shampoo", "adagrad", "adagrad"),
    ):
        p, twin = parameter(12, 10), parameter(12, 10)
        drive(shampoo([p], preconditioner=preconditioner, large_dim=large_dim), [p], range(6))
        drive(shampoo([("w", twin)], exclude=["w"], elementwise=method), [twin], range(6))
        assert torch.equal(p, twin)


def test_a_cutoff_leaves_a_null_direction_alone() -> None:
    """The shift divides a null direction's tiny gradient by a small number; the cutoff gives it no update."""
    moved = {}
    for rule in ("shift", "cutoff"):
        p = parameter(6, 8, dtype=F64)
        options: dict[str, Any] = {"damping": rule, "grafting": "sgd", "weight_decay": 0.0, "betas": (0.0, 0.9)}
        options = BARE | options | {"relative_epsilon": 1e-8}
        optimizer = shampoo([p], precondition_frequency=1, **options, **WIDE)
        before = snapshot([p])[0]
        for step in range(4):
            p.grad = torch.randn(6, 8, dtype=F64, generator=torch.Generator().manual_seed(step))
            p.grad[0] = 1e-5 if step == 3 else 0.0  # far below the threshold of the factor, but not zero
            optimizer.step()
        moved[rule] = (p.detach() - before)[0].norm().item()
        assert (p.detach() - before)[1:].norm() > 0.01
    assert moved["cutoff"] < 0.03 * moved["shift"]


def test_a_split_fused_matrix_takes_the_steps_of_its_parts() -> None:
    fused = parameter(12, 6, dtype=F64)
    parts = [torch.nn.Parameter(part.clone()) for part in fused.detach().split([6, 4, 2])]
    whole = shampoo([fused], split=[6, 4, 2], **WIDE)
    apart = shampoo(parts, **WIDE)
    for step in range(7):
        fused.grad = torch.randn(12, 6, dtype=F64, generator=torch.Generator().manual_seed(step))
        for part, gradient in zip(parts, fused.grad.split([6, 4, 2]), strict=True):
            part.grad = gradient.clone()
        whole.step()
        apart.step()
    assert relative_error(fused.detach(), torch.cat(snapshot(parts))) < 1e-12


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
@pytest.mark.parametrize("grafting", [None, "none", "adam"])
def test_stacked_experts_take_the_steps_of_single_matrices(preconditioner: str, grafting: str | None) -> None:
    options = {"preconditioner": preconditioner, "grafting": grafting, **WIDE}
    stacked = parameter(3, 10, 6, dtype=F64)
    experts = [torch.nn.Parameter(matrix.clone()) for matrix in stacked.detach()]
    whole, apart = shampoo([stacked], batch_dims=1, **options), shampoo(experts, **options)
    for step in range(7):
        stacked.grad = torch.randn(3, 10, 6, dtype=F64, generator=torch.Generator().manual_seed(step))
        for expert, gradient in zip(experts, stacked.grad, strict=True):
            expert.grad = gradient.clone()
        whole.step()
        apart.step()
    assert relative_error(stacked.detach(), torch.stack(snapshot(experts))) < 1e-12


def test_a_split_that_does_not_fit_is_an_error_that_names_the_parameter() -> None:
    p = parameter(12, 6)
    with pytest.raises(OptionError, match=r"'split' does not fit parameter qkv: split = \[6, 4\] adds up to 10"):
        shampoo([("qkv", p)], split=[6, 4])


def test_the_table_says_what_dims_have(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="shampoo_deepspeed"):
        stepped((4, 60), 1, preconditioner="shampoo", large_dim="diagonal")
        stepped((60, 4), 1, preconditioner="shampoo", one_sided="smaller")
        stepped((12, 10), 1, large_dim="adagrad")
        stepped((12, 6), 1, split=[6, 4, 2])
    assert "1 block of 4x60 (matrix, diagonal)" in caplog.text
    assert "1 block of 60x4 (-, matrix)" in caplog.text
    assert "element-wise  a dim above 8: AdaGrad" in caplog.text
    assert "3 blocks of at most 6x6" in caplog.text


def test_state_of_another_side_is_refused() -> None:
    """A vector must never be broadcast to a matrix."""
    saved = stepped((4, 60), preconditioner="shampoo", large_dim="diagonal").state_dict()
    for change in ({"large_dim": "block"}, {"one_sided": "smaller"}):
        p = parameter(4, 60)
        optimizer = shampoo([p], preconditioner="shampoo", large_dim="diagonal")
        optimizer.load_state_dict(saved)
        optimizer.param_groups[0].update(change)
        p.grad = torch.ones_like(p)
        with pytest.raises(ValueError, match="saved state"):
            optimizer.step()


@pytest.mark.parametrize("decay", ["corrected", "independent"])
def test_a_learning_rate_on_the_device_scales_decay_as_a_number_does(decay: str) -> None:
    numbers, tensors = parameter(12, 10), parameter(12, 10)
    drive(shampoo([numbers], weight_decay_type=decay), [numbers], range(4))
    drive(shampoo([tensors], weight_decay_type=decay, lr=torch.tensor(1e-2)), [tensors], range(4))
    torch.testing.assert_close(tensors, numbers)


@pytest.mark.parametrize("decay", ["corrected", "independent"])
def test_scaled_decay_is_that_of_adamw_at_the_peak_and_its_own_below(decay: str) -> None:
    """With a zero gradient only decay acts: at half the peak rate, a quarter or half of AdamW's decay at the peak."""
    p = parameter(6, 5)
    optimizer = shampoo([p], weight_decay_type=decay, lr=0.1, weight_decay=0.5 if decay == "corrected" else 0.05)
    drive(optimizer, [p], [0])
    optimizer.param_groups[0]["lr"] = 0.05
    optimizer.param_groups[0]["betas"] = (0.9, 0.999)
    before, state = snapshot([p])[0], optimizer.state_dict()
    fresh = shampoo([p], weight_decay_type=decay, lr=0.1, weight_decay=0.5 if decay == "corrected" else 0.05)
    fresh.load_state_dict(state)
    assert fresh.param_groups[0]["peak_lr"] == 0.1  # a resumed run does not use the current rate as the peak
    free = parameter(6, 5)
    free.data.copy_(before)
    other = shampoo([free], weight_decay=0.0, lr=0.1)
    other.load_state_dict({**state, "param_groups": [{**state["param_groups"][0], "weight_decay": 0.0}]})
    p.grad = free.grad = torch.zeros_like(p)
    fresh.step()
    other.step()
    expected = 0.05 * 0.5 * 0.5 if decay == "corrected" else 0.05 * 0.05 / 0.1
    torch.testing.assert_close(free.detach() - p.detach(), expected * before, rtol=1e-4, atol=1e-7)


def test_looking_ahead_with_all_of_beta1_changes_no_bit() -> None:
    plain, same = parameter(12, 10), parameter(12, 10)
    drive(shampoo([plain]), [plain], range(5))
    drive(shampoo([same], beta3=0.9), [same], range(5))
    assert same_bits(snapshot([plain]), snapshot([same]))
