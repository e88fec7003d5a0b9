"""DeepSpeed: what ZeRO 0-3 and the half-precision wrappers leave on each rank, as boxes of the model's parameters.

DeepSpeed builds the optimizer from the model's parameters and then replaces these in ``param_groups`` by flat
float32 partitions. All wrappers call ``step()`` on the inner optimizer after averaging, overflow check and clipping,
so nothing of DeepSpeed is patched; this file only works out which flat interval is whose. File names below are
DeepSpeed's (0.19.8). It never imports DeepSpeed: where DeepSpeed is in use, it is in ``sys.modules``.
"""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shampoo_deepspeed.boxes import interval_to_boxes
from shampoo_deepspeed.choices import TRAINER_NO_DECAY
from shampoo_deepspeed.hosts import Entry, Fresh, Layout, LayoutError, Parameter, Shard, whole_tensors
from shampoo_deepspeed.persistence import BlockOptimizer

from .deepspeed_checkpoints import note_folder, resume, wrap_checkpointing

logger = logging.getLogger("shampoo_deepspeed")


_ExpertPart = tuple[int | None, int]


class DeepSpeedHost:
    """The adapter; one instance serves all optimizers of a process."""

    def __init__(self) -> None:
        self._engines: list[weakref.ref[Any]] = []

    def model_under_construction(self, options: dict[str, Any], given: Sequence[Any]) -> nn.Module | None:
        """The model of the engine that is building an optimizer from its JSON right now, if one is.

        DeepSpeed hands over one list of all parameters, so weight decay would also hit norms and biases; unless
        ``no_decay`` is given they are left out, as the Trainer's own two groups do elsewhere.

        Raises:
            LayoutError: for engine settings under which no optimizer but DeepSpeed's own can work.
        """
        engine = _engine_at_work("_configure_basic_optimizer")
        if engine is None:
            return None
        self._adopt(engine)
        if "lr" not in (engine.optimizer_params() or {}):
            logger.warning(
                "the DeepSpeed configuration gives Shampoo no 'lr': %s is used; under the HF Trainer write \"lr\": "
                '"auto" to get its learning_rate',
                options["lr"],
            )
        if _is_one_list(given):
            options.setdefault("no_decay", TRAINER_NO_DECAY)
        module: nn.Module = engine.module
        return module

    def note_model(self, model: nn.Module) -> None:
        """The engine's own model is all that this host needs."""

    def admit(self, optimizer_class: type) -> None:
        """Put the class on DeepSpeed's list of optimizers that may run under ZeRO (runtime/zero/utils.py)."""
        zero = sys.modules.get("deepspeed.runtime.zero.utils")
        supported = getattr(zero, "ZERO_SUPPORTED_OPTIMIZERS", None)
        if supported is not None and optimizer_class not in supported:
            supported.append(optimizer_class)

    def global_shape(self, parameter: Tensor) -> tuple[int, ...] | None:
        """The full shape of a parameter that ZeRO-3 or zero.Init has emptied."""
        shape = getattr(parameter, "ds_shape", None)
        return tuple(shape) if shape is not None else None

    def parts(self, tensor: Tensor, name: str | None) -> None:
        """Optimizers are built from the model's own parameters."""

    def joining(self, waiting: Sequence[Fresh]) -> list[Fresh]:
        """None: averaging is a collective, after which all ranks have a gradient (of a partition always) or none.

        At stage 0 the engine fills in zeros on ranks that have not used a parameter (``_get_gradients_for_reduction``).
        """
        return []

    def layouts(
        self, optimizer: torch.optim.Optimizer, entries: Sequence[Entry], fresh: Sequence[Fresh]
    ) -> list[Layout] | None:
        """One layout per flat partition; one per set of replicas of an unsharded (stage 0) engine.

        Raises:
            LayoutError: for engine settings under which no optimizer but DeepSpeed's own can work, and for tensors
                that are neither partitions nor the model's own.
        """
        if "deepspeed" not in sys.modules or any(hasattr(item.tensor, "placements") for item in fresh):
            return None  # DTensors have the shapes of what they replace, but are no copies of it
        engine = self._engine_of(optimizer)
        pairs = None if engine is not None and engine.zero_optimization_stage() > 0 else _paired(entries, fresh)
        if pairs is not None:
            if engine is None and all(entry.reference() is item.tensor for entry, item in pairs):
                return None  # nothing of DeepSpeed's is to be seen here
            return _replicated(engine, pairs)
        partitions = [item for item in fresh if _is_partition(item, entries)]
        if engine is None and not partitions:
            return None
        if len(partitions) != len(fresh):
            shapes = [tuple(item.tensor.shape) for item in fresh if item not in partitions]
            raise LayoutError(f"DeepSpeed has put tensors into param_groups that are no ZeRO partitions: {shapes}")
        return [_partition_layout(item, entries) for item in partitions]

    def note_load(self, optimizer: BlockOptimizer) -> None:
        """Called within ``engine.load_checkpoint``, maybe before the first step of an optimizer that the user built."""
        frame = _frame_of_engine("load_checkpoint")
        if frame is None or frame.f_locals["self"].basic_optimizer is not optimizer:
            note_folder(optimizer, None)
            return
        self._adopt(frame.f_locals["self"])
        note_folder(optimizer, Path(frame.f_locals["load_dir"]) / str(frame.f_locals["tag"]))

    def resume(self, optimizer: BlockOptimizer) -> None:
        """Load what is still awaited: where no engine was known that could do it after its ``load_checkpoint``."""
        resume(optimizer)

    def _engine_of(self, optimizer: torch.optim.Optimizer) -> Any:
        """The engine whose inner optimizer this is: the one at work now, or one that was seen before."""
        engine = _engine_at_work("_take_model_step", "_configure_fp16_optimizer")
        if engine is not None and engine.basic_optimizer is optimizer:
            self._adopt(engine)  # it was given a finished optimizer
        candidates = [engine, *(reference() for reference in self._engines)]
        return next((e for e in candidates if e is not None and e.basic_optimizer is optimizer), None)

    def _adopt(self, engine: Any) -> None:
        if any(reference() is engine for reference in self._engines):
            return
        _refuse_unsupported(engine)
        self._engines = [reference for reference in self._engines if reference() is not None]
        self._engines.append(weakref.ref(engine))
        wrap_checkpointing(engine)


