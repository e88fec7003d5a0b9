"""A step unit: local tensors that are stepped together, with their plan, exchange, stacks and element-wise parts.

Built once, from a framework's layout, at the first step of its tensors.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from shampoo_deepspeed.algorithm.block_stack import BlockStack
from shampoo_deepspeed.algorithm.elementwise import Elementwise, ElementwiseShard
from shampoo_deepspeed.algorithm.grafting import is_normalized
from shampoo_deepspeed.distributed.collectives import all_gather_numbers, object_of_rank, on_all_ranks
from shampoo_deepspeed.distributed.exchange import Exchange
from shampoo_deepspeed.distributed.frameworks import Layout, LayoutError, compute_dtype
from shampoo_deepspeed.distributed.process_groups import delay_exit_for_gloo
from shampoo_deepspeed.engine.policy import Policy, matrix_of
from shampoo_deepspeed.geometry.boxes import Box, FlatRange, PlacedBox, merged_places, tiling_error
from shampoo_deepspeed.geometry.plan import Matrix, Plan, bucket_elements
from shampoo_deepspeed.geometry.shards import Messages, Sharding, Shards
from shampoo_deepspeed.options.checks import bad, short
from shampoo_deepspeed.options.choices import DTYPES
from shampoo_deepspeed.options.config import ShampooConfig
from shampoo_deepspeed.runtime.devices import communication_device, device_of_blocks, has_float64
from shampoo_deepspeed.runtime.metrics import Measured, UpdateMeter

if TYPE_CHECKING:  # it imports this file
    from shampoo_deepspeed.engine.agreement import Unread

# How many sums each set of replicas compares; see `agreement`.
LANES = 4


@dataclass(frozen=True)
class UpdateRange:
    """Elements of a flattened local tensor that are updated alike; all take part in a step or none does.

    ``parameter`` is the first parameter in the range.
    """

    tensor: int
    elements: FlatRange
    parameter: int
    decays: bool


class SharedPart(NamedTuple):
    """A part of a parameter in a flattened local tensor; ``share`` is one over the number of ranks that hold it."""

    parameter: int
    tensor: int
    elements: slice
    share: float


class StepUnit:
    """Everything that one step of these tensors needs.

    Args:
        layout: the adapter's description of this rank's tensors.
        policies: by parameter key.
        configs: options by the numbers of parameter groups and rules; the same on all ranks.
        prior_loads: each rank's load from units built before.
        phases: the refresh phases of each parameter's blocks by its key, if refreshes are staggered.

    Raises:
        LayoutError: on all ranks alike, if ranks disagree or the shards do not tile the parameters.
    """

    @torch.inference_mode(False)  # state that is made in it could not be changed later; so for all that makes some
    def __init__(
        self,
        layout: Layout,
        policies: Mapping[str, Policy],
        configs: Mapping[int, ShampooConfig],
        prior_loads: Sequence[float] | None = None,
        phases: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        self.layout = layout
        self._phases = phases or {}
        self.tensors = layout.tensors
        self.parameters = layout.parameters
        self.group = layout.process_group
        self.rank = dist.get_rank(self.group) if self.group is not None else 0
        self.world_size = dist.get_world_size(self.group) if self.group is not None else 1
        if dist.is_initialized():
            delay_exit_for_gloo()
        locals_ = self.local_tensors()
        self.sizes = [t.numel() for t in locals_]
        self.device = locals_[0].device if locals_ else torch.device("cpu")
        self.dtype = compute_dtype(locals_[0]) if locals_ else torch.float32
        self.policies = [policies[p.key] for p in self.parameters]
        self.configs = configs  # as they were when an option changed last
        self._locals = [_kind(tensor) for tensor in locals_]
        self.shapes = [tensor.shape for tensor in locals_]
        self.left_out: frozenset[int] = frozenset()  # local tensors that are in none of the groups now
        self.update_meter = UpdateMeter()
        self._reset_counts()
        self._build(configs, prior_loads or [0.0] * self.world_size)

    def _reset_counts(self) -> None:
        # Steps taken by each parameter. All ranks count alike, without a read of the device.
        self.steps = [0] * len(self.parameters)
        self.step_tensor = as_count(0)  # the largest of them, in the form that torch's tools expect
        self.unread: Unread | None = None
        self.rejected_in_a_row = 0
        # Flat buffers on the ranks that hold the shards, by kind and local tensor.
        self.buffers: dict[str, dict[int, Tensor]] = {"momentum": {}, "master": {}, "average": {}}
        self.own_weights: dict[int, Tensor] = {}  # by local tensor, while it has its average

    def release_state(self) -> None:
        """Free the memory of the state; `new_state` must follow before the unit is used."""
        self._reset_counts()
        for stack in self.stacks:
            stack.release()
        self.elementwise.release()

    @torch.inference_mode(False)
    def new_state(self) -> None:
        """Start again with new state, after `release_state`; all else stays as it was built."""
        for stack in self.stacks:
            stack.renew()
        self.elementwise.renew()

    def has_its_tensors(self) -> bool:
        """Whether the local tensors still have the shapes, dtypes and devices that the unit was built for."""
        return [_kind(tensor) for tensor in self.local_tensors()] == self._locals

    def _build(self, configs: Mapping[int, ShampooConfig], prior_loads: Sequence[float]) -> None:
        with on_all_ranks(self.group, self.device):
            self.compute_device = self._compute_device(configs[self.parameters[0].group].compute_device)
            for device in dict.fromkeys((self.device, self.compute_device)):
                if not has_float64(device):
                    raise LayoutError(
                        f"{device} has no float64, in which Shampoo decomposes matrices and adds squares of gradients; "
                        "train on the CPU or on a device that has it"
                    )
        places = self._placed_shards()
        everyone = self._gather(places, configs)
        self._check_tiling(everyone)
        self._find_replicas(places, everyone)
        number_of = {p: n for n, p in enumerate(p for p, t in enumerate(self.policies) if t.preconditioned)}
        matrices = [self._matrix(p, configs) for p in number_of]
        first = configs[self.parameters[0].group]
        item = self.dtype.itemsize
        shards = everyone.chosen(number_of)
        bucket = bucket_elements(first.bucket_mb, item)
        self.plan = Plan(matrices, shards, bucket, prior_loads, self._on_accelerators)
        wire = DTYPES[first.communication_dtype] if first.communication_dtype else self.dtype
        own = [(tensor, place) for p, tensor, place in sorted(places, key=_by_box) if p in number_of]
        self.loads_so_far = [a + b for a, b in zip(prior_loads, self.plan.loads, strict=True)]
        self.exchange = Exchange(
            self.plan, self.rank, own, self.group, wire, self.device, self.compute_device, self.dtype
        )
        self.block_parameters = list(number_of)
        # Ranks own different blocks, so memory may be too small on some of them only.
        with on_all_ranks(self.group, self.device):
            self.stacks = [self._stack(blocks, configs) for blocks in self.exchange.stacks]
            self.elementwise = self._elementwise_part(places, everyone, configs)
        # The parameter of each row of each stack.
        self.parameters_of_rows = [
            [self.block_parameters[self.plan.blocks[block].parameter] for block in blocks]
            for blocks in self.exchange.stacks
        ]
        self.shared_parts = self._shared_parts(places, everyone)
        self.update_ranges = self._joined_ranges()
        self._ranges_of_tensor: dict[int, list[UpdateRange]] = defaultdict(list)
        for joined in self.update_ranges:
            self._ranges_of_tensor[joined.tensor].append(joined)
        # The numbers of the options of element-wise parameters, which may ask for norms at any step.
        self.elementwise_options = {t.options for t in self.policies if not t.preconditioned}
        self._note_methods()

    def _note_methods(self) -> None:
        """Note what the methods of element-wise parameters mean for a step."""
        self.needs_norms = any(is_normalized(t.method) for t in self.policies if not t.preconditioned)
        # Whether a parameter's state shows how large its gradients have been, if they are not normalized.
        self.scaled = [t.preconditioned or not is_normalized(t.method) for t in self.policies]

    def follow(self, policies: Mapping[str, Policy], configs: Mapping[int, ShampooConfig]) -> None:
        """Use options that have changed since. Methods of element-wise parameters may be others; all else is fixed."""
        self.configs = configs
        methods = [policies[p.key].method for p in self.parameters]
        if methods != [policy.method for policy in self.policies]:
            self.policies = [policies[p.key] for p in self.parameters]
            self.elementwise.use_methods(methods, configs)
            self._note_methods()

    def _placed_shards(self) -> list[tuple[int, int, PlacedBox]]:
        """This rank's shards as (parameter, tensor, place in its merged shape)."""
        placed = []
        for shard in self.layout.shards:
            policy, shape = self.policies[shard.parameter], self.parameters[shard.parameter].shape
            if not shape:
                placed.append((shard.parameter, shard.tensor, PlacedBox(Box((0,), (1,)), shard.offset, (1,))))
                continue
            for place in merged_places(shard.box, shape, policy.dims, shard.offset):
                placed.append((shard.parameter, shard.tensor, place))
        return placed

    def _gather(self, places: Sequence[tuple[int, int, PlacedBox]], configs: Mapping[int, ShampooConfig]) -> Shards:
        """All ranks' shards; raises on all of them if any two see different parameters, policies or options.

        Every rank receives one short message of every other: a digest of what must be equal, and the boxes, which
        are named once for all layers. What differs is fetched from the two ranks that the error names.
        """
        mine = [(p, place.box) for p, _, place in places]
        self._on_accelerators = self.compute_device.type != "cpu"  # of any rank, as all need the same plan
        if self.world_size == 1:
            if self.layout.problem:
                raise LayoutError(self.layout.problem)
            return Shards.of_ranks([mine], len(self.parameters))
        options = {g: configs[g].to_json() for g in sorted({p.group for p in self.parameters})}
        phases = {key: hash(found) for key, found in self._phases.items()}  # all blocks' phases would be megabytes
        described = (str(replace(policy, cuts=())) for policy in self.policies)  # cuts follow from the rest
        signature = [
            (p.key, p.shape, p.group, policy, phases.get(p.key))
            for p, policy in zip(self.parameters, described, strict=True)
        ]
        common = (options, signature, str(self.dtype))
        digest = int.from_bytes(sha256(repr(common).encode()).digest()[:7], "big")
        messages = Messages([(p.key, t.merged) for p, t in zip(self.parameters, self.policies, strict=True)])
        numbers = [int(self.layout.problem is not None), digest, int(self._on_accelerators), *messages.write(mine)]
        gathered = all_gather_numbers(numbers, self.group, self.device)
        for rank, (problem, other, *_) in enumerate(gathered):
            if problem:
                raise LayoutError(f"rank {rank}: {object_of_rank(rank, self.layout.problem, self.group, self.device)}")
            if other != gathered[0][1]:
                left, right = (object_of_rank(r, common, self.group, self.device) for r in (0, rank))
                raise LayoutError(f"ranks 0 and {rank} disagree: {_difference(left, right)}")
        self._on_accelerators = any(numbers[2] for numbers in gathered)
        return messages.read([numbers[3:] for numbers in gathered])

    def _check_tiling(self, everyone: Shards) -> None:
        members: dict[tuple[Sharding, tuple[int, ...]], list[int]] = defaultdict(list)
        for p, sharding in enumerate(everyone.shardings):
            members[sharding, self.policies[p].merged].append(p)
        wrong = []
        for (sharding, shape), numbers in members.items():
            error = tiling_error(shape, [box for box, _ in sharding.parts])
            wrong += [(p, error) for p in numbers if error]
        if wrong:
            lines = [f"{self.parameters[p].key} {self.parameters[p].shape}: {error}" for p, error in sorted(wrong)]
            raise LayoutError(
                "the framework's shards do not cover every element of these parameters exactly once:\n  "
                + "\n  ".join(lines)
            )

    def _find_replicas(self, places: Sequence[tuple[int, int, PlacedBox]], everyone: Shards) -> None:
        """Give every set of ranks that hold equal shards a slot, by which they compare gradients at each step."""
        parts = (part for sharding in dict.fromkeys(everyone.shardings) for part in sharding.parts)
        sets = sorted({ranks for _, ranks in parts if len(ranks) > 1})
        self.slots, slot_of = len(sets), {ranks: n for n, ranks in enumerate(sets)}
        self._slot_of_tensor: dict[int, tuple[int, int]] = {}  # slot, and parameter, which spreads tensors over lanes
        apart = set()  # tensors that are only in part the same on the same ranks
        for p, tensor, place in places:
            slot = slot_of.get(everyone.shardings[p].ranks_of(place.box), -1)
            if self._slot_of_tensor.setdefault(tensor, (slot, p))[0] != slot:
                apart.add(tensor)
        for tensor in apart:
            del self._slot_of_tensor[tensor]
        here = {slot for slot, _ in self._slot_of_tensor.values()}
        self._lanes_here = [slot in here for slot in range(self.slots) for _ in range(LANES)]
        self._lanes: dict[tuple[int, ...], Tensor] = {}

    def lanes_of(self, tensors: Sequence[int]) -> Tensor:
        """The lane of each of these local tensors, on the device; tensors without replicas are in the last one."""
        key = tuple(tensors)
        if key not in self._lanes:
            found = [self._slot_of_tensor.get(tensor, (-1, 0)) for tensor in tensors]
            lanes = [slot * LANES + p % LANES if slot >= 0 else self.slots * LANES for slot, p in found]
            self._lanes[key] = torch.tensor(lanes, device=self.device)
        return self._lanes[key]

    def lanes_here(self) -> Tensor:
        """Which lanes belong to replicas on this rank, on the device."""
        if () not in self._lanes:
            self._lanes[()] = torch.tensor(self._lanes_here, device=self.device)
        return self._lanes[()]

    def _matrix(self, p: int, configs: Mapping[int, ShampooConfig]) -> Matrix:
        policy = self.policies[p]
        return matrix_of(policy, configs[policy.options], self._phases.get(self.parameters[p].key))

    def block_key(self, block: int) -> str:
        """The key of a block of the plan: parameter key and index of the block within it."""
        found = self.plan.blocks[block]
        return f"{self.parameters[self.block_parameters[found.parameter]].key}/{found.index}"

    def _stack(self, blocks: Sequence[int], configs: Mapping[int, ShampooConfig]) -> BlockStack:
        group, shape = self.plan.blocks[blocks[0]].stack
        keys = [self.block_key(b) for b in blocks]
        phases = [phase for b in blocks if (phase := self.plan.blocks[b].phase) is not None]
        return BlockStack(keys, shape, configs[group], self.compute_device, self.dtype, phases or None, group)

    def _compute_device(self, wanted: str) -> torch.device:
        try:
            return device_of_blocks(wanted, self.device, self.group)
        except ValueError as error:
            raise bad("compute_device", wanted, f"here it can be {error}") from None

    def _shared_parts(self, places: Sequence[tuple[int, int, PlacedBox]], everyone: Shards) -> list[SharedPart]:
        ranks = {(tensor, place.offset): everyone.shardings[p].ranks_of(place.box) for p, tensor, place in places}
        return [
            SharedPart(
                s.parameter, s.tensor, slice(s.offset, s.offset + s.box.numel), 1.0 / len(ranks[s.tensor, s.offset])
            )
            for s in self.layout.shards
            if s.box.numel
        ]

    def _elementwise_part(
        self,
        places: Sequence[tuple[int, int, PlacedBox]],
        everyone: Shards,
        configs: Mapping[int, ShampooConfig],
    ) -> Elementwise:
        shards_here = []
        for p, tensor, place in places:
            if not self.policies[p].preconditioned:
                parameter, policy = self.parameters[p], self.policies[p]
                (start,), (stop,) = place.box.offsets, place.box.ends
                elements, share = FlatRange(start, stop), 1.0 / len(everyone.shardings[p].ranks_of(place.box))
                local, numel = elements.shift(place.offset - start), math.prod(parameter.shape)
                how = parameter.key, policy.options, policy.method
                shard = ElementwiseShard(p, *how, elements, tensor, local, share, numel, policy.rate)
                shards_here.append(shard)
        return Elementwise(shards_here, configs, self.device, self.dtype)

    def _joined_ranges(self) -> list[UpdateRange]:
        """The ranges of local tensors that shards cover; neighbours that decay alike are joined, without padding."""
        joined: list[UpdateRange] = []
        for shard in sorted(self.layout.shards, key=lambda s: (s.tensor, s.offset)):
            decays = self.policies[shard.parameter].decays
            elements = FlatRange(shard.offset, shard.offset + shard.box.numel)
            last = joined[-1] if joined else None
            if last and (last.tensor, last.elements.stop, last.decays) == (shard.tensor, elements.start, decays):
                joined[-1] = replace(last, elements=FlatRange(last.elements.start, elements.stop))
            else:
                joined.append(UpdateRange(shard.tensor, elements, shard.parameter, decays))
        return joined

    def range_at(self, tensor: int, element: int) -> UpdateRange:
        """The range of updates that has an element of a flattened local tensor."""
        ranges = self._ranges_of_tensor[tensor]
        return ranges[bisect_right(ranges, element, key=lambda joined: joined.elements.start) - 1]

    def local_tensors(self) -> list[Tensor]:
        """The local parts of the unit's tensors, as they are now; views that can be updated."""
        return [self.layout.local(tensor) for tensor in self.tensors]

    def any_rank(self, flags: Sequence[bool]) -> list[bool]:
        """For each flag, whether it is set on any rank of the unit; read on the CPU."""
        if self.group is None:
            return list(flags)
        values = torch.tensor(flags, dtype=torch.float32, device=communication_device(self.group, self.device))
        dist.all_reduce(values, group=self.group)
        return [value > 0 for value in values.tolist()]

    @torch.inference_mode(False)
    def buffer(self, kind: str, tensor: int) -> Tensor:
        """The flat buffer of a kind for a local tensor, of the same size; zeros at first."""
        buffers = self.buffers[kind]
        if tensor not in buffers:
            buffers[tensor] = torch.zeros(self.sizes[tensor], dtype=self.dtype, device=self.device)
        return buffers[tensor]

    @property
    def fresh(self) -> bool:
        """Whether no step has been taken yet."""
        return not any(self.steps)

    def measured(self) -> Measured:
        """The meters of this unit's steps on this rank."""
        stacks = [stack.meter for stack in self.stacks]
        return Measured(self.exchange.meter, stacks, len(self.plan.owned[self.rank]), self.update_meter)


