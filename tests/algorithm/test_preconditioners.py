"""SOAP, KL-Shampoo and kept eigenbases have exactly the state and updates of the float64 reference."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from shampoo_deepspeed import Shampoo, ShampooConfig
from shampoo_deepspeed.algorithm.block_stack import BlockStack
from tests.support.comparing import block_deviations
from tests.support.reference import Options, Reference, new_block
from tests.support.zoo import gradients, make_batch, make_model, relative_error

pytestmark = pytest.mark.slow

BOUND = 1e-9
ACCEPTED = None
FLOAT64: dict[str, Any] = {"factor_dtype": "float64", "root_dtype": "float64"}
# The basis of a factor with several null directions is not unique, so preconditioning starts when there are none left.
BASE: dict[str, Any] = {"precondition_frequency": 3, "start_preconditioning_step": 8}
EVERY_SECOND: dict[str, Any] = {"statistics_frequency": 2}
EVERY_THIRD: dict[str, Any] = {"statistics_frequency": 3}
SUMS: dict[str, Any] = {"betas": (0.0, 1.0), "factor_beta": None}

SHAPES = [(5,), (6, 4), (4, 4), (3, 4, 2), (2, 3, 2, 3)]
ALL: dict[str, dict[str, Any]] = {
    "defaults": {},
    "every_step": {"precondition_frequency": 1},
    "background": {"refresh": "background"},
    "background_every_step": {"refresh": "background", "precondition_frequency": 1},
    "background_tolerance": {"refresh": "background", "refresh_tolerance": 0.1},
    "tolerance": {"refresh_tolerance": 0.1},
    "sums": {**SUMS},
    "gradients_as_they_are": {"normalize_gradients": False, "early_relative_epsilon": 0.0},
    "statistics_every_third_step": {**EVERY_THIRD, "betas": (0.9, 0.9)},
    "eigh": {"solver": "eigh"},
    "eigh_columns_change_places": {"solver": "eigh", "factor_beta": 0.7, "refresh_tolerance": 0.1},
    "qr": {"solver": "qr"},
    "qr_every_step": {"solver": "qr", "precondition_frequency": 1, "early_relative_epsilon": 0.3},
    "qr_tolerance": {"solver": "qr", "refresh_tolerance": 0.1, "factor_beta": 0.7},
    "qr_background": {"solver": "qr", "refresh": "background", "use_bias_correction": False},
}
SOAP: dict[str, dict[str, Any]] = {
    "columns_change_places": {"betas": (0.9, 0.7), "grafting_beta2": 0.99},
    "no_bias_correction": {"use_bias_correction": False},
    "own_beta2": {"betas": (0.9, 0.95), "grafting_beta2": 0.8},
    "large_eps": {"eps": 0.1, "relative_epsilon": 0.1},
    "other_root": {"exponent_override": 4.0},
    "grafted": {"grafting": "rmsprop"},
    "rms": {"grafting": "rms"},
    "warm_sgd": {"elementwise": "sgd"},
    "sums_every_second_step": {**EVERY_SECOND, **SUMS},
}
KL: dict[str, dict[str, Any]] = {
    "default_start": {"start_preconditioning_step": -1, "precondition_frequency": 10},
    "no_bias_correction": {"use_bias_correction": False, "betas": (0.9, 0.9)},
    "ungrafted": {"grafting": "none"},
    "graft_sgd": {"grafting": "sgd"},
    "grafted": {"grafting": "adam"},
    "large_epsilon": {"epsilon": 0.1, "relative_epsilon": 0.01},
    "saturated": {"damping": "saturate", "relative_epsilon": 0.05},
    "saturated_in_kept_bases": {"damping": "saturate", "relative_epsilon": 0.05, "refresh_tolerance": 0.1},
    "shrunk": {"shrinkage": 3.0, "factor_beta": 0.9},
    "shrunk_kept_bases": {**EVERY_SECOND, "shrinkage": 3.0, "refresh_tolerance": 0.1},
    "qr_saturated": {"solver": "qr", "damping": "saturate", "relative_epsilon": 0.05, "shrinkage": 1.0},
    "qr_ungrafted": {**EVERY_SECOND, "solver": "qr", "grafting": "none"},
}
SHAMPOO: dict[str, dict[str, Any]] = {
    "tolerance_root_ungrafted": {"refresh_tolerance": 0.2, "exponent_override": 3.0, "grafting": "none"},
    "cut_off_in_kept_bases": {"damping": "cutoff", "relative_epsilon": 1e-3, "refresh_tolerance": 0.1},
    "saturated_in_kept_bases": {"damping": "saturate", "relative_epsilon": 0.05, "refresh_tolerance": 0.1},
    "shrunk_kept_bases": {**EVERY_SECOND, "shrinkage": 3.0, "refresh_tolerance": 0.1},
    "shrunk_sums": {**EVERY_SECOND, **SUMS, "shrinkage": 3.0},
    "shrunk_in_the_background": {**EVERY_THIRD, "betas": (0.9, 0.9), "shrinkage": 3.0, "refresh": "background"},
    "qr_cut_off": {"solver": "qr", "damping": "cutoff", "relative_epsilon": 1e-3},
    "qr_other_root": {"solver": "qr", "exponent_override": 3.0, "grafting": "adam", "shrinkage": 3.0},
    "grafted": {"grafting": "adam"},
    "normalized": {"grafting": "normalized_adam"},
    "shrunk_uncorrected": {"shrinkage": 3.0, "use_bias_correction": False},
    "rms": {"grafting": "rms"},
    "rms_looks_ahead": {"grafting": "rms", "beta3": 0.4, "use_bias_correction": False},
    "tolerance_of_zero": {"refresh_tolerance": 0.0},
    "sums_every_second_step": {**EVERY_SECOND, **SUMS},
    "statistics_in_the_background": {**EVERY_SECOND, "refresh": "background"},
}
KL_SOAP: dict[str, dict[str, Any]] = {
    "columns_change_places": {"betas": (0.9, 0.7), "grafting_beta2": 0.99, "factor_beta": 0.8},
    "no_bias_correction": {"use_bias_correction": False, "early_relative_epsilon": 0.5},
    "large_epsilon": {"epsilon": 0.1, "relative_epsilon": 0.01},
    "other_root": {"exponent_override": 4.0},
    "rms": {"grafting": "rms", **EVERY_THIRD},
    "grafted": {"grafting": "adam", **SUMS},
}
ORTHOGONAL: dict[str, dict[str, Any]] = {
    "ungrafted": {"grafting": "none"},
    "grafted": {"grafting": "adam"},
    "looks_ahead": {"beta3": 0.4, "use_bias_correction": False},
    "no_first_moment": {"betas": (0.0, 0.9)},
    "as_they_are_ungrafted": {"normalize_gradients": False, "grafting": "none"},
}
CASES = [
    pytest.param({"preconditioner": name, **options}, id=f"{name}-{key}")
    for name, table in (
        ("soap", SOAP),
        ("kl_shampoo", KL),
        ("shampoo", SHAMPOO),
        ("kl_soap", KL_SOAP),
        ("soap_muon", ORTHOGONAL),
        ("muon", ORTHOGONAL),
    )
    for key, options in (ALL | table).items()
    if name != "muon" or not {"solver", "refresh_tolerance"} & set(options)
]


@cache  # many cases share them
def draw(shape: tuple[int, ...], step: int, salt: int) -> Tensor:
    """Return a gradient with a falling spectrum along each dim, which slowly rotates and changes its order."""
    generator = torch.Generator().manual_seed(97 * step + salt)
    g = torch.randn(shape, generator=generator, dtype=torch.float64)
    for dim, d in enumerate(shape):
        decay = 2.0 ** -((torch.arange(d, dtype=torch.float64) + step / 8) % d)
        mixing = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(salt + dim)).double())[0]
        turning = torch.matrix_exp(0.01 * step * (mixing - mixing.T))
        g = torch.tensordot(turning @ mixing @ torch.diag(decay), g, dims=([1], [dim])).movedim(0, dim)
    return g.contiguous()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", CASES)
def test_blocks_of_every_order_have_the_references_state_and_updates(
    options: dict[str, Any], shape: tuple[int, ...]
) -> None:
    config = ShampooConfig(**(BASE | FLOAT64 | options))
    stack = BlockStack(["a/0", "b/0"], shape, config, torch.device("cpu"), torch.float64)
    rule = Options(**(BASE | options))
    blocks = [new_block((...,), torch.zeros(shape, dtype=torch.float64), rule) for _ in stack.keys]
    for step in range(1, 25):
        drawn = [draw(shape, step, salt) for salt in (1, 2)]
        updates = stack.step(0, torch.stack(drawn), [step, step], config, ACCEPTED)
        for row, (block, g) in enumerate(zip(blocks, drawn, strict=True)):
            assert relative_error(updates[row], Reference.step_block(block, g, step, rule)) < BOUND, step
    for row, block in enumerate(blocks):
        found = block_deviations(stack.tensors, row, block, config.preconditioner)
        assert found or not stack.tensors  # Muon without a first moment has no state
        assert max(found.values(), default=0.0) < BOUND, found


@pytest.mark.parametrize("limit", [4, 12, 1024], ids=lambda n: f"blocks_of_{n}")
@pytest.mark.parametrize("preconditioner", ["soap", "kl_shampoo"])
def test_block_sizes_below_equal_and_above_the_dims(preconditioner: str, limit: int) -> None:
    """Whole parameters are compared: cut, merged or element-wise ones, and everything after the update."""
    options: dict[str, Any] = {
        "preconditioner": preconditioner,
        "lr": 1e-2,
        "weight_decay": 0.1,
        "momentum": 0.5,
        "max_preconditioner_dim": limit,
        "precondition_frequency": 4,
        "start_preconditioning_step": 12,
    }
    shapes = {"matrix": (12, 10), "cube": (5, 4, 3), "four": (3, 4, 2, 3), "vector": (7,), "scalar": ()}
    start = {name: draw(shape, 0, 5) for name, shape in shapes.items()}
    trained = {name: torch.nn.Parameter(value.clone()) for name, value in start.items()}
    reference, optimizer = Reference(start, **options), Shampoo(trained.items(), **FLOAT64, **options)
    for step in range(1, 26):
        for salt, p in enumerate(trained.values()):
            p.grad = draw(tuple(p.shape), step, 100 + salt)
        reference.step({name: p.grad for name, p in trained.items()})
        optimizer.step()
    for name, value in reference.values().items():
        assert relative_error(trained[name].detach(), value) < BOUND, name


@pytest.mark.parametrize("kind", ["odd", "wide"])
@pytest.mark.parametrize("preconditioner", ["soap", "kl_shampoo"])
def test_a_models_trajectory_is_that_of_the_reference(preconditioner: str, kind: str) -> None:
    """Groups may differ: the other half of the parameters uses Shampoo."""
    options: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "precondition_frequency": 3}
    options |= {"max_preconditioner_dim": 8 if kind == "odd" else 16, "start_preconditioning_step": 17}
    model = make_model(kind, torch.float64)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    names = list(trained)[::2]
    groups = [
        {"params": [(n, trained[n]) for n in names], "preconditioner": preconditioner},
        {"params": [(n, p) for n, p in trained.items() if n not in names], "preconditioner": "shampoo"},
    ]
    optimizer = Shampoo(groups, **FLOAT64, **options)
    overrides = {n: {"preconditioner": preconditioner if n in names else "shampoo"} for n in trained}
    in_order = {n: trained[n] for n in [*names, *(n for n in trained if n not in names)]}
    reference = Reference(in_order, overrides, exclude=("embed.weight",), **options)
    for step in range(24):
        gradients(model, make_batch(kind, step))
        reference.step({n: p.grad for n, p in trained.items()})
        optimizer.step()
    deviations = {n: relative_error(trained[n].detach(), value) for n, value in reference.values().items()}
    assert max(deviations.values()) < BOUND, deviations
