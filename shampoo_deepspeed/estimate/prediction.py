"""How long a step will take on a device, part by part: predictions from work and published speeds, no measurements."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from shampoo_deepspeed.algorithm.block_stack import REFRESHED_ON_ACCELERATORS
from shampoo_deepspeed.distributed.frameworks import Parameter
from shampoo_deepspeed.estimate.hardware import Hardware
from shampoo_deepspeed.estimate.planner import Estimate
from shampoo_deepspeed.estimate.recommend import BLOCK_SIZES, FREQUENCIES, blocks_of, owned_bytes
from shampoo_deepspeed.estimate.work import (
    ADAMW_PASSES,
    AT_ONCE_LAUNCHES,
    BUCKET_LAUNCHES,
    ELEMENTWISE_LAUNCHES,
    ELEMENTWISE_PASSES,
    FLOAT,
    HELD_PASSES,
    STACK_LAUNCHES,
    STEP_LAUNCHES,
    Work,
    factor_dims,
    guarded_launches,
    guarded_work,
    plain_launches,
    plain_work,
    refresh_launches,
    refresh_waits,
    refresh_work,
)
from shampoo_deepspeed.geometry.owners import LOCALITY_TOLERANCE
from shampoo_deepspeed.options.checks import OptionError
from shampoo_deepspeed.options.choices import MATMUL_PRECISIONS
from shampoo_deepspeed.options.config import ShampooConfig
from shampoo_deepspeed.options.param_groups import group_options
from shampoo_deepspeed.options.rules import expanded

# Rules by the tokens that they need for AdamW's loss, the best first: docs/convergence.md.
BY_QUALITY = ("kl_shampoo", "shampoo", "soap", "kl_soap", "muon")
# The solver that a recommendation names where the rule takes roots: the one with the least work on accelerators.
LIGHT_SOLVER = "qr"
# Options that only some rules take.
OF_SOME = ("exponent_override", "one_sided", "large_dim", "refresh_tolerance", "damping", "shrinkage")
# NCCL's buffers for each peer, direction and channel: NCCL_BUFFSIZE's default and two channels (NCCL's manual,
# "Environment Variables"). Eight buckets are in flight (`Plan`).
NCCL_BUFFER, NCCL_CHANNELS, IN_FLIGHT = 4 << 20, 2, 8


@dataclass(frozen=True)
class Prediction:
    """Milliseconds of the slowest rank in the mean step, unless it says otherwise.

    Args:
        products: products in ``matmul_precision``.
        refresh: products, factorizations and passes of refreshes.
        passes: all that reads and writes memory without being a product.
        launches: the CPU's time for launches, side by side with the device's.
        reads: waits of the CPU for the device.
        exchange: transfers between ranks that nothing hides.
        offload: transfers to and from the CPU's memory that nothing hides.
        plain: a step without refreshes.
        mean: the mean of all steps of a window.
        slowest: the slowest one.
        adamw: fused AdamW's step on the same ranks, bound by memory.
        model: forward and backward; None if no tokens are known.
        buffers: bytes of NCCL's buffers and of buckets in flight, at most.
    """

    products: float
    refresh: float
    passes: float
    launches: float
    reads: float
    exchange: float
    offload: float
    plain: float
    mean: float
    slowest: float
    adamw: float
    model: float | None
    buffers: float

    @property
    def over_model(self) -> float | None:
        """The mean step's share of forward and backward."""
        return None if self.model is None else self.mean / self.model

    @property
    def over_adamw(self) -> float | None:
        """By how much whole training is slower than with fused AdamW."""
        return None if self.model is None else (self.mean - self.adamw) / (self.model + self.adamw)


@dataclass(frozen=True)
class RankWork:
    """What a rank's step is made of.

    Args:
        stacks: how many blocks there are by options and shape.
        buckets: buckets of all units.
        moved: bytes that it sends or receives, whichever is more.
        held, elementwise: preconditioned and element-wise elements that lie there.
        ranks: ranks in all.
        offloaded: whether weights and gradients lie in the CPU's memory.
    """

    stacks: Mapping[tuple[int, tuple[int, ...]], float]
    buckets: int
    moved: float
    held: float
    elementwise: float
    ranks: int
    offloaded: bool = False


def predict(
    made: Estimate, device: Hardware, tokens: float | None = None, tflops: float | None = None, offloaded: bool = False
) -> Prediction:
    """The step of the slowest rank of an estimate.

    Args:
        tokens: tokens of a step on all ranks.
        tflops: TFLOP/s that a rank reaches in forward and backward; None: the device's share.
        offloaded: shards lie in the CPU's memory, and blocks on the device (``compute_device``).
    """
    slowest = max(range(made.world_size), key=made.loads.__getitem__)
    stacks: Counter[tuple[int, tuple[int, ...]]] = Counter()
    for (_, number, shape), count in made.stacks[slowest].items():
        stacks[number, shape] += count
    moved = max((max(pair) for pair in zip(made.sent, made.received, strict=True)), default=0)
    held, elementwise = (max(values, default=0) for values in (made.held, made.elementwise))
    rank = RankWork(stacks, made.accelerator_buckets, moved, held, elementwise, made.world_size, offloaded)
    return predict_rank(rank, made.configs, device, model_milliseconds(made, device, tokens, tflops))


