"""Takes the real first step of single ranks of large jobs on paper: no memory for weights, no other rank.

    python -m benchmarks.many_ranks [--ranks 64 256 1024 4096] [--framework fsdp2 hsdp zero3] [--model llama-3-70b]

Tensors are on torch's meta device and the process group is torch's fake one, so plan, agreement, exchange lists and
state are those of a real run. What other ranks would send at the first step comes from the planner; a rank's own
message must equal the planner's. FSDP2 and HSDP are torch's own. ZeRO-3 cannot run on the meta device. Its tensors and
attributes are made here as DeepSpeed leaves them.

Each rank count gets a process of its own, in which the first, a middle and the last rank take a step. All that a rank
holds, sends and owns is compared with the planner's numbers.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import math
import multiprocessing
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple, cast
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.report import machine, table
from shampoo_deepspeed import Shampoo
from shampoo_deepspeed.distributed.frameworks import Parameter
from shampoo_deepspeed.engine.policy import policy_of
from shampoo_deepspeed.estimate import Estimate, estimate
from shampoo_deepspeed.estimate.expected_shards import UnitLayout, layouts
from shampoo_deepspeed.estimate.model_shapes import parameters_of
from shampoo_deepspeed.geometry.boxes import merged_places
from shampoo_deepspeed.geometry.shards import Held, Messages
from shampoo_deepspeed.options.config import ShampooConfig

FRAMEWORKS = ("fsdp2", "hsdp", "zero3")
REPLICAS = 8  # under HSDP: 8 x 128 on 1,024 ranks
CPU, META = torch.device("cpu"), torch.device("meta")
# Before its boxes a rank sends a mark of a problem, a digest, and whether it computes on an accelerator.
LEADING = 3


@dataclass
class Job:
    """A model under a framework on so many ranks; ``replicas`` matters under HSDP only."""

    framework: str
    parameters: Sequence[Parameter]
    ranks: int
    options: dict[str, Any]
    replicas: int = REPLICAS

    @property
    def shard_ranks(self) -> int:
        return self.ranks // self.replicas

    @property
    def config(self) -> ShampooConfig:
        return ShampooConfig.from_options(self.options)

    @property
    def units(self) -> list[UnitLayout]:
        """The step units as the planner expects them."""
        shapes = [parameter.shape for parameter in self.parameters]
        return layouts(self.framework, shapes, self.ranks, self.shard_ranks)

    def estimate(self) -> Estimate:
        """The planner's numbers of every rank."""
        return estimate(self.parameters, self.ranks, self.framework, self.config, shard_ranks=self.shard_ranks)


class Wire:
    """Stands for all other ranks: fills in what they send at the first step, and counts what this rank sends.

    Args:
        rows: for each step unit the messages of all ranks, without the `LEADING` numbers that precede them.
    """

    def __init__(self, rank: int, rows: Sequence[Sequence[Sequence[int]]]) -> None:
        self.rank = rank
        self.waiting = list(rows)
        self.collectives = self.gathered = self.sent = self.received = self.objects = 0

    def all_reduce(self, values: Tensor, op: Any = None, group: Any = None) -> None:
        if op == dist.ReduceOp.MAX and values.dtype == torch.int64:  # the longest message
            values.fill_(LEADING + max(map(len, self.waiting[0])))
        # No other rank fails, so the lowest rank that does is this one or none. All else is on the meta device.

    def all_gather_into_tensor(self, out: Tensor, mine: Tensor, group: Any = None) -> None:
        """Fill in the rows of all ranks, with this rank's digest of what must be equal for all of them.

        All say that they compute on the CPU, as the planner assumes; the meta device would count as an accelerator.
        """
        own, rows = mine.tolist(), self.waiting.pop(0)
        if own[1 + LEADING : 1 + own[0]] != list(rows[self.rank]):
            raise RuntimeError(f"rank {self.rank} holds other boxes than the planner expects")
        for row, numbers in zip(out.view(len(rows), -1), rows, strict=True):
            filled = torch.tensor([LEADING + len(numbers), *own[1:LEADING], 0, *numbers])
            row[: len(filled)] = filled
        self.gathered += out.nbytes

    def all_to_all_single(
        self, out: Tensor, mine: Tensor, into: list[int], out_of: list[int], group: Any = None, async_op: bool = False
    ) -> Any:
        assert (mine.numel(), out.numel()) == (sum(out_of), sum(into))
        self.sent += mine.nbytes
        self.received += out.nbytes
        self.collectives += 1
        return SimpleNamespace(wait=lambda: None)

    def objects_sent(self, *_: Any, **__: Any) -> None:
        """Refuse: no Python object may be gathered over all ranks."""
        raise RuntimeError("a Python object was gathered over all ranks")


