"""The shard's side of a step: gradients with L2 decay before it, decoupled decay, momentum and update after it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shampoo_deepspeed.algorithm.found_inf import FoundInf
from shampoo_deepspeed.algorithm.grafting import FUSED_DEVICES
from shampoo_deepspeed.distributed.exchange import views
from shampoo_deepspeed.distributed.frameworks import LayoutError
from shampoo_deepspeed.engine.master_weights import wide_weights, write_back
from shampoo_deepspeed.engine.step_unit import StepUnit, UpdateRange
from shampoo_deepspeed.engine.weight_averages import begin_averages, follow_weights
from shampoo_deepspeed.geometry.boxes import BaseBox, FlatRange
from shampoo_deepspeed.options.config import ShampooConfig


class ShardGradients(NamedTuple):
    """Flat gradients of a unit's tensors as the framework gave them, with L2 decay, and which parameters take part."""

    raw: list[Tensor]
    decayed: list[Tensor]
    active: list[bool]


def shard_gradients(unit: StepUnit, configs: Mapping[int, ShampooConfig]) -> ShardGradients:
    """Collect the gradients, and add weight decay if it is coupled (step 1 of docs/how-a-step-works.md).

    Raises:
        RuntimeError: for a sparse gradient.
        LayoutError: for a tensor that has another size or a wider dtype than at its first step.
    """
    gradients = [unit.layout.gradient(tensor) for tensor in unit.tensors]
    if unit.left_out:
        gradients = [None if number in unit.left_out else gradient for number, gradient in enumerate(gradients)]
    active = _taking_part(unit, gradients)
    flat = []
    for number, (size, gradient) in enumerate(zip(unit.sizes, gradients, strict=True)):
        if gradient is None:
            flat.append(torch.zeros(size, dtype=unit.dtype, device=unit.device))
            continue
        if gradient.layout is not torch.strided:
            raise RuntimeError("Shampoo does not support sparse gradients; build the embedding with sparse=False")
        shape = unit.shapes[number]
        reshaped = gradient.shape != shape and gradient.ndim > 1 and len(shape) > 1
        if gradient.numel() != size or reshaped or gradient.dtype.itemsize > unit.dtype.itemsize:
            raise _replaced(unit, number, gradient)
        flat.append(gradient.detach().reshape(-1).contiguous())  # strides of 0 or 2 survive a reshape
    coupled = [g for g, c in configs.items() if c.weight_decay and c.decay_type == "l2"]
    if not coupled:
        return ShardGradients(flat, flat, active)
    decayed = [g.to(unit.dtype, copy=True) for g in flat]
    values = wide_weights(unit, configs)
    for r in unit.update_ranges:
        group = unit.layout.groups[r.tensor]
        if r.decays and group in coupled:
            weights = values[r.tensor].reshape(-1)[slice(*r.elements)]
            decayed[r.tensor][slice(*r.elements)].add_(weights, alpha=configs[group].weight_decay)
    return ShardGradients(flat, decayed, active)


def _replaced(unit: StepUnit, number: int, gradient: Tensor) -> LayoutError:
    """The error for a tensor that was replaced since the unit was built, such as by ``parameter.data = ...``."""
    keys = dict.fromkeys(unit.parameters[s.parameter].key for s in unit.layout.shards if s.tensor == number)
    return LayoutError(
        f"{', '.join(keys)} had {unit.sizes[number]} elements, computed in {unit.dtype}, at its first step, but its "
        f"gradient has {gradient.numel()} elements in {gradient.dtype} now (shape {tuple(unit.shapes[number])}, now "
        f"{tuple(gradient.shape)}); build a new optimizer for new parameters"
    )


def _taking_part(unit: StepUnit, gradients: Sequence[Tensor | None]) -> list[bool]:
    """Which parameters step; a parameter steps with its tensor, on all ranks alike.

    If the framework's layout does not ask ranks to agree, all of them have a gradient of a tensor or none has.
    """
    mine = [gradient is not None for gradient in gradients]
    stepping = unit.any_rank(mine) if unit.layout.agrees else mine
    return [stepping[home] for home in unit.layout.homes or [0] * len(unit.parameters)]


