"""In one process, in float64, runs with every option take exactly the trajectory of the plain reference."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle
from typing import Any

import pytest
import torch

from shampoo_deepspeed import Shampoo
from tests.support.bare import BARE
from tests.support.reference import Reference
from tests.support.zoo import gradients, make_batch, make_model, relative_error

OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    # The reference has no factors of embeddings.
    "bare": {name: value for name, value in BARE.items() if name != "embedding_lr"},
    "shampoo": {"preconditioner": "shampoo"},
    "refresh_every_2": {"precondition_frequency": 2},
    "staggered": {"refresh": "staggered"},
    "background": {"refresh": "background"},
    "background_every_step": {"refresh": "background", "precondition_frequency": 1},
    "background_late": {"refresh": "background", "start_preconditioning_step": 5, "precondition_frequency": 4},
    "staggered_late": {"refresh": "staggered", "start_preconditioning_step": 5, "precondition_frequency": 4},
    "late_start": {"start_preconditioning_step": 5},
    "no_bias_correction": {"use_bias_correction": False},
    "one_block_each": {"max_preconditioner_dim": 1024},
    "sums": {"betas": (0.0, 1.0), "grafting": "adagrad"},
    "sums_with_ema_graft": {"betas": (0.9, 1.0)},
    "own_graft_beta2": {"grafting_beta2": 0.9},
    "graft_sgd": {"grafting": "sgd", "lr": 0.1},
    "graft_none": {"grafting": "none", "lr": 1e-3},
    "graft_none_elementwise_rmsprop": {"grafting": "none", "elementwise": "rmsprop", "lr": 1e-3},
    "graft_rmsprop": {"grafting": "rmsprop", "lr": 1e-3},
    "graft_normalized_adagrad": {"grafting": "normalized_adagrad", "lr": 1e-3},
    "graft_normalized_rmsprop": {"grafting": "normalized_rmsprop", "lr": 1e-4},
    "graft_normalized_adam": {"grafting": "normalized_adam", "lr": 1e-3},
    "graft_adam": {"grafting": "adam"},
    "graft_rms_elementwise_sgd": {"grafting": "rms", "elementwise": "sgd"},
    "elementwise_sgd": {"elementwise": "sgd"},
    "gradients_as_they_are": {"normalize_gradients": False},
    "normalized_with_coupled_decay": {"normalize_gradients": True, "weight_decay_type": "l2"},
    "normalize_gradients_normalized_adam": {"normalize_gradients": True, "grafting": "normalized_adam", "lr": 1e-3},
    "coupled_decay": {"weight_decay": 0.3, "decoupled_weight_decay": False},
    "momentum": {"momentum": 0.8, "dampening": 0.5},
    "nesterov": {"momentum": 0.9, "dampening": 0.1, "nesterov": True},
    "other_root": {"preconditioner": "shampoo", "exponent_override": 2.0},
    "root_by_order": {"preconditioner": "shampoo", "exponent_override": [1.5, None, 4.0]},
    "cutoff": {"preconditioner": "shampoo", "damping": "cutoff", "relative_epsilon": 1e-5},
    "saturate": {"damping": "saturate", "relative_epsilon": 1e-2},
    "shrinkage": {"shrinkage": 2.0},
    "beta3_looks_ahead": {"beta3": 0.5},
    "beta3_zero_uncorrected": {"beta3": 0.0, "use_bias_correction": False},
    "corrected_decay": {"weight_decay_type": "corrected"},
    "independent_decay": {"weight_decay_type": "independent", "peak_lr": 0.5},
    "coupled_decay_by_type": {"weight_decay_type": "l2"},
    "unmerged": {"merge_small_dims": False, "max_preconditioner_dim": 20},
    "left_side": {"preconditioner": "shampoo", "one_sided": "left"},
    "right_side": {"preconditioner": "shampoo", "one_sided": "right"},
    "smaller_side": {"preconditioner": "shampoo", "one_sided": "smaller"},
    "large_diagonal": {"preconditioner": "shampoo", "large_dim": "diagonal"},
    "large_identity": {"preconditioner": "shampoo", "large_dim": "identity"},
    "large_adagrad": {"large_dim": "adagrad"},
    "smaller_side_or_diagonal": {"preconditioner": "shampoo", "one_sided": "smaller", "large_dim": "diagonal"},
    "absolute_epsilon": {"relative_epsilon": 0.0, "epsilon": 1e-6},
}


@pytest.mark.slow
@pytest.mark.parametrize("name, kind", [("defaults", "wide"), *zip(OPTIONS, cycle(["odd", "wide"]), strict=False)])
def test_the_trajectory_is_that_of_the_reference(name: str, kind: str) -> None:
    """One layer of the odd model has no gradient (None) in every third step.

    Each option is tested on one of the models; test_combinations.py has blocks of every size and number of dims.
    """
    base: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "precondition_frequency": 3}
    base["max_preconditioner_dim"] = 8 if kind == "odd" else 16
    options = base | OPTIONS[name]
    model = make_model(kind, torch.float64)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    reference = Reference(trained, exclude=("embed.weight",), **options)
    optimizer = Shampoo(trained.items(), factor_dtype="float64", root_dtype="float64", **options)
    for step in range(10):
        rate = options["lr"] * (1.0 - 0.05 * step)  # a schedule, which scales corrected and independent decay
        for group in optimizer.param_groups:
            group["lr"] = rate
        for p in reference.params.values():
            p.options = replace(p.options, lr=rate)
        gradients(model, make_batch(kind, step, unused=2))
        reference.step({n: p.grad for n, p in trained.items()})
        optimizer.step()
    deviations = {n: relative_error(trained[n].detach(), value) for n, value in reference.values().items()}
    assert max(deviations.values()) < 1e-10, deviations


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["odd", "wide"])
@pytest.mark.parametrize(("settings", "bound"), [({"relative_epsilon": 1e-3, "eps": 1e-4}, 1e-5), ({}, 2e-3)])
def test_float32_stays_with_a_float64_run_of_its_own(settings: dict[str, Any], bound: float, kind: str) -> None:
    """Each run computes its gradients at its own parameters, so that deviations feed back."""
    options = {"lr": 1e-2, "weight_decay": 0.1, "precondition_frequency": 3, "max_preconditioner_dim": 8, **settings}
    model, exact = make_model(kind), make_model(kind, torch.float64)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    values = {n: p for n, p in exact.named_parameters() if p.requires_grad}
    reference = Reference(values, exclude=("embed.weight",), **options)
    optimizer = Shampoo(trained.items(), **options)
    for step in range(9):
        batch = make_batch(kind, step, unused=2)
        gradients(model, batch)
        optimizer.step()
        reference.step(gradients(exact, batch))
        for name, value in reference.values().items():
            values[name].data.copy_(value)
    deviations = {n: relative_error(trained[n].detach(), value) for n, value in reference.values().items()}
    assert max(deviations.values()) <= bound, deviations
