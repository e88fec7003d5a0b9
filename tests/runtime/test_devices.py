"""On a (simulated) accelerator, steps do what they do on the CPU, mix no devices, and wait for nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shampoo_deepspeed import Shampoo
from shampoo_deepspeed.algorithm.found_inf import FoundInf
from tests.support.bare import BARE
from tests.support.simulated_device import Device, Mode, on_device, simulate, values_of

STEPS, FREQUENCY = 7, 3
SHAPES = {"a": (20, 12), "b": (12,), "c": (6, 4, 3, 3), "s": ()}
CASES: dict[str, dict[str, Any]] = {
    "as_it_is": {},
    "bare": BARE,
    "eigh": {"solver": "eigh"},
    "coupled_newton": {"solver": "coupled_newton"},
    "shampoo": {"preconditioner": "shampoo"},
    "soap": {"preconditioner": "soap"},
    "normalized_elementwise": {"elementwise": "normalized_adam"},
    "gradients_as_they_are": {"normalize_gradients": False},
    "normalized": {"grafting": "normalized_adam", "weight_decay": 0.1},
    "adam": {"grafting": "adam"},
    "momentum": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "weight_decay_type": "independent"},
    "not_fused": {"eps": 0.0, "beta3": 0.5, "betas": (0.9, 0.99)},
    "no_first_moment": {"betas": (0.0, 0.99), "grafting": "rmsprop"},
    "float64_factors": {"factor_dtype": "float64"},
    "narrow": {"root_dtype": "bfloat16", "apply_dtype": "bfloat16"},
    "diagonal": {"preconditioner": "shampoo", "large_dim": "diagonal", "max_preconditioner_dim": 16},
    "one_sided": {"preconditioner": "shampoo", "one_sided": "left"},
    "cutoff": {"preconditioner": "shampoo", "damping": "cutoff"},
    "saturate": {"damping": "saturate", "shrinkage": 0.5},
    "tolerance": {"refresh_tolerance": 0.1},
    "qr": {"solver": "qr"},
    "kl_soap": {"preconditioner": "kl_soap"},
    "soap_muon": {"preconditioner": "soap_muon"},
    "muon": {"preconditioner": "muon"},
    "qr_shampoo": {"preconditioner": "shampoo", "solver": "qr", "refresh_tolerance": 0.1},
    "soap_eigh": {"preconditioner": "soap", "solver": "eigh"},
    "statistics": {"preconditioner": "shampoo", "statistics_frequency": 2},
}
ALWAYS_EIGH = ("soap", "kl_soap", "soap_muon", "muon", "cutoff", "saturate", "tolerance")


def gradient(name: str, step: int) -> Tensor:
    seeded = torch.Generator().manual_seed(100 * step + ord(name))
    return torch.randn(SHAPES[name], generator=seeded)


def trained(
    options: dict[str, Any], device: Device | None = None, bad: int = -1, factors: Sequence[float] = (1.0,) * STEPS
) -> tuple[list[Tensor], list[list[str]]]:
    """Return the parameters after all steps, and the CPU's reads in each.

    Each step's gradients are multiplied by one of the factors; those of step ``bad`` are NaN.
    """
    mark = on_device if device else (lambda t: t)
    params = {name: nn.Parameter(mark(gradient(name, -1))) for name in SHAPES}
    reads = []
    with Mode() if device else contextlib.nullcontext():
        own = {"max_preconditioner_dim": 8, "precondition_frequency": FREQUENCY, "refresh": "sync", **options}
        optimizer = Shampoo(list(params.items()), lr=1e-2, **own)
        for step in range(STEPS):
            for name, p in params.items():
                p.grad = mark(gradient(name, step) * (torch.nan if step == bad else factors[step]))
            if device:
                device.catch_up()  # during the forward and backward pass
            before = len(device.reads) if device else 0
            optimizer.step()
            reads.append(device.reads[before:] if device else [])
        optimizer.finish_step()
    assert optimizer.rejected_steps == (bad >= 0)
    return [values_of(p) for p in params.values()], reads


def assert_equal_but_for_rounding(found: list[Tensor], expected: list[Tensor], bound: float = 5e-6) -> None:
    assert max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)) <= bound


# Those with `refresh_tolerance` read in each refresh which bases may stay.
READING = ("qr_shampoo", "tolerance")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_step_without_refresh_waits_for_nothing(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    on_accelerators = {} if case in ALWAYS_EIGH else {"solver": "coupled_newton"}  # what "auto" chooses there
    options = {"refresh_growth": 0.0} | CASES[case]  # without early refreshes, so that there are steps without any
    expected, _ = trained(on_accelerators | options)
    device = simulate(monkeypatch)
    found, reads = trained(options, device)
    assert not device.mixed
    # The first step reads flags before there is state; after it, every third step refreshes, and the first refresh
    # reads whether it failed.
    quiet = [step for step in range(1, STEPS) if (step + 1) % FREQUENCY]
    assert quiet and not [reads[step] for step in quiet if reads[step]]
    if case == "muon":  # there is nothing to refresh
        assert not any(reads[1:])
    else:
        assert reads[FREQUENCY - 1]
        later = [reads[step] for step in range(FREQUENCY, STEPS) if step not in quiet]
        assert later and (case in READING or not any(later)), later
    assert_equal_but_for_rounding(found, expected, 1e-3 if case == "narrow" else 5e-6)


@pytest.mark.slow
@pytest.mark.parametrize("preconditioner", ["shampoo", "soap", "kl_shampoo"])
def test_gradients_of_any_scale_are_normalized_there_too(preconditioner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"preconditioner": preconditioner, "normalize_gradients": True, "relative_epsilon": 1e-3, "eps": 0.0}
    options |= {"solver": "eigh", "start_preconditioning_step": 6}
    expected, _ = trained(options)
    device = simulate(monkeypatch)
    found, _ = trained(options, device, factors=[1e20, 1e-30, 1.0, 1e3, 1e-30, 1e20, 1.0])
    assert not device.mixed
    assert_equal_but_for_rounding(found, expected, 5e-5)


@pytest.mark.parametrize("rejected", [False, True])
def test_a_decay_has_the_precision_of_what_it_multiplies(rejected: bool) -> None:
    found_inf = FoundInf(torch.tensor(rejected), torch.float32)
    assert found_inf.keep(0.9999, torch.float64).item() == (1.0 if rejected else 0.9999)
    assert found_inf.keep(0.9999).dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("grafting", [None, "rms"])
@pytest.mark.parametrize("refresh", ["sync", "staggered", "background"])
@pytest.mark.parametrize("normalizes", [False, True])
@pytest.mark.parametrize("preconditioner", ["shampoo", "soap", "kl_shampoo"])
def test_a_rejected_step_changes_nothing_there_either(
    preconditioner: str, refresh: str, grafting: str | None, normalizes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"preconditioner": preconditioner, "refresh": refresh, "solver": "eigh"}
    options |= {"grafting": grafting, "normalize_gradients": normalizes}
    if preconditioner != "shampoo":
        del options["solver"]
    expected, _ = trained(options, bad=4)
    device = simulate(monkeypatch)
    found, _ = trained(options, device, bad=4)
    assert not device.mixed
    assert_equal_but_for_rounding(found, expected)
