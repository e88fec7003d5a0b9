"""Memory, bytes, FLOPs and balance of a run before it starts: the plan of every rank, from shapes alone.

The geometry is the optimizer's own (`plan`, `boxes`), and so is the state: stacks are built on the meta device and
measured.
"""

from __future__ import annotations

import gc
import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import torch

from shampoo_deepspeed.algorithm.block_stack import CACHED_BYTES, REFRESHED_BYTES, BlockStack
from shampoo_deepspeed.algorithm.elementwise import TOGETHER, Elementwise, ElementwiseShard
from shampoo_deepspeed.algorithm.formats import base_name
from shampoo_deepspeed.distributed.frameworks import Parameter
from shampoo_deepspeed.engine.policy import Policy, matrix_of, policy_of
from shampoo_deepspeed.engine.refresh_schedule import refresh_phases
from shampoo_deepspeed.estimate.expected_shards import SUB_GROUP_SIZE, UnitLayout, layouts
from shampoo_deepspeed.geometry.boxes import FlatRange, merged_places
from shampoo_deepspeed.geometry.plan import Plan, bucket_elements
from shampoo_deepspeed.geometry.shards import HeldBox, Sharding, Shards
from shampoo_deepspeed.options.choices import DTYPES
from shampoo_deepspeed.options.config import ShampooConfig
from shampoo_deepspeed.options.rules import expanded

META = torch.device("meta")
# Bytes for each element of 8-bit AdamW: two codes, and two float32 scales of 256 elements.
ADAMW_8BIT = 2.0 + 2.0 * 4.0 / 256.0
# Temporaries of a step, measured on a CPU (`benchmarks.memory`). In rows that are computed together: those of passes
# over moments, and those that a refresh finds. Then tensors of a refresh, and of element-wise pieces.
WIDE_PASSES, NARROW_PASSES, NARROW_ROWS, REFRESHED_PIECES = 5, 9, 4, 9
WIDE_PIECES, NARROW_PIECES = 4, 9
IN_FLIGHT = 8  # buckets that move at a time, each way
# Steps of a window that are listed one by one, if it has no block that refreshes later.
LISTED = 1000


class Step(NamedTuple):
    """FLOPs of a step: of the slowest rank, of its refreshes, and the mean of the ranks.

    Ranks wait for one another in each step unit, so the slowest ranks of all units add up.
    """

    slowest: float
    refresh: float
    mean: float


