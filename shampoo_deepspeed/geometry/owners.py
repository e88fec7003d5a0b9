"""Gives each block one owner: equal work on all ranks in every step, and blocks stay where they lie where they may.

Pure integers and floats, no tensors; the same on all ranks.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from shampoo_deepspeed.geometry.holders import BlockHolders

LOCALITY_TOLERANCE = 0.04


class Work(Protocol):
    """What a block costs: FLOPs a step with the refresh's share, FLOPs of a refresh, and when it is refreshed."""

    @property
    def cost(self) -> float: ...

    @property
    def refresh(self) -> float: ...

    @property
    def phase(self) -> int | None: ...


def assign(
    blocks: Sequence[Work], holders: Sequence[BlockHolders], world_size: int, prior_loads: Sequence[float]
) -> tuple[list[int], list[float]]:
    """Owners of the blocks, and each rank's load (FLOPs a step).

    Largest block first, each to the rank that holds most of it while that keeps balance, else to the least loaded:
    longest-processing-time scheduling with a preference for locality. No rank's load exceeds the larger of
    (1 + tolerance) times the mean and the mean plus one block. Where refreshes are staggered this is so in
    each phase (by refresh cost; of ranks that are equal in it the least loaded one is taken), because a step takes
    as long as its slowest rank.

    Args:
        holders: who holds each block.
        prior_loads: loads of earlier units, which decide between ranks that are equal in this one.
    """
    ledger = _Ledger(world_size, prior_loads)
    owners = [0] * len(blocks)
    so_far: list[float] = []
    for phase, members in sorted(_by_phase(blocks).items()):
        so_far += [blocks[b].cost for b in members]
        refreshes = [blocks[b].refresh for b in members] if phase >= 0 else None
        ledger.open_phase(_limit(so_far, world_size), _limit(refreshes, world_size) if refreshes else None)
        for number in sorted(members, key=lambda b: (-blocks[b].cost, b)):
            owner = ledger.local(holders[number], blocks[number])
            if owner is None:
                owner = ledger.least(range(world_size))
            ledger.add(owner, blocks[number])
            owners[number] = owner
    return owners, ledger.loads


def _by_phase(blocks: Sequence[Work]) -> dict[int, list[int]]:
    """Numbers of the blocks by phase; -1: those that are refreshed together."""
    phases: dict[int, list[int]] = {}
    for number, block in enumerate(blocks):
        phases.setdefault(-1 if block.phase is None else block.phase, []).append(number)
    return phases


def best_possible(costs: Sequence[float], world_size: int) -> float:
    """A load that the slowest of these ranks cannot stay below, however blocks are assigned.

    The mean; and since of k * ranks + 1 blocks some rank has k + 1, that many times the least of them.
    """
    falling = sorted(costs, reverse=True)
    whole_blocks = (share * cost for share, cost in enumerate(falling[::world_size], 1))
    return max([sum(costs) / world_size, *whole_blocks], default=0.0)


def _limit(costs: Sequence[float], world_size: int) -> float:
    """Up to this load a block may stay where it lies."""
    return max((1.0 + LOCALITY_TOLERANCE) * sum(costs) / world_size, best_possible(costs, world_size))


class _Ledger:
    """Loads of the ranks while owners are chosen."""

    def __init__(self, world_size: int, prior_loads: Sequence[float]) -> None:
        self.loads = [0.0] * world_size
        self._carried = prior_loads

    def open_phase(self, limit: float, phase_limit: float | None) -> None:
        """Begin with the blocks of the next phase; limits of what may stay local: all in all, and in this phase."""
        self._limit, self._phase_limit = limit, phase_limit
        self._phase_loads = [0.0] * len(self.loads)
        self._queues: dict[Iterable[int], _Queue] = {}

    def add(self, rank: int, block: Work) -> None:
        self.loads[rank] += block.cost
        if self._phase_limit is not None:
            self._phase_loads[rank] += block.refresh

    def least(self, ranks: Sequence[int]) -> int:
        """The least loaded of these ranks."""
        if len(ranks) == 1:
            return ranks[0]
        if ranks not in self._queues:
            self._queues[ranks] = _Queue(ranks, self._key)
        return self._queues[ranks].least()

    def local(self, holders: BlockHolders, block: Work) -> int | None:
        """Of the ranks that hold most of the block the least loaded one that has room for it."""
        if len(holders.held_boxes) == 1 and len(holders.held_boxes[0].ranks) == len(self.loads):
            return None  # replicated on all ranks: locality does not matter
        best = None
        for elements, ranks in holders.candidates:
            if best is not None and elements < best[0]:
                break
            rank = self.least(ranks)
            fits = self.loads[rank] + block.cost <= self._limit
            if self._phase_limit is not None:
                fits = fits and self._phase_loads[rank] + block.refresh <= self._phase_limit
            if fits and (best is None or self._key(rank) < best[1]):
                best = elements, self._key(rank), rank
        return None if best is None else best[2]

    def _key(self, rank: int) -> tuple[float, float, float, int]:
        return self._phase_loads[rank], self.loads[rank], self._carried[rank], rank


class _Queue:
    """Finds the least of some ranks by a key that only grows."""

    def __init__(self, ranks: Iterable[int], key: Callable[[int], tuple[float, float, float, int]]) -> None:
        self._key = key
        self._heap = [key(rank) for rank in ranks]
        heapq.heapify(self._heap)

    def least(self) -> int:
        while True:
            rank = self._heap[0][3]
            current = self._key(rank)
            if current == self._heap[0]:
                return rank
            heapq.heapreplace(self._heap, current)