def model_milliseconds(made: Estimate, device: Hardware, tokens: float | None, tflops: float | None) -> float | None:
    """Forward and backward of a step, by 6 FLOPs for each parameter and token."""
    if tokens is None:
        return None
    rate = 1e12 * tflops if tflops else device.model_share * device.bfloat16 * 1e12
    return 1e3 * 6.0 * made.elements * tokens / (made.world_size * rate)


def predict_rank(
    rank: RankWork, configs: Mapping[int, ShampooConfig], device: Hardware, model: float | None
) -> Prediction:
    """The step of a rank with this work."""
    plain, launches = Work(), float(STEP_LAUNCHES + BUCKET_LAUNCHES * rank.buckets)
    at_once = rank.buckets > 1 and all(config.applies_at_once for config in configs.values())
    launches -= AT_ONCE_LAUNCHES * at_once
    by_precision: dict[str, float] = dict.fromkeys(MATMUL_PRECISIONS, 0.0)
    slices = len(rank.stacks) + max(0, rank.buckets - 1)
    refreshing = worst = reads = refresh_operators = guards = 0.0
    for (number, shape), count in rank.stacks.items():
        config = configs[number].for_blocks
        dims = factor_dims(shape, config)
        work = (plain_work(shape, config) + guarded_work(shape, config)).times(count)
        plain += work
        by_precision[config.matmul_precision] += work.lowered
        of_stack, once = guarded_launches(config, len(dims))
        launches += (plain_launches(config, len(dims)) + of_stack) * slices / len(rank.stacks)
        guards = max(guards, once)
        if not dims:
            continue
        due, steps = _due(count, config)
        batch = max(1.0, min(due, REFRESHED_ON_ACCELERATORS // (FLOAT * max(math.prod(shape), max(dims) ** 2))))
        one = refresh_work(shape, config, batch, device.accelerator)
        seconds = _refresh_seconds(one, device)
        refreshing += seconds * count / config.precondition_frequency
        operators, waits = refresh_launches(config, dims, batch, device.accelerator), refresh_waits(config, dims, batch)
        times = math.ceil(due / batch) * steps
        refresh_operators += operators * times
        reads += waits * times
        worst += seconds * due
    launches += (
        guards + STACK_LAUNCHES * max(0, len(rank.stacks) - 1) + (ELEMENTWISE_LAUNCHES if rank.elementwise else 0)
    )
    products = sum(flops / device.products(p) for p, flops in by_precision.items()) + plain.full / device.products(
        "highest"
    )
    products = max(products, (plain.lowered_bytes + plain.full_bytes) / device.bytes_per_second)
    others = FLOAT * (HELD_PASSES * rank.held + ELEMENTWISE_PASSES * rank.elementwise) + (
        2.0 * rank.moved if rank.ranks > 1 else 0.0
    )
    passes = (plain.nbytes + others) / device.bytes_per_second
    busy = products + passes
    exchange = _exposed(rank.moved / device.exchange(rank.ranks) if rank.ranks > 1 else 0.0, busy, rank.buckets)
    carried = (
        FLOAT * (rank.held + rank.elementwise) / (device.link_share * device.pcie * 1e9) if rank.offloaded else 0.0
    )
    offload = _exposed(carried, busy, rank.buckets)
    waits_seconds = reads * device.read * 1e-6
    outside = exchange + offload
    host, more = launches * device.launch * 1e-6, refresh_operators * device.launch * 1e-6
    mean = max(busy + refreshing, host + more) + waits_seconds + outside
    slow = max(busy + worst, host + more) + waits_seconds + outside
    moved = rank.moved / max(1, rank.buckets)
    buffers = 2.0 * IN_FLIGHT * moved + 2.0 * NCCL_CHANNELS * NCCL_BUFFER * (rank.ranks - 1)
    adamw = ADAMW_PASSES * FLOAT * (rank.held + rank.elementwise) / device.bytes_per_second
    return Prediction(
        products=1e3 * products,
        refresh=1e3 * refreshing,
        passes=1e3 * passes,
        launches=1e3 * (host + more),
        reads=1e3 * waits_seconds,
        exchange=1e3 * exchange,
        offload=1e3 * offload,
        plain=1e3 * (max(busy, host) + outside),
        mean=1e3 * mean,
        slowest=1e3 * max(mean, slow),
        adamw=1e3 * adamw,
        model=model,
        buffers=buffers if rank.ranks > 1 else 0.0,
    )


def _due(count: float, config: ShampooConfig) -> tuple[float, float]:
    """How many of a stack's blocks refresh in a step in which some do, and which share of the steps that is."""
    frequency = config.precondition_frequency
    if not config.staggers:
        return count, 1.0 / frequency
    return max(1.0, count / frequency), min(1.0, count / frequency)


def _refresh_seconds(work: Work, device: Hardware) -> float:
    full = max(work.full / device.products("highest"), work.full_bytes / device.bytes_per_second)
    seconds = full + work.nbytes / device.bytes_per_second
    seconds += work.factorizations / (device.factorization_share * device.float32 * 1e12)
    return seconds + 25.0 * work.decomposed / (device.decomposition_share * device.float32 * 1e12)


def _exposed(seconds: float, busy: float, buckets: int) -> float:
    """What is not hidden of transfers in buckets beside computing: the first and the last one, and what is longer."""
    return max(seconds - busy, 2.0 * seconds / max(2, buckets))


@dataclass(frozen=True)
class Advice:
    """Options for a budget, and what is predicted for them.

    Args:
        dropped: options that were given and that this preconditioner does not take, with their defaults.
    """

    preconditioner: str
    solver: str
    max_preconditioner_dim: int
    precondition_frequency: int
    matmul_precision: str
    state_bytes: float
    prediction: Prediction
    dropped: Mapping[str, object] = field(default_factory=dict)

    def options(self) -> dict[str, object]:
        """As options of ``Shampoo``, to be set next to those that were given."""
        names = ("preconditioner", "solver", "max_preconditioner_dim", "precondition_frequency", "matmul_precision")
        return {**{name: getattr(self, name) for name in names}, **self.dropped}


def advise(
    parameters: Sequence[Parameter],
    config: ShampooConfig,
    made: Estimate,
    device: Hardware,
    overhead: float,
    budget: float | None = None,
    *,
    tokens: float,
    tflops: float | None = None,
    offloaded: bool = False,
) -> Advice | None:
    """The best options whose whole training is at most ``overhead`` slower than AdamW's, by predictions.

    The rule that needs the fewest tokens comes first (`BY_QUALITY`), then the largest block, the most frequent refresh
    and the highest precision. Other options, such as formats of state, stay as they are if the rule takes them.

    Args:
        made: the estimate under ``config``, from which bytes that move and elements on ranks are taken.
        budget: bytes of state of a rank, at most; None: any.

    Returns:
        None if nothing fits.
    """
    model = model_milliseconds(made, device, tokens, tflops)
    moved = max((max(pair) for pair in zip(made.sent, made.received, strict=True)), default=0)
    with_shards = max(0.0, max(made.state_bytes) - owned_bytes(blocks_of(parameters, config), config, made.world_size))
    for rule in BY_QUALITY:
        for size in reversed(BLOCK_SIZES):
            base = _candidate(config, rule, size, device.accelerator)
            if base is None:
                continue
            blocks = blocks_of(parameters, base)
            owned = owned_bytes(blocks, base, made.world_size)
            if budget is not None and with_shards + owned > budget:
                continue
            share = (1.0 if made.world_size == 1 else 1.0 + LOCALITY_TOLERANCE) / made.world_size
            stacks = {key: many * share for key, many in blocks.items()}
            held, elementwise = (max(values, default=0) for values in (made.held, made.elementwise))
            rank = RankWork(stacks, made.accelerator_buckets, moved, held, elementwise, made.world_size, offloaded)
            for frequency in FREQUENCIES:
                for precision in MATMUL_PRECISIONS:
                    own = replace(base, precondition_frequency=frequency, matmul_precision=precision)
                    found = predict_rank(rank, expanded({0: own}), device, model)
                    if found.over_adamw is not None and found.over_adamw <= overhead:
                        dropped = {n: getattr(own, n) for n in OF_SOME if getattr(own, n) != getattr(config, n)}
                        state = with_shards + owned
                        return Advice(rule, own.solver, size, frequency, precision, state, found, dropped)
                if not base.parts.statistics:
                    break
    return None


def _candidate(config: ShampooConfig, rule: str, size: int, accelerator: bool) -> ShampooConfig | None:
    """The options with another preconditioner and block size, or None if rules of parameters do not combine with it.

    Options that this preconditioner does not take get their defaults.
    """
    solver = LIGHT_SOLVER if accelerator and rule in ("kl_shampoo", "shampoo") else "auto"
    chosen = {"preconditioner": rule, "solver": solver, "max_preconditioner_dim": size}
    kept = {name: getattr(config, name) for name in OF_SOME}
    own = {name: value for name, value in kept.items() if _combine({**chosen, name: value})}
    defaults = {name: getattr(ShampooConfig(), name) for name in OF_SOME if name not in own}
    changed = {**chosen, **defaults}
    return replace(config, **changed) if _combine({**group_options(config), **changed}) else None


def _combine(options: Mapping[str, Any]) -> bool:
    try:
        ShampooConfig.from_options(options)
    except OptionError:
        return False
    return True
