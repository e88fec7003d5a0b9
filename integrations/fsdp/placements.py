"""Placements of a DTensor: which boxes of the global tensor are on this rank, and where in its local tensor.

Each mesh dim cuts as torch.chunk does, from left to right. FSDP2 over tensor parallelism cuts what tensor parallelism
has left, so from right to left; ``_StridedShard(dim, split_factor)`` on FSDP2's mesh dim shows that (torch's
placement_types.py). With other strided shards, a rank may hold several ranges of rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from shampoo_deepspeed.distributed.frameworks import LayoutError
from shampoo_deepspeed.geometry.boxes import Box, FlatRange, chunk

if TYPE_CHECKING:
    from torch.distributed.tensor import Placement


class MeshSplit(NamedTuple):
    """How a mesh dim divides a tensor's dim: number of parts, which part is here, and split factor (1: none)."""

    parts: int
    here: int
    split_factor: int


def local_boxes(
    shape: Sequence[int],
    placements: Sequence[Placement],
    sizes: Sequence[int],
    coordinate: Sequence[int],
    held: Sequence[int],
) -> list[tuple[Box, int]]:
    """Return a rank's boxes of the global tensor, in memory order, each with its offset in the flattened local tensor.

    Args:
        shape: shape of the global tensor.
        placements: one for each mesh dim.
        sizes: sizes of the mesh dims.
        coordinate: coordinate of this rank in the mesh.
        held: shape of the local tensor.

    Raises:
        LayoutError: if the local tensor does not fit the placements.
    """
    splits = _splits(len(shape), placements, sizes, coordinate)
    ranges = [_ranges(numel, own, wanted) for numel, own, wanted in zip(shape, splits, held, strict=True)]
    lengths = tuple(map(_total, ranges))
    if 0 in lengths and 0 in held:
        return []
    if lengths != tuple(held):
        raise LayoutError(f"its local shape is {tuple(held)}, but its placements {tuple(placements)} give {lengths}")
    last = max((dim for dim, along in enumerate(ranges) if len(along) > 1), default=0)
    # Memory runs through all ranges of the last dim that has several before it goes on along an earlier dim.
    ranges[:last] = [[FlatRange(n, n + 1) for part in along for n in range(*part)] for along in ranges[:last]]
    found, offset = [], 0
    for combination in itertools.product(*ranges):
        box = Box(tuple(along.start for along in combination), tuple(along.size for along in combination))
        found.append((box, offset))
        offset += box.numel
    return found


def _splits(
    dims: int, placements: Sequence[Placement], sizes: Sequence[int], coordinate: Sequence[int]
) -> list[list[MeshSplit]]:
    """Return, for each dim of a tensor, how mesh dims divide it."""
    splits: list[list[MeshSplit]] = [[] for _ in range(dims)]
    for placement, parts, here in zip(placements, sizes, coordinate, strict=True):
        if placement.is_replicate():
            continue
        dim = getattr(placement, "dim", None)
        if dim is None:
            raise LayoutError(f"placement {placement} is neither sharded nor replicated")
        splits[dim].append(MeshSplit(parts, here, int(getattr(placement, "split_factor", 1))))
    return splits


def _ranges(numel: int, splits: Sequence[MeshSplit], held: int) -> list[FlatRange]:
    """Return the indices of a dim that are on this rank.

    If rows do not divide evenly, FSDP2 holds what it has cut itself. That may be another number of rows than its
    placements give by the rules of a DTensor.
    """
    later = [math.prod(s.parts for s in splits[n + 1 :] if s.split_factor == 1) for n in range(len(splits))]
    if all(split.split_factor in (1, rest) for split, rest in zip(splits, later, strict=True)):
        own = _divided(numel, sorted(splits, key=lambda split: split.split_factor > 1), strided=False)
        if _total(own) == held:
            return own
    return _divided(numel, splits, strided=True)


def _divided(numel: int, splits: Sequence[MeshSplit], strided: bool) -> list[FlatRange]:
    """Apply the divisions one after another; a strided one takes its part of each of ``split_factor`` chunks."""
    ranges = [FlatRange(0, numel)] if numel else []
    for split in splits:
        chunks = [ranges]
        if strided and split.split_factor > 1:
            chunks = [_chunk(ranges, split.split_factor, n) for n in range(split.split_factor)]
        ranges = _joined([found for part in chunks for found in _chunk(part, split.parts, split.here)])
    return ranges


def _chunk(ranges: Sequence[FlatRange], parts: int, index: int) -> list[FlatRange]:
    """Return what torch.chunk gives for the concatenated ranges."""
    wanted = chunk(_total(ranges), parts, index)
    found, position = [], 0
    for elements in ranges:
        common = wanted.shift(elements.start - position).intersect(elements)
        if common is not None:
            found.append(common)
        position += elements.size
    return found


def _joined(ranges: Sequence[FlatRange]) -> list[FlatRange]:
    """Merge adjacent ranges."""
    found: list[FlatRange] = []
    for elements in ranges:
        if found and found[-1].stop == elements.start:
            found[-1] = FlatRange(found[-1].start, elements.stop)
        else:
            found.append(elements)
    return found


def _total(ranges: Sequence[FlatRange]) -> int:
    return sum(elements.size for elements in ranges)
