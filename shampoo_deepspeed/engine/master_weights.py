"""Weights narrower than the step's arithmetic: a float32 copy of each shard, or stochastic rounding.

Random bits are a pure function of the element's place in the global parameter, the parameter's key and its step. So
results do not depend on how the parameter is sharded.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from shampoo_deepspeed.engine.step_unit import StepUnit
from shampoo_deepspeed.geometry.boxes import Box, row_major
from shampoo_deepspeed.options.checks import OptionError
from shampoo_deepspeed.options.config import ShampooConfig

# Dtypes that end below this need a bound. Updates in float32 end far below bfloat16's largest number, as gradients that
# are not normalized end at `agreement.LARGEST_GRADIENT` and learning rates at `checks.LARGEST_RATE`.
SHORT_RANGE = 2.0**100


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
            if config.stochastic_rounding and value.dtype != torch.bfloat16:
                raise OptionError(
                    f"Shampoo option 'stochastic_rounding' = True is not allowed for parameters in {value.dtype}: "
                    "bfloat16 only; use master_weights"
                )
            out.append(flat.to(unit.dtype))
            continue
        master = unit.buffer("master", number)
        master.copy_(torch.where(master.to(flat.dtype) == flat, master, flat.to(master.dtype)))
        out.append(master)
    return out


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
    rounded = wide.clone()
    for shard in unit.layout.shards:
        if shard.tensor == tensor:
            parameter = unit.parameters[shard.parameter]
            noise = random_bits(parameter.key, parameter.shape, shard.box, unit.steps[shard.parameter], wide.device)
            part = rounded[shard.offset : shard.offset + shard.box.numel]
            part.copy_(stochastically_rounded(part, noise))
    return rounded


def stochastically_rounded(values: Tensor, noise: Tensor) -> Tensor:
    """Float32 values rounded to bfloat16's grid, up with the probability of their distance from the lower neighbour.

    Args:
        noise: int64 in [0, 2^16), uniform, of the same shape.
    """
    bits = values.float().view(torch.int32)
    moved = ((bits.long() + noise) & ~0xFFFF).to(torch.int32).view(torch.float32)
    return torch.where(torch.isfinite(values) & torch.isfinite(moved), moved, values)


def random_bits(key: str, shape: Sequence[int], box: Box, step: int, device: torch.device) -> Tensor:
    """16 random bits for each element of a box of a parameter, flat, as int64: SplitMix64 of (key, step, element)."""
    place = torch.zeros((), dtype=torch.int64, device=device)
    for stride, offset, length in zip(row_major(shape), box.offsets, box.lengths, strict=True):
        place = place.unsqueeze(-1) + torch.arange(offset, offset + length, device=device) * stride
    seed = _mixed(torch.full((), (zlib.crc32(key.encode()) << 31) ^ step, dtype=torch.int64, device=device))
    return _mixed(place.reshape(-1) + seed) & 0xFFFF


def _mixed(x: Tensor) -> Tensor:
    """SplitMix64's finalizer (Steele, Lea, Flood 2014) in wrapping int64 arithmetic."""
    x = x * _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
