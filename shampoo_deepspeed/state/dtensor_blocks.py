"""Spreads the bytes of a parameter's blocks evenly over the ranks of its mesh, and sends them back to owners.

DTensors can describe this form, so torch's own tools gather and cut it like any other tensor.
"""

from __future__ import annotations

import itertools
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shampoo_deepspeed.algorithm.block_stack import BlockStack
from shampoo_deepspeed.distributed.collectives import all_reduce_maxima
from shampoo_deepspeed.engine.step_unit import StepUnit
from shampoo_deepspeed.geometry.boxes import FlatRange, chunk
from shampoo_deepspeed.options.config import ShampooConfig
from shampoo_deepspeed.runtime.devices import communication_device
from shampoo_deepspeed.state.block_codec import BlockLayout, block_layout, block_size, packed, unpack
from shampoo_deepspeed.state.state_dict import StackState

Rows = Mapping[str, tuple[StackState, int]]
# Ranges of a parameter's bytes, by the number in the plan of the block that they are in.
BytesOfBlocks = dict[int, FlatRange]


class BlockBytes:
    """The byte ranges of a unit's blocks in the bytes of its parameters. Building it is a collective.

    Args:
        saved: options by number, if the bytes are those of a save whose formats may differ from the unit's.
    """

    def __init__(self, unit: StepUnit, saved: Mapping[int, ShampooConfig] | None = None) -> None:
        self.unit = unit
        self._layouts = [_layout(stack, unit, saved or {}) for stack in unit.stacks]
        here = {
            unit.plan.blocks[owned[0]].stack: block_size(layout)
            for layout, owned in zip(self._layouts, unit.exchange.stacks, strict=True)
        }
        kinds = list(dict.fromkeys(block.stack for block in unit.plan.blocks))  # in the same order on all ranks
        found = all_reduce_maxima([here.get(kind, 0) for kind in kinds], unit.group, unit.device)
        sizes = dict(zip(kinds, found, strict=True))
        self._totals = [0] * len(unit.parameters)
        self._of_blocks: list[BytesOfBlocks] = [{} for _ in unit.parameters]
        # The same, also by owner: a rank looks up what it sends to and gets from each of the others.
        self._of_owners: list[dict[int, BytesOfBlocks]] = [defaultdict(dict) for _ in unit.parameters]
        self._places: dict[Any, list[tuple[int, ...]]] = {}  # of the unit's ranks in each mesh
        for number, block in enumerate(unit.plan.blocks):
            parameter = unit.block_parameters[block.parameter]
            start, stop = self._totals[parameter], self._totals[parameter] + sizes[block.stack]
            self._of_blocks[parameter][number] = FlatRange(start, stop)
            self._of_owners[parameter][unit.plan.owners[number]][number] = FlatRange(start, stop)
            self._totals[parameter] = stop

    def total(self, number: int) -> int:
        """Bytes of all blocks of a parameter."""
        return self._totals[number]

    def own_rows(self) -> Rows:
        """Stack and row of each block that this rank owns, by key."""
        stacks = [StackState.of(stack) for stack in self.unit.stacks]
        return {key: (stack, row) for stack in stacks for row, key in enumerate(stack.keys)}

    def collected(self, number: int, rows: Rows) -> Tensor | None:
        """The bytes of a parameter's blocks: a DTensor if the parameter is one (then a collective), else all of them.

        None on replicas that have only a part; zeros if no step has been taken.

        Args:
            rows: stack and row of the blocks that are here, by key.
        """
        unit, of_blocks, total = self.unit, self._of_blocks[number], self.total(number)
        tensor = unit.tensors[number]
        blobs = {b: _packed(rows[key]) for b in of_blocks if (key := unit.block_key(b)) in rows}
        if not is_dtensor(tensor):
            if len(blobs) == len(of_blocks):
                return torch.cat([blobs[b] for b in of_blocks])
            return torch.zeros(total, dtype=torch.uint8, device="cpu") if unit.fresh else None
        held = self._held_by_ranks(tensor, total)
        leaving = [
            [blobs[b][slice(*common.shift(-of_blocks[b].start))] for b, common in found.items()]
            for found in (self._common(number, unit.rank, theirs) for theirs in held)
        ]
        mine = held[unit.rank]
        local = torch.empty(mine.size, dtype=torch.uint8, device=unit.device)
        arriving = [self._common(number, owner, mine) for owner in range(unit.world_size)]
        for _, common, content in self._exchanged(leaving, arriving):
            local[slice(*common.shift(-mine.start))] = content
        module: Any = sys.modules["torch.distributed.tensor"]
        mesh = _dtensor(tensor).device_mesh
        cut = [module.Shard(0)] * mesh.ndim
        made: Tensor = module.DTensor.from_local(local, mesh, cut, run_check=False, shape=(total,), stride=(1,))
        return made

    def distribute(self, number: int, local: Tensor, held: Sequence[FlatRange]) -> None:
        """Put a parameter's bytes into the stacks of their owners. A collective unless every rank has all of them.

        Args:
            local: the bytes on this rank.
            held: the range of bytes on each rank.
        """
        unit, everything = self.unit, FlatRange(0, self.total(number))
        own = self._of_owners[number].get(unit.rank, {})
        blobs = {b: torch.empty(whole.size, dtype=torch.uint8, device="cpu") for b, whole in own.items()}
        if all(theirs == everything for theirs in held):
            for b, whole in own.items():
                blobs[b].copy_(local[slice(*whole)])
        else:
            mine = held[unit.rank]
            leaving = [
                [local[slice(*common.shift(-mine.start))] for common in self._common(number, owner, mine).values()]
                for owner in range(unit.world_size)
            ]
            arriving = [self._common(number, unit.rank, theirs) for theirs in held]
            for b, common, content in self._exchanged(leaving, arriving):
                blobs[b][slice(*common.shift(-own[b].start))] = content
        for stack, layout, owned in zip(unit.stacks, self._layouts, unit.exchange.stacks, strict=True):
            for row, b in enumerate(owned):
                if b in blobs:
                    unpack(stack, row, layout, blobs[b])

    def _common(self, number: int, owner: int, held: FlatRange) -> BytesOfBlocks:
        """The bytes of an owner's blocks within ``held``."""
        blocks = self._of_owners[number].get(owner, {})
        return {b: common for b, whole in blocks.items() if (common := whole.intersect(held)) is not None}

    def _exchanged(
        self, leaving: Sequence[Sequence[Tensor]], arriving: Sequence[BytesOfBlocks]
    ) -> list[tuple[int, FlatRange, Tensor]]:
        """Send bytes to each rank of the unit; returns block, range and content of those received. A collective."""
        unit, group = self.unit, self.unit.group
        device = communication_device(group, unit.device) if group is not None else unit.device
        empty = torch.empty(0, dtype=torch.uint8, device=device)
        out = torch.cat([empty, *(content.to(device) for contents in leaving for content in contents)])
        into = out
        if group is not None:
            counts = [sum(common.size for common in found.values()) for found in arriving]
            into = out.new_empty(sum(counts))
            dist.all_to_all_single(into, out, counts, [sum(map(Tensor.numel, contents)) for contents in leaving], group)
        flat = [(b, common) for found in arriving for b, common in found.items()]
        contents = torch.split(into, [common.size for _, common in flat]) if flat else ()
        return [(b, common, content) for (b, common), content in zip(flat, contents, strict=True)]

    def _held_by_ranks(self, tensor: Tensor, total: int) -> list[FlatRange]:
        """The range of a parameter's bytes on each rank of the unit."""
        mesh, group = _dtensor(tensor).device_mesh, self.unit.group
        if group is None:
            return [_cut(total, mesh, mesh.get_coordinate())]
        if mesh not in self._places:
            coordinates = itertools.product(*(range(size) for size in mesh.shape))
            of_ranks = dict(zip(mesh.mesh.flatten().tolist(), coordinates, strict=True))
            self._places[mesh] = [of_ranks[rank] for rank in dist.get_process_group_ranks(group)]
        return [_cut(total, mesh, place) for place in self._places[mesh]]