class Accepted(TorchDispatchMode):
    """A context in which a value of the meta device that is read on the CPU is True."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return True
        return func(*args, **(kwargs or {}))


class StepFlags:
    """The flags of a step that was accepted, in place of a copy from a device."""

    def __init__(self, flags: Tensor) -> None:
        del flags

    def read(self) -> list[float]:
        return [0.0, 1.0, 0.0, 0.0]


@contextlib.contextmanager
def _on_paper(wire: Wire) -> Iterator[None]:
    """Run a step without devices and other ranks: collectives go to ``wire``, and nothing is measured on a device."""
    nothing = mock.Mock(side_effect=lambda *_, **__: contextlib.nullcontext())
    with contextlib.ExitStack() as stack:
        for name in ("all_reduce", "all_gather_into_tensor", "all_to_all_single"):
            stack.enter_context(mock.patch.object(dist, name, getattr(wire, name)))
        for name in ("all_gather_object", "gather_object", "broadcast_object_list"):
            stack.enter_context(mock.patch.object(dist, name, wire.objects_sent))
        stack.enter_context(mock.patch("shampoo_deepspeed.engine.agreement.StepFlags", StepFlags))
        stack.enter_context(mock.patch("shampoo_deepspeed.runtime.metrics.Stopwatch.span", nothing))
        stack.enter_context(mock.patch("shampoo_deepspeed.optimizer.full_precision", nothing))
        here = mock.Mock(return_value=CPU)
        stack.enter_context(mock.patch("shampoo_deepspeed.distributed.collectives.communication_device", here))
        stack.enter_context(mock.patch.dict(sys.modules, {"deepspeed": ModuleType("deepspeed")}))
        stack.enter_context(Accepted())
        yield


@dataclass
class FirstStep:
    """What one rank's first step was; ``optimizer`` has the plan and all that is held."""

    rank: int
    optimizer: Shampoo
    wire: Wire
    seconds: float

    @property
    def state(self) -> int:
        """Bytes of state."""
        stacks = [tensor for unit in self.optimizer.units for stack in unit.stacks for tensor in stack.tensors.values()]
        rest = [tensor for unit in self.optimizer.units for _, tensor in unit.elementwise.tensors]
        return sum(tensor.nbytes for tensor in [*stacks, *rest])

    @property
    def messages(self) -> int:
        """Messages to other ranks in a step: those in a collective's bucket that are not empty."""
        buckets = [bucket for unit in self.optimizer.units for bucket in unit.exchange.buckets]
        splits = [route.send_splits for bucket in buckets for route in (bucket.gradients, bucket.updates)]
        return sum(1 for split in splits for elements in split if elements)

    @property
    def keys(self) -> list[str]:
        """The keys of the blocks whose state this rank holds."""
        return [key for unit in self.optimizer.units for stack in unit.stacks for key in stack.keys]

    @property
    def moved(self) -> Moved:
        """What the planner computes, too."""
        return Moved(self.wire.sent, self.wire.received, self.wire.collectives, self.state)


class Moved(NamedTuple):
    """Bytes that a rank sends and receives in a step, the collectives that move them, and bytes of state."""

    sent: int
    received: int
    collectives: int
    state: int


def planned(made: Estimate, rank: int) -> Moved:
    """The planner's numbers of a rank."""
    return Moved(made.sent[rank], made.received[rank], made.collectives, made.state_bytes[rank])


def rows_of(job: Job) -> list[list[list[int]]]:
    """For each step unit the messages of all ranks, as the planner expects their shards."""
    policies = [policy_of(parameter, job.config) for parameter in job.parameters]
    rows = []
    for unit in job.units:
        members = [(job.parameters[n], policies[n]) for n in unit.parameters]
        messages = Messages([(parameter.key, policy.merged) for parameter, policy in members])
        known: dict[tuple[int, Any], list[Any]] = {}

        def merged(held: Sequence[Held], members: Any = members, known: Any = known) -> Iterator[Held]:
            for n, box in held:
                parameter, policy = members[n]
                if (policy.dims, box) not in known:
                    known[policy.dims, box] = [p.box for p in merged_places(box, parameter.shape, policy.dims)]
                yield from ((n, part) for part in known[policy.dims, box])

        rows.append([messages.write(merged(unit.shards.of_rank(rank))) for rank in range(job.ranks)])
    return rows