def _replicated(engine: Any, pairs: Sequence[tuple[Entry, Fresh]]) -> list[Layout]:
    """Stage 0: whole tensors (FP16_UnfusedOptimizer: float32 copies), the same on all data-parallel ranks."""
    by_group: dict[tuple[int, _ExpertPart], tuple[dist.ProcessGroup | None, list[tuple[Entry, Fresh]]]] = {}
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
                _check_master(layout, entry.parameter, item.tensor, original.detach())
        layouts.append(layout)
    return layouts


def _engine_at_work(*methods: str) -> Any:
    """The DeepSpeedEngine one of whose ``methods`` is calling us, or None.

    DeepSpeed tells an optimizer neither the model nor its configuration; the calling frame has both. Everything works
    (with less knowledge) where nothing is found.
    """
    frame = _frame_of_engine(*methods)
    return frame.f_locals["self"] if frame is not None else None


def _frame_of_engine(*methods: str) -> FrameType | None:
    """The frame of a DeepSpeedEngine's method that is calling us; the one place that looks at frames."""
    frame: FrameType | None = sys._getframe(1)
    for _ in range(24):
        if frame is None:
            return None
        if frame.f_code.co_name in methods and hasattr(frame.f_locals.get("self"), "zero_optimization_stage"):
            return frame
        frame = frame.f_back
    return None


