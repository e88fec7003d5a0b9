"""The bytes of a parameter's blocks one after the other, cut evenly over the ranks of its mesh, and back to owners.

That is a form which DTensors can describe, so that torch's own tools gather and cut it as any other tensor.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from shampoo_deepspeed.distributed.collectives import all_gather_objects
from shampoo_deepspeed.engine.step_unit import StepUnit
from shampoo_deepspeed.geometry.boxes import chunk
from shampoo_deepspeed.runtime.devices import communication_device
from shampoo_deepspeed.state.block_codec import block_layout, block_size, packed, unpack
from shampoo_deepspeed.state.state_dict import StackState

Interval = tuple[int, int]
Rows = Mapping[str, tuple[StackState, int]]


class _Stretch(NamedTuple):
    """Bytes [start, stop) of a parameter, in the block with this number in the plan."""

    block: int
    start: int
    stop: int


class BlockBytes:
    """Which bytes of its parameters are those of a unit's blocks. Building it is a collective."""

    def __init__(self, unit: StepUnit) -> None:
        self.unit = unit
        mine = {
            unit.plan.blocks[owned[0]].stack: block_size(block_layout(stack))
            for stack, owned in zip(unit.stacks, unit.exchange.stacks, strict=True)
        }
        gathered = all_gather_objects(mine, unit.group, unit.device)
        sizes = {stack: size for found in gathered for stack, size in found.items()}
        self._stretches: list[list[_Stretch]] = [[] for _ in unit.parameters]
        for number, block in enumerate(unit.plan.blocks):
            own = self._stretches[unit.block_parameters[block.parameter]]
            start = own[-1].stop if own else 0
            own.append(_Stretch(number, start, start + sizes[block.stack]))

    def total(self, number: int) -> int:
        """Bytes of all blocks of a parameter."""
        return self._stretches[number][-1].stop

    def own_rows(self) -> Rows:
        """Stack and row of each block that this rank owns, by key."""
        stacks = [StackState.of(stack) for stack in self.unit.stacks]
        return {key: (stack, row) for stack in stacks for row, key in enumerate(stack.keys)}

    def collected(self, number: int, rows: Rows) -> Tensor | None:
        """The bytes of a parameter's blocks: a DTensor if the parameter is one (a collective then), else all of them.

        None on replicas that have only a part; zeros if no step has been taken.

        Args:
            rows: stack and row of the blocks that are here, by key.
        """
        unit, stretches, total = self.unit, self._stretches[number], self.total(number)
        tensor = unit.tensors[number]
        blobs = {s.block: _packed(rows[key]) for s in stretches if (key := unit.block_key(s.block)) in rows}
        if not is_dtensor(tensor):
            if len(blobs) == len(stretches):
                return torch.cat([blobs[s.block] for s in stretches]).to(unit.device)
            return torch.zeros(total, dtype=torch.uint8, device=unit.device) if unit.fresh else None
        intervals = self._intervals(tensor, total)
        starts = {s.block: s.start for s in stretches}
        leaving = [
            [blobs[b][start - starts[b] : stop - starts[b]] for b, start, stop in self._common(number, unit.rank, i)]
            for i in intervals
        ]
        first, last = intervals[unit.rank]
        local = torch.empty(last - first, dtype=torch.uint8, device=unit.device)
        arriving = [self._common(number, owner, (first, last)) for owner in range(unit.world_size)]
        for (_, start, stop), piece in self._exchanged(leaving, arriving):
            local[start - first : stop - first] = piece
        module: Any = sys.modules["torch.distributed.tensor"]
        mesh = _dtensor(tensor).device_mesh
        cut = [module.Shard(0)] * mesh.ndim
        made: Tensor = module.DTensor.from_local(local, mesh, cut, run_check=False, shape=(total,), stride=(1,))
        return made

    def distribute(self, number: int, local: Tensor, intervals: Sequence[Interval]) -> None:
        """Put a parameter's bytes into the stacks of their owners. A collective unless every rank has all of them.

        Args:
            local: what of them is on this rank.
            intervals: which bytes each rank has.
        """
        unit, stretches = self.unit, self._stretches[number]
        own = {s.block: s for s in stretches if unit.plan.owners[s.block] == unit.rank}
        blobs = {b: torch.empty(s.stop - s.start, dtype=torch.uint8, device="cpu") for b, s in own.items()}
        if all(interval == (0, self.total(number)) for interval in intervals):
            for b, s in own.items():
                blobs[b].copy_(local[s.start : s.stop])
        else:
            mine = intervals[unit.rank]
            leaving = [
                [local[start - mine[0] : stop - mine[0]] for _, start, stop in self._common(number, owner, mine)]
                for owner in range(unit.world_size)
            ]
            arriving = [self._common(number, unit.rank, interval) for interval in intervals]
            for (b, start, stop), piece in self._exchanged(leaving, arriving):
                blobs[b][start - own[b].start : stop - own[b].start] = piece
        for stack, owned in zip(unit.stacks, unit.exchange.stacks, strict=True):
            for row, b in enumerate(owned):
                if b in blobs:
                    unpack(stack, row, block_layout(stack), blobs[b])

    def _common(self, number: int, owner: int, interval: Interval) -> list[_Stretch]:
        """The parts of an owner's blocks that are in an interval."""
        found = []
        for b, start, stop in self._stretches[number]:
            first, last = max(start, interval[0]), min(stop, interval[1])
            if self.unit.plan.owners[b] == owner and first < last:
                found.append(_Stretch(b, first, last))
        return found

    def _exchanged(
        self, leaving: Sequence[Sequence[Tensor]], arriving: Sequence[Sequence[_Stretch]]
    ) -> list[tuple[_Stretch, Tensor]]:
        """Send pieces to each rank of the unit; returns those that came from each. A collective."""
        unit, group = self.unit, self.unit.group
        device = communication_device(group, unit.device) if group is not None else unit.device
        empty = torch.empty(0, dtype=torch.uint8, device=device)
        out = torch.cat([empty, *(piece.to(device) for pieces in leaving for piece in pieces)])
        into = out
        if group is not None:
            counts = [sum(s.stop - s.start for s in stretches) for stretches in arriving]
            into = out.new_empty(sum(counts))
            dist.all_to_all_single(into, out, counts, [sum(p.numel() for p in pieces) for pieces in leaving], group)
        flat = [s for stretches in arriving for s in stretches]
        return list(zip(flat, torch.split(into, [s.stop - s.start for s in flat]), strict=True)) if flat else []

    def _intervals(self, tensor: Tensor, total: int) -> list[Interval]:
        """What each rank of the unit has of a parameter's bytes."""
        mesh, group = _dtensor(tensor).device_mesh, self.unit.group
        if group is None:
            return [_cut(total, mesh, mesh.get_coordinate())]
        places = [(mesh.mesh == rank).nonzero()[0].tolist() for rank in dist.get_process_group_ranks(group)]
        return [_cut(total, mesh, place) for place in places]


