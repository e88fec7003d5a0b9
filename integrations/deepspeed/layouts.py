"""Describes what ZeRO 0-3 and the half-precision wrappers leave on each rank, as boxes of the model's parameters.

DeepSpeed replaces the model's parameters in ``param_groups`` by flat float32 partitions, or by float32 copies; this
file works out which flat range belongs to which parameter. File names below are DeepSpeed's (0.19.8).
"""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, cast

import torch.distributed as dist
from torch import Tensor

from shampoo_deepspeed.distributed.frameworks import Entry, Layout, NewTensor, Parameter, Shard, whole_tensors
from shampoo_deepspeed.geometry.boxes import FlatRange, range_to_boxes

if TYPE_CHECKING:
    from .engine import Engine, ExpertParameter, FlatZeroParameter, ZeroOptimizer

logger = logging.getLogger("shampoo_deepspeed")

_ExpertPart = tuple[int | None, int]


def paired(entries: Sequence[Entry], fresh: Sequence[NewTensor]) -> list[tuple[Entry, NewTensor]] | None:
    """Pair each new tensor, a parameter or its float32 copy, with its entry, or return None if they do not match.

    A copy seen for the first time is matched by its position in the group.
    """
    own = {id(entry.reference()): entry for entry in entries}
    own |= {id(entry.stand_in()): entry for entry in entries if entry.stand_in is not None}
    if all(id(item.tensor) in own for item in fresh):
        return [(own[id(item.tensor)], item) for item in fresh]
    pairs = []
    for group in dict.fromkeys(item.group for item in fresh):
        copies = [item for item in fresh if item.group == group]
        originals = {id(t): p for p, t in _originals(entries, group)}
        sources = [own[key] for key in originals]
        if [tuple(item.tensor.shape) for item in copies] != [s.parameter.shape for s in sources]:
            return None
        pairs += list(zip(sources, copies, strict=True))
    return pairs


def replicated(engine: Engine | None, pairs: Sequence[tuple[Entry, NewTensor]]) -> list[Layout]:
    """Return the layouts of stage 0: whole tensors, the same on all data-parallel ranks.

    With FP16_UnfusedOptimizer they are float32 copies.
    """
    by_group: dict[tuple[int, _ExpertPart], tuple[dist.ProcessGroup | None, list[tuple[Entry, NewTensor]]]] = {}
    for entry, item in pairs:
        group = _replica_group(engine, entry.reference()) if engine is not None else None
        key = (id(group), _expert_part(entry.reference()))
        by_group.setdefault(key, (group, []))[1].append((entry, item))
    layouts = []
    for (_, (part, parts)), (group, members) in by_group.items():
        layout = whole_tensors([entry.parameter for entry, _ in members], [item for _, item in members])
        layout.process_group, layout.part, layout.parts = group, part, parts
        layout.one_rank_saves = True
        for entry, item in members:
            original = entry.reference()
            if original is not None and original is not item.tensor:
                entry.stand_in = weakref.ref(item.tensor)
                _check_master(layout, entry.parameter, item.tensor, original.detach(), _is_copy(engine, item, original))
        layouts.append(layout)
    return layouts


def _is_copy(engine: Engine | None, item: NewTensor, original: Tensor) -> bool:
    """Whether DeepSpeed itself has this tensor as the float32 copy of a parameter (FP16_UnfusedOptimizer)."""
    wrapper = engine.optimizer if engine is not None else None
    lows, highs = (chain(*getattr(wrapper, name, ())) for name in ("fp16_groups", "fp32_groups"))
    return any(low is original and high is item.tensor for low, high in zip(lows, highs, strict=False))


def is_partition(item: NewTensor, entries: Sequence[Entry]) -> bool:
    """Whether a tensor is a flat partition that ZeRO-1/2/3 or BF16_Optimizer has put into ``param_groups``."""
    if item.tensor.ndim != 1 or any(entry.reference() is item.tensor for entry in entries):
        return False
    if isinstance(getattr(item.tensor, "ds_id", None), str):
        return True
    return bool(_flat_members(entries, item.group))


def partition_layout(item: NewTensor, entries: Sequence[Entry]) -> Layout:
    """Return the layout of a flat partition: the ranges of parameters that it holds on this rank."""
    if isinstance(getattr(item.tensor, "ds_id", None), str):
        return _stage3_layout(item, entries)
    return _stage12_layout(item, entries)


