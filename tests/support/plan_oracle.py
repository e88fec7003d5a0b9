"""Plans computed by brute force: all transfers of all ranks at once, and owners by a search over all ranks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from shampoo_deepspeed.geometry.boxes import Box
from shampoo_deepspeed.geometry.owners import LOCALITY_TOLERANCE, best_possible
from shampoo_deepspeed.geometry.plan import Plan, Transfer, Transfers

Held = Sequence[Sequence[tuple[int, Box]]]


def boxes_of_blocks(plan: Plan, shards: Held) -> list[dict[Box, dict[int, int]]]:
    """Return each block's boxes, and for each box the shard number at every rank that holds it."""
    held_boxes: list[dict[Box, dict[int, int]]] = []
    for block in plan.blocks:
        boxes: dict[Box, dict[int, int]] = defaultdict(dict)
        for rank, held in enumerate(shards):
            for shard, (number, box) in enumerate(held):
                common = block.box.intersect(box) if number == block.parameter else None
                if common is not None:
                    boxes[common][rank] = shard
        held_boxes.append(dict(sorted(boxes.items())))
    return held_boxes


def transfers(plan: Plan, shards: Held) -> list[list[Transfers]]:
    """Return for each rank what ``plan.transfers`` must return."""
    out = [[Transfers() for _ in range(plan.bucket_count)] for _ in range(plan.world_size)]
    for block, boxes in enumerate(boxes_of_blocks(plan, shards)):
        owner, bucket = plan.owners[block], plan.buckets[block]
        for box, by_rank in boxes.items():
            source = owner if owner in by_rank else sorted(by_rank)[block % len(by_rank)]
            for holder, shard in by_rank.items():
                if holder == owner:
                    out[owner][bucket].local.append(Transfer(block, box, shard))
                    continue
                out[owner][bucket].updates_out[holder].append(Transfer(block, box, -1))
                out[holder][bucket].updates_in[owner].append(Transfer(block, box, shard))
            if source != owner:
                out[owner][bucket].gradients_in[source].append(Transfer(block, box, -1))
                out[source][bucket].gradients_out[owner].append(Transfer(block, box, by_rank[source]))
    return out


def elements(transfers: Sequence[Transfers]) -> tuple[int, int]:
    """Elements (sent, received) by these transfers."""
    out = (found for t in transfers for found in (*t.gradients_out.values(), *t.updates_out.values()))
    into = (found for t in transfers for found in (*t.gradients_in.values(), *t.updates_in.values()))
    return sum(t.box.numel for found in out for t in found), sum(t.box.numel for found in into for t in found)


def owners(plan: Plan, shards: Held, prior_loads: Sequence[float]) -> list[int]:
    """Choose owners by the plan's rule, with a full search over the ranks for every block."""
    held_boxes = boxes_of_blocks(plan, shards)
    ranks = range(plan.world_size)
    loads = [0.0] * plan.world_size
    chosen = [-1] * len(plan.blocks)
    so_far: list[float] = []
    phases = sorted({-1 if b.phase is None else b.phase for b in plan.blocks})
    for phase in phases:
        members = [n for n, b in enumerate(plan.blocks) if (-1 if b.phase is None else b.phase) == phase]
        so_far += [plan.blocks[n].cost for n in members]
        refreshes = [plan.blocks[n].refresh for n in members] if phase >= 0 else [0.0]
        limits = [
            max((1 + LOCALITY_TOLERANCE) * sum(c) / plan.world_size, best_possible(c, plan.world_size))
            for c in (so_far, refreshes)
        ]
        in_phase = [0.0] * plan.world_size
        for number in sorted(members, key=lambda n: (-plan.blocks[n].cost, n)):
            block = plan.blocks[number]
            refresh = block.refresh if phase >= 0 else 0.0

            def key(rank: int, in_phase: list[float] = in_phase) -> tuple[float, float, float, int]:
                return in_phase[rank], loads[rank], prior_loads[rank], rank

            together: dict[tuple[int, ...], int] = defaultdict(int)
            for box, by_rank in held_boxes[number].items():
                together[tuple(sorted(by_rank))] += box.numel
            whole_everywhere = len(held_boxes[number]) == 1 and len(together) == 1 and len(*together) == plan.world_size
            fitting = []
            for group, numel in together.items():
                rank = min(group, key=key)
                fits = loads[rank] + block.cost <= limits[0] and in_phase[rank] + refresh <= limits[1]
                if fits and 8 * numel >= block.box.numel and not whole_everywhere:
                    fitting.append((-numel, key(rank)))
            owner = min(fitting)[1][3] if fitting else min(ranks, key=key)
            loads[owner] += block.cost
            in_phase[owner] += refresh
            chosen[number] = owner
    return chosen
