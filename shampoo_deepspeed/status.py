"""What all ranks must agree on before a step: is every gradient finite, is any non-zero, norms, failing roots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from shampoo_deepspeed.config import ShampooConfig
from shampoo_deepspeed.exchange import communication_device
from shampoo_deepspeed.unit import Unit
from shampoo_deepspeed.verdict import Verdict

_BAD, _NONZERO, _FAILING = range(3)
_FLAGS = 3


class Report:
    """The agreed status of one `step()` call.

    Args:
        values: [flags and squared norms], summed over ranks.
        norms: where each unit's squared norms begin in ``values``.
    """

    def __init__(self, values: Tensor, norms: Mapping[int, tuple[int, int]]) -> None:
        self.values = values
        self._norms = norms

    def verdict(self, unit: Unit) -> Verdict:
        """The device-side verdict for a unit's tensors."""
        return Verdict((self.values[_BAD] > 0).to(unit.device), unit.dtype)

    def any_gradient(self) -> bool:
        """Whether any element of any gradient is not zero; read on the host, so only asked at first steps."""
        return bool(self.values[_NONZERO] > 0)

    def squared_norms(self, unit: Unit) -> Tensor | None:
        """||G||^2 of each of the unit's parameters, where a normalized method needs it."""
        if id(unit) not in self._norms:
            return None
        start, stop = self._norms[id(unit)]
        return self.values[start:stop].to(device=unit.device, dtype=unit.dtype)


def agree(work: Sequence[tuple[Unit, list[Tensor], list[bool]]], configs: Mapping[int, ShampooConfig]) -> Report:
    """Combine this rank's status with that of all ranks that share a unit of this call.

    One small all-reduce where the ranks are those of one group; none with a single rank.
    """
    parts: list[Tensor] = []
    norms: dict[int, tuple[int, int]] = {}
    groups: dict[int, dist.ProcessGroup] = {}
    home = work[0][0].device if work else torch.device("cpu")
    flags = torch.zeros(_FLAGS, dtype=torch.float64, device=home)
    end = _FLAGS
    for unit, gradients, active in work:
        flags += _flags(unit, gradients, active, configs).to(home)
        if unit.world_size > 1 and unit.group is not None:
            groups[id(unit.group)] = unit.group
        if unit.needs_norms:
            squares = unit.elementwise.squared_norms(gradients, len(unit.parameters))
            parts.append(squares.to(device=home, dtype=torch.float64))
            norms[id(unit)] = (end, end + len(unit.parameters))
            end += len(unit.parameters)
    values = torch.cat([flags, *parts])
    for group in groups.values():
        values = _summed(values, group)
    if len(groups) > 1:
        # Units on different groups (experts beside dense layers): a rejection must reach every rank.
        values = torch.cat([_summed(values[:_FLAGS].clone(), None), values[_FLAGS:]])
    return Report(values, norms)


def _flags(
    unit: Unit, gradients: Sequence[Tensor], active: Sequence[bool], configs: Mapping[int, ShampooConfig]
) -> Tensor:
    used = {shard.tensor for shard in unit.layout.shards if active[shard.parameter]}
    largest = [torch.linalg.vector_norm(gradients[t], float("inf")) for t in sorted(used) if gradients[t].numel()]
    peak = torch.stack([v.double() for v in largest]) if largest else torch.zeros(1, dtype=torch.float64)
    failing = sum(
        failures >= configs[unit.plan.blocks[unit.exchange.stacks[number][0]].group].failure_limit
        for number, stack in enumerate(unit.stacks)
        for failures in stack.failures
    )
    bad, some = (~torch.isfinite(peak)).any(), (peak != 0).any()
    return torch.stack([bad.double(), some.double(), torch.full_like(peak[0], failing)])


def _summed(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    device = communication_device(group or dist.group.WORLD, values.device)
    moved = values.to(device)
    dist.all_reduce(moved, group=group)
    return moved.to(values.device)


def read(values: Tensor) -> tuple[bool, int]:
    """(rejected, number of failing blocks) of a past step's agreed values."""
    flags = values[:_FLAGS].tolist()
    return flags[_BAD] > 0, int(flags[_FAILING])
