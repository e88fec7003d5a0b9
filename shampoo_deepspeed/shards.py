"""The shard's side of a step: gradients with L2 decay before it, decoupled decay, momentum and update after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from shampoo_deepspeed.config import ShampooConfig
from shampoo_deepspeed.unit import Unit
from shampoo_deepspeed.verdict import Verdict


def shard_gradients(unit: Unit, configs: Mapping[int, ShampooConfig]) -> tuple[list[Tensor], list[bool]]:
    """Flat gradients of the unit's tensors (step 1: with L2 decay where coupled), and which parameters take part.

    Raises:
        RuntimeError: for a sparse gradient.
    """
    flat = []
    active = [True] * len(unit.parameters)
    for shard in unit.layout.shards:
        if unit.tensors[shard.tensor].grad is None:
            active[shard.parameter] = False
    for tensor in unit.tensors:
        if tensor.grad is None:
            flat.append(torch.zeros((), dtype=tensor.dtype, device=tensor.device).expand(tensor.numel()))
            continue
        if tensor.grad.layout is not torch.strided:
            raise RuntimeError("Shampoo takes no sparse gradients; build the embedding with sparse=False")
        flat.append(tensor.grad.detach().reshape(-1))
    decayed = [g for g, c in configs.items() if c.weight_decay and not c.decoupled_weight_decay]
    if decayed:
        flat = [g.to(unit.dtype, copy=True) for g in flat]
        for number, start, stop, _, decays in unit.updates:
            group = unit.layout.groups[number]
            if decays and group in decayed:
                weights = unit.tensors[number].detach().reshape(-1)[start:stop]
                flat[number][start:stop].add_(weights, alpha=configs[group].weight_decay)
    return flat, active


def update(
    unit: Unit,
    directions: Sequence[Tensor],
    active: Sequence[bool],
    configs: Mapping[int, ShampooConfig],
    rates: Mapping[int, float | Tensor],
    verdict: Verdict,
) -> None:
    """Steps 7 to 9 of the rule on the shards: decoupled decay, momentum, and W <- W - lr * direction."""
    for tensor, start, stop, parameter, decays in unit.updates:
        if not active[parameter]:
            continue
        group = unit.layout.groups[tensor]
        config = configs[group]
        target = unit.tensors[tensor].detach()
        part = directions[tensor][start:stop]
        # A region that is a whole tensor keeps the tensor's own strides; flat shards are contiguous.
        weights = target if stop - start == target.numel() else target.view(-1)[start:stop]
        step = part.view(weights.shape)
        if config.decoupled_weight_decay and decays and config.weight_decay:
            step.add_(weights, alpha=config.weight_decay)
        if config.momentum:
            step = _with_momentum(unit, tensor, start, stop, step, config, verdict)
        weights.add_(step.mul_(verdict.scale(rates[group])), alpha=-1.0)


def _with_momentum(
    unit: Unit, tensor: int, start: int, stop: int, step: Tensor, config: ShampooConfig, verdict: Verdict
) -> Tensor:
    """Step 8: B <- mu * B + (1 - dampening) * U; B, or with Nesterov (1 - dampening) * U + mu * B."""
    buffer = unit.momentum_buffer(tensor)[start:stop].view(step.shape)
    step.mul_(1.0 - config.dampening)
    buffer.mul_(verdict.keep(config.momentum)).add_(step * verdict.scale(1.0))
    return step.add_(buffer, alpha=config.momentum) if config.nesterov else buffer.clone()
