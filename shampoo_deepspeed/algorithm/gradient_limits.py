"""How large gradients may be that are not normalized, compared with those before and with what state can hold.

Factor matrices and second moments show the scale of the gradients so far. All functions see this rank's part only, and
their sums may be added over ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from shampoo_deepspeed.algorithm.block_stack import BlockStack
from shampoo_deepspeed.algorithm.elementwise import Elementwise
from shampoo_deepspeed.options.config import ShampooConfig

# The largest element of a gradient from which float32 factor matrices can be computed if it is not normalized: its
# square may grow by 2^40 in KL-Shampoo's roots and by the size of the block in the sum.
LARGEST_GRADIENT = 2.0**32
# In float64, norms of gradients up to here are finite.
LARGEST_IN_FLOAT64 = 2.0**480
# A gradient is a spike if its norm is so many times the root of its running mean square. With it, second moments and
# factor matrices would be useless for as long as they remember. After n gradients it is SPIKE * (1 + DOUBT / n) times,
# as the mean of a few is not sure yet. docs/reliability.md has the share of usual gradients that count as spikes.
SPIKE, DOUBT = 32.0, 8.0
# If so many steps in a row were rejected as spikes, gradients have another scale now.
SPIKES = 3


def is_spike(now: Tensor, before: Tensor, seen: int) -> Tensor:
    """Whether gradients are a spike, given ||G||^2 and its running mean after ``seen`` gradients; NaN is one."""
    factor = SPIKE * (1.0 + DOUBT / max(1, seen))
    return (before > 0) & ~(now <= factor * factor * before)


def sum_of_squares(parts: Sequence[Tensor], weights: Sequence[float], device: torch.device) -> Tensor:
    """The weighted sum of ||x||^2, 0-d float64."""
    if not parts:
        return torch.zeros((), dtype=torch.float64, device=device)
    norms = torch._foreach_norm(list(parts), 2, torch.float64)
    return _weighted_sum([norm.square() for norm in norms], weights)


def mean_square_of_blocks(
    stacks: Sequence[BlockStack],
    parameters_of_rows: Sequence[Sequence[int]],
    steps: Sequence[int],
    configs: Mapping[int, ShampooConfig],
    device: torch.device,
) -> Tensor:
    """The running mean of ||G||^2 of these blocks, by factor matrices or without any by first moments: 0-d float64.

    Args:
        parameters_of_rows: the parameter of each row of each stack.
        steps: the step count of each parameter; those with 0 do not count.
        device: of the result.
    """
    total = torch.zeros((), dtype=torch.float64, device=device)
    for stack, parameters in zip(stacks, parameters_of_rows, strict=True):
        config = configs[stack.options]
        counts = [_gradients_in(config, steps[p]) if steps[p] else 0 for p in parameters]
        factors = [name for name in stack.tensors if name.startswith("factor_")]
        if any(counts) and not factors and "exp_avg" in stack.tensors:
            weights = [_of_first_moment(config.betas[0], steps[p]) if steps[p] else 0.0 for p in parameters]
            total += sum_of_squares(stack.tensors["exp_avg"].unbind(), weights, device)
        elif any(counts) and factors:
            name = min(factors, key=lambda n: int(n[7:]))
            factor, beta = stack.tensors[name], config.factors_decay
            scale = 1.0
            if config.parts.statistics == "whitened":  # its mean eigenvalue is that of an element
                scale = math.prod(stack.shape) / factor.shape[-1]
            weights = [scale / (n if beta == 1.0 else 1.0 - beta**n) if n else 0.0 for n in counts]
            traces = factor if factor.ndim == 2 else factor.diagonal(dim1=-2, dim2=-1)
            total += _weighted_sum(traces.double().sum(-1).unbind(), weights).to(device)
    return total


def mean_square_of_elements(
    elementwise: Elementwise, steps: Sequence[int], configs: Mapping[int, ShampooConfig], device: torch.device
) -> Tensor:
    """The same of element-wise parameters, by second moments, or by first ones if there are none."""
    seconds: list[tuple[Tensor, float]] = []
    firsts: list[tuple[Tensor, float]] = []
    for number, shard in enumerate(elementwise.shards):
        config, step = configs[shard.group].for_elementwise, steps[shard.parameter]
        needs, beta1 = elementwise.needs[shard.group, shard.method], config.betas[0]
        if not step:
            continue
        if "second_moment" in needs:
            decayed = shard.method != "adagrad"
            weight = 1.0 / (1.0 - config.second_moment_beta**step if decayed else step)
            seconds.append((elementwise.views["second_moment"][number], weight * shard.share))
        elif beta1:
            firsts.append((elementwise.views["exp_avg"][number], _of_first_moment(beta1, step) * shard.share))
    total = sum_of_squares([part for part, _ in firsts], [weight for _, weight in firsts], device)
    if seconds:  # the sum of elements, none of which is negative
        sums = torch._foreach_norm([part for part, _ in seconds], 1, torch.float64)
        total = total + _weighted_sum(sums, [weight for _, weight in seconds])
    return total


def _of_first_moment(beta1: float, step: int) -> float:
    """||G||^2 divided by that of a first moment of pure noise, which is shorter by the root of (1 + b) / (1 - b)."""
    return (1.0 + beta1) / (1.0 - beta1) / (1.0 - beta1**step) ** 2


def _gradients_in(config: ShampooConfig, step: int) -> int:
    """The gradients in a block's first factor matrix after this step (see ``Sampling``)."""
    dense, sampled = config.dense_statistics, config.sampling
    return step if step <= dense else dense + sampled * (1 + (step - dense - 1) // sampled)


def _weighted_sum(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The sum of 0-d tensors times numbers, which a device gets with its kernels, so that nothing waits for it."""
    return torch.stack(torch._foreach_mul(list(values), list(weights))).sum()
