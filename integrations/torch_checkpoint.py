"""Gives the optimizer's state to the helpers in torch.distributed.checkpoint.state_dict, in a form that they handle.

``get_optimizer_state_dict`` and ``set_optimizer_state_dict`` call ``optimizer.state_dict()`` on all ranks. They accept
only tensors that they can gather or shard. torch has no hook by which an optimizer could recognise them.

Before they load, they leave out the state of frozen parameters and, of a flattened dict, values whose names are not in
``optimizer.state`` yet. Both are looked up in what they were given.

torch's ZeroRedundancyOptimizer and _NamedOptimizer carry only ``optimizer.state``, so they are refused.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shampoo_deepspeed.distributed.collectives import decide_on_first_rank, job_group
from shampoo_deepspeed.distributed.frameworks import Adapter, Entry, LayoutError, NewTensor
from shampoo_deepspeed.state.dcp_state import BLOCKS
from shampoo_deepspeed.state.dtensor_blocks import is_dtensor, resized
from shampoo_deepspeed.state.stateful_optimizer import BlockOptimizer

from .frames import frame_in_module

HELPERS = "torch.distributed.checkpoint.state_dict"
# Classes of torch that build an optimizer and save no more than their own part of it, and what to use instead.
REFUSED = {
    "torch.distributed.optim.zero_redundancy_optimizer": (
        "ZeroRedundancyOptimizer",
        "Shampoo divides its state and its work over DDP's ranks itself: use Shampoo(model.named_parameters(), "
        "model=model, ...) with the DDP-wrapped model, or process_group=; before state_dict() call "
        "consolidate_state_dict() on all ranks, or use save_shampoo and load_shampoo",
    ),
    "torch.distributed.optim.named_optimizer": (
        "_NamedOptimizer",
        "Shampoo's own state is keyed by names: use Shampoo(model.named_parameters(), model=model, ...) with its "
        "state_dict() and load_state_dict(), or save_shampoo and load_shampoo",
    ),
}
# Precedes the names of parameters in the keys of a flattened state dict.
STATE = "state."


def helpers_ask() -> bool:
    """Whether one of torch's helpers is calling."""
    return frame_in_module(HELPERS) is not None


class TorchCheckpointAdapter(Adapter):
    """The adapter for torch's helpers, which shard nothing themselves."""

    def layouts(self, optimizer: torch.optim.Optimizer, entries: Sequence[Entry], fresh: Sequence[NewTensor]) -> None:
        """Return None: FSDP2's adapter describes DTensors, and other tensors are unsharded."""

    def admit(self, optimizer_class: type) -> None:
        """Refuse to be built by those of torch's optimizers whose checkpoints would hold no state.

        Raises:
            LayoutError: if one of them is building the optimizer.
        """
        for module, (wrapper, instead) in REFUSED.items():
            if frame_in_module(module) is not None:
                raise LayoutError(
                    f"{wrapper}(optimizer_class={optimizer_class.__name__}) is not supported: its checkpoints would "
                    f"hold nothing of the optimizer's state but the steps; {instead}"
                )

    def state_entries(self, optimizer: BlockOptimizer) -> dict[int, dict[str, Tensor]] | None:
        """Return the state in a form that the helpers handle, or a note that it is external. This is a collective."""
        if not helpers_ask():
            return None
        if optimizer.state_is_external:
            return optimizer.external_entries(True, lambda _: (1,))
        entries = optimizer.gathered_entries()
        for tensor, total in self._sizes_given(optimizer).items():
            known = entries.get(tensor, {}).get(BLOCKS)
            if known is not None and known.numel() != total:
                entries[tensor][BLOCKS] = resized(known, total)
        return entries

    def _sizes_given(self, optimizer: BlockOptimizer) -> dict[int, int]:
        """Return the bytes of blocks, by tensor, in a full state dict that the helpers are loading; else nothing.

        They ask for a template first, by which they cut what they were given. State of other formats has other sizes.
        A collective if only the first rank was given the state dict.
        """
        frame = frame_in_module(HELPERS, "_load_optim_state_dict")
        if frame is None or frame.f_locals["info"].fsdp_modules:
            return {}
        given, info = frame.f_locals["state_dict"] or {}, frame.f_locals["info"]
        tensors = (tensor for group in optimizer.param_groups for tensor in group["params"])
        named = {name: id(tensor) for tensor in tensors for name in info.fqn_param_mapping.get(tensor, ())}
        state = given["state"] if "state" in given else _unflattened(given, named)
        sizes = {name: entry[BLOCKS].numel() for name, entry in state.items() if name in named and BLOCKS in entry}
        if info.broadcast_from_rank0:
            sizes = decide_on_first_rank(sizes, lambda ranks: ranks[0], job_group())
        return {named[name]: total for name, total in sizes.items()}

    def loaded_entries(self, optimizer: BlockOptimizer) -> dict[int, dict[str, Any]] | None:
        """Return the entries that the helpers were given. Full ones are only of use for frozen parameters.

        A collective if they load full state dicts.
        """
        frame = frame_in_module(HELPERS, "_load_optim_state_dict")
        if frame is None or frame.f_locals["info"].fsdp_modules:
            return None
        # Ranks that receive a full dict from the first one may have been given None.
        given, info = frame.f_locals["state_dict"] or {}, frame.f_locals["info"]
        tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
        wanted = [tensor for tensor in tensors if not (info.full_state_dict and tensor.requires_grad)]
        named = {name: tensor for tensor in wanted for name in info.fqn_param_mapping.get(tensor, ())}
        state = given["state"] if "state" in given else _unflattened(given, named)
        found = {name: entry for name, entry in state.items() if name in named and entry}
        if info.broadcast_from_rank0:
            found = decide_on_first_rank(found, lambda ranks: ranks[0], job_group())
        if info.full_state_dict:
            found = {name: _sharded(entry, named[name]) for name, entry in found.items()}
        return {id(named[name]): entry for name, entry in found.items()}


def _sharded(entry: Mapping[str, Any], like: Tensor) -> dict[str, Any]:
    """Return an entry with all that has the parameter's shape sharded as the parameter is; a collective."""
    if not is_dtensor(like):
        return dict(entry)
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    mesh, placements = like.device_mesh, like.placements
    return {
        name: distribute_tensor(value.to(like.device), mesh, placements) if _has_shape(value, like) else value
        for name, value in entry.items()
    }


def _has_shape(value: object, like: Tensor) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape == like.shape


def _unflattened(flat: Mapping[str, Any], names: Collection[str]) -> dict[str, dict[str, Any]]:
    """Return the entries of these parameters in a flattened state dict; dots in other names mean nested dicts."""
    state: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        parts = key.removeprefix(STATE).split(".") if key.startswith(STATE) else []
        ends = (end for end in range(1, len(parts)) if ".".join(parts[:end]) in names)
        for end in ends:
            entry = state.setdefault(".".join(parts[:end]), {})
            for part in parts[end:-1]:
                entry = entry.setdefault(part, {})
            entry[parts[-1]] = value
    return state


ADAPTER = TorchCheckpointAdapter()
