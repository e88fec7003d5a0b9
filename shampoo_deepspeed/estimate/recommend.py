"""Which block size and refresh frequency fit a memory budget and a share of the step's time. Plain arithmetic.

Candidates are compared by totals over ranks, not by full plans, so an answer takes no longer than the estimate.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from shampoo_deepspeed.distributed.frameworks import Parameter
from shampoo_deepspeed.engine.policy import policy_of
from shampoo_deepspeed.estimate.planner import Estimate, block_bytes
from shampoo_deepspeed.geometry.owners import LOCALITY_TOLERANCE
from shampoo_deepspeed.geometry.plan import iteration_cost, refresh_cost, step_cost
from shampoo_deepspeed.linalg.orthogonalise import ITERATIONS
from shampoo_deepspeed.options.config import ShampooConfig
from shampoo_deepspeed.options.rules import expanded

# How many blocks there are, by the number of their options and by shape.
Blocks: TypeAlias = Mapping[tuple[int, tuple[int, ...]], int]
# Larger values are not practical: eigendecompositions of larger blocks take seconds each, and older roots are stale.
BLOCK_SIZES = (128, 256, 512, 1024, 2048)
FREQUENCIES = (1, 2, 5, 10, 20, 50, 100)


@dataclass(frozen=True)
class Speed:
    """A device and the work of a step.

    Args:
        tokens: tokens of a step on all ranks together.
        tflops: TFLOP/s that one rank reaches in the model's forward and backward.
        optimizer_tflops: TFLOP/s that it reaches in the optimizer's float32 products.
        refresh_tflops: TFLOP/s that it reaches in refreshes, with ``plan.REFRESH_CUBES`` d^3 for a factor matrix.
        bandwidth: GB/s that a rank sends (and at once receives) between ranks; None: exchange costs nothing.
    """

    tokens: float
    tflops: float
    optimizer_tflops: float
    refresh_tflops: float
    bandwidth: float | None = None

    def model_seconds(self, elements: int, world_size: int) -> float:
        """Forward and backward: 6 FLOPs for each parameter and token."""
        return 6.0 * elements * self.tokens / (world_size * self.tflops * 1e12)

    def overhead(self, products: float, refreshes: float, nbytes: float, elements: int, world_size: int) -> float:
        """The optimizer's time divided by the model's, with none of it hidden; products and refreshes in FLOPs."""
        seconds = products / (self.optimizer_tflops * 1e12) + refreshes / (self.refresh_tflops * 1e12)
        if self.bandwidth is not None:
            seconds += nbytes / (self.bandwidth * 1e9)
        return seconds / self.model_seconds(elements, world_size)


@dataclass(frozen=True)
class Overhead:
    """The optimizer's share on top of forward and backward: over a window, and in its slowest step."""

    model_seconds: float
    mean: float
    slowest: float


def expected_overhead(made: Estimate, speed: Speed) -> Overhead:
    """The overhead of the estimate at this speed. AdamW's own time, which is bound by memory, is not subtracted."""
    nbytes = max((max(pair) for pair in zip(made.sent, made.received, strict=True)), default=0)
    shares = [
        speed.overhead(step.slowest - step.refresh, step.refresh, nbytes, made.elements, made.world_size)
        for step in made.window
    ]
    model = speed.model_seconds(made.elements, made.world_size)
    return Overhead(model, made.mean_over_window(shares), max(shares, default=0.0))


@dataclass(frozen=True)
class Recommendation:
    """A block size with the state that it needs on the fullest rank, and the frequency that its time allows.

    ``frequency`` is None if no speed is given, or if no frequency in the list is rare enough.
    """

    max_preconditioner_dim: int
    state_bytes: float
    frequency: int | None


def recommend(
    parameters: Sequence[Parameter],
    config: ShampooConfig,
    made: Estimate,
    budget: float,
    speed: Speed | None = None,
    overhead: float = 0.05,
) -> Recommendation | None:
    """The largest block size whose state fits into ``budget`` bytes per rank, and the most frequent refresh for it.

    If a speed is given, a block size that no frequency makes fast enough is skipped if a smaller one is fast enough.

    Args:
        made: the estimate under ``config``; the state that is kept with the shards is taken from it.
        overhead: the optimizer's mean time as a fraction of forward and backward, at most.

    Returns:
        None if no block size fits.
    """
    with_shards = max(made.state_bytes) - owned_bytes(blocks_of(parameters, config), config, made.world_size)
    fitting = None
    for size in BLOCK_SIZES:
        candidate = replace(config, max_preconditioner_dim=size)
        blocks = blocks_of(parameters, candidate)
        needed = max(0.0, with_shards) + owned_bytes(blocks, candidate, made.world_size)
        if needed > budget:
            continue
        found = Recommendation(size, needed, _frequency(blocks, candidate, made, speed, overhead))
        if speed is None or fitting is None or found.frequency is not None:
            fitting = found
    return fitting


def blocks_of(parameters: Sequence[Parameter], config: ShampooConfig) -> Blocks:
    """How many blocks there are by the number of their options and by shape."""
    alike: Counter[tuple[int, tuple[tuple[int, ...], ...]]] = Counter()
    for parameter in parameters:
        policy = policy_of(parameter, config)
        if policy.preconditioned:
            alike[policy.options, policy.cuts] += 1
    blocks: Counter[tuple[int, tuple[int, ...]]] = Counter()
    for (number, cuts), times in alike.items():
        shapes: dict[tuple[int, ...], int] = {(): times}
        for along in map(Counter, cuts):
            shapes = {(*head, d): many * some for head, many in shapes.items() for d, some in along.items()}
        blocks.update({(number, shape): many for shape, many in shapes.items()})
    return blocks


def owned_bytes(blocks: Blocks, config: ShampooConfig, ranks: int) -> float:
    """Bytes of blocks on the fullest rank: the mean with the planner's tolerance, or whole blocks if there are few."""
    configs = expanded({0: config})
    sizes = {(number, shape): sum(block_bytes(shape, configs[number]).values()) for number, shape in blocks}
    total = sum(sizes[key] * many for key, many in blocks.items())
    whole_blocks = math.ceil(sum(blocks.values()) / ranks) * max(sizes.values(), default=0)
    mean = total / ranks
    return mean if ranks == 1 else max((1.0 + LOCALITY_TOLERANCE) * mean, min(whole_blocks, total))


def _frequency(
    blocks: Blocks, config: ShampooConfig, made: Estimate, speed: Speed | None, overhead: float
) -> int | None:
    if speed is None:
        return None
    nbytes = max((max(pair) for pair in zip(made.sent, made.received, strict=True)), default=0)
    for frequency in FREQUENCIES:
        configs = expanded({0: replace(config, precondition_frequency=frequency)})
        costs = [(many, *_costs(shape, configs[number])) for (number, shape), many in blocks.items()]
        share = (1.0 + LOCALITY_TOLERANCE) / made.world_size
        products, refreshes = (share * sum(cost[0] * cost[n] for cost in costs) for n in (1, 2))
        if speed.overhead(products, refreshes, nbytes, made.elements, made.world_size) <= overhead:
            return frequency
    return None


def _costs(shape: tuple[int, ...], config: ShampooConfig) -> tuple[float, float]:
    """FLOPs of a block in a step without refresh, and the share of a step in those of a refresh, as in the plan."""
    sides, batch = config.sides(shape), config.batch_dims
    step = step_cost(shape, sides, config.products(len(shape) - batch))
    if config.parts.orthogonalises:
        step += ITERATIONS * iteration_cost(shape[batch:])
    return step, config.decompositions * refresh_cost(shape, sides) / config.precondition_frequency