@torch.inference_mode(False)
def as_count(number: int) -> Tensor:
    """A count as torch's optimizers hold it, always float32 on the CPU: in 16 bits 1,001 would be 1,000."""
    return torch.tensor(float(number), dtype=torch.float32, device="cpu")


def _kind(local: Tensor) -> tuple[torch.device, torch.dtype, torch.Size]:
    return local.device, local.dtype, local.shape


def _by_box(placed: tuple[int, int, PlacedBox]) -> tuple[int, Box]:
    """The order in which a plan takes a rank's shards."""
    parameter, _, place = placed
    return parameter, place.box


def _difference(left: Any, right: Any) -> str:
    """The first difference between what two ranks have in common with others: options, parameters and the dtype."""
    for group in left[0].keys() & right[0].keys():
        of_left, of_right = left[0][group], right[0][group]
        names = [name for name, value in of_left.items() if repr(value) != repr(of_right[name])]
        if names:
            values = (f"{name!r} = {short(of_left[name])} against {short(of_right[name])}" for name in names)
            return f"options of parameter group {group}, which all ranks must give alike: {'; '.join(values)}"
    for a, b in zip(left[1], right[1], strict=False):
        if a != b:
            kinds = ("name", "shape", "group", "policy", "phases of refreshes")
            differing = (f"{kind} {x} against {y}" for kind, x, y in zip(kinds, a, b, strict=True) if x != y)
            return f"parameter {a[0]!r}: {'; '.join(differing)}"
    return f"{len(left[1])} parameters in {left[2]} against {len(right[1])} in {right[2]}"
