"""Products of stacked matrices, of blocks along one mode, and of an unfolding with itself.

Functions with a ``precision`` take ``"highest"`` (the dtype's own), ``"high"`` (TF32) or ``"medium"`` (bfloat16), as
torch names them: operands are rounded, sums are not. Narrower dtypes than float32 are not affected.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from shampoo_deepspeed.linalg.precision import INDEPENDENT, rounded, tensor_float_32

# Products of one size and dtype are bitwise equal if all their matrices begin at multiples of this many bytes.
ALIGNMENT = 64
# A symmetric product on the CPU is computed in strips: the least rows of a strip, and the most strips, measured best
# from 128 to 1024 rows. Without the upper triangle two strips have 3/4 of the multiplications, and eight 9/16.
STRIP, STRIPS = 64, 8
# Strips begin at multiples of this many rows, so that any row length gives aligned addresses (see ``precision``).
ROWS = 16
# From this many elements in a block on, the CPU multiplies one block after the other by its two matrices. At 256 x 256
# this takes a fifth less time, and torch's calls are short compared with the products.
CHAINED = 128 * 128


def product(left: Tensor, right: Tensor) -> Tensor:
    """``bmm``; in float64 within ``independent_of_switches``, rounded to the dtype of ``left``."""
    return bmm(left.double(), right.double()).to(left.dtype) if INDEPENDENT.get() else bmm(left, right)


def lowered(left: Tensor, right: Tensor, precision: str) -> Tensor:
    """``bmm`` of operands that are rounded to a precision; on NVIDIA's and AMD's devices by their own units."""
    if left.device.type == "cuda" and left.dtype == torch.float32:
        if precision == "medium":
            narrow: Tensor = torch.bmm(left.bfloat16(), right.bfloat16(), out_dtype=torch.float32)
            return narrow
        if precision == "high":
            with tensor_float_32() as on:
                if on:
                    return torch.bmm(left, right)
    if precision != "highest":
        left, right = rounded(left, precision), rounded(right, precision)
    return bmm(left, right)


def bmm(left: Tensor, right: Tensor) -> Tensor:
    """Products [B, m, n] of stacks [B, m, k] and [B, k, n], each of which depends on its two matrices alone.

    On the CPU, matrices that are not aligned in their stack are multiplied in padded copies. Vectors are multiplied as
    matrices of two columns, because one matrix-vector product uses another routine than a batch of them.
    """
    if left.device.type != "cpu":
        return torch.bmm(left, right)
    if left.shape[1] == 1 and right.shape[2] > 1:
        return bmm(right.mT, left.mT).mT
    if right.shape[2] == 1:
        return bmm(left, torch.cat([right, torch.zeros_like(right)], dim=2))[..., :1].contiguous()
    left, right = aligned(left), aligned(right)
    if aligned_rows(left.shape[1] * right.shape[2], left.dtype):
        return torch.bmm(left, right)
    out = _padded(left, left.shape[1], right.shape[2])
    return torch.bmm(left, right, out=out).contiguous()


def aligned_rows(numel: int, dtype: torch.dtype) -> bool:
    """Whether consecutive matrices of ``numel`` elements are all aligned if the first one is."""
    return numel * dtype.itemsize % ALIGNMENT == 0


def aligned(stack: Tensor) -> Tensor:
    """The stack, or a copy of it, in which each matrix begins at a multiple of ``ALIGNMENT`` bytes.

    Matrices that are stored transposed stay so in the copy.
    """
    stride = stack.stride(0) * stack.element_size() if len(stack) > 1 else 0
    if (stack.data_ptr() | stride) % ALIGNMENT == 0:
        return stack
    if stack.stride(1) == 1 and stack.stride(2) != 1:
        return aligned(stack.mT).mT
    return _padded(stack, stack.shape[1], stack.shape[2]).copy_(stack)


def _padded(like: Tensor, rows: int, columns: int) -> Tensor:
    """An uninitialised stack of aligned matrices, each of which is contiguous."""
    numel, unit = rows * columns, ALIGNMENT // like.element_size()
    flat = like.new_empty(len(like), -(-numel // unit) * unit)
    return flat[:, :numel].unflatten(1, (rows, columns))


def unfold(stack: Tensor, mode: int) -> Tensor:
    """Mode unfolding of each block: [B, d_0, ..., d_k-1] to [B, d_mode, product of the other dims]."""
    front = stack.movedim(mode + 1, 1)
    return front.reshape(front.shape[0], front.shape[1], -1)


def fold(unfolded: Tensor, shape: torch.Size, mode: int) -> Tensor:
    """Inverse of ``unfold`` for a stack of this full shape."""
    others = [n for dim, n in enumerate(shape[1:]) if dim != mode]
    return unfolded.reshape(shape[0], shape[mode + 1], *others).movedim(1, mode + 1)


def multiply(stack: Tensor, matrices: Tensor, mode: int, precision: str = "highest") -> Tensor:
    """Each block of [B, *shape] multiplied along one mode by its own matrix of [B, d_mode, d_mode].

    Diagonal matrices are given as vectors [B, d_mode].
    """
    matrices = matrices.to(stack.dtype)
    if matrices.ndim == 2:
        return stack * matrices.view(len(stack), *(n if dim == mode else 1 for dim, n in enumerate(stack.shape[1:])))
    if mode == stack.ndim - 2:  # from the right, which needs no transposed copy
        flat = stack.reshape(stack.shape[0], -1, stack.shape[-1])
        return lowered(flat, matrices.mT, precision).view(stack.shape)
    return fold(lowered(matrices, unfold(stack, mode), precision), stack.shape, mode)


def multiply_along(matrices: Mapping[int, Tensor], precision: str, stack: Tensor, mode: int) -> Tensor:
    """``multiply`` by the mode's own matrices of several modes'."""
    return multiply(stack, matrices[mode], mode, precision)


def multiply_modes(stack: Tensor, matrices: Mapping[int, Tensor], precision: str = "highest") -> Tensor:
    """``multiply`` along several modes, each by its own matrices; a new tensor if there are any."""
    square = stack.ndim == 3 and sorted(matrices) == [0, 1] and all(m.ndim == 3 for m in matrices.values())
    if square and stack.device.type == "cpu" and precision == "highest" and _worth_chaining(stack):
        return _chained(*(aligned(each.to(stack.dtype)) for each in (stack, matrices[0], matrices[1])))
    for mode, own in sorted(matrices.items()):
        stack = multiply(stack, own, mode, precision)
    return stack


def _worth_chaining(stack: Tensor) -> bool:
    m, n = stack.shape[1:]
    return m * n >= CHAINED and all(aligned_rows(numel, stack.dtype) for numel in (m * m, m * n, n * n))


def _chained(stack: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """L X R' of each block; one block's intermediate product stays in the cache, a whole stack's would not."""
    made, between = torch.empty_like(stack), torch.empty_like(stack[0])
    for block, a, b, out in zip(stack, left, right, made, strict=True):
        torch.mm(torch.mm(a, block, out=between), b.mT, out=out)
    return made