@dataclass
class Estimate:
    """What a run will hold, move and compute, rank by rank.

    Args:
        world_size: number of ranks.
        elements: number of elements of all parameters.
        preconditioned: number of elements of the parameters with factor matrices.
        blocks: number of blocks.
        units: number of step units.
        state: bytes on each rank by kind of state ("factor", "root", "exp_avg", "second_moment", ...).
        adamw: bytes of AdamW's two float32 moments on each rank under the same framework.
        step_peak: bytes that a step needs on each rank above weights, gradients and state, with blocks on CPUs.
        sent: bytes that each rank sends in a step.
        received: bytes that each rank receives in a step.
        collectives: all-to-all calls per step of ranks that compute on CPUs.
        accelerator_collectives: the same on accelerators, which have larger buckets.
        accelerator_buckets: how many buckets these have, also where nothing moves.
        stacks: each rank's blocks by step unit, number of their options and shape.
        held: preconditioned elements that lie on each rank, with those of replicas.
        elementwise: element-wise elements on each rank.
        configs: the options by number.
        loads: FLOPs on each rank per step, with the refreshes' share; all units together.
        window: each step of a refresh window; of a very long one only the first steps.
        further: the steps of the window after these, all of which equal the last of them.
    """

    world_size: int
    elements: int = 0
    preconditioned: int = 0
    blocks: int = 0
    units: int = 0
    state: dict[str, list[int]] = field(default_factory=dict)
    adamw: list[int] = field(default_factory=list)
    step_peak: list[int] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)
    received: list[int] = field(default_factory=list)
    collectives: int = 0
    accelerator_collectives: int = 0
    accelerator_buckets: int = 0
    stacks: list[Counter[tuple[int, int, tuple[int, ...]]]] = field(default_factory=list)
    held: list[int] = field(default_factory=list)
    elementwise: list[int] = field(default_factory=list)
    configs: Mapping[int, ShampooConfig] = field(default_factory=dict)
    loads: list[float] = field(default_factory=list)
    window: list[Step] = field(default_factory=list)
    further: int = 0

    @property
    def state_bytes(self) -> list[int]:
        """Bytes of all state on each rank."""
        return [sum(kinds) for kinds in zip(*self.state.values(), strict=True)] or [0] * self.world_size

    @property
    def adamw_8bit(self) -> list[float]:
        """Bytes of 8-bit AdamW's moments on each rank: a byte each, and float32 scales of 256 elements (torchao)."""
        return [size / 8.0 * ADAMW_8BIT for size in self.adamw]

    @property
    def peak_share(self) -> float:
        """The largest ``step_peak`` as a share of the state on its rank."""
        pairs = zip(self.step_peak, self.state_bytes, strict=True)
        return max((peak / state for peak, state in pairs if state), default=0.0)

    @property
    def bytes_per_element(self) -> float:
        """Bytes of state for each element whose state a rank holds, replicas included."""
        held = sum(self.adamw) / 8.0
        return sum(self.state_bytes) / held if held else 0.0

    @property
    def imbalance(self) -> float:
        """The slowest rank's load divided by the mean; 1.0 is perfect."""
        mean = sum(self.loads) / self.world_size
        return max(self.loads) / mean if mean else 1.0

    @property
    def slowest_step(self) -> float:
        """FLOPs of the slowest rank in the slowest step of a window."""
        return max((step.slowest for step in self.window), default=0.0)

    @property
    def fastest_step(self) -> float:
        """FLOPs of the slowest rank in the fastest step of a window."""
        return min((step.slowest for step in self.window), default=0.0)

    @property
    def mean_step(self) -> float:
        """FLOPs of the slowest rank per step, over a window."""
        return self.mean_over_window([step.slowest for step in self.window])

    def mean_over_window(self, values: Sequence[float]) -> float:
        """The mean over all steps of a window, given the values of those in ``window``."""
        return (sum(values) + self.further * values[-1]) / (len(values) + self.further) if values else 0.0

    def add_state(self, kind: str, rank: int, nbytes: int) -> None:
        """Count bytes of a kind on a rank."""
        self.state.setdefault(kind, [0] * self.world_size)[rank] += nbytes

    def to_json(self) -> dict[str, object]:
        """The numbers as JSON types; those of ranks as mean and largest."""
        return {
            "world_size": self.world_size,
            "elements": self.elements,
            "preconditioned_elements": self.preconditioned,
            "blocks": self.blocks,
            "step_units": self.units,
            "state_bytes": {kind: _over_ranks(values) for kind, values in self.state.items()},
            "state_bytes_total": _over_ranks(self.state_bytes),
            "adamw_state_bytes": _over_ranks(self.adamw),
            "adamw_8bit_state_bytes": _over_ranks(self.adamw_8bit),
            "state_bytes_per_element": self.bytes_per_element,
            "peak_bytes_of_a_step": _over_ranks(self.step_peak),
            "bytes_sent_per_step": _over_ranks(self.sent),
            "bytes_received_per_step": _over_ranks(self.received),
            "collectives_per_step": self.collectives,
            "collectives_per_step_on_accelerators": self.accelerator_collectives,
            "flops_per_step": _over_ranks(self.loads),
            "flops_of_slowest_rank": {
                "mean_step": self.mean_step,
                "fastest_step": self.fastest_step,
                "slowest_step": self.slowest_step,
            },
            "imbalance": self.imbalance,
            "imbalance_of_worst_step": max((s.slowest / s.mean for s in self.window if s.mean), default=1.0),
        }


def _over_ranks(values: Sequence[float]) -> dict[str, float]:
    return {"mean": sum(values) / max(1, len(values)), "largest": max(values, default=0)}