def stage3_partitions(wrapper: ZeroOptimizer, entries: Sequence[Entry]) -> list[NewTensor]:
    """Return all partitions of ZeRO-3, each in the group of its parameters."""
    groups = {id(entry.reference()): entry.parameter.group for entry in entries}
    pairs = zip(wrapper.fp16_groups, wrapper.fp32_partitioned_groups_flat, strict=True)
    return [NewTensor(flat, groups[id(members[0])], 0) for members, flat in pairs]


def _originals(entries: Sequence[Entry], group: int) -> list[tuple[Parameter, Tensor]]:
    """Return the parameters of a group that DeepSpeed optimizes, in order: trainable, not empty (runtime/utils.py)."""
    found = []
    for entry in entries:
        tensor = entry.reference()
        if (
            entry.parameter.group == group
            and tensor is not None
            and tensor.requires_grad
            and 0 not in entry.parameter.shape
        ):
            found.append((entry.parameter, tensor))
    return found


def _flat_members(entries: Sequence[Entry], group: int) -> list[tuple[Parameter, FlatZeroParameter]]:
    """Return the parameters of a group that are in its flat buffer: all that were trainable when DeepSpeed built it.

    They have the attribute ``_dp_group``. Parameters of an earlier engine may have it too, but are in another buffer.
    It does not matter whether they are trainable now: layers may be frozen for a while.
    """
    tensors = [(e.parameter, e.reference()) for e in entries if e.parameter.group == group]
    marked = [
        (p, cast("FlatZeroParameter", t)) for p, t in tensors if t is not None and hasattr(t, "_dp_group") and t.numel()
    ]
    if not marked:
        return []
    anchor = next((t for _, t in marked if t.requires_grad), marked[0][1])
    buffer = anchor.untyped_storage().data_ptr()
    return [(p, t) for p, t in marked if t.untyped_storage().data_ptr() == buffer]


def _stage12_layout(item: NewTensor, entries: Sequence[Entry]) -> Layout:
    """Return the layout of ZeRO-1/2 and BF16_Optimizer: equal contiguous partitions of one flat buffer.

    The model's parameters are views of that buffer, so their storage offsets give the layout of all ranks. This holds
    for reordered (``round_robin_gradients``) and aligned parameters too. DeepSpeed's own ``_hp_mapping`` may be wrong
    for these.
    """
    members = _flat_members(entries, item.group)
    flat, group = item.tensor, members[0][1]._dp_group
    rank, size = dist.get_rank(group), flat.numel()
    layout = Layout([p for p, _ in members], [flat], [item.group], [], _or_none(group), may_probe=False)
    layout.part, layout.parts = _expert_part(members[0][1])
    outside = {p.key for p, _ in _originals(entries, item.group)} - {p.key for p, _ in members}
    if outside:
        layout.problem = f"these parameters are not in the flat buffer of their group: {', '.join(sorted(outside))}"
        return layout
    base = min(int(tensor.storage_offset()) for _, tensor in members)
    partition = FlatRange(rank * size, (rank + 1) * size)
    for number, (parameter, tensor) in enumerate(members):
        begin = int(tensor.storage_offset()) - base
        common = FlatRange(begin, begin + tensor.numel()).intersect(partition)
        if common is not None:
            elements, here = common.shift(-begin), common.shift(-partition.start)
            _place(layout, number, elements, here.start)
            master, low = flat.detach()[slice(*here)], tensor.detach().reshape(-1)[slice(*elements)]
            _check_master(layout, parameter, master, low, _is_mapped(tensor, elements, master))
    return layout


