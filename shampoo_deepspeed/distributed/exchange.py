"""Executes a plan: moves gradients to the owners of blocks in buckets, and updates back.

Everything that moves is described once, at the first step, as placed boxes of base tensors. A step only makes views,
packs them in one call, and runs `all_to_all_single` with uneven splits on the group that spans the shards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from shampoo_deepspeed.geometry.boxes import FlatRange, PlacedBox
from shampoo_deepspeed.geometry.plan import Plan, Transfer, Transfers
from shampoo_deepspeed.runtime.devices import communication_device
from shampoo_deepspeed.runtime.metrics import ExchangeMeter

TransfersByPeer: TypeAlias = dict[int, list[Transfer]]
# The number of a flat base tensor, and a box in it.
BaseBox: TypeAlias = tuple[int, PlacedBox]
Resolver: TypeAlias = Callable[[Transfer], BaseBox]


def views(bases: Sequence[Tensor], boxes: Sequence[BaseBox]) -> list[Tensor]:
    """Views of these boxes of the base tensors."""
    starts = [b.storage_offset() for b in bases]
    return [bases[n].as_strided(place.box.lengths, place.strides, starts[n] + place.offset) for n, place in boxes]


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)


def _cut(buffer: Tensor, boxes: Sequence[BaseBox]) -> list[Tensor]:
    """A contiguous buffer cut into consecutive tensors of the boxes' shapes."""
    if not boxes:
        return []
    parts = torch.split(buffer, [place.box.numel for _, place in boxes])
    return [part.view(place.box.lengths) for part, (_, place) in zip(parts, boxes, strict=True)]


@dataclass
class Route:
    """One direction of one bucket: boxes in send order and receive order, and elements per peer."""

    send: list[BaseBox] = field(default_factory=list)
    receive: list[BaseBox] = field(default_factory=list)
    send_splits: list[int] = field(default_factory=list)
    receive_splits: list[int] = field(default_factory=list)


@dataclass
class Bucket:
    """Rows of this rank's stacks that travel together, and their routes.

    ``rows`` are ranges of rows, each with the number of its stack; base tensor i of blocks is that of ``rows[i]``.
    """

    rows: list[tuple[int, FlatRange]]
    moves: bool
    local_shards: list[BaseBox]
    local_blocks: list[BaseBox]
    gradients: Route
    updates: Route


@dataclass
class CommStats:
    """Bytes that this rank sent to and received from other ranks in the last step, and by how many collectives."""

    bytes_sent: int = 0
    bytes_received: int = 0
    collectives: int = 0