def apply_updates(
    unit: StepUnit,
    updates: Sequence[Tensor],
    active: Sequence[bool],
    configs: Mapping[int, ShampooConfig],
    rates: Mapping[int, float | Tensor],
    found_inf: FoundInf | None,
) -> None:
    """Step 8 of the rule on the shards: decoupled decay, momentum, and W <- W - lr * update.

    ``updates`` are overwritten: their content is undefined afterwards.
    """
    if unit.update_meter.due:
        parts = [updates[r.tensor][slice(*r.elements)] for r in unit.update_ranges if active[r.parameter]]
        unit.update_meter.note([torch.linalg.vector_norm(part) for part in parts], sum(p.numel() for p in parts))
    values = [unit.layout.local(tensor) for tensor in unit.tensors]
    narrow = any(value.dtype != unit.dtype for value in values)
    if narrow:
        values = wide_weights(unit, configs)
    averages = any(config.ema_decay for config in configs.values())
    if averages:
        begin_averages(unit, values, active, configs)
    for group, ranges in _ranges_by_group(unit, active).items():
        config, rate = configs[group], _plain(rates[group])
        weights = [_elements(values[r.tensor], r.elements) for r in ranges]
        steps = [updates[r.tensor][slice(*r.elements)].view_as(w) for r, w in zip(ranges, weights, strict=True)]
        fused = [_fuses(w, s, config, rate) for w, s in zip(weights, steps, strict=True)]
        for decays in (True, False):
            chosen = [n for n, r in enumerate(ranges) if fused[n] and r.decays == decays]
            if chosen:
                decay = float(config.decay(rate)) if decays and config.weight_decay else 0.0
                _in_one_pass([weights[n] for n in chosen], [steps[n] for n in chosen], float(rate), decay, found_inf)
        rest = [n for n, done in enumerate(fused) if not done]
        if rest:
            others = [weights[n] for n in rest], [steps[n] for n in rest]
            _in_many_passes(unit, [ranges[n] for n in rest], *others, config, rate, found_inf)
    if narrow:
        write_back(unit, values, configs)
    if averages:
        follow_weights(unit, values, active, configs, found_inf)
    _show_changes(unit, active)


