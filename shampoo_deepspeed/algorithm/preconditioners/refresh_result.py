"""What a refresh has computed and not yet installed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RefreshResult:
    """What ``compute`` returns for n blocks: tensors with the block as first dim, and the rows that failed.

    Attributes:
        good: [n] bool, of a refresh without reads: the rows that did not fail. The CPU does not know them yet, so that
            ``failed`` is empty.
    """

    tensors: dict[str, Tensor]
    failed: frozenset[int] = frozenset()
    good: Tensor | None = None

    @staticmethod
    def joined(parts: Sequence[RefreshResult], places: Sequence[slice]) -> RefreshResult:
        """The results of neighbouring blocks joined; ``places`` are the parts' rows."""
        if len(parts) == 1:
            return parts[0]
        tensors = {name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors}
        failed = [place.start + row for part, place in zip(parts, places, strict=True) for row in part.failed]
        return RefreshResult(tensors, frozenset(failed))

    def rows(self, first: int, stop: int) -> RefreshResult:
        """The result for the blocks from ``first`` up to ``stop``, as views."""
        tensors = {name: tensor[first:stop] for name, tensor in self.tensors.items()}
        good = None if self.good is None else self.good[first:stop]
        return RefreshResult(tensors, frozenset(row - first for row in self.failed if first <= row < stop), good)
