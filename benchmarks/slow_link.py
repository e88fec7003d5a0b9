"""Measures how much of the exchange over a slow link is hidden behind computation, with one or more buckets in flight.

    python -m benchmarks.slow_link [--buckets 8] [--plot docs/slow_link.png]

Two ranks train the attention projections of sixteen layers under FSDP2, so that every block is spread over both. Their
link is slowed down. `all_to_all_single` really moves the bytes, on its own thread, one call after another. The link is
busy from the moment when both ranks have called it, for a delay plus bytes divided by the rate. The rate is chosen so
that the link is busy as long as the step computes. "Exposed" is the link's busy time during which the step waits for
it; the rest is "hidden". If a rank waits because the other one is late, that time counts as neither.

``--buckets`` is the number of equal buckets that a rank's blocks would make. From four on, the first and the last
buckets are smaller, which adds three.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from benchmarks.contestants import RULES
from benchmarks.ranks import run_on_ranks
from benchmarks.report import figure, machine, table
from shampoo_deepspeed import Shampoo
from shampoo_deepspeed.algorithm.block_stack import BlockStack

Spans: TypeAlias = list[tuple[float, float]]


@dataclass
class Timeline:
    """Time spans of one step, in wall seconds: link busy, link waiting for the other rank, step waiting, computing."""

    link: Spans = field(default_factory=list)
    late: Spans = field(default_factory=list)
    waiting: Spans = field(default_factory=list)
    computing: Spans = field(default_factory=list)
    step: tuple[float, float] = (0.0, 0.0)
    nbytes: int = 0

    def exposed(self) -> float:
        """Return the seconds of the link's busy time during which the step waits."""
        return overlap(self.link, self.waiting)

    def hidden_share(self) -> float:
        """Return the share of the link's busy time that the step does not wait for."""
        return 1.0 - self.exposed() / total(self.link)


def total(spans: Spans) -> float:
    return sum(stop - start for start, stop in spans)


def overlap(left: Spans, right: Spans) -> float:
    """Return the seconds that are in a span of both lists; spans of one list do not overlap."""
    pairs = ((max(a, c), min(b, d)) for a, b in left for c, d in right)
    return sum(stop - start for start, stop in pairs if stop > start)


class Handle:
    """What an asynchronous collective returns; it records the time in `wait` on the timeline."""

    def __init__(self, future: Future[None], timeline: Timeline) -> None:
        self._future, self._timeline = future, timeline

    def wait(self) -> None:
        begin = time.perf_counter()
        self._future.result()
        self._timeline.waiting.append((begin, time.perf_counter()))


def prefer_others_to_me(computing: int) -> None:
    """Give the link's threads priority: a real link needs neither a core nor the interpreter to move its bytes.

    This holds for the rest of the process, which is one rank of one run. Other load on the machine then slows down the
    computation, and `tune` slows down the link with it.

    Args:
        computing: id of the thread that steps, which yields to all others from now on.
    """
    sys.setswitchinterval(1e-4)
    if sys.platform == "linux":  # there, each thread has its own priority
        os.setpriority(os.PRIO_PROCESS, computing, 15)


class SlowLink:
    """Replaces `all_to_all_single` and records when it is busy."""

    def __init__(self, delay: float, seconds_per_byte: float) -> None:
        self.delay, self.seconds_per_byte = delay, seconds_per_byte
        self.timeline = Timeline()
        self._real = dist.all_to_all_single
        self._thread = ThreadPoolExecutor(1)
        self._thread.submit(prefer_others_to_me, threading.get_native_id()).result()

    def all_to_all_single(
        self, output: Tensor, tensor: Tensor, receive: list[int], send: list[int], group: Any, async_op: bool
    ) -> Handle:
        assert async_op
        timeline = self.timeline
        nbytes = max(output.nbytes, tensor.nbytes)  # both directions run at once
        timeline.nbytes += nbytes

        def move() -> None:
            begin = time.perf_counter()
            dist.barrier(group)
            both = time.perf_counter()
            self._real(output, tensor, receive, send, group=group)
            left = both + self.delay + nbytes * self.seconds_per_byte - time.perf_counter()
            time.sleep(max(0.0, left))
            timeline.late.append((begin, both))
            timeline.link.append((both, time.perf_counter()))

        return Handle(self._thread.submit(move), timeline)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Inside this context the exchange uses this link, and stacks record when they compute."""
        advance = BlockStack.step

        def noted(stack: BlockStack, *arguments: Any) -> Tensor:
            begin = time.perf_counter()
            made = advance(stack, *arguments)
            self.timeline.computing.append((begin, time.perf_counter()))
            return made

        dist.all_to_all_single = self.all_to_all_single  # type: ignore[assignment]
        BlockStack.step = noted  # type: ignore[assignment, method-assign]
        try:
            yield
        finally:
            dist.all_to_all_single = self._real
            BlockStack.step = advance  # type: ignore[method-assign]
            self._thread.shutdown()


@dataclass(frozen=True)
class Setting:
    """Settings of a run; ``link_over_compute`` is the link's busy time over the step's computing time."""

    buckets: int
    rule: str = "shampoo"
    width: int = 256
    matrices: int = 64
    steps: int = 30
    warm: int = 30
    delay: float = 1e-3
    link_over_compute: float = 1.0


def train(setting: Setting) -> list[Timeline]:
    """Run one rank: warm up, tune the link's rate to the computation, then record the timelines of the steps."""
    torch.manual_seed(0)
    width, world = setting.width, dist.get_world_size()
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(setting.matrices)))
    fully_shard(model)
    owned = setting.matrices * width * width * 4 / world / 2**20
    optimizer = Shampoo(
        model.named_parameters(),
        lr=1e-3,
        preconditioner=setting.rule,
        refresh="staggered",
        max_preconditioner_dim=width,
        bucket_mb=1.001 * owned / setting.buckets,
    )
    link = SlowLink(0.0, 0.0)
    timelines: list[Timeline] = []
    with link.installed():
        for step in range(setting.warm + setting.steps):
            if step >= setting.warm // 2 and step % 5 == 0:
                tune(link, timelines[-5:], setting)
            random_gradients(model, step)
            dist.barrier()
            link.timeline = Timeline()
            begin = time.perf_counter()
            optimizer.step()
            link.timeline.step = (begin, time.perf_counter())
            timelines.append(link.timeline)
    return timelines[setting.warm :]


