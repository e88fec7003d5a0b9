"""Loads torch's distributed checkpoints (``dcp.load``) whose state was saved in other formats than those given here.

    state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=folder, planner=ConvertingLoadPlanner())
    set_optimizer_state_dict(model, optimizer, state["optimizer"])

``dcp.load`` reads into a template, which must have the sizes of what was saved. Blocks are stored as their bytes, and
other formats have other bytes. This planner gives the template of blocks the sizes that it finds in the checkpoint. The
optimizer then converts them to its own formats. torch's default planner refuses other sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, Metadata
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from shampoo_deepspeed.state.dcp_state import BLOCKS
from shampoo_deepspeed.state.dtensor_blocks import resized


class ConvertingLoadPlanner(DefaultLoadPlanner):
    """torch's default planner, except that bytes of Shampoo's blocks may be as many as were saved."""

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Prepare to load into this template, in which it replaces blocks of other sizes."""
        stored = {} if metadata is None else metadata.state_dict_metadata
        for holder, key, name in list(_blocks_in(state_dict, "")):
            found = stored.get(name)
            if isinstance(found, TensorStorageMetadata) and found.size != holder[key].size():
                holder[key] = resized(holder[key], found.size.numel())
        super().set_up_planner(state_dict, metadata, is_coordinator)


def _blocks_in(
    state_dict: MutableMapping[Any, Any], within: str
) -> Iterator[tuple[MutableMapping[Any, Any], Any, str]]:
    """Each tensor of blocks: the dict that holds it, its key there, and its name in the checkpoint."""
    for key, value in state_dict.items():
        name = f"{within}.{key}" if within else str(key)
        if isinstance(value, MutableMapping):
            yield from _blocks_in(value, name)
        elif isinstance(value, Tensor) and name.rpartition(".")[2] == BLOCKS:
            yield state_dict, key, name
