"""Compares peak memory with the plan: weights, gradients, state (the planner's bytes), updates and buckets.

    python -m benchmarks.memory [--width 512] [--block 256] [--bucket-mb 2]

torch's profiler reports each allocation and release of a step. The bytes of the state must equal the planner's. The
plan of a step on one rank is one update for each element, and gradients and updates of one bucket in flight. Memory at
the peak beyond that is listed by the operator that allocated it.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from benchmarks.contestants import REFRESHES, RULES
from benchmarks.gpt import Size, batch, build
from benchmarks.report import machine, table
from shampoo_deepspeed import Shampoo
from shampoo_deepspeed.distributed.frameworks import Parameter
from shampoo_deepspeed.estimate import estimate
from shampoo_deepspeed.options.config import ShampooConfig


class Peak(NamedTuple):
    """Bytes at the peak of a step, in excess of those at its start, and how many of them each operator allocated."""

    nbytes: int
    operators: Counter[str]


class Allocation(NamedTuple):
    when: int
    pointer: int
    nbytes: int
    operator: str


def allocations(events: Sequence[Any], operator: str = "python") -> Iterator[Allocation]:
    """Yield all allocations (positive) and releases (negative) below these events of the profiler's tree."""
    for event in events:
        if event.tag == _EventType.Allocation:
            fields = event.extra_fields
            yield Allocation(event.start_time_ns, fields.ptr, fields.alloc_size, operator)
            continue
        known = event.tag == _EventType.TorchOp and not event.name.startswith("aten::empty")
        yield from allocations(event.children, event.name if known else operator)


def peak_of(step: Any) -> Peak:
    """Run a step under the profiler, and return its peak."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    tree = profiler.profiler.kineto_results.experimental_event_tree()
    now, peak = 0, Peak(0, Counter())
    live: dict[int, Allocation] = {}
    for found in sorted(allocations(tree)):
        now += found.nbytes
        if found.nbytes > 0:
            live[found.pointer] = found
        else:
            live.pop(found.pointer, None)
        if now > peak.nbytes:
            operators: Counter[str] = Counter()
            for one in live.values():
                operators[one.operator] += one.nbytes
            peak = Peak(now, operators)
    return peak


def held_bytes(optimizer: Shampoo) -> int:
    """Return the bytes of the state that the step units hold."""
    tensors = [t for unit in optimizer.units for stack in unit.stacks for t in stack.tensors.values()]
    tensors += [t for unit in optimizer.units for _, t in unit.elementwise.tensors]
    return sum(t.nbytes for t in tensors)


def planned_state(model: nn.Module, options: dict[str, Any]) -> int:
    parameters = []
    for name, parameter in model.named_parameters():
        kinds = frozenset({"embedding"} if name.startswith("w") else set())
        parameters.append(Parameter(name, tuple(parameter.shape), 0, name, kinds))
    return estimate(parameters, 1, "ddp", ShampooConfig.from_options(options)).state_bytes[0]


def measure(rule: str, refresh: str, width: int, block: int, bucket_mb: float, frequency: int) -> dict[str, Any]:
    """Return planned and measured bytes of the largest step in a window of refreshes."""
    size = Size(width=width)
    model = build(size)
    options: dict[str, Any] = {"preconditioner": rule, "refresh": refresh, "bucket_mb": bucket_mb}
    options |= {"max_preconditioner_dim": block, "precondition_frequency": frequency}
    optimizer = Shampoo(model.named_parameters(), model=model, lr=1e-3, **options)
    highest = Peak(-1, Counter())
    for step in range(3 * frequency):
        model.zero_grad()
        model(batch(size, 512, step)).backward()
        if step < 2 * frequency:
            optimizer.step()
        else:
            highest = max(highest, peak_of(optimizer.step), key=lambda p: p.nbytes)
    (unit,) = optimizer.units
    weights = sum(p.nbytes for p in model.parameters())
    rows = Counter(unit.plan.buckets)
    largest = max(
        4 * sum(math.prod(b.box.lengths) for b, n in zip(unit.plan.blocks, unit.plan.buckets, strict=True) if n == k)
        for k in rows
    )
    plan = {"weights and gradients": 2 * weights, "state": planned_state(model, options)}
    plan |= {"updates": weights, "buckets": 2 * largest}
    return {"plan": plan, "held": held_bytes(optimizer), "step": highest, "weights": weights}


def row(rule: str, refresh: str, found: dict[str, Any]) -> list[Any]:
    plan, step, mb = found["plan"], found["step"].nbytes, 2.0**20
    total = 2 * found["weights"] + found["held"] + step
    return [
        f"{rule}, {refresh}",
        plan["state"] / mb,
        found["held"] / plan["state"],
        (plan["updates"] + plan["buckets"]) / mb,
        step / mb,
        sum(plan.values()) / mb,
        total / mb,
        total / sum(plan.values()),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, and the largest temporaries if a step needs more than 1.1 times the plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preconditioner", nargs="+", default=list(RULES), choices=RULES)
    parser.add_argument("--refresh", nargs="+", default=list(REFRESHES), choices=REFRESHES)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--block", type=int, default=256)
    parser.add_argument("--frequency", type=int, default=10)
    parser.add_argument("--bucket-mb", type=float, default=2.0)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    lines, notes = [], []
    for rule in args.preconditioner:
        for refresh in args.refresh:
            found = measure(rule, refresh, args.width, args.block, args.bucket_mb, args.frequency)
            lines.append(row(rule, refresh, found))
            largest = found["step"].operators.most_common(6)
            if lines[-1][-1] > 1.1:
                notes.append(f"{rule}, {refresh}: " + ", ".join(f"{k} {v / 2**20:.1f} MiB" for k, v in largest))
    print(
        f"\nmemory, one process; {machine()}\nwidth {args.width}, block {args.block}, buckets {args.bucket_mb:g} MiB\n"
    )
    heads = ["MiB", "state planned", "state held / planned", "step planned", "step peak", "all planned", "all at peak"]
    print(table([*heads, "peak / plan"], lines))
    if notes:
        print("\nlive at the peak of a step, by operator:\n" + "\n".join(notes))


if __name__ == "__main__":
    main()
