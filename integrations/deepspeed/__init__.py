"""DeepSpeed: finds the engine that an optimizer belongs to, and refuses engine settings that cannot work.

DeepSpeed builds the optimizer from the model's parameters and then replaces these in ``param_groups`` by flat
float32 partitions (see ``layouts.py``). All wrappers call ``step()`` on the inner optimizer after averaging,
overflow check and clipping, so the step needs no patch of DeepSpeed. File names below are DeepSpeed's (0.19.8).
This folder never imports DeepSpeed: if DeepSpeed is in use, it is in ``sys.modules``.
"""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from shampoo_deepspeed.distributed.frameworks import Adapter, Entry, Layout, LayoutError, NewTensor
from shampoo_deepspeed.options.choices import TRAINER_NO_DECAY
from shampoo_deepspeed.state.stateful_optimizer import BlockOptimizer

from ..frames import calling_frame
from .checkpoints import is_loading, note_folder, resume, wrap_checkpointing
from .layouts import is_partition, paired, partition_layout, replicated, stage3_partitions
from .weights import pass_on
from .whole_step import WholeStep, needs_decision

if TYPE_CHECKING:
    from .engine import Engine

logger = logging.getLogger("shampoo_deepspeed")

BUILDS = "_configure_basic_optimizer"  # the engine's method that builds an optimizer from the JSON
STEPS = ("_take_model_step", "_configure_fp16_optimizer")  # the engine's methods that call step()
LOADS = "load_checkpoint"


class DeepSpeedAdapter(Adapter):
    """The adapter for DeepSpeed; one instance serves all optimizers of a process.

    It does not override ``joining``: no tensor is stepped without a gradient. Averaging is a collective, after which
    either all ranks have a gradient or none has; partitions always have one. At stage 0 the engine fills in zeros on
    ranks that have not used a parameter (``_get_gradients_for_reduction``).
    """

    def __init__(self) -> None:
        self._engines: list[weakref.ref[Engine]] = []
        self._decisions: weakref.WeakKeyDictionary[Engine, WholeStep] = weakref.WeakKeyDictionary()

    def model_under_construction(self, options: dict[str, Any], given: Sequence[Any]) -> nn.Module | None:
        """Return the model of the engine that is building an optimizer from its JSON right now, or None.

        DeepSpeed passes one list of all parameters, so weight decay would also apply to norms and biases. Unless
        ``no_decay`` is given, it is set here to exempt them, as the Trainer's own two groups do.

        Raises:
            LayoutError: for engine settings under which no optimizer but DeepSpeed's own can work.
        """
        frame = _frame_of_engine(BUILDS)
        if frame is None:
            return None
        engine: Engine = frame.f_locals["self"]
        self._adopt(engine)
        if "lr" not in (engine.optimizer_params() or {}):
            logger.warning(
                "the DeepSpeed configuration gives Shampoo no 'lr': %s is used; under the HF Trainer write \"lr\": "
                '"auto" to get its learning_rate',
                options["lr"],
            )
        if _is_one_list(given):
            options.setdefault("no_decay", TRAINER_NO_DECAY)
        return engine.module

    def model_found(self, model: nn.Module, options: dict[str, Any], given: Sequence[Any]) -> None:
        """Treat ``deepspeed.initialize(optimizer=lambda params: Shampoo(params, ...))`` as an optimizer from the JSON.

        The model is then an engine that calls the user's function and has no optimizer yet.
        """
        if not hasattr(model, "zero_optimization_stage"):
            return
        engine = cast("Engine", model)
        builder = engine.client_optimizer
        if engine.optimizer is not None or isinstance(builder, torch.optim.Optimizer) or not callable(builder):
            return
        self._adopt(engine)
        if _is_one_list(given):
            options.setdefault("no_decay", TRAINER_NO_DECAY)

    def admit(self, optimizer_class: type) -> None:
        """Add the class to DeepSpeed's list of optimizers that may run under ZeRO (runtime/zero/utils.py)."""
        zero = sys.modules.get("deepspeed.runtime.zero.utils")
        supported = getattr(zero, "ZERO_SUPPORTED_OPTIMIZERS", None)
        if supported is not None and optimizer_class not in supported:
            supported.append(optimizer_class)

    def global_shape(self, parameter: Tensor) -> tuple[int, ...] | None:
        """Return the full shape of a parameter that ZeRO-3 or zero.Init has emptied."""
        shape = getattr(parameter, "ds_shape", None)
        return tuple(shape) if shape is not None else None

    def layouts(
        self, optimizer: torch.optim.Optimizer, entries: Sequence[Entry], fresh: Sequence[NewTensor]
    ) -> list[Layout] | None:
        """Return one layout per flat partition, or at stage 0 (unsharded) one per set of replicas.

        Raises:
            LayoutError: for engine settings under which no optimizer but DeepSpeed's own can work; for tensors that
                are neither partitions nor the model's own; and for DeepSpeed's tensors without an engine.
        """
        if "deepspeed" not in sys.modules or any(hasattr(item.tensor, "placements") for item in fresh):
            return None  # DTensors have the shapes of the parameters that they replace, but are not copies of them
        engine = self._engine_of(optimizer)
        pairs = None if engine is not None and engine.zero_optimization_stage() > 0 else paired(entries, fresh)
        if pairs is not None:
            if engine is None and all(entry.reference() is item.tensor for entry, item in pairs):
                return None  # no sign of DeepSpeed here
            return self._with_decision(_known(engine), replicated(_known(engine), pairs))
        partitions = [item for item in fresh if is_partition(item, entries)]
        if engine is None and not partitions:
            return None
        engine = _known(engine)
        if len(partitions) != len(fresh):
            shapes = [tuple(item.tensor.shape) for item in fresh if item not in partitions]
            raise LayoutError(f"DeepSpeed has put tensors into param_groups that are not ZeRO partitions: {shapes}")
        return self._with_decision(engine, [partition_layout(item, entries) for item in partitions])

    def _with_decision(self, engine: Engine, layouts: list[Layout]) -> list[Layout]:
        """Let a gradient that is not finite reject the engine's whole step, and not only one of its calls."""
        if needs_decision(engine):
            decision = self._decisions.setdefault(engine, WholeStep(engine))
            for layout in layouts:
                layout.whole_step = partial(decision.decide, id(layout.tensors[0]))
        return layouts

    def note_load(self, optimizer: BlockOptimizer) -> None:
        """Note the folder that ``engine.load_checkpoint`` is loading from, if our wrapper of it is not at work.

        The wrapper itself resumes. But an engine that was given a finished optimizer may not be known before its first
        step, and is then not wrapped.
        """
        frame = _frame_of_engine(LOADS) if not is_loading(optimizer) else None
        folder = None
        if frame is not None and frame.f_locals["self"].basic_optimizer is optimizer:
            self._adopt(frame.f_locals["self"])
            folder = Path(frame.f_locals["load_dir"]) / str(frame.f_locals["tag"])
        note_folder(optimizer, folder)

    def weights_changed(self, optimizer: BlockOptimizer) -> None:
        """Give the model the masters' weights."""
        engine = self._engine_of(optimizer)
        if engine is not None:
            pass_on(engine)

    def resume(self, optimizer: BlockOptimizer) -> None:
        """Load external state that is still missing, because no engine was known when ``load_checkpoint`` ran."""
        resume(optimizer)

    def kept_out(self, optimizer: BlockOptimizer) -> list[NewTensor]:
        """Return the partitions of ZeRO-3, which has them in ``param_groups`` only while it steps or saves."""
        engine = self._engine_of(optimizer)
        if engine is None or engine.zero_optimization_stage() != 3:
            return []
        return stage3_partitions(engine.optimizer, optimizer.entries)

    def _engine_of(self, optimizer: torch.optim.Optimizer) -> Engine | None:
        """Return the engine whose inner optimizer this is: one seen before, or the one that is calling us now.

        Raises:
            LayoutError: if the engine has built the optimizer from its JSON in a way that this adapter did not see.
        """
        frame = _frame_of_engine(*STEPS)
        engine: Engine | None = frame.f_locals["self"] if frame is not None else None
        if engine is not None and engine.basic_optimizer is optimizer:
            self._adopt_at_step(engine)
            return engine
        known = (reference() for reference in self._engines)
        return next((e for e in known if e is not None and e.basic_optimizer is optimizer), None)

    def _adopt_at_step(self, engine: Engine) -> None:
        """Adopt an engine that was given a finished optimizer."""
        if not self._knows(engine) and engine.client_optimizer is None:
            raise LayoutError(
                f"DeepSpeed has built Shampoo from its JSON without calling {BUILDS}(), so the names of the "
                "parameters are unknown, and weight decay and other options would apply to the wrong parameters. This "
                "package supports DeepSpeed 0.19.8; with another version, build the optimizer yourself: "
                "deepspeed.initialize(model=model, optimizer=Shampoo(model.named_parameters(), ...), config=...)"
            )
        self._adopt(engine)

    def _adopt(self, engine: Engine) -> None:
        if self._knows(engine):
            return
        _refuse_unsupported(engine)
        self._engines = [reference for reference in self._engines if reference() is not None]
        self._engines.append(weakref.ref(engine))
        wrap_checkpointing(engine)

    def _knows(self, engine: Engine) -> bool:
        return any(reference() is engine for reference in self._engines)


