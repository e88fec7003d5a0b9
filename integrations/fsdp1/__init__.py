"""FSDP1: describes flat ranges of the model's parameters. Tensors do not show which these are; the wrapped model does.

torch and Transformers have deprecated FSDP1. All code that only FSDP1 needs is in this folder, to be removed with it.

With ``use_orig_params=True`` an optimizer is given 1-D shards of the original parameters, with ``False`` one flat
tensor for each wrapped module. File names below are torch's (torch/distributed/fsdp, 2.13).
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shampoo_deepspeed.distributed.frameworks import (
    Adapter,
    Entry,
    FlatMember,
    Layout,
    LayoutError,
    NewTensor,
    Shard,
    compute_dtype,
)
from shampoo_deepspeed.geometry.boxes import FlatRange, range_to_boxes
from shampoo_deepspeed.options.model_search import living_modules
from shampoo_deepspeed.options.parameter_names import (
    clean_name,
    clean_path,
    kinds_by_module,
    kinds_of_holders,
    output_heads,
)
from shampoo_deepspeed.runtime.devices import communication_device
from shampoo_deepspeed.state.dcp_state import FLAT_SHARDS
from shampoo_deepspeed.state.stateful_optimizer import BlockOptimizer

from ..frames import calling_frame, frame_in_module
from ..torch_checkpoint import helpers_ask
from .checkpoints import load_from_folder, save_to_folder
from .tensors import is_flat, is_fsdp1

if TYPE_CHECKING:
    from torch.distributed.fsdp._flat_param import FlatParameter, ParamInfo, SharedParamInfo

FSDP1 = "torch.distributed.fsdp.fully_sharded_data_parallel"
FLAT_NAME = "_flat_param"
MOST_OF_A_MODULE = 1 << 20  # more parameters than any wrapped module has


@dataclass(frozen=True)
class _FlatShard:
    """The elements of an original parameter of this shape that this rank holds, from ``offset`` of the tensor on."""

    shape: tuple[int, ...]
    elements: FlatRange
    offset: int


@dataclass(frozen=True)
class _Known:
    """What is known about a tensor in ``param_groups``: its shards and, if it is flat, the original parameters.

    The ranks of ``group`` hold all shards of these parameters, and their replicas. It is None if the tensor was seen
    without its model.
    """

    tensor: weakref.ref[Tensor]
    shards: tuple[_FlatShard, ...]
    members: tuple[FlatMember, ...] | None
    group: dist.ProcessGroup | None


class FSDP1Adapter(Adapter):
    """The adapter for FSDP1. Under hybrid sharding the group is the world, where replicas hold equal ranges."""

    def __init__(self) -> None:
        self._known: dict[int, _Known] = {}  # by the ids of tensors, while these exist

    def model_under_construction(self, options: dict[str, Any], given: Sequence[Any]) -> nn.Module | None:
        """Return the wrapped model in ``accelerator.prepare(model, optimizer)``; only the calling frame has both.

        FSDP1 builds no optimizers. But right after wrapping the model, accelerate loads an empty state into one, and
        this is called.
        """
        module = sys.modules.get("torch.distributed.fsdp")
        frame = calling_frame(lambda frame: frame.f_code.co_name == "prepare_optimizer")
        if frame is None or module is None:
            return None
        models = getattr(frame.f_locals.get("self"), "_models", ())
        wrapped = [model for model in models if module.FullyShardedDataParallel.fsdp_modules(model)]
        own = {id(tensor) for tensor in given}
        return next((m for m in wrapped if any(id(p) in own for p in m.parameters())), None)

    def attach_model(self, model: nn.Module) -> None:
        """Read names and ranges of a wrapped model's parameters (_flat_param.py)."""
        module = sys.modules.get("torch.distributed.fsdp")
        if module is None:
            return
        heads = {id(part) for head in output_heads(model) for part in head.modules()}
        kinds = kinds_by_module(model)
        places = {id(part): place for place, part in enumerate(model.modules())}
        for name, wrapped in model.named_modules():
            handle = wrapped._handle if isinstance(wrapped, module.FullyShardedDataParallel) else None
            if handle is None:
                continue
            hybrid = getattr(wrapped, "_inter_node_pg", None) is not None
            group = dist.group.WORLD if hybrid else wrapped.process_group
            flat = handle.flat_param
            if not handle._use_orig_params:
                self._remember(flat, _shards(flat), _members(flat, name, heads, kinds, places, model), group)
                continue
            for parameter, shard in zip(flat._params, _shards(flat), strict=True):
                # The model holds the shard alone, not the flat tensor.
                self._remember(parameter, (replace(shard, offset=0),), None, group)

    def global_shape(self, parameter: Tensor) -> tuple[int, ...] | None:
        """Return the shape of an original parameter before flattening."""
        known = self._find(parameter)
        return known.shards[0].shape if known is not None else None

    def flat_members(self, tensor: Tensor, name: str | None) -> Sequence[FlatMember] | None:
        """Return the original parameters in a flat tensor.

        Their names come from the model, or from the flat tensor's own name in ``model.named_parameters()``. Without
        either, they have no names.
        """
        known = self._find(tensor)
        if is_flat(tensor) and (known is None or known.group is None):
            members = _members(_flat(tensor), name.removesuffix(FLAT_NAME) if name is not None else None, None, {})
            known = self._remember(tensor, _shards(_flat(tensor)), members, None)
        return known.members if known is not None else None

    def joining(self, waiting: Sequence[NewTensor]) -> list[NewTensor]:
        """Return shards without a gradient here whose parameters are trained on some rank.

        A rank that holds nothing of a parameter never has a gradient of it. A flat tensor is never empty, and
        reduce-scatter is a collective, so either all ranks have its gradient or none has.
        """
        by_group: dict[int, tuple[dist.ProcessGroup | None, list[NewTensor]]] = {}
        for item in waiting:
            known = self._find(item.tensor)
            if known is not None and known.members is None and item.tensor.requires_grad:
                by_group.setdefault(id(known.group), (known.group, []))[1].append(item)
        found = []
        for group, items in by_group.values():
            here = float(any(item.tensor.grad is not None for item in items))
            anywhere = torch.tensor(here, device=communication_device(group, items[0].tensor.device))
            dist.all_reduce(anywhere, group=group)
            if anywhere.item() > 0:
                found += [item for item in items if item.tensor.grad is None]
        return found

    def layouts(
        self, optimizer: torch.optim.Optimizer, entries: Sequence[Entry], fresh: Sequence[NewTensor]
    ) -> list[Layout] | None:
        """Return one layout for each process group and dtype of wrapped parameters, or None if there are none.

        Raises:
            LayoutError: if there are other parameters too, or if only the model could show the process group.
        """
        members = [(item, known) for item in fresh if (known := self._find(item.tensor)) is not None]
        if not members:
            return None
        if len(members) != len(fresh):
            raise LayoutError(
                f"{len(fresh) - len(members)} of {len(fresh)} parameters with a gradient are not FSDP1's: give ignored "
                "ones to an optimizer of their own; the others must be in the wrapped model, model=..."
            )
        units: dict[tuple[int, torch.dtype], tuple[dist.ProcessGroup | None, list[tuple[Tensor, _Known]]]] = {}
        for item, known in members:
            group = known.group if known.group is not None else _group_of(_flat(item.tensor))
            key = id(group), compute_dtype(item.tensor)
            units.setdefault(key, (group, []))[1].append((item.tensor, known))
        return [_layout(group, tensors, entries) for group, tensors in units.values()]

    def why_not_whole(self, tensor: Tensor) -> str | None:
        """Return the reason for FSDP1's tensors that were seen without their model."""
        if not is_fsdp1(tensor):
            return None
        return (
            "these are FSDP1 parameters, which do not show what they are shards of: build the optimizer after wrapping "
            "and pass it the wrapped model, Shampoo(model.named_parameters(), model=model, ...)"
        )

    def state_entries(self, optimizer: BlockOptimizer) -> dict[int, dict[str, Tensor]] | None:
        """Return a note that the state is saved in another place; FSDP1's own state dict cannot hold the state itself.

        Raises:
            RuntimeError: if there is state that is not saved in another place.
        """
        if frame_in_module(FSDP1) is not None:
            external = optimizer.state_is_external or optimizer.has_state and _saved(optimizer)
        elif _holds_fsdp1(optimizer) and helpers_ask():
            external = optimizer.state_is_external
            if not external:
                raise RuntimeError(FLAT_SHARDS)
        else:
            return None
        return optimizer.external_entries(external, lambda tensor: () if is_fsdp1(tensor) else (1,))

    def note_load(self, optimizer: BlockOptimizer) -> None:
        """Load the state; called within ``load_fsdp_optimizer``, which runs on all ranks together."""
        if _holds_fsdp1(optimizer):
            load_from_folder(optimizer)

    def weights_will_change(self, optimizer: BlockOptimizer) -> None:
        """Free whole parameters, as torch does after a backward. A forward without one leaves those of the root."""
        module = sys.modules.get("torch.distributed.fsdp")
        if module is None or not _holds_fsdp1(optimizer):
            return
        wrapped: list[Any] = living_modules(module.FullyShardedDataParallel, optimizer.registry.models)
        for handle in (part._handle for part in wrapped):
            # What is sharded has such a tensor from the first forward on.
            if handle is not None and handle.uses_sharded_strategy and hasattr(handle.flat_param, "_full_param_padded"):
                handle.reshard(True)
                handle.post_reshard()
                handle._prefetched = False

    def _remember(
        self,
        tensor: Tensor,
        shards: tuple[_FlatShard, ...],
        members: tuple[FlatMember, ...] | None,
        group: dist.ProcessGroup | None,
    ) -> _Known:
        key, everything = id(tensor), self._known
        known = everything[key] = _Known(weakref.ref(tensor, lambda _: everything.pop(key)), shards, members, group)
        return known

    def _find(self, tensor: Tensor) -> _Known | None:
        known = self._known.get(id(tensor))
        return known if known is not None and known.tensor() is tensor else None


