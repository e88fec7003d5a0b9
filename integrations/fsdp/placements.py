"""Placements of a DTensor: which boxes of the global tensor lie on this rank, and where in its local tensor.

Each mesh dim cuts as torch.chunk does, from left to right. FSDP2 over tensor parallelism cuts what tensor parallelism
has left, so from right to left; ``_StridedShard(dim, split_factor)`` on FSDP2's mesh dim shows that (torch's
placement_types.py). Other strided shards leave a rank several intervals of rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from shampoo_deepspeed.distributed.frameworks import LayoutError
from shampoo_deepspeed.geometry.boxes import Box, chunk


class Run(NamedTuple):
    """Consecutive indices [start, start + length) along a dim of the global tensor."""

    start: int
    length: int


class Cut(NamedTuple):
    """A mesh dim that divides a tensor's dim: into how many, which of these is here, and its split factor (1: none)."""

    parts: int
    here: int
    split_factor: int


def local_boxes(
    shape: Sequence[int],
    placements: Sequence[Any],
    sizes: Sequence[int],
    coordinate: Sequence[int],
    held: Sequence[int],
) -> list[tuple[Box, int]]:
    """Boxes of the global tensor on a rank, in memory order, each with its offset in the flattened local tensor.

    Args:
        shape: of the global tensor.
        placements: one for each mesh dim.
        sizes: of the mesh dims.
        coordinate: of this rank in the mesh.
        held: shape of the local tensor.

    Raises:
        LayoutError: if the local tensor does not fit the placements, or is not a row of boxes.
    """
    cuts = _cuts(len(shape), placements, sizes, coordinate)
    runs = [_runs(numel, own, wanted) for numel, own, wanted in zip(shape, cuts, held, strict=True)]
    lengths = tuple(sum(run.length for run in along) for along in runs)
    if 0 in lengths and 0 in held:
        return []
    if lengths != tuple(held):
        raise LayoutError(f"it holds {tuple(held)} where its placements {tuple(placements)} give {lengths}")
    broken = next((dim for dim, along in enumerate(runs) if len(along) > 1), 0)
    if any(len(along) > 1 for along in runs[broken + 1 :]) or math.prod(lengths[:broken]) > 1 and len(runs[broken]) > 1:
        raise LayoutError(f"with placements {tuple(placements)} it is no row of contiguous boxes")
    found, offset = [], 0
    for combination in itertools.product(*runs):
        box = Box(tuple(run.start for run in combination), tuple(run.length for run in combination))
        found.append((box, offset))
        offset += box.numel
    return found


def _cuts(dims: int, placements: Sequence[Any], sizes: Sequence[int], coordinate: Sequence[int]) -> list[list[Cut]]:
    """The cuts of each dim of a tensor."""
    cuts: list[list[Cut]] = [[] for _ in range(dims)]
    for placement, parts, here in zip(placements, sizes, coordinate, strict=True):
        if placement.is_replicate():
            continue
        dim = getattr(placement, "dim", None)
        if dim is None:
            raise LayoutError(f"placement {placement} is neither sharded nor replicated")
        cuts[dim].append(Cut(parts, here, int(getattr(placement, "split_factor", 1))))
    return cuts


def _runs(numel: int, cuts: Sequence[Cut], held: int) -> list[Run]:
    """The indices of a dim that lie here.

    Where rows do not divide evenly, FSDP2 holds what it has cut itself, and that may be another number of rows than
    its placements give by the rules of a DTensor.
    """
    later = [math.prod(c.parts for c in cuts[n + 1 :] if c.split_factor == 1) for n in range(len(cuts))]
    if all(cut.split_factor in (1, rest) for cut, rest in zip(cuts, later, strict=True)):
        own = _cut(numel, sorted(cuts, key=lambda cut: cut.split_factor > 1), strided=False)
        if sum(run.length for run in own) == held:
            return own
    return _cut(numel, cuts, strided=True)


def _cut(numel: int, cuts: Sequence[Cut], strided: bool) -> list[Run]:
    """Apply cuts one after the other; a strided one takes its part of each of ``split_factor`` chunks."""
    runs = [Run(0, numel)] if numel else []
    for cut in cuts:
        chunks = [runs]
        if strided and cut.split_factor > 1:
            chunks = [_chunk(runs, cut.split_factor, n) for n in range(cut.split_factor)]
        runs = _joined([run for part in chunks for run in _chunk(part, cut.parts, cut.here)])
    return runs


def _chunk(runs: Sequence[Run], parts: int, index: int) -> list[Run]:
    """What torch.chunk gives for the concatenated runs."""
    start, length = chunk(sum(run.length for run in runs), parts, index)
    found, position = [], 0
    for run in runs:
        low, high = max(start - position, 0), min(start + length - position, run.length)
        if low < high:
            found.append(Run(run.start + low, high - low))
        position += run.length
    return found


def _joined(runs: Sequence[Run]) -> list[Run]:
    """Neighbours as one."""
    found: list[Run] = []
    for run in runs:
        if found and found[-1].start + found[-1].length == run.start:
            found[-1] = Run(found[-1].start, found[-1].length + run.length)
        else:
            found.append(run)
    return found
