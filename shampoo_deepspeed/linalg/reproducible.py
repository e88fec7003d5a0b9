"""Results that depend on values alone, not on what lies beside them in memory.

Libraries do not promise that. LAPACK kernels take other paths for a matrix that is not aligned, as matrices of odd
size inside a batch are not; and torch's vectorised loops compute the last elements of a tensor, which fill no vector
register, by another formula (``pow``, the fused Adam). So on the CPU matrices are decomposed one by one, each in
memory of its own, and elements at the end of a tensor are computed in a padded copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# A multiple of the elements that torch's loops take at a time, on any CPU: two vector registers of 16 float32 with
# AVX-512, of 64 with the widest SVE.
LANES = 128
# Torch divides tensors from 32,768 elements on among threads, and not at multiples of vector registers.
UNDIVIDED = 1 << 14


def elementwise(function: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """``function(values)``, where each element of the result depends on its own element of ``values`` alone.

    Args:
        function: an element-wise function of tensors that keeps shape and dtype.
    """
    if values.device.type != "cpu" or not values.numel():
        return function(values)
    flat = values.reshape(-1)
    padded = flat.new_ones(-(-len(flat) // LANES) * LANES)
    padded[: len(flat)] = flat
    parts = [function(part) for part in padded.split(UNDIVIDED)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[: len(flat)].view(values.shape)


def power(values: Tensor, exponent: float) -> Tensor:
    """``values ** exponent``, element by element, by ``elementwise``."""
    return elementwise(lambda part: part.pow(exponent), values)


def in_whole_registers(function: Callable[[Sequence[list[Tensor]]], None], *lists: Sequence[Tensor]) -> None:
    """Calls ``function`` on lists of contiguous tensors that it changes in place, element by element.

    On the CPU it gets flat views: of each tensor the elements that fill vector registers, and padded copies of the
    others, which are written back.

    Args:
        function: takes as many lists as there are here; tensors at the same place of each have one size.
        lists: of tensors; those at the same place of each list have one size.
    """
    if not lists[0] or lists[0][0].device.type != "cpu":
        function([list(tensors) for tensors in lists])
        return
    full = [tensor.numel() // LANES * LANES for tensor in lists[0]]
    short = [place for place, tensor in enumerate(lists[0]) if tensor.numel() > full[place]]
    flat = [[tensor.view(-1) for tensor in tensors] for tensors in lists]
    bodies = [[t[:n] for t, n in zip(tensors, full, strict=True) if n] for tensors in flat]
    ends = [[tensors[place][full[place] :] for place in short] for tensors in flat]
    padded = [[_padded(end) for end in tensors] for tensors in ends]
    function([body + rest for body, rest in zip(bodies, padded, strict=True)])
    for tensors, copies in zip(ends, padded, strict=True):
        if tensors:
            torch._foreach_copy_(tensors, [copy[: len(end)] for end, copy in zip(tensors, copies, strict=True)])


def _padded(end: Tensor) -> Tensor:
    out = end.new_zeros(LANES)
    out[: len(end)] = end
    return out