def _holds_fsdp1(optimizer: BlockOptimizer) -> bool:
    return any(is_fsdp1(tensor) for group in optimizer.param_groups for tensor in group["params"])


def _saved(optimizer: BlockOptimizer) -> bool:
    """Save the state into accelerate's folder and return True.

    Raises:
        RuntimeError: if another tool than accelerate asks for the state dict.
    """
    if not save_to_folder(optimizer):
        raise RuntimeError(
            "FSDP1's own optimizer state dict cannot carry Shampoo's state; use save_shampoo(optimizer, path) "
            "and load_shampoo(optimizer, path), or accelerate's save_state, or the Trainer"
        )
    return True


def _flat(tensor: Tensor) -> FlatParameter:
    """Return the tensor itself, which is a FlatParameter, for the type checker; none is imported."""
    return cast("FlatParameter", tensor)


def _shards(flat: FlatParameter) -> tuple[_FlatShard, ...]:
    if any(extension is not None for extension in flat._param_extensions):
        raise LayoutError(
            f"FSDP1 over tensor parallelism flattens shards of {', '.join(flat._fqns)} and does not show which shards; "
            "use FSDP2 (fully_shard)"
        )
    shards = []
    for shape, info in zip(flat._shapes, flat._shard_param_infos, strict=True):
        elements = FlatRange(0, 0)
        if info.in_shard:
            assert info.intra_param_start_idx is not None and info.intra_param_end_idx is not None
            elements = FlatRange(info.intra_param_start_idx, info.intra_param_end_idx + 1)
        shards.append(_FlatShard(tuple(shape), elements, info.offset_in_shard or 0))
    return tuple(shards)