class Exchange:
    """The buckets of one rank, resolved to memory.

    Args:
        plan: the unit's plan.
        rank: this rank's number within the group.
        shards: this rank's shards, in the order given to the plan.
        group: process group that spans the shards; None if there is only one rank.
        dtype: dtype of what is sent.
        device: device of the base tensors and the stacks, even if this rank has none.
    """

    def __init__(
        self,
        plan: Plan,
        rank: int,
        shards: Sequence[BaseBox],
        group: dist.ProcessGroup | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.plan, self.rank, self.group, self.dtype, self.device = plan, rank, group, dtype, device
        self._shards = shards
        self._place_of_block: dict[int, tuple[int, int]] = {}
        self.stacks: list[list[int]] = []
        self._lay_out_stacks()
        self.buckets = [self._resolve(n, t) for n, t in enumerate(plan.transfers(rank))]
        self.waits = False  # whether to wait for each collective as soon as it is started, to debug
        self.stats = CommStats()
        self.meter = ExchangeMeter()

    def _lay_out_stacks(self) -> None:
        keys: dict[tuple[int, tuple[int, ...]], int] = {}
        for block in self.plan.owned[self.rank]:
            key = self.plan.blocks[block].stack
            if key not in keys:
                keys[key] = len(self.stacks)
                self.stacks.append([])
            stack = self.stacks[keys[key]]
            self._place_of_block[block] = (keys[key], len(stack))
            stack.append(block)

    def _resolve(self, number: int, t: Transfers) -> Bucket:
        rows: list[tuple[int, FlatRange]] = []
        for stack, blocks in enumerate(self.stacks):
            inside = [row for row, block in enumerate(blocks) if self.plan.buckets[block] == number]
            if inside:
                rows.append((stack, FlatRange(inside[0], inside[-1] + 1)))
        base_of = {stack: (base, inside.start) for base, (stack, inside) in enumerate(rows)}

        def at_block(transfer: Transfer) -> BaseBox:
            block = self.plan.blocks[transfer.block].box
            stack, row = self._place_of_block[transfer.block]
            base, first = base_of[stack]
            return base, PlacedBox.contiguous(block, (row - first) * block.numel).part(transfer.box)

        def at_shard(transfer: Transfer) -> BaseBox:
            base, place = self._shards[transfer.shard]
            return base, place.part(transfer.box)

        def route(out: TransfersByPeer, sender: Resolver, into: TransfersByPeer, receiver: Resolver) -> Route:
            made = Route()
            for peer in range(self.plan.world_size):
                leaving, coming = out.get(peer, []), into.get(peer, [])
                made.send += [sender(transfer) for transfer in leaving]
                made.receive += [receiver(transfer) for transfer in coming]
                made.send_splits.append(sum(transfer.box.numel for transfer in leaving))
                made.receive_splits.append(sum(transfer.box.numel for transfer in coming))
            return made

        return Bucket(
            rows=rows,
            moves=self.plan.moving[number],
            local_shards=[at_shard(transfer) for transfer in t.local],
            local_blocks=[at_block(transfer) for transfer in t.local],
            gradients=route(t.gradients_out, at_shard, t.gradients_in, at_block),
            updates=route(t.updates_out, at_block, t.updates_in, at_shard),
        )

    def begin_step(self, waits: bool) -> None:
        """Count a step.

        Args:
            waits: wait for each collective as soon as it is started, to debug.
        """
        self.stats = CommStats()
        self.meter.steps += 1
        self.waits = waits

    def send_gradients(self, bucket: Bucket, shard_gradients: Sequence[Tensor]) -> Transit:
        """Start moving a bucket's gradients from the shards to their owners."""
        with self._measured(bucket):
            return self._start(bucket, bucket.gradients, shard_gradients)

    def receive_gradients(
        self, bucket: Bucket, transit: Transit, shard_gradients: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> None:
        """Fill the block gradients (one tensor [rows, *block shape] per entry of ``bucket.rows``)."""
        _copy(views(gradients, bucket.local_blocks), self._rounded(views(shard_gradients, bucket.local_shards)))
        with self._measured(bucket):
            self._finish(transit, bucket.gradients, gradients)

    def send_updates(self, bucket: Bucket, updates: Sequence[Tensor], shard_updates: Sequence[Tensor]) -> Transit:
        """Start moving updates from the owners to all holders; what stays here is copied at once."""
        _copy(views(shard_updates, bucket.local_shards), self._rounded(views(updates, bucket.local_blocks)))
        with self._measured(bucket):
            return self._start(bucket, bucket.updates, updates)

    def receive_updates(self, bucket: Bucket, transit: Transit, shard_updates: Sequence[Tensor]) -> None:
        """Fill this rank's parts of the updates."""
        with self._measured(bucket):
            self._finish(transit, bucket.updates, shard_updates)

    def _measured(self, bucket: Bucket) -> AbstractContextManager[None]:
        return self.meter.watch.span(self.device) if bucket.moves else nullcontext()

    def _start(self, bucket: Bucket, route: Route, bases: Sequence[Tensor]) -> Transit:
        if not bucket.moves:
            return Transit(None, None, None)
        packed = torch.empty(sum(route.send_splits), dtype=self.dtype, device=self.device)
        _copy(_cut(packed, route.send), views(bases, route.send))
        wire = communication_device(self.group, self.device)
        outgoing = packed.to(wire)
        incoming = torch.empty(sum(route.receive_splits), dtype=self.dtype, device=wire)
        work = dist.all_to_all_single(
            incoming, outgoing, route.receive_splits, route.send_splits, group=self.group, async_op=True
        )
        if self.waits:
            work.wait()
        self.stats.bytes_sent += outgoing.nbytes
        self.stats.bytes_received += incoming.nbytes
        self.stats.collectives += 1
        self.meter.bytes_moved += outgoing.nbytes + incoming.nbytes
        return Transit(work, outgoing, incoming)

    def _finish(self, transit: Transit, route: Route, bases: Sequence[Tensor]) -> None:
        if transit.work is None or transit.incoming is None:
            return
        transit.work.wait()
        _copy(views(bases, route.receive), _cut(transit.incoming.to(self.device), route.receive))

    def _rounded(self, staying: list[Tensor]) -> list[Tensor]:
        """Tensors that stay here, rounded like those that are sent: else replicas and owners would drift apart."""
        if self.plan.world_size == 1:
            return staying
        return [t.to(self.dtype) if t.dtype.itemsize > self.dtype.itemsize else t for t in staying]


class Transit(NamedTuple):
    """A bucket in flight: the collective's handle and the buffers that it still uses."""

    work: dist.Work | None
    outgoing: Tensor | None
    incoming: Tensor | None
