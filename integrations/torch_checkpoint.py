"""torch.distributed.checkpoint.state_dict: what its helpers get as the state of an optimizer.

``get_optimizer_state_dict`` and ``set_optimizer_state_dict`` call ``optimizer.state_dict()`` as anybody does, but on
all ranks, and take only tensors that they can gather or shard. torch has no hook by which an optimizer could know them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shampoo_deepspeed.distributed.frameworks import Adapter, Entry, NewTensor
from shampoo_deepspeed.state.stateful_optimizer import BlockOptimizer

from .frames import frame_in_module

HELPERS = "torch.distributed.checkpoint.state_dict"


def helpers_ask() -> bool:
    """Whether torch's helpers are asking for a state dict right now."""
    return frame_in_module(HELPERS) is not None


class TorchCheckpointAdapter(Adapter):
    """The adapter of torch's helpers, which shard nothing themselves."""

    def layouts(self, optimizer: torch.optim.Optimizer, entries: Sequence[Entry], fresh: Sequence[NewTensor]) -> None:
        """None: DTensors are those of FSDP2's adapter, other tensors are whole."""

    def state_entries(self, optimizer: BlockOptimizer) -> dict[int, dict[str, Tensor]] | None:
        """The state in the form that the helpers can carry, or a note that it is external. A collective."""
        if not helpers_ask():
            return None
        if optimizer.state_is_external:
            return optimizer.external_entries(True, lambda _: (1,))
        return optimizer.gathered_entries()


ADAPTER = TorchCheckpointAdapter()
