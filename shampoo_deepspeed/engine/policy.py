"""How a parameter is treated, by shape, name and kind: preconditioned and in which blocks, or element-wise and why."""

from __future__ import annotations

import math
from dataclasses import dataclass

from shampoo_deepspeed.distributed.frameworks import Parameter
from shampoo_deepspeed.geometry.blocks import Side, cut_lengths, merge_small_dims
from shampoo_deepspeed.geometry.plan import Matrix
from shampoo_deepspeed.linalg.orthogonalise import ITERATIONS
from shampoo_deepspeed.options.checks import OptionError
from shampoo_deepspeed.options.config import ShampooConfig
from shampoo_deepspeed.options.parameter_names import matching, rate_option
from shampoo_deepspeed.options.rules import number_under, rule_of


@dataclass(frozen=True)
class Policy:
    """How a parameter is treated: its merged shape if it is preconditioned, else why it is element-wise and how.

    Args:
        options: the number of its options: those of its param group, or of a rule of the group.
        cuts: lengths of its blocks along each dim.
        sides: what each dim of a block has.
        method: the method of its update if it is element-wise.
        rule: the pattern of the rule that it is under, if any.
        rate: the option with the factor on its rate if it is element-wise.
    """

    merged: tuple[int, ...]
    dims: tuple[tuple[int, ...], ...]
    reason: str | None
    decays: bool
    options: int
    cuts: tuple[tuple[int, ...], ...] = ()
    sides: tuple[Side, ...] = ()
    method: str = ""
    rule: str | None = None
    rate: str = "elementwise_lr"

    @property
    def preconditioned(self) -> bool:
        return self.reason is None


def policy_of(parameter: Parameter, config: ShampooConfig) -> Policy:
    """Decide by shape, name and kind alone whether and how a parameter is preconditioned and whether it decays.

    Args:
        config: the options of its group; a rule that it matches applies.

    Raises:
        OptionError: if ``split`` does not fit the shape.
    """
    decays = decays_under(parameter, config)
    rule, pattern = rule_of(parameter.name, parameter.kinds, parameter.shape, config), None
    options = number_under(parameter.group, rule)
    if rule is not None:
        pattern = matching(config.rules[rule]["match"], parameter.name, parameter.kinds, parameter.shape)
        config = config.by_rule[rule]
    limit, batch = config.block_size, config.batch_dims
    merged, dims = merge_small_dims(parameter.shape, limit, batch, config.merge_small_dims)
    reason, method = _why_elementwise(parameter, merged, config)
    if reason is not None:
        flat = (tuple(range(len(parameter.shape))),)
        merged, rate = (math.prod(parameter.shape),), rate_option(parameter.kinds)
        return Policy(merged, flat, reason, decays, options, method=method, rule=pattern, rate=rate)
    sides = config.sides(merged)
    try:
        # A rule without factor matrices works on blocks of at most the given size in every dim.
        every: Side = "matrix"
        cut = sides if config.parts.statistics else (every,) * len(merged)
        cuts = cut_lengths(merged, limit, cut, batch, config.split)
        return Policy(merged, dims, None, decays, options, cuts, sides, rule=pattern)
    except ValueError as error:
        raise OptionError(f"Shampoo option 'split' does not fit parameter {parameter.key}: {error}.") from None


def decays_under(parameter: Parameter, config: ShampooConfig) -> bool:
    """Whether a parameter has the weight decay of its group: by ``no_decay``, or by shape if it has no name."""
    if parameter.name is None and not parameter.kinds and config.no_decay:
        return sum(n > 1 for n in parameter.shape) > 1  # the usual rule of thumb
    return matching(config.no_decay, parameter.name, parameter.kinds, parameter.shape) is None


def _why_elementwise(parameter: Parameter, merged: tuple[int, ...], config: ShampooConfig) -> tuple[str | None, str]:
    """(why a parameter is element-wise, or None; the method of its update)."""
    pattern = matching(config.exclude, parameter.name, parameter.kinds, parameter.shape)
    if pattern is not None:
        return f"excluded by {pattern!r}", config.elementwise_method
    if len(merged) - config.batch_dims < 2 or 0 in merged:
        return "fewer than two dims larger than 1", config.elementwise_method
    if config.large_dim == "adagrad" and max(merged[config.batch_dims :]) > config.block_size:
        return f"a dim above {config.block_size}: AdaGrad", "adagrad"
    if config.parts.statistics and not any(side != "none" for side in config.sides(merged)):
        return f"its dims are above {config.block_size}", config.elementwise_method
    return None, config.elementwise_method


def matrix_of(policy: Policy, config: ShampooConfig, phases: tuple[int, ...] | None = None) -> Matrix:
    """A preconditioned parameter as the plan knows it; ``config`` are its options."""
    products = config.products(len(policy.merged) - config.batch_dims)
    return Matrix(
        policy.merged,
        policy.cuts,
        policy.options,
        config.precondition_frequency,
        phases,
        policy.sides,
        products,
        config.decompositions,
        ITERATIONS if config.parts.orthogonalises else 0,
        config.batch_dims,
    )
