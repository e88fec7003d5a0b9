"""Weights narrower than the step's arithmetic: a float32 copy of each shard, or stochastic rounding.

Random bits are a pure function of the element's place in the global parameter, the parameter's key and its step. So
results do not depend on how the parameter is sharded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from shampoo_deepspeed.algorithm.formats import bits_of, salts_of, seeds_of, to_bfloat16
from shampoo_deepspeed.engine.step_unit import StepUnit
from shampoo_deepspeed.geometry.boxes import Box, FlatRange, row_major
from shampoo_deepspeed.options.checks import OptionError
from shampoo_deepspeed.options.config import ShampooConfig

# Dtypes that end below this need a bound. Updates in float32 end far below bfloat16's largest number, as gradients that
# are not normalized end at `agreement.LARGEST_GRADIENT` and learning rates at `checks.LARGEST_RATE`.
SHORT_RANGE = 2.0**100
# Elements that are rounded at random at a time; each holds about 60 bytes meanwhile.
TOGETHER = 1 << 20


def wide_weights(unit: StepUnit, configs: Mapping[int, ShampooConfig]) -> list[Tensor]:
    """The unit's local weights to be updated, in the unit's dtype.

    A tensor of that dtype is returned itself. For others it is a flat master that is kept, or a flat copy. If something
    else has changed a tensor (such as loading weights), its master takes the new values.
    """
    out = []
    for number, value in enumerate(unit.local_tensors()):
        if value.dtype == unit.dtype:
            out.append(value)
            continue
        config, flat = configs[unit.layout.groups[number]], value.reshape(-1)
        if not config.master_weights:
            refuse_rounding(config, value.dtype)  # it may have been another dtype when the options were checked
            out.append(flat.to(unit.dtype))
            continue
        master = unit.buffer("master", number)
        master.copy_(torch.where(master.to(flat.dtype) == flat, master, flat.to(master.dtype)))
        out.append(master)
    return out


def refuse_rounding(config: ShampooConfig, dtype: torch.dtype) -> None:
    """Raise OptionError if weights of a dtype cannot be rounded as the options ask."""
    if config.stochastic_rounding and dtype not in (torch.bfloat16, torch.float32, torch.float64):
        raise OptionError(
            f"Shampoo option 'stochastic_rounding' = True is not allowed for parameters in {dtype}: bfloat16 only; use "
            "master_weights"
        )


def write_back(unit: StepUnit, wide: Sequence[Tensor], configs: Mapping[int, ShampooConfig]) -> None:
    """Round updated weights into the unit's local tensors; a weight that did not change stays as it is, to the bit.

    Weights that would leave the range of a narrow dtype get its largest number.
    """
    for number, (value, updated) in enumerate(zip(unit.local_tensors(), wide, strict=True)):
        if value.dtype == unit.dtype:
            continue
        config = configs[unit.layout.groups[number]]
        if torch.finfo(value.dtype).max < SHORT_RANGE:
            _bound_(updated, torch.finfo(value.dtype).max)
        if config.stochastic_rounding and not config.master_weights:
            updated = _randomly_rounded(unit, number, updated)
        value.copy_(updated.view(value.shape))


def _bound_(wide: Tensor, largest: float) -> None:
    """Keep finite numbers within a dtype's range, in place; what is infinite or NaN already stays so.

    Updates of ``sgd`` and of normalized methods are as long as gradients. So one finite gradient at the first step,
    when nothing shows yet that it is a spike, could make float16 weights infinite for ever.
    """
    wide.copy_(torch.where(wide.isfinite(), wide.clamp(-largest, largest), wide))


def _randomly_rounded(unit: StepUnit, tensor: int, wide: Tensor) -> Tensor:
    rounded = wide.to(torch.bfloat16)
    for shard in unit.layout.shards:
        if shard.tensor != tensor:
            continue
        parameter, step = unit.parameters[shard.parameter], unit.steps[shard.parameter]
        for start in range(0, shard.box.numel, TOGETHER):
            few = FlatRange(start, min(start + TOGETHER, shard.box.numel))
            bits = random_bits(parameter.key, parameter.shape, shard.box, step, wide.device, few)
            here = slice(*few.shift(shard.offset))
            rounded[here].copy_(stochastically_rounded(wide[here], bits))
    return rounded


def stochastically_rounded(values: Tensor, bits: Tensor) -> Tensor:
    """Float32 values in bfloat16, up with the probability of their distance from the lower neighbour.

    Args:
        bits: `random_bits` of the same shape.
    """
    return torch.where(values.isfinite(), to_bfloat16(values.float(), bits), values.to(torch.bfloat16))


def random_bits(
    key: str, shape: Sequence[int], box: Box, step: int, device: torch.device, few: FlatRange | None = None
) -> Tensor:
    """16 random bits for each element of a box of a parameter, flat: `formats.random_bits` of (key, step, element).

    Args:
        few: which elements of the flattened box; None: all.
    """
    start, stop = few or FlatRange(0, box.numel)
    number = torch.arange(start, stop, device=device)
    place = torch.zeros_like(number)
    strides = zip(row_major(shape), row_major(box.lengths), box.offsets, box.lengths, strict=True)
    for stride, inner, offset, length in strides:
        place += ((number // inner) % length + offset) * stride
    # The seed is made on the CPU, so that nothing is copied to an accelerator, which would be waited for.
    seed = seeds_of(salts_of([key], torch.device("cpu")), "weight", step).item()
    return bits_of(torch.full((1,), seed, dtype=torch.int32, device=device), place).squeeze(0)