def _refuse_unsupported(engine: Any) -> None:
    zero = engine._config.zero_config
    offload = zero.offload_optimizer
    reasons = []
    if offload is not None and str(getattr(offload.device, "value", offload.device)) == "nvme":
        reasons.append("offload_optimizer.device = 'nvme' (the swapper moves only flat state; use 'cpu')")
    if offload is not None and getattr(offload, "super_offload", False):
        reasons.append("offload_optimizer.super_offload = true (it runs DeepSpeedCPUAdam)")
    if offload is not None and getattr(offload, "ratio", 1.0) < 1.0:
        reasons.append(f"offload_optimizer.ratio = {offload.ratio} (partial offload runs DeepSpeedCPUAdam; use 1.0)")
    weights = zero.offload_param
    if weights is not None and str(getattr(weights.device, "value", weights.device)) == "nvme":
        reasons.append("offload_param.device = 'nvme' (the partitions are not in memory at the step; use 'cpu')")
    sixteen = engine.torch_autocast_enabled() and engine.torch_autocast_dtype() == torch.float16
    if sixteen and zero.stage > 0 and not engine.zero_compute_grad_norm():
        reasons.append("compute_grad_norm = false with float16 autocast (each rank would skip steps on its own)")
    if getattr(zero, "zenflow", None) is not None:
        reasons.append("zero_optimization.zenflow (it runs its own CPU Adam on transposed gradients)")
    if engine.autotp_size() > 1:
        reasons.append(f"tensor_parallel.autotp_size = {engine.autotp_size()} (weights are cut before ZeRO sees them)")
    if zero.stage in (1, 2) and engine.zero_elastic_checkpoint():
        reasons.append(
            "zero_optimization.elastic_checkpoint = true (DeepSpeed then does not ask an optimizer for state)"
        )
    if zero.stage in (1, 2) and engine.load_universal_checkpoint() and engine.zero_round_robin_gradients():
        reasons.append(
            "checkpoint.load_universal = true with round_robin_gradients = true (DeepSpeed then loads weights into the "
            "wrong places; set round_robin_gradients to false)"
        )
    if reasons:
        raise LayoutError("Shampoo cannot run with this DeepSpeed configuration: " + "; ".join(reasons))


def _is_one_list(given: Sequence[Any]) -> bool:
    """Whether the user gave no groups: one flat list, perhaps split off from experts by DeepSpeed (moe/utils.py)."""
    groups = [g for g in given if isinstance(g, dict)]
    if not groups:
        return True
    return any(g.get("name") == "dense-params" for g in groups) and all("name" in g for g in groups)


def _originals(entries: Sequence[Entry], group: int) -> list[tuple[Parameter, Tensor]]:
    """The trainable, non-empty parameters of a group, in order: those that DeepSpeed optimizes (runtime/utils.py)."""
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


def _flat_members(entries: Sequence[Entry], group: int) -> list[tuple[Parameter, Any]]:
    """The parameters of a group that lie in its flat buffer: all that were trainable when DeepSpeed built it.

    They carry ``_dp_group``, as may leftovers of an earlier engine, which lie elsewhere. Whether they are trainable
    now says nothing: layers may be frozen for a while.
    """
    tensors = [(e.parameter, e.reference()) for e in entries if e.parameter.group == group]
    marked = [(p, t) for p, t in tensors if t is not None and hasattr(t, "_dp_group") and t.numel()]
    if not marked:
        return []
    anchor = next((t for _, t in marked if t.requires_grad), marked[0][1])
    buffer = anchor.untyped_storage().data_ptr()
    return [(p, t) for p, t in marked if t.untyped_storage().data_ptr() == buffer]


def _is_partition(item: Fresh, entries: Sequence[Entry]) -> bool:
    """Whether a tensor is a flat partition that ZeRO-1/2/3 or BF16_Optimizer has put into ``param_groups``."""
    if item.tensor.ndim != 1 or any(entry.reference() is item.tensor for entry in entries):
        return False
    if isinstance(getattr(item.tensor, "ds_id", None), str):
        return True
    return bool(_flat_members(entries, item.group))


def _partition_layout(item: Fresh, entries: Sequence[Entry]) -> Layout:
    if isinstance(getattr(item.tensor, "ds_id", None), str):
        return _stage3_layout(item, entries)
    return _stage12_layout(item, entries)


