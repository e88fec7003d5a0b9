"""DeepSpeed: the engine that an optimizer works for, and the engine settings under which it cannot work.

DeepSpeed builds the optimizer from the model's parameters and then replaces these in ``param_groups`` by flat
float32 partitions (see ``layouts``). All wrappers call ``step()`` on the inner optimizer after averaging,
overflow check and clipping, so the step needs no patch of DeepSpeed. File names below are DeepSpeed's (0.19.8).
It never imports DeepSpeed: where DeepSpeed is in use, it is in ``sys.modules``.
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
from torch import Tensor, nn

from shampoo_deepspeed.distributed.frameworks import Entry, Layout, LayoutError, NewTensor
from shampoo_deepspeed.options.choices import TRAINER_NO_DECAY
from shampoo_deepspeed.state.stateful_optimizer import BlockOptimizer

from .checkpoints import note_folder, resume, wrap_checkpointing
from .layouts import is_partition, paired, partition_layout, replicated

logger = logging.getLogger("shampoo_deepspeed")


class DeepSpeedAdapter:
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

    def attach_model(self, model: nn.Module) -> None:
        """The engine's own model is all that this framework needs."""

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

    def joining(self, waiting: Sequence[NewTensor]) -> list[NewTensor]:
        """None: averaging is a collective, after which all ranks have a gradient (of a partition always) or none.

        At stage 0 the engine fills in zeros on ranks that have not used a parameter (``_get_gradients_for_reduction``).
        """
        return []

    def layouts(
        self, optimizer: torch.optim.Optimizer, entries: Sequence[Entry], fresh: Sequence[NewTensor]
    ) -> list[Layout] | None:
        """One layout per flat partition; one per set of replicas of an unsharded (stage 0) engine.

        Raises:
            LayoutError: for engine settings under which no optimizer but DeepSpeed's own can work, and for tensors
                that are neither partitions nor the model's own.
        """
        if "deepspeed" not in sys.modules or any(hasattr(item.tensor, "placements") for item in fresh):
            return None  # DTensors have the shapes of what they replace, but are no copies of it
        engine = self._engine_of(optimizer)
        pairs = None if engine is not None and engine.zero_optimization_stage() > 0 else paired(entries, fresh)
        if pairs is not None:
            if engine is None and all(entry.reference() is item.tensor for entry, item in pairs):
                return None  # nothing of DeepSpeed's is to be seen here
            return replicated(engine, pairs)
        partitions = [item for item in fresh if is_partition(item, entries)]
        if engine is None and not partitions:
            return None
        if len(partitions) != len(fresh):
            shapes = [tuple(item.tensor.shape) for item in fresh if item not in partitions]
            raise LayoutError(f"DeepSpeed has put tensors into param_groups that are no ZeRO partitions: {shapes}")
        return [partition_layout(item, entries) for item in partitions]

    def note_load(self, optimizer: BlockOptimizer) -> None:
        """Called within ``engine.load_checkpoint``, maybe before the first step of an optimizer that the user built."""
        frame = _frame_of_engine("load_checkpoint")
        if frame is None or frame.f_locals["self"].basic_optimizer is not optimizer:
            note_folder(optimizer, None)
            return
        self._adopt(frame.f_locals["self"])
        note_folder(optimizer, Path(frame.f_locals["load_dir"]) / str(frame.f_locals["tag"]))

    def resume(self, optimizer: BlockOptimizer) -> None:
        """Load external state that is still missing: no engine was known that could do it after ``load_checkpoint``."""
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


ADAPTER = DeepSpeedAdapter()
