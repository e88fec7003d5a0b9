"""What all ranks must agree on before a step: is every gradient finite, is any non-zero, norms, failing roots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from shampoo_deepspeed.algorithm.found_inf import FoundInf, StepFlags
from shampoo_deepspeed.engine.shard_update import ShardGradients
from shampoo_deepspeed.engine.step_unit import StepUnit
from shampoo_deepspeed.linalg.inverse_root import extremes
from shampoo_deepspeed.options.config import ShampooConfig
from shampoo_deepspeed.runtime.devices import communication_device

# What a unit's status holds before its squared norms.
_BAD, _NONZERO, _FAILING = range(3)
_FLAGS = 3


class Report:
    """The agreed status of one `step()` call.

    Args:
        flags: [bad, nonzero, failing], each 0 where there is none on any rank of any unit of the call.
        norms: for each unit that needs it, ||G||^2 of its parameters.
    """

    def __init__(self, flags: Tensor, norms: Mapping[int, Tensor]) -> None:
        self._flags = flags
        self._norms = norms
        self.outcome = StepFlags(flags)

    def found_inf(self, unit: StepUnit) -> FoundInf:
        """The device-side found_inf for a unit's tensors."""
        return FoundInf((self._flags[_BAD] > 0).to(unit.device), unit.dtype, lambda: read(self.outcome)[0])

    def any_gradient(self) -> bool:
        """Whether any element of any gradient is not zero; read on the CPU, so only asked at first steps."""
        return bool(self._flags[_NONZERO] > 0)

    def squared_norms(self, unit: StepUnit) -> Tensor | None:
        """||G||^2 of each of the unit's parameters, where a normalized method needs it."""
        return self._norms.get(id(unit))


def agree(work: Sequence[tuple[StepUnit, ShardGradients]], configs: Mapping[int, ShampooConfig]) -> Report:
    """Combine this rank's status with that of all ranks that share a unit of this call.

    One small all-reduce for each unit with several ranks; none with a single rank.
    """
    home = work[0][0].device if work else torch.device("cpu")
    flags = torch.zeros(_FLAGS, device=home)
    norms: dict[int, Tensor] = {}
    for unit, gradients in work:
        flags += _flags(unit, gradients, configs).to(home)
    # Small groups first: what an expert's ranks know then reaches all ranks through the larger group around them.
    for unit, gradients in sorted(work, key=lambda item: item[0].world_size):
        squares = torch.empty(0, dtype=unit.dtype, device=unit.device)
        if unit.needs_norms:
            squares = unit.elementwise.squared_norms(gradients.decayed, len(unit.parameters)).to(unit.device)
        if unit.group is not None:
            summed = _summed(torch.cat([flags.to(squares), squares]), unit.group)
            flags, squares = summed[:_FLAGS].clamp_max(1e6).to(flags), summed[_FLAGS:]
        norms[id(unit)] = squares
    return Report(flags, {key: n for key, n in norms.items() if n.numel()})


def _flags(unit: StepUnit, gradients: ShardGradients, configs: Mapping[int, ShampooConfig]) -> Tensor:
    used = sorted({shard.tensor for shard in unit.layout.shards if gradients.active[shard.parameter]})
    filled = [gradients.raw[t] for t in used if gradients.raw[t].numel()]
    peak = _peaks(filled) if filled else torch.zeros(1, device=unit.device)
    failing = sum(
        failures >= configs[unit.plan.blocks[unit.exchange.stacks[number][0]].group].failure_limit
        for number, stack in enumerate(unit.stacks)
        for failures in stack.failures
    )
    bad, some = (~torch.isfinite(peak)).any(), (peak != 0).any()
    return torch.stack([bad.float(), some.float(), torch.full_like(peak[0], failing)])


def _peaks(tensors: Sequence[Tensor]) -> Tensor:
    """The largest magnitude in each tensor, NaN where it holds one: float32 [len(tensors)]."""
    if tensors[0].device.type == "cpu":
        low, high = extremes(tensors)
        return torch.maximum(-low, high).float()
    return torch.stack([v.float() for v in torch._foreach_norm(list(tensors), float("inf"))])


def _summed(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    moved = values.to(communication_device(group, values.device))
    dist.all_reduce(moved, group=group)
    return moved.to(values.device)


def read(outcome: StepFlags) -> tuple[bool, int]:
    """(rejected, at least how many blocks fail) of a past step."""
    flags = outcome.read()
    return flags[_BAD] > 0, int(flags[_FAILING])