def first_step(job: Job, rank: int, rows: Sequence[Sequence[Sequence[int]]]) -> FirstStep:
    """Take the first step of a rank, in a process that has no process group.

    Args:
        rows: `rows_of` the job.
    """
    dist.init_process_group("fake", rank=rank, world_size=job.ranks, store=FakeStore())
    try:
        model, wire = _model(job.parameters), Wire(rank, rows)
        step = _under_zero3 if job.framework == "zero3" else _under_fsdp
        with step(job, model, rank) as (optimizer, call), _on_paper(wire):
            begin = time.process_time()
            call()
            return FirstStep(rank, optimizer, wire, time.process_time() - begin)
    finally:
        dist.destroy_process_group()


def _model(parameters: Sequence[Parameter]) -> nn.Module:
    """A tree of modules with these parameters on the meta device."""
    root = nn.Module()
    for parameter in parameters:
        *path, name = parameter.key.split(".")
        module = root
        for part in path:
            if part not in dict(module.named_children()):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(name, nn.Parameter(torch.empty(parameter.shape, device=META)))
    return root


@contextlib.contextmanager
def _under_fsdp(job: Job, model: nn.Module, rank: int) -> Iterator[tuple[Shampoo, Any]]:
    """Shard the model by torch's FSDP2, or HSDP, and give it gradients."""
    shape = [job.replicas, job.shard_ranks] if job.framework == "hsdp" else [job.ranks]
    # Torch keeps what it knows of equal meshes in a process. Those of two ranks are equal unless their names differ.
    names = tuple(f"dim{dim}_of_rank{rank}" for dim in range(len(shape)))
    mesh = init_device_mesh("cpu", tuple(shape), mesh_dim_names=names)
    for layer in cast(Any, model).model.layers.children():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    optimizer = Shampoo(model.named_parameters(), model=model, **job.options)
    yield optimizer, optimizer.step


class Engine:
    """What is used of a DeepSpeedEngine of stage 3 with default settings."""

    pipeline_parallelism = False

    def __init__(self, optimizer: Shampoo) -> None:
        self.basic_optimizer = self.client_optimizer = optimizer
        zero = SimpleNamespace(stage=3, offload_optimizer=None, offload_param=None)
        self._config = SimpleNamespace(zero_config=zero)

    def zero_optimization_stage(self) -> int:
        return 3

    def optimizer_params(self) -> None:
        """There is no "optimizer" section."""

    def torch_autocast_enabled(self) -> bool:
        return False

    def autotp_size(self) -> int:
        return 1

    def save_checkpoint(self) -> None: ...

    def load_checkpoint(self) -> None: ...

    def _take_model_step(self) -> None:
        """The adapter finds the engine by this frame."""
        self.basic_optimizer.step()


