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

from shampoo_deepspeed.geometry.boxes import BaseBox, FlatRange, PlacedBox, Take
from shampoo_deepspeed.geometry.plan import Plan, Transfer, Transfers
from shampoo_deepspeed.runtime.devices import Copy, Staging, communication_device
from shampoo_deepspeed.runtime.metrics import ExchangeMeter

TransfersByPeer: TypeAlias = dict[int, list[Transfer]]
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
    """One direction of one bucket: boxes in send order and receive order, and elements per peer.

    ``moves`` is the same on all ranks: whether anything travels between any two of them.
    """

    moves: bool
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
        shards_on: device of the base tensors, even if this rank has none.
        blocks_on: device of the stacks; None if it is the same.
        wide: dtype of the stacks' gradients and updates; None if it is that of what is sent.
    """

    def __init__(
        self,
        plan: Plan,
        rank: int,
        shards: Sequence[BaseBox],
        group: dist.ProcessGroup | None,
        dtype: torch.dtype,
        shards_on: torch.device,
        blocks_on: torch.device | None = None,
        wide: torch.dtype | None = None,
    ) -> None:
        self.plan, self.rank, self.group, self.dtype = plan, rank, group, dtype
        self.shards_on, self.blocks_on = shards_on, blocks_on or shards_on
        # What stays on this rank is rounded as what is sent, unless there is only this rank.
        exact = wide or dtype
        self._staying = dtype if plan.world_size > 1 and dtype.itemsize < exact.itemsize else exact
        self._staging = None if self.shards_on == self.blocks_on else Staging(self.blocks_on)
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

        def route(
            moves: bool, out: TransfersByPeer, sender: Resolver, into: TransfersByPeer, receiver: Resolver
        ) -> Route:
            made = Route(moves)
            for peer in range(self.plan.world_size):
                leaving, coming = out.get(peer, []), into.get(peer, [])
                made.send += [sender(transfer) for transfer in leaving]
                made.receive += [receiver(transfer) for transfer in coming]
                made.send_splits.append(sum(transfer.box.numel for transfer in leaving))
                made.receive_splits.append(sum(transfer.box.numel for transfer in coming))
            return made

        return Bucket(
            rows=rows,
            local_shards=[at_shard(transfer) for transfer in t.local],
            local_blocks=[at_block(transfer) for transfer in t.local],
            gradients=route(self.plan.gradients_move[number], t.gradients_out, at_shard, t.gradients_in, at_block),
            updates=route(self.plan.updates_move[number], t.updates_out, at_block, t.updates_in, at_shard),
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
        with self._measured(bucket.gradients):
            staged = self._stage(shard_gradients, bucket.local_shards)
            return self._start(bucket.gradients, shard_gradients, self.blocks_on, staged)

    def receive_gradients(
        self, bucket: Bucket, transit: Transit, shard_gradients: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> None:
        """Fill the block gradients (one tensor [rows, *block shape] per entry of ``bucket.rows``)."""
        self._finish_local(transit, shard_gradients, bucket.local_shards, gradients, bucket.local_blocks)
        with self._measured(bucket.gradients):
            self._finish(transit, bucket.gradients, gradients)

    def send_updates(
        self, bucket: Bucket, updates: Sequence[Tensor], shard_updates: Sequence[Tensor] | Take[Tensor]
    ) -> Transit:
        """Start moving updates from the owners to all holders; what stays on this device is delivered at once."""
        if self._staging is None:
            _deliver(shard_updates, bucket.local_shards, self._rounded(views(updates, bucket.local_blocks)))
        with self._measured(bucket.updates):
            staged = self._stage(updates, bucket.local_blocks)
            return self._start(bucket.updates, updates, self.shards_on, staged)

    def receive_updates(self, bucket: Bucket, transit: Transit, shard_updates: Sequence[Tensor] | Take[Tensor]) -> None:
        """Fill this rank's parts of the updates, or give them away."""
        if transit.staged is not None:
            _deliver(shard_updates, bucket.local_shards, _cut(transit.staged.arrive(), bucket.local_shards))
        with self._measured(bucket.updates):
            self._finish(transit, bucket.updates, shard_updates)

    def _finish_local(
        self,
        transit: Transit,
        sources: Sequence[Tensor],
        source_boxes: Sequence[BaseBox],
        targets: Sequence[Tensor],
        boxes: Sequence[BaseBox],
    ) -> None:
        """Copy what stays on this rank."""
        if transit.staged is None:
            _copy(views(targets, boxes), self._rounded(views(sources, source_boxes)))
        else:
            _copy(views(targets, boxes), _cut(transit.staged.arrive(), boxes))

    def _measured(self, route: Route) -> AbstractContextManager[None]:
        return self.meter.watch.span(self.shards_on) if route.moves else nullcontext()

    def _stage(self, bases: Sequence[Tensor], boxes: Sequence[BaseBox]) -> Copy | None:
        """Start moving what stays on this rank to the other device, if there are two."""
        if self._staging is None or not boxes:
            return None
        return self._staging.begin(self._packed(bases, boxes, self._staying))

    def _packed(self, bases: Sequence[Tensor], boxes: Sequence[BaseBox], dtype: torch.dtype) -> Tensor:
        """The boxes in one buffer on their device, one after the other; in pinned memory, if it is to be staged."""
        numel = sum(place.box.numel for _, place in boxes)
        device = bases[0].device if bases else self.shards_on
        pins = self._staging is not None and device.type == "cpu"
        packed = torch.empty(numel, dtype=dtype, device=device, pin_memory=pins)
        _copy(_cut(packed, boxes), views(bases, boxes))
        return packed

    def _start(self, route: Route, bases: Sequence[Tensor], target: torch.device, staged: Copy | None) -> Transit:
        """Start a direction of a bucket, towards this device; what stays on this rank is staged already, if at all."""
        if not route.moves:
            return Transit(staged=staged)
        outgoing = self._on_wire(self._packed(bases, route.send, self.dtype))
        pins = self._staging is not None and outgoing.device.type == "cpu"
        count = sum(route.receive_splits)
        incoming = torch.empty(count, dtype=self.dtype, device=outgoing.device, pin_memory=pins)
        work = dist.all_to_all_single(
            incoming, outgoing, route.receive_splits, route.send_splits, group=self.group, async_op=True
        )
        if self.waits:
            work.wait()
        self.stats.bytes_sent += outgoing.nbytes
        self.stats.bytes_received += incoming.nbytes
        self.stats.collectives += 1
        self.meter.bytes_moved += outgoing.nbytes + incoming.nbytes
        arriving = None
        if self._staging is not None and target.type == "cpu" and incoming.device.type != "cpu":
            arriving = self._staging.begin(incoming, work)
        return Transit(work, outgoing, incoming, arriving, staged)

    def _on_wire(self, packed: Tensor) -> Tensor:
        """The buffer on the device from which the group sends."""
        if self._staging is None:
            return packed.to(communication_device(self.group, self.shards_on))
        wire = staged_wire(self.group, self.blocks_on)
        return packed if packed.device == wire else self._staging.begin(packed).arrive()

    def _finish(self, transit: Transit, route: Route, bases: Sequence[Tensor] | Take[Tensor]) -> None:
        if transit.work is None or transit.incoming is None:
            return
        if transit.arriving is not None:
            incoming = transit.arriving.arrive()
        else:
            transit.work.wait()
            incoming = transit.incoming
        there = self.shards_on if callable(bases) else bases[0].device if bases else incoming.device
        if incoming.device != there:
            staged = None if self._staging is None else self._staging.begin(incoming)
            incoming = incoming.to(there) if staged is None else staged.arrive()
        _deliver(bases, route.receive, _cut(incoming, route.receive))

    def _rounded(self, staying: list[Tensor]) -> list[Tensor]:
        """Tensors that stay here, rounded like those that are sent: else replicas and owners would drift apart."""
        if self.plan.world_size == 1:
            return staying
        return [t.to(self.dtype) if t.dtype.itemsize > self.dtype.itemsize else t for t in staying]


def _deliver(target: Sequence[Tensor] | Take[Tensor], boxes: Sequence[BaseBox], pieces: Sequence[Tensor]) -> None:
    """Copy pieces to their boxes in base tensors, or give them to a function."""
    if callable(target):
        target(boxes, pieces)
    else:
        _copy(views(target, boxes), list(pieces))


def staged_wire(group: dist.ProcessGroup | None, accelerator: torch.device) -> torch.device:
    """The device from which a group sends what is computed on an accelerator: that one, unless it only serves CPUs."""
    serves = accelerator.type in dist.get_backend_config(group)
    return accelerator if serves else torch.device("cpu")


class Transit(NamedTuple):
    """A bucket in flight: the collective's handle, the buffers that it still uses, and copies between two devices."""

    work: dist.Work | None = None
    outgoing: Tensor | None = None
    incoming: Tensor | None = None
    arriving: Copy | None = None
    staged: Copy | None = None
