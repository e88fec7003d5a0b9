"""The refresh phase of every block of a model, from what the optimizer was given alone: the same on all ranks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from shampoo_deepspeed.distributed.frameworks import Parameter
from shampoo_deepspeed.engine.policy import policy_of
from shampoo_deepspeed.engine.staggering import staggered_phases
from shampoo_deepspeed.geometry.blocks import cut_into_blocks
from shampoo_deepspeed.geometry.plan import refresh_cost
from shampoo_deepspeed.options.config import ShampooConfig
from shampoo_deepspeed.options.rules import number_under, rule_of


def refresh_phases(parameters: Iterable[Parameter], configs: Mapping[int, ShampooConfig]) -> dict[str, tuple[int, ...]]:
    """By key the phases of the blocks of each parameter whose group spreads its refreshes.

    Args:
        parameters: all that the optimizer was given; groups take turns in their order, and in each of them the
            parameters in theirs, whatever shards and step units are. Groups of one frequency share a window. Frozen
            ones come after all others, so that it makes no difference whether they are given too.
        configs: options by group number, and of rules by theirs.
    """
    phases: dict[str, tuple[int, ...]] = {}
    windows: dict[int, list[float]] = defaultdict(list)
    for parameter in sorted(parameters, key=lambda p: (p.frozen, p.group, p.turn)):
        group = number_under(
            parameter.group, rule_of(parameter.name, parameter.kinds, parameter.shape, configs[parameter.group])
        )
        config = configs[group]
        if not config.staggers:
            continue
        policy = policy_of(parameter, configs[parameter.group])
        if not policy.preconditioned:
            continue
        frequency = config.precondition_frequency
        blocks = cut_into_blocks(policy.merged, policy.cuts)
        costs = [refresh_cost(box.lengths, policy.sides) for box in blocks]
        found = staggered_phases(costs, frequency, windows[frequency])
        window = windows[frequency] or [0.0] * frequency
        for cost, phase in zip(costs, found, strict=True):
            window[phase] += cost
        windows[frequency] = window
        phases[parameter.key] = tuple(found)
    return phases
