"""Modes of stacked blocks: unfoldings, and products along one mode."""

from __future__ import annotations

import torch
from torch import Tensor


def unfold(stack: Tensor, mode: int) -> Tensor:
    """Mode unfolding of each block: [B, d_0, ..., d_k-1] to [B, d_mode, product of the other dims]."""
    front = stack.movedim(mode + 1, 1)
    return front.reshape(front.shape[0], front.shape[1], -1)


def fold(unfolded: Tensor, shape: torch.Size, mode: int) -> Tensor:
    """Inverse of ``unfold`` for a stack of this full shape."""
    others = [n for dim, n in enumerate(shape[1:]) if dim != mode]
    return unfolded.reshape(shape[0], shape[mode + 1], *others).movedim(1, mode + 1)


def multiply(stack: Tensor, matrices: Tensor, mode: int) -> Tensor:
    """Each block of [B, *shape] multiplied along one mode by its own matrix of [B, d_mode, d_mode].

    Diagonal matrices are given as vectors [B, d_mode].
    """
    matrices = matrices.to(stack.dtype)
    if matrices.ndim == 2:
        return stack * matrices.view(len(stack), *(n if dim == mode else 1 for dim, n in enumerate(stack.shape[1:])))
    if mode == stack.ndim - 2:  # from the right, which needs no transposed copy
        flat = stack.reshape(stack.shape[0], -1, stack.shape[-1])
        return torch.bmm(flat, matrices.mT).view(stack.shape)
    return fold(torch.bmm(matrices, unfold(stack, mode)), stack.shape, mode)