class AppliedAtOnce:
    """Step 8 on pieces of shards as soon as their updates are there, so that no buffer holds those of all weights.

    Elements are updated one by one, so the weights are those of `apply_updates`, to the bit.
    """

    def __init__(
        self,
        unit: StepUnit,
        active: Sequence[bool],
        configs: Mapping[int, ShampooConfig],
        rates: Mapping[int, float | Tensor],
        found_inf: FoundInf | None,
    ) -> None:
        self._unit, self._active, self._found_inf = unit, active, found_inf
        self._flat = [unit.layout.local(tensor).view(-1) for tensor in unit.tensors]
        self._rates = {group: float(rates[group]) for group in set(unit.layout.groups)}
        decaying = {group: configs[group] for group in self._rates if configs[group].weight_decay}
        self._decays = {group: float(config.decay(self._rates[group])) for group, config in decaying.items()}
        self._norms: list[Tensor] = []  # of the pieces so far, if they are to be measured
        self._elements = 0

    @staticmethod
    def possible(unit: StepUnit, configs: Mapping[int, ShampooConfig], rates: Mapping[int, float | Tensor]) -> bool:
        """Whether updates can be applied so: to weights in the dtype of updates, by one fused kernel."""
        plain = {group: _plain(rate) for group, rate in rates.items()}
        if not all(configs[group].applies_at_once for group in unit.layout.groups):
            return False
        pairs = zip(unit.local_tensors(), unit.layout.groups, strict=True)
        return all(weight.dtype == unit.dtype and _fuses(weight, weight, configs[g], plain[g]) for weight, g in pairs)

    def __call__(self, boxes: Sequence[BaseBox], pieces: Sequence[Tensor]) -> None:
        """Update boxes of local tensors, each given by the number of its tensor."""
        chosen: dict[tuple[int, bool], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for (tensor, place), weight, piece in zip(boxes, views(self._flat, boxes), pieces, strict=True):
            found = self._unit.range_at(tensor, place.offset)
            if self._active[found.parameter] and piece.numel():
                if self._unit.update_meter.due:
                    self._norms.append(torch.linalg.vector_norm(piece.to(self._unit.dtype)))
                    self._elements += piece.numel()
                chosen[self._unit.layout.groups[tensor], found.decays].append((weight, piece))
        for (group, decays), pairs in chosen.items():
            # On the CPU one by one, so that copies of parts that are not contiguous are small.
            for some in [[pair] for pair in pairs] if self._unit.device.type == "cpu" else [pairs]:
                apart = [
                    (w, torch.empty(w.shape, dtype=w.dtype, device=w.device)) for w, _ in some if not w.is_contiguous()
                ]
                if apart:  # the kernel ignores strides
                    torch._foreach_copy_([own for _, own in apart], [weight for weight, _ in apart])
                copies = iter(apart)
                weights = [weight if weight.is_contiguous() else next(copies)[1] for weight, _ in some]
                steps = [piece.to(self._unit.dtype).contiguous() for _, piece in some]
                decay = self._decays.get(group, 0.0) if decays else 0.0
                _in_one_pass(weights, steps, self._rates[group], decay, self._found_inf)
                if apart:
                    torch._foreach_copy_([weight for weight, _ in apart], [own for _, own in apart])

    def finish(self) -> None:
        """Let autograd see that the weights have changed, after all of them."""
        if self._unit.update_meter.due:
            self._unit.update_meter.note(self._norms, self._elements)
        _show_changes(self._unit, self._active)


def _plain(rate: float | Tensor) -> float | Tensor:
    """A rate as a number, unless that needs a wait for a device."""
    if isinstance(rate, Tensor) and rate.device.type == "cpu":
        return float(rate)  # copying it to the device would wait
    return rate


def _show_changes(unit: StepUnit, active: Sequence[bool]) -> None:
    """Count the step as a change of the parameters, as autograd must see it.

    A fused kernel and a write into a local part do not count. So a second backward through a graph from before the step
    would be a wrong gradient and not an error.
    """
    changed = {r.tensor for r in unit.update_ranges if active[r.parameter]}
    torch.autograd.graph.increment_version([unit.tensors[number] for number in changed])


def _fuses(weight: Tensor, step: Tensor, config: ShampooConfig, rate: float | Tensor) -> bool:
    """Whether torch's fused kernel for SGD can be used.

    Its momentum is different, it ignores strides, and it takes a rate on the device in float32 only.
    """
    if config.momentum or isinstance(rate, Tensor):
        return False
    return weight.device.type in FUSED_DEVICES and weight.is_contiguous() and weight.dtype == step.dtype


def _in_one_pass(
    weights: list[Tensor], steps: list[Tensor], rate: float, decay: float, found_inf: FoundInf | None
) -> None:
    """W <- W - lr * (update + decay * W), each read and written once."""
    torch._fused_sgd_(
        weights,
        steps,
        [],
        weight_decay=decay,
        momentum=0.0,
        lr=rate,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
        found_inf=None if found_inf is None else found_inf.as_float,
    )


def _in_many_passes(
    unit: StepUnit,
    ranges: Sequence[UpdateRange],
    weights: list[Tensor],
    steps: list[Tensor],
    config: ShampooConfig,
    rate: float | Tensor,
    found_inf: FoundInf | None,
) -> None:
    """The same with momentum, for weights of any strides and a rate that may be on the device."""
    if config.decay_type != "l2" and config.weight_decay:
        decaying = [n for n, r in enumerate(ranges) if r.decays]
        if decaying:
            _add_decay([steps[n] for n in decaying], [weights[n] for n in decaying], config.decay(rate))
    if config.momentum:
        steps = _with_momentum(unit, ranges, steps, config, found_inf)
    if found_inf is not None:
        torch._foreach_mul_(steps, found_inf.scale(rate))
        rate = 1.0
    elif isinstance(rate, Tensor):  # on another device than the weights
        rate = float(rate)
    torch._foreach_add_(weights, steps, alpha=-rate)


def _add_decay(steps: list[Tensor], weights: list[Tensor], decay: float | Tensor) -> None:
    if isinstance(decay, Tensor):  # scaled by a learning rate that lives on the device
        weights = [w * decay.to(device=w.device, dtype=s.dtype) for w, s in zip(weights, steps, strict=True)]
        decay = 1.0
    torch._foreach_add_(steps, weights, alpha=decay)


def _ranges_by_group(unit: StepUnit, active: Sequence[bool]) -> dict[int, list[UpdateRange]]:
    chosen: dict[int, list[UpdateRange]] = defaultdict(list)
    for updated in unit.update_ranges:
        if active[updated.parameter]:
            chosen[unit.layout.groups[updated.tensor]].append(updated)
    return chosen


def _elements(tensor: Tensor, elements: FlatRange) -> Tensor:
    """These elements of a tensor. A whole tensor keeps its own strides; flat shards are contiguous."""
    return tensor if elements == (0, tensor.numel()) else tensor.view(-1)[slice(*elements)]


def _with_momentum(
    unit: StepUnit,
    ranges: Sequence[UpdateRange],
    steps: list[Tensor],
    config: ShampooConfig,
    found_inf: FoundInf | None,
) -> list[Tensor]:
    """Step 8: B <- mu * B + (1 - dampening) * U; gives B, or with Nesterov (1 - dampening) * U + mu * B."""
    buffers = [
        unit.buffer("momentum", r.tensor)[slice(*r.elements)].view_as(step)
        for r, step in zip(ranges, steps, strict=True)
    ]
    torch._foreach_mul_(steps, 1.0 - config.dampening)
    if found_inf is None:
        torch._foreach_mul_(buffers, config.momentum)
        torch._foreach_add_(buffers, steps)
    else:
        torch._foreach_mul_(buffers, found_inf.keep(config.momentum))
        torch._foreach_add_(buffers, torch._foreach_mul(steps, found_inf.scale(1.0)))
    if not config.nesterov:
        return [b.clone() for b in buffers]
    torch._foreach_add_(steps, buffers, alpha=config.momentum)
    return steps