def _known(engine: Engine | None) -> Engine:
    """Return the engine of tensors that are DeepSpeed's.

    Raises:
        LayoutError: if there is none: its settings could not be checked, and its checkpoints would lose the state.
    """
    if engine is None:
        raise LayoutError(
            "DeepSpeed has replaced this optimizer's parameters, but the DeepSpeedEngine that it belongs to was not "
            "found: call engine.step(), not step() of an optimizer. If you do so already, this version of DeepSpeed "
            "calls optimizers in a way that this package does not support; it supports 0.19.8"
        )
    return engine


def _frame_of_engine(*methods: str) -> FrameType | None:
    """Return the calling frame that runs one of these methods of a DeepSpeedEngine, or None.

    DeepSpeed gives an optimizer neither the model nor its configuration; the engine's frame has both.
    """
    return calling_frame(
        lambda frame: frame.f_code.co_name in methods and hasattr(frame.f_locals.get("self"), "zero_optimization_stage")
    )


def _refuse_unsupported(engine: Engine) -> None:
    zero = engine._config.zero_config
    offload = zero.offload_optimizer
    reasons = []
    if engine.client_optimizer is not None and engine.optimizer_params() is not None:
        reasons.append(
            'its "optimizer" section next to initialize(optimizer=...) (DeepSpeed drops that section; leave out one)'
        )
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
    if sixteen and engine.pipeline_parallelism:
        reasons.append("float16 autocast in a pipeline (each stage would skip steps on its own)")
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
    """Whether the user gave one flat list instead of groups. DeepSpeed may have split experts off (moe/utils.py)."""
    groups = [g for g in given if isinstance(g, dict)]
    if not groups:
        return True
    return any(g.get("name") == "dense-params" for g in groups) and all("name" in g for g in groups)


ADAPTER = DeepSpeedAdapter()
