"""Gives the optimizer's state to the helpers in torch.distributed.checkpoint.state_dict, in a form that they handle.

``get_optimizer_state_dict`` and ``set_optimizer_state_dict`` call ``optimizer.state_dict()`` on all ranks. They accept
only tensors that they can gather or shard. torch has no hook by which an optimizer could recognise them.
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
    """Whether one of torch's helpers is calling."""
    return frame_in_module(HELPERS) is not None


class TorchCheckpointAdapter(Adapter):
    """The adapter for torch's helpers, which shard nothing themselves."""

    def layouts(self, optimizer: torch.optim.Optimizer, entries: Sequence[Entry], fresh: Sequence[NewTensor]) -> None:
        """Return None: FSDP2's adapter describes DTensors, and other tensors are unsharded."""

    def state_entries(self, optimizer: BlockOptimizer) -> dict[int, dict[str, Tensor]] | None:
        """Return the state in a form that the helpers handle, or a note that it is external. This is a collective."""
        if not helpers_ask():
            return None
        if optimizer.state_is_external:
            return optimizer.external_entries(True, lambda _: (1,))
        return optimizer.gathered_entries()


ADAPTER = TorchCheckpointAdapter()