def random_gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step * dist.get_world_size() + dist.get_rank())
    for parameter in model.parameters():
        shard = cast(DTensor, parameter.data)
        local = torch.randn(shard.to_local().shape, generator=generator) * 1e-3
        parameter.grad = DTensor.from_local(local, shard.device_mesh, shard.placements)


def tune(link: SlowLink, measured: Sequence[Timeline], setting: Setting) -> None:
    """Set the link's delay, and its rate so that it is busy for as long as the setting says.

    It is called repeatedly, because the machine's speed changes. It uses measured times, because no sleep is exact.
    """
    spans = [t.computing for t in measured], [t.link for t in measured]
    sums = torch.tensor([statistics.median(map(total, kind)) for kind in spans])
    dist.all_reduce(sums)  # so that all ranks set the same rate
    computing, busy = (sums / dist.get_world_size()).tolist()
    wanted, nbytes = computing * setting.link_over_compute, measured[-1].nbytes
    if link.seconds_per_byte:
        # Change the rate in small steps, because a measurement may have been disturbed.
        rate = link.seconds_per_byte * min(1.25, max(0.8, wanted / busy))
    else:
        rate = max(0.0, wanted - len(measured[-1].link) * setting.delay) / nbytes
    link.delay, link.seconds_per_byte = setting.delay, rate


def medians(ranks: Sequence[Sequence[Timeline]]) -> dict[str, float]:
    """Return medians over steps and ranks, times in milliseconds."""
    steps = [timeline for timelines in ranks for timeline in timelines]

    def median(values: list[float]) -> float:
        return 1e3 * statistics.median(values)

    return {
        "step ms": median([t.step[1] - t.step[0] for t in steps]),
        "computing ms": median([total(t.computing) for t in steps]),
        "link busy ms": median([total(t.link) for t in steps]),
        "exposed ms": median([t.exposed() for t in steps]),
        "hidden": statistics.median(t.hidden_share() for t in steps),
    }


def draw(path: Path, named: dict[str, Timeline]) -> None:
    """Draw a typical step of each run as bars: when the rank computes, when the link is busy, when the step waits."""
    made, panels = figure(path, 1, 1.4 + 1.1 * len(named))
    panel, labels = panels[0], []
    colours = {"computing": "#4c72b0", "link": "#dd8452", "waiting": "#c44e52"}
    for place, (name, timeline) in enumerate(named.items()):
        begin = timeline.step[0]
        for lane, (kind, colour) in enumerate(colours.items()):
            spans: Spans = getattr(timeline, kind)
            y = place * 4 + lane
            bars = [(1e3 * (a - begin), 1e3 * (b - a)) for a, b in spans]
            panel.broken_barh(bars, (y - 0.4, 0.8), facecolors=colour, edgecolor="white", linewidth=0.5)
            labels.append((y, f"{name}: {'link busy' if kind == 'link' else kind}"))
    panel.set_yticks([y for y, _ in labels], [text for _, text in labels], fontsize=8)
    panel.invert_yaxis()
    panel.set_xlabel("milliseconds of one step on rank 0")
    made.savefig(path, dpi=110)


def middling(timelines: Sequence[Timeline]) -> Timeline:
    """Return the step with the median hidden share."""
    return sorted(timelines, key=lambda t: t.hidden_share())[len(timelines) // 2]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--buckets", type=int, nargs="+", default=[1, 4, 8], help="buckets of each rank")
    parser.add_argument("--preconditioner", default="shampoo", choices=RULES)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--delay", type=float, default=1.0, help="milliseconds of each collective")
    parser.add_argument("--link-over-compute", type=float, default=1.0)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows, chosen = [], {}
    for buckets in args.buckets:
        setting = Setting(
            buckets,
            args.preconditioner,
            steps=args.steps,
            delay=1e-3 * args.delay,
            link_over_compute=args.link_over_compute,
        )
        ranks = run_on_ranks(2, train, setting)
        found = medians(ranks)
        rows.append([buckets, *list(found.values())[:-1], f"{found['hidden']:.0%}"])
        chosen[f"{buckets} bucket{'s' if buckets > 1 else ''}"] = middling(ranks[0])
    print(
        f"\nslow link, 2 ranks; {machine()}\n{args.preconditioner}, link busy {args.link_over_compute:g} of computing\n"
    )
    print(table(["buckets", *list(found)], rows))
    if args.plot:
        draw(args.plot, chosen)
        print(f"plot: {args.plot}")


if __name__ == "__main__":
    main()