def estimate(
    parameters: Sequence[Parameter],
    world_size: int,
    framework: str,
    config: ShampooConfig,
    *,
    shard_ranks: int | None = None,
    sub_group_size: int = SUB_GROUP_SIZE,
    weights_dtype: str = "float32",
) -> Estimate:
    """Plan a run of these parameters as one parameter group, and count what it needs.

    Args:
        parameters: in the order in which the optimizer will be given them, all with group 0.
        framework: one of ``expected_shards.FRAMEWORKS``.
        shard_ranks: under ``hsdp``, ranks that each parameter is sharded over.
        sub_group_size: under ``zero3``, DeepSpeed's option.
        weights_dtype: dtype of what the optimizer updates: "float32" under ZeRO, which keeps masters; narrower ones
            get a float32 master from the optimizer if ``master_weights`` is on.

    Raises:
        ValueError: for a framework, a number of ranks or a dtype that is not allowed.
    """
    if weights_dtype not in ("float64", "float32", "bfloat16", "float16"):
        raise ValueError(f"weights_dtype {weights_dtype!r} is not allowed: float64, float32, bfloat16 or float16")
    if framework.startswith("zero"):
        weights_dtype = "float32"
    made = Estimate(world_size)
    made.adamw, made.loads = [0] * world_size, [0.0] * world_size
    made.sent, made.received, made.step_peak = ([0] * world_size for _ in range(3))
    made.held, made.elementwise = [0] * world_size, [0] * world_size
    made.stacks = [Counter() for _ in range(world_size)]
    made.configs = expanded({0: config})
    policies = {parameter.key: policy_of(parameter, config) for parameter in parameters}
    phases = refresh_phases(parameters, policies, expanded({0: config}))
    refreshing = 1 + max((max(found) for found in phases.values() if found), default=0)
    listed = min(config.precondition_frequency, max(refreshing + 1, LISTED))
    made.window = [Step(0.0, 0.0, 0.0)] * listed
    made.further = config.precondition_frequency - listed
    with _collector_paused():
        for layout in layouts(framework, [p.shape for p in parameters], world_size, shard_ranks, sub_group_size):
            members = [parameters[n] for n in layout.parameters]
            unit = _Unit(members, policies, layout, config, getattr(torch, weights_dtype), phases)
            unit.plan_onto(made)
            unit.measure_onto(made)
            unit.peak_onto(made)
    return made


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Pause the garbage collector.

    A thousand ranks' shards are a million small tuples without a cycle; walking them would take half of the time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Unit:
    """One step unit: its plan, and what the plan means for memory and traffic."""

    def __init__(
        self,
        parameters: Sequence[Parameter],
        policies: Mapping[str, Policy],
        layout: UnitLayout,
        config: ShampooConfig,
        weights: torch.dtype,
        phases: Mapping[str, tuple[int, ...]],
    ) -> None:
        self.parameters, self.layout, self.config, self.weights = parameters, layout, config, weights
        self.phases = phases
        self.dtype = torch.promote_types(weights, torch.float32)
        self.configs = expanded({0: config})
        self.policies = [policies[p.key] for p in parameters]
        preconditioned = [n for n, t in enumerate(self.policies) if t.preconditioned]
        self.number_of = {n: number for number, n in enumerate(preconditioned)}

    def plan_onto(self, made: Estimate) -> None:
        """Make the plan and add up work and traffic."""
        config = self.config
        matrices = [
            matrix_of(t, self.configs[t.options], self.phases.get(p.key))
            for p, t in zip(self.parameters, self.policies, strict=True)
            if t.preconditioned
        ]
        bucket = bucket_elements(config.bucket_mb, self.dtype.itemsize)
        self.plan = plan = Plan(matrices, self._merged_shards(), bucket, made.loads)
        wire = (DTYPES[config.communication_dtype] if config.communication_dtype else self.dtype).itemsize
        for rank, (sent, received) in enumerate(plan.traffic):
            made.sent[rank] += sent * wire
            made.received[rank] += received * wire
        made.collectives += sum(plan.gradients_move) + sum(plan.updates_move)
        buckets, collectives = plan.collectives(bucket, on_accelerators=True)
        made.accelerator_buckets += buckets
        made.accelerator_collectives += collectives
        made.loads = [a + b for a, b in zip(made.loads, plan.loads, strict=True)]
        made.window = [_with_unit(step, plan, offset) for offset, step in enumerate(made.window)]
        made.blocks += len(plan.blocks)
        made.units += 1
        made.elements += sum(math.prod(p.shape) for p in self.parameters)
        made.preconditioned += sum(math.prod(m.shape) for m in matrices)

    def _merged_shards(self) -> Shards:
        """The shards of preconditioned parameters, in their merged shapes."""
        known: dict[tuple[Sharding, tuple[tuple[int, ...], ...]], Sharding] = {}
        for n in self.number_of:
            sharding, dims, shape = self.layout.shards.shardings[n], self.policies[n].dims, self.parameters[n].shape
            if (sharding, dims) not in known:
                places = ((merged_places(box, shape, dims), ranks) for box, ranks in sharding.parts)
                known[sharding, dims] = Sharding(HeldBox(p.box, ranks) for found, ranks in places for p in found)
        shardings = [known[self.layout.shards.shardings[n], self.policies[n].dims] for n in self.number_of]
        return Shards(self.layout.shards.world_size, shardings)

    def measure_onto(self, made: Estimate) -> None:
        """Add up the bytes of state: blocks at their owners, the rest with the shards."""
        counts = Counter(
            (owner, b.group, b.box.lengths) for owner, b in zip(self.plan.owners, self.plan.blocks, strict=True)
        )
        kinds_of_blocks = {(number, shape) for _, number, shape in counts}
        sizes = {(n, shape): block_bytes(shape, self.configs[n], self.dtype) for n, shape in kinds_of_blocks}
        for (rank, number, shape), count in counts.items():
            made.stacks[rank][made.units, number, shape] = count
            for kind, nbytes in sizes[number, shape].items():
                made.add_state(kind, rank, count * nbytes)

        alike: Counter[tuple[Sharding, int, str]] = Counter()
        for n, sharding in enumerate(self.layout.shards.shardings):
            if n not in self.number_of:
                alike[sharding, self.policies[n].options, self.policies[n].method] += 1
        for (sharding, number, method), many in alike.items():
            nbytes_of = self._elementwise_bytes(number, method)
            for box, ranks in sharding.parts:
                for rank in ranks:
                    made.elementwise[rank] += many * box.numel
                for rank, (kind, nbytes) in itertools.product(ranks, nbytes_of.items()):
                    made.add_state(kind, rank, many * box.numel * nbytes)
        for n in self.number_of:
            for box, ranks in self.layout.shards.shardings[n].parts:
                for rank in ranks:
                    made.held[rank] += box.numel
        for rank, size in enumerate(self.layout.sizes):
            made.adamw[rank] += 8 * size
            if self.config.momentum:
                made.add_state("momentum", rank, size * self.dtype.itemsize)
            if self.config.ema_decay:
                made.add_state("average", rank, size * self.dtype.itemsize)
            if self.config.master_weights and self.weights != self.dtype:
                made.add_state("master", rank, size * self.dtype.itemsize)

    def peak_onto(self, made: Estimate) -> None:
        """Count what a step of this unit holds at most; units step one after another."""
        plan, config, item = self.plan, self.config, self.dtype.itemsize
        in_buckets: Counter[tuple[int, int]] = Counter()
        largest = [0] * plan.world_size
        for block, owner, bucket in zip(plan.blocks, plan.owners, plan.buckets, strict=True):
            in_buckets[owner, bucket] += block.box.numel * item
            largest[owner] = max(largest[owner], block.box.numel * item)
        buckets = [0] * plan.world_size
        for (owner, _), size in in_buckets.items():
            buckets[owner] = max(buckets[owner], size)
        at_once = plan.bucket_count > 1 and self.weights == self.dtype and config.applies_at_once
        narrow = any(of != "float32" for of in config.formats.values())
        pieces = (NARROW_PIECES if config.elementwise_format == "bfloat16" else WIDE_PIECES) * item
        wire = (DTYPES[config.communication_dtype] if config.communication_dtype else self.dtype).itemsize
        under_way = min(1.0, IN_FLIGHT / max(1, plan.bucket_count)) * wire
        for rank, (most, block_size, traffic) in enumerate(zip(buckets, largest, plan.traffic, strict=True)):
            rows, refreshed = min(CACHED_BYTES, most), max(block_size, min(REFRESHED_BYTES, most))
            held = (NARROW_ROWS if narrow else 1) * rows + REFRESHED_PIECES * refreshed
            held = most + max(held, (NARROW_PASSES if narrow else WIDE_PASSES) * rows)
            if at_once:
                held = max(held, pieces * min(TOGETHER, made.elementwise[rank]))
            else:
                updates = self.layout.sizes[rank] * item
                copies = updates if config.momentum and not config.nesterov else 0
                held = updates + max(held, copies)
            made.step_peak[rank] = max(made.step_peak[rank], held + int(under_way * sum(traffic)))

    @cache  # noqa: B019  a unit lives as long as its estimate is made
    def _elementwise_bytes(self, number: int, method: str) -> dict[str, int]:
        """Bytes of one element's state by kind."""
        shard = ElementwiseShard(0, "", number, method, FlatRange(0, 1), 0, FlatRange(0, 1), 1.0, 1)
        return _bytes_by_kind(dict(Elementwise([shard], self.configs, META, self.dtype).tensors))


def _with_unit(step: Step, plan: Plan, offset: int) -> Step:
    """A step of the window with a unit's work added."""
    loads = plan.loads_at(offset)
    slowest = max(range(plan.world_size), key=loads.__getitem__)
    refresh = loads[slowest] - plan.step_loads[slowest]
    return Step(step.slowest + loads[slowest], step.refresh + refresh, step.mean + sum(loads) / plan.world_size)


def block_bytes(shape: tuple[int, ...], config: ShampooConfig, dtype: torch.dtype = torch.float32) -> dict[str, int]:
    """Bytes of one block's state by kind: those of a stack with one row."""
    return _bytes_by_kind(BlockStack([""], shape, config, META, dtype).tensors)


def _bytes_by_kind(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Bytes by name; names that differ only in a trailing number (factor matrices of each dim) are added up."""
    kinds: dict[str, int] = defaultdict(int)
    for name, tensor in tensors.items():
        kinds[re.sub(r"_\d+$", "", base_name(name))] += tensor.nbytes
    return kinds