def add_gram_(
    factors: Tensor, stack: Tensor, mode: int, decay: float, weight: float, precision: str = "highest"
) -> None:
    """A <- decay * A + weight * XX' in place, for the mode unfoldings X [B, d, n] of a stack [B, *shape].

    Only the lower triangles of A [B, d, d] are defined; the elements above them may be stale (see
    ``inverse_root.symmetric``). Factors [B, d] hold only the diagonals.
    """
    unfolded = unfold(stack, mode)
    unfolded = unfolded.to(torch.promote_types(factors.dtype, unfolded.dtype))
    if factors.ndim == 2:
        factors.mul_(decay).add_(unfolded.square().sum(dim=-1), alpha=weight)
        return
    d, on_cpu = factors.shape[-1], factors.device.type == "cpu"
    if precision != "highest":
        if not on_cpu:
            _add_lowered_(factors, unfolded, decay, weight, precision)
            return
        unfolded = rounded(unfolded, precision)
    if factors.dtype != unfolded.dtype or (on_cpu and not aligned_rows(d * d, factors.dtype)):
        factors.mul_(decay).add_(bmm(unfolded, unfolded.mT), alpha=weight)
        return
    unfolded = aligned(unfolded) if on_cpu else unfolded
    strips = min(STRIPS, d // STRIP) if on_cpu else 1
    width = -(-d // max(1, strips))
    width += -width % ROWS
    for begin in range(0, d, width):
        end = min(d, begin + width)
        rows = factors[:, begin:end, :end]
        rows.baddbmm_(unfolded[:, begin:end], unfolded[:, :end].mT, beta=decay, alpha=weight)


def _add_lowered_(factors: Tensor, unfolded: Tensor, decay: float, weight: float, precision: str) -> None:
    """``add_gram_`` of an accelerator's matrices; in TF32 without a tensor for the product."""
    if precision == "high" and factors.device.type == "cuda" and factors.dtype == unfolded.dtype == torch.float32:
        with tensor_float_32() as on:
            if on:
                factors.baddbmm_(unfolded, unfolded.mT, beta=decay, alpha=weight)
                return
    factors.mul_(decay).add_(lowered(unfolded, unfolded.mT, precision), alpha=weight)