def _stage3_layout(item: NewTensor, entries: Sequence[Entry]) -> Layout:
    """Return the layout of ZeRO-3, which cuts every parameter evenly over its ranks and concatenates the partitions.

    Padding after a partition is uninitialised memory and is never read or written.
    """
    known = {id(entry.reference()): entry.parameter for entry in entries}
    owners = (getattr(entry.reference(), "_z3_optimizer", None) for entry in entries)
    owner: ZeroOptimizer = next(found for found in owners if found is not None)
    number = next(n for n, flat in enumerate(owner.fp32_partitioned_groups_flat) if flat is item.tensor)
    members = owner.fp16_groups[number]
    group = members[0].ds_process_group
    rank = dist.get_rank(group)
    parameters = [known[id(member)] for member in members]
    layout = Layout(parameters, [item.tensor], [parameters[0].group], [], _or_none(group), may_probe=False)
    layout.part, layout.parts = _expert_part(members[0])
    offset = 0
    for index, (parameter, member) in enumerate(zip(parameters, members, strict=True)):
        part = member.ds_tensor.ds_numel
        elements = FlatRange(rank * part, (rank + 1) * part).intersect(FlatRange(0, member.ds_numel))
        if elements is not None:
            _place(layout, index, elements, offset)
            master = item.tensor[offset : offset + elements.size]
            low = member.ds_tensor.detach().reshape(-1)[: elements.size]
            agreed = list(owner.grad_position[owner.get_param_id(member)]) == [number, offset, part]
            _check_master(layout, parameter, master, low, agreed)
        offset += part
    if {p.group for p in parameters} != {item.group}:
        layout.problem = f"the ZeRO-3 sub-group that begins with {parameters[0].key} mixes parameter groups"
    return layout


def _place(layout: Layout, number: int, elements: FlatRange, offset: int) -> None:
    """Add a flat range of a parameter that begins at ``offset`` of the layout's only tensor."""
    for box in range_to_boxes(layout.parameters[number].shape, elements):
        layout.shards.append(Shard(number, box, 0, offset))
        offset += box.numel


def _is_mapped(tensor: FlatZeroParameter, elements: FlatRange, master: Tensor) -> bool:
    """Whether DeepSpeed itself says that these elements of a parameter have this master, as its ``safe_set_...`` do."""
    found = tensor._hp_mapping
    if found is None or found.hp_fragment is None:
        return False
    address, fragment = found.lp_fragment_address, found.hp_fragment
    there = address.start, address.numel, fragment.data_ptr(), fragment.dtype
    return there == (elements.start, elements.size, master.data_ptr(), master.dtype)


def _check_master(layout: Layout, parameter: Parameter, master: Tensor, low: Tensor, agreed: bool) -> None:
    """Set the layout's problem if a float32 master does not equal its parameter, as under ZenFlow (transposed).

    If ``agreed``, DeepSpeed names the same elements, so the weights have been changed since: by its ``safe_set_...``
    functions, in the masters, or by loading into the module. DeepSpeed steps the masters whatever the optimizer is.
    """
    cast = master.detach().to(low.dtype).to(low.device)
    if low.numel() == cast.numel() and bool(((cast == low) | (cast.isnan() & low.isnan())).all()):
        return
    if agreed:
        logger.warning(
            "the float32 master of %s was changed after deepspeed.initialize, or the model's weights were: DeepSpeed "
            "trains the masters, so weights that were put into the module alone are lost with this step (put them into "
            "the model before deepspeed.initialize, or use deepspeed.utils.safe_set_full_fp32_param)",
            parameter.key,
        )
        return
    layout.problem = layout.problem or (
        f"the float32 master does not equal the model's parameter {parameter.key}: the model's weights were changed "
        "after deepspeed.initialize, or DeepSpeed's layout is one that this version does not support"
    )


def _replica_group(engine: Engine, parameter: Tensor | None) -> dist.ProcessGroup | None:
    """Return the ranks that hold the same parameter: all data-parallel ones, or for an expert those of its group."""
    if getattr(parameter, "allreduce", True) is False:
        return _or_none(engine.expert_data_parallel_group[cast("ExpertParameter", parameter).group_name])
    return _or_none(engine.seq_data_parallel_group)


def _expert_part(parameter: object) -> _ExpertPart:
    """Return this rank's place among the expert-parallel ranks and their number; ``(None, 1)`` for other parameters.

    The place distinguishes experts that have the same name on different ranks.
    """
    if getattr(parameter, "allreduce", True):
        return None, 1
    group = sys.modules["deepspeed.utils.groups"]._get_expert_parallel_group(
        cast("ExpertParameter", parameter).group_name
    )
    parts = dist.get_world_size(group)
    return (dist.get_rank(group), parts) if parts > 1 else (None, 1)


def _or_none(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """Return the group, or None if it has only one rank, so that nothing needs to be communicated."""
    if dist.get_world_size(group) == 1:
        return None
    return dist.group.WORLD if group is None else group
