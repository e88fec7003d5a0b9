"""A load into an optimizer that has stepped keeps units that would be built the same way, and replaces their state."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from shampoo_deepspeed import Shampoo, load_shampoo, save_shampoo
from tests.support.stepping import drive, parameter, same_bits, shampoo, snapshot, state_of

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "soap": {"preconditioner": "soap"},
    "kl": {"preconditioner": "kl_shampoo"},
    "momentum": {"momentum": 0.9},
    "background": {"refresh": "background"},
}


def made(**options: Any) -> tuple[list[nn.Parameter], Shampoo]:
    params = [parameter(12, 10), parameter(8, 6, seed=1), parameter(6, seed=2)]
    return params, shampoo(list(zip("abc", params, strict=True)), **options)


def by_file(source: Shampoo, target: Shampoo, path: Path) -> None:
    """Load through a checkpoint."""
    save_shampoo(source, path)
    load_shampoo(target, path)


def by_dict(source: Shampoo, target: Shampoo, _: Path) -> None:
    """Load through a state dict, whose tensors are the optimizer's own."""
    target.load_state_dict(copy.deepcopy(source.state_dict()))


@pytest.mark.parametrize("load", [by_file, by_dict])
@pytest.mark.parametrize("name", OPTIONS)
def test_units_stay_and_hold_what_was_loaded_only(
    name: str, load: Callable[[Shampoo, Shampoo, Path], None], tmp_path: Path
) -> None:
    params, optimizer = made(**OPTIONS[name])
    drive(optimizer, params, range(5))
    own, used = made(**OPTIONS[name])
    drive(used, own, range(9), salt=100)
    units, stacks = list(used.units), [stack for unit in used.units for stack in unit.stacks]
    load(optimizer, used, tmp_path)
    assert not used.units and all(not stack.tensors for stack in stacks)  # the memory is free until the next step
    for source, target in zip(params, own, strict=True):
        target.data.copy_(source.data)
    for with_, given in ((optimizer, params), (used, own)):
        drive(with_, given, range(5, 9))
    assert used.units == units and [stack for unit in used.units for stack in unit.stacks] == stacks
    assert same_bits(snapshot(params), snapshot(own)) and same_bits(state_of(optimizer), state_of(used))


def test_other_options_rebuild_the_units(tmp_path: Path) -> None:
    params, optimizer = made(precondition_frequency=7)
    drive(optimizer, params, range(2))
    save_shampoo(optimizer, tmp_path)
    _, used = made(precondition_frequency=5)
    own = [entry.reference() for entry in used.entries]
    drive(used, own, range(2))  # type: ignore[arg-type]
    (unit,) = used.units
    load_shampoo(used, tmp_path)
    drive(used, own, range(2, 3))  # type: ignore[arg-type]
    assert used.units != [unit] and used.units[0].steps == [3, 3, 3]


def test_another_learning_rate_keeps_the_units(tmp_path: Path) -> None:
    params, optimizer = made()
    drive(optimizer, params, range(2))
    save_shampoo(optimizer, tmp_path)
    (unit,) = optimizer.units
    optimizer.param_groups[0]["lr"] = 1e-5
    load_shampoo(optimizer, tmp_path)
    drive(optimizer, params, range(2, 3))
    assert optimizer.units == [unit] and optimizer.param_groups[0]["lr"] == 1e-2


def test_replaced_tensors_rebuild_the_units(tmp_path: Path) -> None:
    params, optimizer = made()
    drive(optimizer, params, range(2))
    save_shampoo(optimizer, tmp_path)
    (unit,) = optimizer.units
    load_shampoo(optimizer, tmp_path)
    params[0].data = params[0].data.double()
    drive(optimizer, params, range(2, 3))
    assert unit not in optimizer.units and sum(len(unit.tensors) for unit in optimizer.units) == 3
