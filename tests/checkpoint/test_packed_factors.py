"""save_shampoo(..., packed_factors=True) writes only lower triangles, and training stays equal to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shampoo_deepspeed import Shampoo, load_shampoo, save_shampoo
from shampoo_deepspeed.checkpoint.manifest import Manifest
from tests.support.saved_forms import FORMS
from tests.support.stepping import drive, parameter, same_bits, shampoo, snapshot

SAVED, END = 4, 8  # refreshes at every third step
FAMILY = ("shampoo", "soap", "kl_shampoo")
REFRESHES = ("sync", "staggered", "background")
RUNS: dict[str, dict[str, Any]] = {
    **FORMS, **{f"{p}_{r}": {"preconditioner": p, "refresh": r} for p in FAMILY for r in REFRESHES},
}  # fmt: skip
ALONE = {name: options for name, options in RUNS.items() if options.get("refresh") != "background"}


def made(like: list[nn.Parameter] | None = None, **options: Any) -> tuple[list[nn.Parameter], Shampoo]:
    """Return factor matrices large enough to be computed in strips, so that their upper triangles are not valid."""
    values = like or [parameter(160, 136), parameter(24, 6, seed=1), parameter(5)]
    params = [nn.Parameter(p.detach().clone()) for p in values]
    names = ["mix.weight", "down.weight", "b"]
    options = {**options, "rules": [r for r in options.get("rules", []) if r["match"] == "mix.weight"]}
    return params, shampoo(list(zip(names, params, strict=True)), **{"max_preconditioner_dim": 160, **options})


def factors(optimizer: Shampoo) -> list[torch.Tensor]:
    """Return the optimizer's own factor matrices."""
    stacks = [stack for unit in optimizer.units for stack in unit.stacks]
    return [t for s in stacks for name, t in s.tensors.items() if name.startswith("factor_") and t.ndim == 3]


@pytest.mark.slow
@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(options: dict[str, Any], tmp_path: Path) -> None:
    params, optimizer = made(**options)
    drive(optimizer, params, range(SAVED))
    save_shampoo(optimizer, tmp_path, packed_factors=True)
    again, other = made(params, **options)
    load_shampoo(other, tmp_path)
    drive(optimizer, params, range(SAVED, END))
    drive(other, again, range(SAVED, END))
    assert same_bits(snapshot(params), snapshot(again))


# Not in the background, because a thread would read factor matrices while this test writes to them.
@pytest.mark.parametrize("options", ALONE.values(), ids=ALONE)
def test_upper_triangles_are_never_read(options: dict[str, Any]) -> None:
    params, optimizer = made(**options)
    again, other = made(params, **options)
    for step in range(END):
        drive(optimizer, params, range(step, step + 1))
        drive(other, again, range(step, step + 1))
        for factor in factors(other):
            factor.masked_fill_(torch.ones_like(factor, dtype=torch.bool).triu(1), float("inf"))
    assert same_bits(snapshot(params), snapshot(again))


@pytest.mark.parametrize("preconditioner", FAMILY)
def test_half_of_the_factor_matrices_less_is_written(preconditioner: str, tmp_path: Path) -> None:
    """A block has two of them, two roots or bases, and one moment; with SOAP two."""
    matrices = 6 if preconditioner == "soap" else 5
    w = parameter(512, 512)
    optimizer = shampoo([("w", w)], max_preconditioner_dim=256, preconditioner=preconditioner)
    drive(optimizer, [w], range(1))
    sizes = {}
    for name in ("whole", "packed"):
        save_shampoo(optimizer, tmp_path / name, packed_factors=name == "packed")
        sizes[name] = sum(file["bytes"] for file in Manifest.read(tmp_path / name).files.values())
    assert sizes["packed"] / sizes["whole"] == pytest.approx((matrices - 1) / matrices, rel=0.01)


@pytest.mark.parametrize("forms", [(True, False), (False, True)], ids=str)
def test_pending_state_is_written_again_as_it_was_stored(forms: tuple[bool, bool], tmp_path: Path) -> None:
    params, optimizer = made()
    drive(optimizer, params, range(SAVED))
    save_shampoo(optimizer, tmp_path / "0", packed_factors=forms[0])
    again, other = made(params)
    load_shampoo(other, tmp_path / "0")
    save_shampoo(other, tmp_path / "1", packed_factors=forms[1])
    last, third = made(params)
    load_shampoo(third, tmp_path / "1")
    in_memory = third.state_dict()  # reads all pending state
    fourth_params, fourth = made(params)
    fourth.load_state_dict(in_memory)
    save_shampoo(fourth, tmp_path / "2", packed_factors=True)
    fifth_params, fifth = made(params)
    load_shampoo(fifth, tmp_path / "2")
    drive(optimizer, params, range(SAVED, END))
    for its, own in ((third, last), (fourth, fourth_params), (fifth, fifth_params)):
        drive(its, own, range(SAVED, END))
        assert same_bits(snapshot(params), snapshot(own))
