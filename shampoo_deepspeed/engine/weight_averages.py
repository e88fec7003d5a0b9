"""Exponential moving averages of the weights, kept by the ranks that hold the shards, and put into the model on demand.

At step t of a parameter: E <- d E + (1 - d) W, with d the smaller of ``ema_decay`` and (1 + t) / (10 + t), so that the
first weights are forgotten soon (as in TensorFlow's ExponentialMovingAverage with ``num_updates``). E begins with the
weights before the first step. Shards are averaged one by one: parameters in one flat tensor may have begun at
different steps, and results must not depend on how they are sharded.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from shampoo_deepspeed.algorithm.found_inf import FoundInf
from shampoo_deepspeed.distributed.frameworks import Shard
from shampoo_deepspeed.engine.step_unit import StepUnit
from shampoo_deepspeed.options.config import ShampooConfig

AVERAGE = "average"  # the kind of buffer


def begin_averages(
    unit: StepUnit, weights: Sequence[Tensor], active: Sequence[bool], configs: Mapping[int, ShampooConfig]
) -> None:
    """Before a step changes weights: let averages begin at them, where there are none or a parameter is new.

    Args:
        weights: of the unit's local tensors, in its dtype.
        active: which parameters step.
    """
    kept = unit.buffers[AVERAGE]
    for tensor, value in enumerate(weights):
        if _decay(unit, tensor, configs) and tensor not in kept:
            kept[tensor] = value.reshape(-1).clone()
    new = [s for s in _averaged_shards(unit, active, configs) if unit.steps[s.parameter] == 1]
    for shard in new:
        _part(kept[shard.tensor], shard).copy_(_part(weights[shard.tensor].reshape(-1), shard))


def follow_weights(
    unit: StepUnit,
    weights: Sequence[Tensor],
    active: Sequence[bool],
    configs: Mapping[int, ShampooConfig],
    found_inf: FoundInf | None,
) -> None:
    """After a step: move the averages towards the new weights; a rejected step changes nothing."""
    by_decay: dict[float, list[Shard]] = defaultdict(list)
    for shard in _averaged_shards(unit, active, configs):
        step = unit.steps[shard.parameter]
        by_decay[min(_decay(unit, shard.tensor, configs), (1.0 + step) / (10.0 + step))].append(shard)
    for decay, shards in by_decay.items():
        averages = [_part(unit.buffers[AVERAGE][s.tensor], s) for s in shards]
        new = [_part(weights[s.tensor].reshape(-1), s) for s in shards]
        if found_inf is None:
            torch._foreach_mul_(averages, decay)
            torch._foreach_add_(averages, new, alpha=1.0 - decay)
        else:
            torch._foreach_mul_(averages, found_inf.keep(decay))
            torch._foreach_add_(averages, torch._foreach_mul(new, found_inf.scale(1.0 - decay)))


def use_averages(units: Sequence[StepUnit], configs: Mapping[int, ShampooConfig]) -> None:
    """Put the averages into the units' local tensors, and keep the weights that were there.

    If it fails, nothing has changed.
    """
    found = []
    for unit in units:
        for tensor, value in enumerate(unit.local_tensors()):
            average = unit.buffers[AVERAGE].get(tensor)
            if average is not None and _decay(unit, tensor, configs) and tensor not in unit.own_weights:
                found.append((unit, tensor, value, average.view(value.shape)))
    kept = [value.clone() for _, _, value, _ in found]  # memory may be too small
    try:
        for (unit, tensor, value, average), own in zip(found, kept, strict=True):
            unit.own_weights[tensor] = own
            value.copy_(average)
            torch.autograd.graph.increment_version(unit.tensors[tensor])
    except BaseException:
        for unit, tensor, value, _ in found:
            _put_back(unit, tensor, value)
        raise


def use_weights(unit: StepUnit) -> None:
    """Put the weights back, to the bit."""
    for tensor, value in enumerate(unit.local_tensors()):
        _put_back(unit, tensor, value)


def _put_back(unit: StepUnit, tensor: int, value: Tensor) -> None:
    own = unit.own_weights.get(tensor)
    if own is not None:
        value.copy_(own)
        del unit.own_weights[tensor]  # not before, so that an interrupt loses nothing
        torch.autograd.graph.increment_version(unit.tensors[tensor])


def _averaged_shards(unit: StepUnit, active: Sequence[bool], configs: Mapping[int, ShampooConfig]) -> list[Shard]:
    return [s for s in unit.layout.shards if s.box.numel and active[s.parameter] and _decay(unit, s.tensor, configs)]


def _decay(unit: StepUnit, tensor: int, configs: Mapping[int, ShampooConfig]) -> float:
    return configs[unit.layout.groups[tensor]].ema_decay


def _part(flat: Tensor, shard: Shard) -> Tensor:
    return flat[shard.offset : shard.offset + shard.box.numel]
