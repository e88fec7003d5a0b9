"""Converts a block's state to stored tensors and back, each by itself or all of them as bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shampoo_deepspeed.algorithm.block_stack import BlockStack, read_status
from shampoo_deepspeed.algorithm.formats import stored_forms
from shampoo_deepspeed.state.state_dict import StackState

# A block's tensors in the order of its stored bytes: name, dtype, shape.
BlockLayout = list[tuple[str, str, tuple[int, ...]]]

MOMENTS = ("exp_avg", "rotated_exp_avg", "second_moment", "rotated_second_moment", "momentum")
# Not a tensor of the stack: 1 if the block was refreshed plus 2 if a refresh is pending, and how often its roots failed
# in a row.
STATUS = ("status", "int64", (2,))
# Follows the dtype of a square matrix of which only this triangle is stored, row by row.
TRIANGLE = " lower triangle"


@dataclass(frozen=True)
class Form:
    """How a save differs from the state in memory.

    Args:
        moments: dtype of moments, None for their own.
        packed_factors: store only the lower triangles of factor matrices; nothing else of them is ever read (see
            ``linalg.inverse_root.symmetric``).
    """

    moments: torch.dtype | None = None
    packed_factors: bool = False

    def dtype(self, name: str, tensor: Tensor) -> torch.dtype:
        """The dtype in which a tensor of the state is stored."""
        return self.moments if self.moments is not None and name in MOMENTS else tensor.dtype


AS_IN_MEMORY = Form()


def block_layout(stack: StackState | BlockStack, form: Form = AS_IN_MEMORY) -> BlockLayout:
    """What a stored block of a stack consists of."""
    layout: BlockLayout = []
    for name, tensor in sorted(stack.tensors.items()):
        shape = tuple(tensor.shape[1:])
        packs = form.packed_factors and name.startswith("factor_") and len(shape) == 2
        layout.append((name, dtype_name(form.dtype(name, tensor)) + TRIANGLE * packs, shape))
    return [*layout, STATUS]


def block_size(layout: BlockLayout) -> int:
    """Bytes of a stored block."""
    return sum(_bytes(part) for part in layout)


def stored_tensors(stack: StackState, row: int, layout: BlockLayout) -> list[Tensor]:
    """A block's state, a row of a stack, as the tensors of its layout, on the CPU."""
    flags = [int(stack.refreshed[row]) + 2 * int(stack.pending[row]), stack.failures[row]]
    status = torch.tensor(flags, dtype=torch.int64, device="cpu")  # under any default device
    parts = []
    for name, kind, _ in layout:
        tensor = status if name == "status" else stack.tensors[name][row]
        if kind.endswith(TRIANGLE):
            tensor = tensor[_lower(tensor)]
        parts.append(tensor.to(_dtype(kind)).cpu().contiguous())
    return parts


def packed(stack: StackState, row: int, layout: BlockLayout) -> Tensor:
    """A block's state, a row of a stack, as bytes on the CPU."""
    return torch.cat([part.reshape(-1).view(torch.uint8) for part in stored_tensors(stack, row, layout)])


def whole_tensors(parts: Sequence[Tensor], layout: BlockLayout) -> list[Tensor]:
    """The tensors of a block from those that were stored."""
    return [
        _mirrored(part, shape) if kind.endswith(TRIANGLE) else part.view(tuple(shape))
        for part, (_, kind, shape) in zip(parts, layout, strict=True)
    ]


def unpack(stack: BlockStack, row: int, layout: BlockLayout, blob: Tensor) -> None:
    """Load a block's bytes into a row, still without state, of a live stack."""
    pieces = torch.split(blob, [_bytes(part) for part in layout])
    # A view as a wider dtype must be aligned for that dtype.
    parts = [piece.clone().view(_dtype(kind)) for piece, (_, kind, _) in zip(pieces, layout, strict=True)]
    whole = zip(layout, whole_tensors(parts, layout), strict=True)
    state = {name: tensor for (name, _, _), tensor in whole}
    stack.load_row(row, state, *read_status(state.pop("status").tolist()))


def shapes_in(layout: BlockLayout) -> dict[str, tuple[int, ...]]:
    """The shapes of a block's state as the mathematics sees it, by name.

    Raises:
        ValueError: if the stored tensors do not go together.
    """
    forms = stored_forms({name: (_dtype(kind), shape) for name, kind, shape in layout if name != STATUS[0]})
    return {name: form.shape for name, form in forms.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """``"float32"`` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def _dtype(kind: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, kind.removesuffix(TRIANGLE))
    return found


def _bytes(part: tuple[str, str, Sequence[int]]) -> int:
    _, kind, shape = part
    numel = shape[0] * (shape[0] + 1) // 2 if kind.endswith(TRIANGLE) else math.prod(shape)
    return numel * _dtype(kind).itemsize


def _lower(matrix: Tensor) -> Tensor:
    """Which elements of a square matrix are in its lower triangle."""
    return torch.ones(matrix.shape, dtype=torch.bool, device=matrix.device).tril()


def _mirrored(triangle: Tensor, shape: Sequence[int]) -> Tensor:
    """The symmetric matrix with this lower triangle."""
    matrix = triangle.new_zeros(tuple(shape))
    lower = _lower(matrix)
    matrix[lower] = triangle
    return torch.where(lower, matrix, matrix.mT)