def _members(
    flat: FlatParameter,
    prefix: str | None,
    heads: set[int] | None,
    of_module: Mapping[int, frozenset[str]],
    places: Mapping[int, int] | None = None,
    model: nn.Module | None = None,
) -> tuple[FlatMember, ...]:
    """Return the original parameters in a flat tensor, with the names and kinds that the unwrapped model has.

    See ``parameter_names.py`` for names and kinds.

    Args:
        prefix: name of the wrapped module, None if it is not known.
        heads: ids of the output head's modules; None without a model, and then there are no kinds.
        of_module: kinds of modules' own parameters, by the modules' ids.
        places: positions of modules in the model, by their ids; without a model the flat tensor's order is used.
        model: shows what wrappers have added to names; without it only their text does.
    """
    members = []
    for number, (path, shape, info) in enumerate(zip(flat._fqns, flat._shapes, flat._param_infos, strict=True)):
        name = ".".join(filter(None, (prefix.strip("."), path))) if prefix is not None else None
        if name is not None:
            name = clean_name(name) if model is None else clean_path(model, name)
        kinds = _kinds(flat, info, heads, of_module) if heads is not None else frozenset[str]()
        position = places[id(info.module)] * MOST_OF_A_MODULE + number if places is not None else None
        members.append(FlatMember(clean_name(path), tuple(shape), name, kinds, position))
    return tuple(members)