def _stage12_layout(item: Fresh, entries: Sequence[Entry]) -> Layout:
    """ZeRO-1/2 and BF16_Optimizer: equal contiguous partitions of one flat buffer.

    The model's parameters are views of that buffer, so their storage offsets are the layout of all ranks, also with
    reordered (``round_robin_gradients``) or aligned parameters, where DeepSpeed's own ``_hp_mapping`` may be wrong.
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
    for number, (parameter, tensor) in enumerate(members):
        begin = int(tensor.storage_offset()) - base
        start, stop = max(begin, rank * size), min(begin + tensor.numel(), (rank + 1) * size)
        if start < stop:
            master = flat[start - rank * size : stop - rank * size]
            _place(layout, number, start - begin, stop - begin, start - rank * size)
            _check_master(layout, parameter, master, tensor.detach().reshape(-1)[start - begin : stop - begin])
    return layout


def _stage3_layout(item: Fresh, entries: Sequence[Entry]) -> Layout:
    """ZeRO-3: every parameter is cut evenly over its ranks; a sub-group's partitions are concatenated.

    Padding behind a partition is uninitialised memory and is never read or written.
    """
    known = {id(entry.reference()): entry.parameter for entry in entries}
    owner = next(t._z3_optimizer for e in entries if (t := e.reference()) is not None and hasattr(t, "_z3_optimizer"))
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
        start, stop = rank * part, min((rank + 1) * part, member.ds_numel)
        if start < stop:
            _place(layout, index, start, stop, offset)
            master = item.tensor[offset : offset + stop - start]
            _check_master(layout, parameter, master, member.ds_tensor.detach().reshape(-1)[: stop - start])
        offset += part
    if {p.group for p in parameters} != {item.group}:
        layout.problem = f"the ZeRO-3 sub-group that begins with {parameters[0].key} mixes parameter groups"
    return layout


def _place(layout: Layout, number: int, start: int, stop: int, offset: int) -> None:
    """Add the flat interval [start, stop) of a parameter, which lies at ``offset`` of the layout's one tensor."""
    for box in interval_to_boxes(layout.parameters[number].shape, start, stop):
        layout.shards.append(Shard(number, box, 0, offset))
        offset += box.numel


def _check_master(layout: Layout, parameter: Parameter, master: Tensor, low: Tensor) -> None:
    """The master copy must be this very piece of the parameter; ZenFlow's transposed layout would fail here."""
    cast = master.detach().to(low.dtype).to(low.device)
    if low.numel() == cast.numel() and bool(((cast == low) | (cast.isnan() & low.isnan())).all()):
        return
    layout.problem = layout.problem or (
        f"the float32 master does not hold what the model's parameter {parameter.key} holds: the model's weights were "
        "changed after deepspeed.initialize, or DeepSpeed has laid it out in a way that this version does not know"
    )


def _paired(entries: Sequence[Entry], fresh: Sequence[Fresh]) -> list[tuple[Entry, Fresh]] | None:
    """Each fresh tensor with its entry: itself, or the float32 copy, at first by its place in the group."""
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


def _replica_group(engine: Any, parameter: Any) -> dist.ProcessGroup | None:
    """The ranks that hold the same copy of a parameter: all data-parallel ones, for an expert those of its group."""
    if getattr(parameter, "allreduce", True) is False:
        return _or_none(engine.expert_data_parallel_group[parameter.group_name])
    return _or_none(engine.seq_data_parallel_group)


def _expert_part(parameter: Any) -> _ExpertPart:
    """Which of its equally named experts an expert parameter is, this rank's place among the expert-parallel ranks, and
    how many there are."""
    if getattr(parameter, "allreduce", True):
        return None, 1
    group = sys.modules["deepspeed.utils.groups"]._get_expert_parallel_group(parameter.group_name)
    parts = dist.get_world_size(group)
    return (dist.get_rank(group), parts) if parts > 1 else (None, 1)


def _or_none(group: Any) -> dist.ProcessGroup | None:
    """The group, or None where it has one rank only: then nothing needs to be communicated."""
    if dist.get_world_size(group) == 1:
        return None
    return dist.group.WORLD if group is None else group


HOST = DeepSpeedHost()