@contextlib.contextmanager
def _under_zero3(job: Job, model: nn.Module, rank: int) -> Iterator[tuple[Shampoo, Any]]:
    """Leave parameters and flat partitions as DeepSpeed does: each parameter is cut evenly over all ranks."""
    optimizer = Shampoo(model.named_parameters(), model=model, **job.options)
    parameters = list(model.parameters())
    groups = [[parameters[n] for n in unit.parameters] for unit in job.units]
    zero = SimpleNamespace(fp16_groups=groups, fp32_partitioned_groups_flat=[], grad_position={}, get_param_id=id)
    for number, members in enumerate(groups):
        sizes = [-(-member.numel() // job.ranks) for member in members]
        flat = nn.Parameter(torch.empty(sum(sizes), device=META))
        flat.grad = torch.empty_like(flat)
        flat.ds_id = f"{number}_{rank}"  # type: ignore[attr-defined]
        zero.fp32_partitioned_groups_flat.append(flat)
        offset = 0
        for member, size in zip(cast(Any, members), sizes, strict=True):
            zero.grad_position[id(member)] = [number, offset, size]
            offset += size
            part = torch.empty(size, device=META)
            part.ds_numel = size  # type: ignore[attr-defined]
            member.ds_numel, member.ds_shape, member.ds_tensor = member.numel(), member.shape, part
            member.ds_process_group, member._z3_optimizer = dist.group.WORLD, zero
    optimizer.param_groups[0]["params"] = zero.fp32_partitioned_groups_flat
    engine = Engine(optimizer)
    yield optimizer, engine._take_model_step


class Measured(NamedTuple):
    """The numbers of one rank: CPU seconds, bytes gathered, its blocks, boxes and messages, and what moves."""

    seconds: float
    gathered: int
    owned: int
    boxes: int
    messages: int
    moved: Moved


class Row(NamedTuple):
    """The largest numbers of the ranks that took a step, memory in MiB, and whether all are as planned."""

    largest: Measured
    peak: float
    before: float
    equal: bool
    planner: float


def measure(framework: str, model: str, ranks: int) -> Row:
    """Take the first step of the first, a middle and the last rank, and compare them with the planner."""
    torch.set_num_threads(1)
    job = Job(framework, parameters_of(model), ranks, {})
    rows = rows_of(job)
    gc.collect()
    before = _peak()
    held: set[str] = set()
    found = {rank: _measured(first_step(job, rank, rows), held) for rank in (0, ranks // 2, ranks - 1)}
    peak, begin = _peak(), time.process_time()
    made = job.estimate()
    seconds = time.process_time() - begin
    equal = all(measured.moved == planned(made, rank) for rank, measured in found.items())
    largest = Measured(*map(max, zip(*found.values(), strict=True)))
    return Row(largest, peak, before, equal and sum(made.sent) == sum(made.received), seconds)


def _measured(step: FirstStep, held: set[str]) -> Measured:
    """One rank's numbers; ``held`` are the blocks of ranks measured before.

    Raises:
        RuntimeError: unless the ranks of the plan together own each block once, and this one has state of its own.
    """
    units = step.optimizer.units
    owned = sorted(b for unit in units for ranks in unit.plan.owned for b in map(unit.block_key, ranks))
    every = sorted(unit.block_key(b) for unit in units for b in range(len(unit.plan.blocks)))
    own = {unit.block_key(b) for unit in units for b in unit.plan.owned[unit.rank]}
    if owned != every or own != set(step.keys) or held & own:
        raise RuntimeError(f"rank {step.rank}: blocks are not owned exactly once")
    held |= own
    boxes = sum(_boxes(unit.exchange.buckets) for unit in units)
    return Measured(step.seconds, step.wire.gathered, len(own), boxes, step.messages, step.moved)


def _boxes(buckets: Sequence[Any]) -> int:
    """The number of boxes in this rank's lists."""
    routes = [route for bucket in buckets for route in (bucket.gradients, bucket.updates)]
    return sum(len(b.local_blocks) for b in buckets) + sum(len(r.send) + len(r.receive) for r in routes)


def _peak() -> float:
    """The largest resident memory of this process until now, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 256, 1024, 4096])
    parser.add_argument("--framework", nargs="+", default=list(FRAMEWORKS), choices=FRAMEWORKS)
    parser.add_argument("--model", default="llama-3-70b")
    args = parser.parse_args(arguments)
    heads = ["framework, ranks", "CPU s", "peak MiB", "before", "KiB gathered", "own blocks", "boxes in lists"]
    heads += ["collectives", "messages", "MiB sent", "MiB of state", "and planned", "planner's CPU s"]
    lines: list[list[object]] = []
    context = multiprocessing.get_context("spawn")
    elements = sum(math.prod(parameter.shape) for parameter in parameters_of(args.model))
    print(f"\nfirst steps on paper, {args.model} ({elements / 1e9:.1f} billion parameters); {machine()}\n", flush=True)
    for framework in args.framework:
        for ranks in args.ranks:
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                row = pool.submit(measure, framework, args.model, ranks).result()
            seconds, gathered, owned, boxes, messages, moved = row.largest
            lines.append([f"{framework}, {ranks}", seconds, row.peak, row.before, gathered / 1024, owned, boxes])
            lines[-1] += [moved.collectives, messages, moved.sent / 2**20, moved.state / 2**20]
            lines[-1] += ["equal" if row.equal else "DIFFERENT", row.planner]
            print(table(heads, lines[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    print(table(heads, lines))


if __name__ == "__main__":
    main()
