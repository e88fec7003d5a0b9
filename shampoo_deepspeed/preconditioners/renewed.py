"""What a refresh has computed and not yet installed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Renewed:
    """The outcome of ``compute`` for n blocks: tensors with the block as first dim, and the rows that failed."""

    tensors: dict[str, Tensor]
    failed: frozenset[int]

    def rows(self, first: int, stop: int) -> Renewed:
        """Those of some neighbouring blocks, as views."""
        tensors = {name: tensor[first:stop] for name, tensor in self.tensors.items()}
        return Renewed(tensors, frozenset(row - first for row in self.failed if first <= row < stop))