def _kinds(
    flat: FlatParameter, info: ParamInfo, heads: set[int], of_module: Mapping[int, frozenset[str]]
) -> frozenset[str]:
    """Return the kinds of all modules that hold a parameter: its module in ``_param_infos``, and those tied to it."""
    own = (info.module, info.param_name)
    holders: list[ParamInfo | SharedParamInfo] = [info]
    holders += [s for s in flat._shared_param_infos if (s.prim_module, s.prim_param_name) == own]
    kinds = kinds_of_holders([holder.module for holder in holders], of_module)
    if any(holder.param_name == "weight" and id(holder.module) in heads for holder in holders):
        kinds.add("lm_head")
    return frozenset(kinds)


def _group_of(flat: FlatParameter) -> dist.ProcessGroup | None:
    """Return the group of a flat tensor that was seen without its model: the world, or None with NO_SHARD.

    Raises:
        LayoutError: if it is sharded over a part of the ranks.
    """
    padded = getattr(flat, "_padded_unsharded_size", None)
    if padded is None:
        return None
    ranks = padded.numel() // flat._sharded_size.numel()
    if ranks != dist.get_world_size():
        raise LayoutError(
            f"an FSDP1 parameter is sharded over {ranks} of {dist.get_world_size()} ranks, and only the model shows "
            "which ranks: pass the wrapped model, Shampoo(model.named_parameters(), model=model, ...)"
        )
    return dist.group.WORLD


def _layout(
    group: dist.ProcessGroup | None, tensors: Sequence[tuple[Tensor, _Known]], entries: Sequence[Entry]
) -> Layout:
    """Return the layout of one step unit with these tensors."""
    of_tensor: dict[int, list[Entry]] = {}
    for entry in entries:
        of_tensor.setdefault(id(entry.reference()), []).append(entry)
    layout = Layout([], [], [], [], group if group is not None and dist.get_world_size(group) > 1 else None, homes=[])
    assert layout.homes is not None
    for number, (tensor, known) in enumerate(tensors):
        own = of_tensor[id(tensor)]
        layout.tensors.append(tensor)
        layout.groups.append(own[0].parameter.group)
        # An empty shard has no gradient, although the parameter may have one on other ranks.
        layout.agrees |= known.members is None
        for entry, shard in zip(own, known.shards, strict=True):
            offset = shard.offset
            for box in range_to_boxes(shard.shape, shard.elements):
                layout.shards.append(Shard(len(layout.parameters), box, number, offset))
                offset += box.numel
            layout.parameters.append(entry.parameter)
            layout.homes.append(number)
    return layout


ADAPTER = FSDP1Adapter()