def interval_of(value: Tensor | None) -> Interval:
    """Which bytes of such a tensor this rank has."""
    if value is None or not is_dtensor(value):
        return (0, 0 if value is None else value.numel())
    mesh = _dtensor(value).device_mesh
    return _cut(value.numel(), mesh, mesh.get_coordinate())


def local_part(value: Tensor) -> Tensor:
    """What of a DTensor is on this rank; any other tensor as it is."""
    part: Tensor = _dtensor(value).to_local() if is_dtensor(value) else value
    return part


def as_sharded(like: Tensor, flat: Tensor) -> Tensor:
    """A flat local part of a parameter as a tensor that is sharded as the parameter is."""
    if not is_dtensor(like):
        return flat.view(like.shape)
    module: Any = sys.modules["torch.distributed.tensor"]
    known = _dtensor(like)
    part: Tensor = module.DTensor.from_local(
        flat.view(known.to_local().shape),
        known.device_mesh,
        known.placements,
        run_check=False,
        shape=known.shape,
        stride=known.stride(),
    )
    return part


def is_dtensor(tensor: Tensor) -> bool:
    """Whether this is a DTensor; if nobody has imported DTensor there is none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _dtensor(tensor: Tensor) -> Any:
    """A DTensor in the eyes of the type checker, which is not to import it."""
    return tensor


def _cut(total: int, mesh: Any, place: Sequence[int]) -> Interval:
    """The part of the rank at a place of the mesh, each of whose dims cuts as torch.chunk does."""
    start, length = 0, total
    for dim, coordinate in enumerate(place):
        offset, length = chunk(length, mesh.size(dim), coordinate)
        start += offset
    return start, start + length


def _packed(place: tuple[StackState, int]) -> Tensor:
    stack, row = place
    return packed(stack, row, block_layout(stack))
