"""Checks which values of options can be combined."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING

from torch import Tensor

from shampoo_deepspeed.options.checks import bad
from shampoo_deepspeed.options.choices import OF_BASES

if TYPE_CHECKING:
    from shampoo_deepspeed.options.config import ShampooConfig

# A step multiplies weights by 1 - decay. From here on they grow in each step.
LARGEST_DECAY = 2.0

# KL-Shampoo is the default, so users may not know that these options of Shampoo depend on the preconditioner.
_INSTEAD = "or preconditioner = shampoo"


def check_together(config: ShampooConfig) -> None:
    """Raise an error if two options cannot be combined.

    Raises:
        OptionError: naming one of them, its value, and what is allowed with the other.
    """
    if config.nesterov and config.momentum == 0.0:
        raise bad("nesterov", config.nesterov, "true only together with momentum > 0")
    if config.dampening and config.momentum == 0.0:
        raise bad("dampening", config.dampening, "0 unless momentum > 0")
    if config.stochastic_rounding and config.master_weights:
        raise bad("stochastic_rounding", config.stochastic_rounding, "true only together with master_weights = false")
    _check_preconditioner(config)
    _check_regularisation(config)
    _check_solver(config)
    _check_decay(config)
    _check_blocks(config)


def _check_preconditioner(config: ShampooConfig) -> None:
    """Options that only some preconditioners have, and those that rule out kept eigenbases."""
    parts, name = config.parts, f"preconditioner {config.preconditioner}"
    if parts.whitens and not parts.in_basis and config.exponent_override is not None:
        allowed = f"null with {name}, whose statistics use inverse square roots; {_INSTEAD}"
        raise bad("exponent_override", config.exponent_override, allowed)
    defaults = {"one_sided": (None,), "large_dim": ("block", "adagrad")}
    for option, values in defaults.items():
        value = getattr(config, option)
        if not (parts.takes_roots and not parts.whitens) and value not in values:
            allowed = " or ".join("null" if v is None else v for v in values)
            raise bad(option, value, f"{allowed} with {name}; {_INSTEAD}")
    if parts.in_basis and isinstance(config.exponent_override, tuple):
        raise bad("exponent_override", config.exponent_override, f"null or a number with {name}")
    if config.refresh_tolerance is not None and config.solver not in OF_BASES:
        raise bad("solver", config.solver, "auto, eigh or qr together with refresh_tolerance, which keeps eigenbases")
    if parts.in_basis and config.solver not in OF_BASES:
        raise bad("solver", config.solver, f"auto, eigh or qr with {name}, which takes no inverse roots")
    if parts.statistics is None:
        _check_without_statistics(config)


def _check_without_statistics(config: ShampooConfig) -> None:
    """Options of factor matrices where there are none."""
    without = {"exponent_override": None, "refresh_tolerance": None, "solver": "auto", "damping": "shift"}
    for option, value in {**without, "shrinkage": 0.0}.items():
        if getattr(config, option) != value:
            shown = "null" if value is None else value
            allowed = f"{shown} with preconditioner {config.preconditioner}, which has no factor matrices"
            raise bad(option, getattr(config, option), allowed)


def _check_regularisation(config: ShampooConfig) -> None:
    parts, name = config.parts, f"preconditioner {config.preconditioner}"
    if parts.in_basis and config.damping != "shift":
        raise bad("damping", config.damping, f"shift with {name}, which takes no inverse roots")
    if parts.in_basis and config.shrinkage > 0.0:
        allowed = f"0 with {name}; a multiple of the identity does not change its eigenbases"
        raise bad("shrinkage", config.shrinkage, allowed)
    if parts.whitens and config.damping == "cutoff":
        # A gradient along directions that are cut off in every mode would never reach the statistics, for good.
        allowed = f"shift or saturate with {name}, whose statistics would never see what is cut off"
        raise bad("damping", config.damping, f"{allowed}; {_INSTEAD}")
    if config.damping != "shift" and config.solver not in OF_BASES:
        raise bad("solver", config.solver, f"auto, eigh or qr if damping is {config.damping}, which needs eigenvalues")


def _check_solver(config: ShampooConfig) -> None:
    given = config.exponent_override
    for root in given if isinstance(given, tuple) else (given,):
        if config.solver == "coupled_newton" and root is not None and root != int(root):
            allowed = f"auto or eigh with exponent_override = {root}; coupled_newton needs an integer"
            raise bad("solver", config.solver, allowed)


def _check_decay(config: ShampooConfig) -> None:
    if not config.decoupled_weight_decay and config.weight_decay_type not in (None, "l2"):
        raise bad("weight_decay_type", config.weight_decay_type, "l2 or null if decoupled_weight_decay is false")
    if config.beta3 is not None and config.betas[0] == 0.0:
        raise bad("beta3", config.beta3, "null if betas[0] is 0, as there is no first moment")

    rate = _known(config.lr)
    if rate is None or config.weight_decay == 0.0:
        return
    peak = config.peak_lr or rate
    shares = {"corrected": rate * rate / peak if peak else 0.0, "independent": rate / peak if peak else 1.0}
    share = shares.get(config.decay_type, rate)
    momentum = config.momentum, config.dampening, config.nesterov
    if config.decay_type == "l2" and not config.normalize_gradients and config.elementwise_method in ("none", "sgd"):
        share *= max(1.0, config.elementwise_lr, config.embedding_lr or 0.0, config.tied_embedding_lr or 0.0)
        beta1, beta3 = config.for_elementwise.betas[0], config.for_elementwise.beta3
        largest = _largest_decay(beta1, beta1 if beta3 is None else beta3, *momentum)
    else:
        largest = _largest_decay(0.0, 0.0, *momentum)
    if config.weight_decay * share >= largest:
        allowed = f"less than {largest / share:g} with this learning rate, or weights would change sign and grow"
        raise bad("weight_decay", config.weight_decay, allowed)


def _largest_decay(beta1: float, beta3: float, momentum: float, dampening: float, nesterov: bool) -> float:
    """The decay in a step, relative to the weights, from which on they grow; at most LARGEST_DECAY.

    A step is linear in weights w, first moment M and momentum B. With the decay s, and no gradient but w, it is
    U = beta3 M + (1 - beta3) w, M <- beta1 M + (1 - beta1) w, B <- momentum B + (1 - dampening) U, and w <- w - s B, or
    with Nesterov w - s ((1 - dampening) U + momentum B). Weights grow from where an eigenvalue is above 1, which
    Jury's stability criterion tells from the characteristic polynomial z^3 + a z^2 + b z + c.

    Args:
        beta1: 0 if the decay does not pass through a first moment.
    """
    first, late, m, kept = map(Fraction, (beta1, beta3, momentum, 1.0 - dampening))  # exact: their 1 - x may be tiny
    buffer = kept * (1 - late), kept * late, m  # of w, M and B
    change = (buffer[0] * (1 + m), buffer[1] * (1 + m), m * m) if nesterov else buffer
    # Each coefficient is linear in s: what it is without decay, and its slope.
    a = -(1 + first + m), change[0]
    b = first + m + first * m, change[1] * (1 - first) + change[2] * buffer[0] - change[0] * (first + m)
    c = (
        -first * m,
        (
            change[0] * first * m
            - change[1] * (1 - first) * m
            + change[2] * ((1 - first) * buffer[1] - first * buffer[0])
        ),
    )
    squares = c[0] * c[0], 2 * c[0] * c[1], c[1] * c[1]
    crossed = c[0] * a[0] - b[0], c[0] * a[1] + c[1] * a[0] - b[1], c[1] * a[1]
    conditions: list[tuple[Fraction, ...]] = [(1 - a[0] + b[0] - c[0], b[1] - a[1] - c[1], Fraction(0))]
    for sign in (1, -1):
        conditions.append((1 + sign * c[0], sign * c[1], Fraction(0)))
        conditions.append(tuple(one - x + sign * y for one, x, y in zip((1, 0, 0), squares, crossed, strict=True)))
    return min(LARGEST_DECAY, *(_first_root(*map(float, condition)) for condition in conditions))


def _first_root(constant: float, slope: float, curvature: float) -> float:
    """Where a quadratic that is positive at 0 becomes negative above it, or infinity."""
    square = slope * slope - 4.0 * constant * curvature
    if square < 0.0:
        return math.inf
    part = -0.5 * (slope + math.copysign(math.sqrt(square), slope))
    roots = [above / below for above, below in ((part, curvature), (constant, part)) if below]
    return min((root for root in roots if root > 0.0), default=math.inf)


def refuse_unused_peak(config: ShampooConfig) -> None:
    """Raise an error if ``peak_lr`` is given and nothing reads it.

    Only what a user gives is checked so: a group may keep its peak while its kind of decay is changed by hand.

    Raises:
        OptionError: naming it, its value, and what is allowed with this kind of decay.
    """
    if config.peak_lr is not None and not config.decays_by_peak:
        allowed = f"null if weight decay is {config.decay_type}; only corrected and independent decay are scaled by it"
        raise bad("peak_lr", config.peak_lr, allowed)


def _known(rate: float | Tensor) -> float | None:
    """The learning rate as a number; None if it is on a device, whose reading would wait."""
    if not isinstance(rate, Tensor):
        return rate
    return float(rate.detach()) if rate.device.type == "cpu" else None


def _check_blocks(config: ShampooConfig) -> None:
    # The parts may have any size, but what a dim has must follow from the size of a block.
    if config.split and config.large_dim not in ("block", "adagrad"):
        raise bad("large_dim", config.large_dim, "block or adagrad together with split")
    if config.split and config.one_sided == "smaller":
        raise bad("one_sided", config.one_sided, "null, left or right together with split")