def _layout(stack: BlockStack, unit: StepUnit, saved: Mapping[int, ShampooConfig]) -> BlockLayout:
    """What a block of a stack consisted of in a save with these options, or consists of here."""
    before, now = saved.get(stack.options), unit.configs.get(stack.options)
    if before is None or now is None or before.formats == now.formats:
        return block_layout(stack)
    return block_layout(BlockStack([""], stack.shape, before, torch.device("meta"), unit.dtype))


def resized(value: Tensor, total: int) -> Tensor:
    """An empty tensor of so many bytes that is cut over the same mesh."""
    if not is_dtensor(value):
        return value.new_empty(total)
    module: Any = sys.modules["torch.distributed.tensor"]
    known = _dtensor(value)
    mesh = known.device_mesh
    local = known.to_local().new_empty(_cut(total, mesh, mesh.get_coordinate()).size)
    made: Tensor = module.DTensor.from_local(
        local, mesh, known.placements, run_check=False, shape=(total,), stride=(1,)
    )
    return made


def on_cpu(value: Any) -> Any:
    """A tensor on the CPU; a DTensor is one of the same mesh whose local part is there. Other values as they are."""
    return value.cpu() if isinstance(value, Tensor) else value


def bytes_here(value: Tensor | None) -> FlatRange:
    """The range of such a tensor's bytes on this rank."""
    if value is None or not is_dtensor(value):
        return FlatRange(0, 0 if value is None else value.numel())
    mesh = _dtensor(value).device_mesh
    return _cut(value.numel(), mesh, mesh.get_coordinate())


def local_part(value: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor as it is."""
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
    """Whether this is a DTensor; if DTensor was never imported, there is none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _dtensor(tensor: Tensor) -> Any:
    """The same DTensor, typed as Any so that the class need not be imported."""
    return tensor


def _cut(total: int, mesh: Any, place: Sequence[int]) -> FlatRange:
    """The part of the rank at a place of the mesh, each of whose dims cuts as torch.chunk does."""
    held = FlatRange(0, total)
    for dim, coordinate in enumerate(place):
        held = chunk(held.size, mesh.size(dim), coordinate).shift(held.start)
    return held


def _packed(place: tuple[StackState, int]) -> Tensor:
    stack, row = place
    return packed(stack, row, block_layout(stack))
