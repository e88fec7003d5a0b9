"""What each framework will put on each rank, from shapes alone, before anything runs. Pure integers, no tensors.

These are the boxes that the adapters find at the first step; `tests/estimate/test_planner.py` and the distributed
checks compare them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shampoo_deepspeed.geometry.boxes import Box, FlatRange, chunk, range_to_boxes, whole
from shampoo_deepspeed.geometry.shards import HeldBox, Sharding, Shards

FRAMEWORKS = ("zero1", "zero2", "zero3", "fsdp2", "ddp", "hsdp")
# DeepSpeed's default of zero_optimization.sub_group_size, elements of one rank (deepspeed/runtime/zero/config.py).
SUB_GROUP_SIZE = 10**9
# ZeRO-1/2 pad their flat buffer to this many elements a rank (nccl_start_alignment_factor in stage_1_and_2.py).
ALIGNMENT = 2


@dataclass(frozen=True)
class UnitLayout:
    """A step unit as a framework will make it.

    Args:
        parameters: which parameters are in it, by number.
        shards: what each rank holds of them; parameters are counted as in ``parameters``.
        sizes: for each rank the elements of its local tensors, padding included.
    """

    parameters: Sequence[int]
    shards: Shards
    sizes: Sequence[int]


def layouts(
    framework: str,
    shapes: Sequence[tuple[int, ...]],
    world_size: int,
    shard_ranks: int | None = None,
    sub_group_size: int = SUB_GROUP_SIZE,
) -> list[UnitLayout]:
    """The step units of one parameter group under a framework.

    Args:
        framework: one of ``FRAMEWORKS``; ``ddp`` is ZeRO-0 too, with the replicas sharing the work.
        shapes: global shapes in the optimizer's order, none with a dim of 0.
        world_size: data-parallel ranks.
        shard_ranks: under ``hsdp``, ranks that a parameter is sharded over; the others are replicas.
        sub_group_size: under ``zero3``, elements of one rank at which DeepSpeed closes a sub-group.

    Raises:
        ValueError: for an unknown framework, and for ranks that do not divide evenly.
    """
    if framework not in FRAMEWORKS:
        raise ValueError(f"framework {framework!r} is not allowed: one of {', '.join(FRAMEWORKS)}")
    if world_size < 1:
        raise ValueError(f"world_size {world_size} is not allowed: an integer >= 1")
    numbers = range(len(shapes))
    if framework == "ddp":
        everyone = tuple(range(world_size))
        shardings = {shape: Sharding([HeldBox(whole(shape), everyone)]) for shape in shapes}
        shards = Shards(world_size, [shardings[shape] for shape in shapes])
        return [UnitLayout(numbers, shards, [sum(map(math.prod, shapes))] * world_size)]
    if framework in ("zero1", "zero2"):
        return [_flat_buffer(shapes, world_size)]
    if framework == "zero3":
        groups = _sub_groups([-(-math.prod(shape) // world_size) for shape in shapes], sub_group_size)
        return [_per_parameter(group, [shapes[n] for n in group], world_size, 1, _flat_part) for group in groups]
    sharded = world_size if framework == "fsdp2" or shard_ranks is None else shard_ranks
    if sharded < 1:
        raise ValueError(f"shard_ranks {sharded} is not allowed: an integer >= 1 that divides world_size")
    if world_size % sharded:
        raise ValueError(f"shard_ranks {sharded} is not allowed: it must divide world_size, which is {world_size}")
    # The mesh is (replicate, shard): neighbours share a replica.
    return [_per_parameter(numbers, shapes, sharded, world_size // sharded, _chunk)]


def _flat_buffer(shapes: Sequence[tuple[int, ...]], ranks: int) -> UnitLayout:
    """ZeRO-1/2: equal contiguous partitions of all parameters, one after another."""
    total = sum(map(math.prod, shapes))
    part = -(-total // (ALIGNMENT * ranks)) * ALIGNMENT
    shards: list[list[tuple[int, Box]]] = [[] for _ in range(ranks)]
    begin = 0
    for number, shape in enumerate(shapes):
        end = begin + math.prod(shape)
        for rank in range(begin // part, (end - 1) // part + 1):
            held = FlatRange(max(begin, rank * part), min(end, (rank + 1) * part))
            shards[rank] += [(number, box) for box in range_to_boxes(shape, held.shift(-begin))]
        begin = end
    return UnitLayout(
        range(len(shapes)), Shards.of_ranks(shards, len(shapes)), [part if held else 0 for held in shards]
    )


def _sub_groups(partitions: Sequence[int], limit: int) -> list[list[int]]:
    """ZeRO-3 closes a sub-group once its partitions reach the limit (stage3.py, _create_fp16_sub_groups)."""
    groups: list[list[int]] = [[]]
    filled = 0
    for number, size in enumerate(partitions):
        if groups[-1] and filled >= limit:
            groups.append([])
            filled = 0
        groups[-1].append(number)
        filled += size
    return groups


def _per_parameter(
    numbers: Sequence[int],
    shapes: Sequence[tuple[int, ...]],
    ranks: int,
    copies: int,
    part: Callable[[tuple[int, ...], int, int], tuple[Sequence[Box], int]],
) -> UnitLayout:
    """Every parameter is cut over so many ranks, and there are so many copies of them.

    ``part`` returns boxes and local elements, once for each shape.
    """
    holding = [tuple(range(rank, ranks * copies, ranks)) for rank in range(ranks)]
    shardings: dict[tuple[int, ...], Sharding] = {}
    sizes = [0] * ranks
    for shape, count in Counter(shapes).items():
        parts = [part(shape, ranks, rank) for rank in range(ranks)]
        boxes = (HeldBox(box, held) for (found, _), held in zip(parts, holding, strict=True) for box in found)
        shardings[shape] = Sharding(boxes)
        sizes = [total + count * size for total, (_, size) in zip(sizes, parts, strict=True)]
    return UnitLayout(numbers, Shards(ranks * copies, [shardings[shape] for shape in shapes]), sizes * copies)


def _flat_part(shape: tuple[int, ...], ranks: int, rank: int) -> tuple[Sequence[Box], int]:
    """ZeRO-3: equal flat ranges; the last ones are padded."""
    numel = math.prod(shape)
    return range_to_boxes(shape, chunk(numel, ranks, rank)), -(-numel // ranks)


def _chunk(shape: tuple[int, ...], ranks: int, rank: int) -> tuple[Sequence[Box], int]:
    """FSDP2: rows as torch.chunk cuts them; the last ranks may hold fewer, or nothing."""
    rows = chunk(shape[0], ranks, rank)
    box = Box((rows.start, *(0,) * (len(shape) - 1)), (rows.size, *shape[1:]))
    return ([box] if rows.size else []), box.numel
