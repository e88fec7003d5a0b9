"""The Hugging Face Trainer: ``optimizers=`` under every framework, a factory for the stock Trainer, and a callback.

The stock Trainer takes a finished optimizer only in a single process and under DDP: under FSDP it raises an error,
under DeepSpeed it silently trains with AdamW. Its ``optimizer_cls_and_kwargs=`` works everywhere, so all ways here use
it. The Trainer calls that factory without arguments, and its result with the model. ``optim="shampoo"`` is another name
for the same factory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from shampoo_deepspeed import Shampoo, ShampooConfig, load_shampoo
from shampoo_deepspeed.distributed.frameworks import adapters
from shampoo_deepspeed.options.choices import TRAINER_NO_DECAY
from shampoo_deepspeed.options.param_groups import signature_with_options
from shampoo_deepspeed.options.parameter_names import clean_path
from shampoo_deepspeed.state.unwrap import inner_optimizer

from .accelerate import check_inner_optimizer, refuse_foreign_parameters, refuse_offload
from .checkpoints import TrainerCheckpoints, check_resumed
from .displacement import DISPLACEMENT, Displacement
from .fsdp1.tensors import is_flat, refuse_flat
from .transformers_names import NAME, add_check, add_name, options_from_text

if TYPE_CHECKING:
    from accelerate import DeepSpeedPlugin
    from torch.optim.lr_scheduler import LRScheduler
    from typing_extensions import Unpack

    from shampoo_deepspeed.options.typed import DeferredOptions, Options

logger = logging.getLogger("shampoo_deepspeed")

# From a model to the names of its weight-decayed parameters, like Trainer.get_decay_parameter_names.
DecayRule = Callable[[nn.Module], list[str]]

PREFIX = "shampoo/"

__all__ = [
    "Deferred",
    "ShampooCallback",
    "ShampooFactory",
    "ShampooTrainer",
    "ShampooTrainerMixin",
    "deferred",
    "register_with_transformers",
]


def register_with_transformers() -> None:
    """Make ``TrainingArguments(optim="shampoo", optim_args="precondition_frequency=5,betas=0.9;0.95")`` work.

    Call it before TrainingArguments are built or read from ``training_args.bin``; further calls change nothing. The
    learning rate, weight decay, betas and eps come from TrainingArguments unless ``optim_args`` gives them. Lists are
    written with semicolons. Importing ``shampoo_deepspeed.integrations.optim_shampoo`` calls this function.

    A Trainer whose arguments have this name, but which would train with another optimizer, then raises an error at the
    start: one that is given as well, that is in DeepSpeed's JSON, or by which a framework has replaced Shampoo.

    Raises:
        RuntimeError: if this version of Transformers keeps its names of optimizers in another way.
    """
    add_name(lambda arguments: _named(arguments).filled(arguments), ShampooFactory)
    add_check(NamedOptimizerCheck)


class ShampooFactory:
    """Builds Shampoo for the stock Trainer.

    ``Trainer(..., optimizer_cls_and_kwargs=(ShampooFactory, {"lr": 1e-3, "weight_decay": 0.1}))``

    Shampoo gets the Trainer's two groups: norms and biases have no weight decay. If ``no_decay`` is among the options,
    its patterns apply instead. Frozen parameters are left out. The factory does not see TrainingArguments, so give it
    the learning rate and weight decay.

    Raises:
        ValueError: if the framework would replace the optimizer.
    """

    def __call__(self, model: nn.Module, lr: float | Tensor = ShampooConfig.lr, **options: Unpack[Options]) -> Shampoo:
        if is_initialized():
            _refuse_deepspeed(_deepspeed_plugin(), None)
        return build(model, {"lr": lr, **options}, _trainer_rule)


@dataclass(frozen=True)
class Deferred:
    """Options of a Shampoo that is built when the Trainer has a model; returned by ``deferred``."""

    options: Mapping[str, Any]

    def filled(self, arguments: TrainingArguments) -> dict[str, Any]:
        """Return the options, with ``"auto"`` replaced by the values of TrainingArguments, as in DeepSpeed's JSON."""
        known = {
            "lr": arguments.learning_rate,
            "betas": (arguments.adam_beta1, arguments.adam_beta2),
            "eps": arguments.adam_epsilon,
            "weight_decay": arguments.weight_decay,
        }
        return {k: known[k] if k in known and v == "auto" else v for k, v in self.options.items()}


def deferred(lr: float | str = "auto", **options: Unpack[DeferredOptions]) -> Deferred:
    """Return a Shampoo for ``optimizers=`` that is built later, when the Trainer has a model.

    ``ShampooTrainer(..., optimizers=(deferred(lr=1e-3, weight_decay=0.1), None))``

    Args:
        lr: learning rate; ``"auto"`` takes that of TrainingArguments. ``betas``, ``eps`` and ``weight_decay`` may be
            ``"auto"`` too; if they are not given, Shampoo's defaults are used.
        **options: other options, as for ``ShampooFactory``.
    """
    return Deferred({"lr": lr, **options})


deferred.__signature__ = signature_with_options(deferred)  # type: ignore[attr-defined]


# The Trainer's annotations are narrower than what it takes: LambdaLR for a scheduler, a class for a factory.
class ShampooTrainerMixin(TrainerCheckpoints):
    """Adds Shampoo to any Trainer class: ``class MyTrainer(ShampooTrainerMixin, SFTTrainer)``.

    ``optimizers=(Shampoo(...) or deferred(...), scheduler or None)`` then works in a single process and under DDP,
    FSDP and DeepSpeed (without "optimizer" in its JSON). Other optimizers are passed on to the Trainer. Under DDP, a
    deferred Shampoo divides its work among the replicas; a finished one does if it was given a ``process_group``.
    ``optim="shampoo"`` counts as deferred. The Trainer's training logs include ``Shampoo.metrics()`` of the rank that
    logs, and what the callback ``Displacement`` measures if there is one.

    Raises:
        ValueError: if another optimizer or scheduler than the given one would train.
    """

    _given_scheduler: LRScheduler | None = None

    def __init__(
        self,
        *args: Any,
        optimizers: tuple[torch.optim.Optimizer | Deferred | None, LRScheduler | None] = (None, None),
        **kwargs: Any,
    ) -> None:
        if any(isinstance(value, tuple) and value and _is_ours(value[0]) for value in args):
            raise TypeError("pass optimizers=(...) by keyword")
        optimizer, scheduler = optimizers
        if not _is_ours(optimizer):
            super().__init__(*args, optimizers=optimizers, **kwargs)  # type: ignore[arg-type, misc]
            self._take_name(optimizer, scheduler)
            if _json_names_shampoo(self.args, _deepspeed_plugin()):
                self._watch()
            return
        _check_scheduler(optimizer, scheduler)
        super().__init__(*args, **kwargs)
        self._take(optimizer, scheduler)

    def _take_name(self, optimizer: torch.optim.Optimizer | Deferred | None, scheduler: LRScheduler | None) -> None:
        """Use ``optim="shampoo"`` if no optimizer is given in another way."""
        if optimizer is None and self.optimizer_cls_and_kwargs is None and self.args.optim == NAME:
            named = _named(self.args)
            _check_scheduler(named, scheduler)
            self._take(named, scheduler, by_name=True)

    def _take(self, optimizer: Shampoo | Deferred, scheduler: LRScheduler | None, by_name: bool = False) -> None:
        if self.optimizer_cls_and_kwargs is not None:
            raise ValueError("both optimizers= and optimizer_cls_and_kwargs= are given; leave one out")
        _refuse_deepspeed(_deepspeed_plugin(), scheduler)
        if isinstance(optimizer, Shampoo):
            refuse_flat(getattr(self.accelerator.state, "fsdp_plugin", None))
            factory: Callable[[], Callable[..., Shampoo]] = _Prebuilt(optimizer)
        else:

            def factory() -> Callable[..., Shampoo]:
                # Read the arguments only now: a hyperparameter search changes those of the same Trainer.
                options = (_named(self.args) if by_name else optimizer).filled(self.args)
                if self.accelerator.distributed_type.value.startswith("MULTI_"):  # DDP
                    options.setdefault("process_group", dist.group.WORLD)
                return lambda model, **_: build(model, options, self.get_decay_parameter_names)

        no_options: dict[str, Any] = {}
        self.optimizer_cls_and_kwargs = (factory, no_options)  # type: ignore[assignment]
        self._given_scheduler = scheduler
        self.lr_scheduler = self.callback_handler.lr_scheduler = scheduler  # type: ignore[assignment]
        self._watch()

    def _watch(self) -> None:
        """Add the callback that checks that Shampoo trains."""
        if not any(isinstance(callback, ShampooCallback) for callback in self.callback_handler.callbacks):
            self.add_callback(ShampooCallback)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the optimizer's metrics since the last training log to each training log."""
        optimizer = inner_optimizer(self.optimizer)
        if "loss" in logs and isinstance(optimizer, Shampoo):
            logs = logs | _prefixed(optimizer.metrics())
        for callback in self.callback_handler.callbacks if "loss" in logs else ():
            if isinstance(callback, Displacement):
                logs = logs | {DISPLACEMENT: callback.measured()}
        super().log(logs, *args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate and predict with the averaged weights of the option ``ema_decay``, if it is set."""
        with self._averaged_weights():
            return super().evaluation_loop(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model with averaged weights; checkpoints, from which training resumes, hold the weights."""
        with nullcontext() if _internal_call else self._averaged_weights():
            super().save_model(output_dir, _internal_call=_internal_call)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Push the model as ``save_model`` saves it; the Trainer saves it by a call like that for a checkpoint."""
        with self._averaged_weights():
            return super().push_to_hub(*args, **kwargs)

    def _averaged_weights(self) -> AbstractContextManager[None]:
        optimizer = inner_optimizer(self.optimizer)
        return optimizer.averaged_weights() if isinstance(optimizer, Shampoo) else nullcontext()

    def create_scheduler(self, *args: Any, **kwargs: Any) -> LRScheduler:
        """Return the given scheduler, also under DeepSpeed, where the Trainer has dropped it."""
        if self.lr_scheduler is None and self._given_scheduler is not None:
            self.lr_scheduler = self._given_scheduler  # type: ignore[assignment]
        return super().create_scheduler(*args, **kwargs)


class ShampooTrainer(ShampooTrainerMixin, Trainer):
    """A Trainer that takes ``optimizers=(Shampoo(...) or deferred(...), scheduler or None)`` under every framework."""


class ShampooCallback(TrainerCallback):
    """Raises an error at the start of training if another optimizer trains: some frameworks silently replace Shampoo.

    It also raises an error if the Trainer resumes from a checkpoint without Shampoo state. If ``require_state`` is
    False, the optimizer then starts with new state instead.

    Args:
        start_from: a folder with the ``manifest.json`` of an optimizer state, with which this training begins. It may
            be written under any framework on any number of ranks, for example a DeepSpeed checkpoint's
            ``global_stepN/shampoo``. Weights are not loaded from it, and options are those of this run. If the Trainer
            resumes from a checkpoint of its own, the state comes from there.

    ``history`` holds ``Shampoo.metrics()`` of each training log, with its ``"step"``. The stock Trainer's own logs are
    written before a callback sees them; to have metrics in the logs, use ``ShampooTrainerMixin``.
    """

    require_state = True

    def __init__(self, start_from: str | PathLike[str] | None = None) -> None:
        self.start_from = start_from
        self.history: list[dict[str, float]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, *_: Any, optimizer: object = None, **__: Any
    ) -> None:
        inner = check_inner_optimizer(
            optimizer,
            'select it by optim="shampoo", by ShampooTrainer(optimizers=...), by '
            "Trainer(optimizer_cls_and_kwargs=(ShampooFactory, {...})), or, under DeepSpeed, by "
            '"optimizer": {"type": "Shampoo"} in its JSON',
        )
        _warn_of_ignored_fsdp(args)
        if args.load_best_model_at_end and any(group["ema_decay"] for group in inner.param_groups):
            raise ValueError(
                "load_best_model_at_end = True is not allowed with Shampoo's ema_decay: evaluations see averaged "
                "weights, and checkpoints hold the weights; set it to False and call save_model() after training"
            )
        # A second train() of the same Trainer begins at step 0 too, and continues with the optimizer's present state.
        if self.start_from is not None and state.global_step == 0 and not inner.has_state:
            load_shampoo(inner, self.start_from, options=False)
        # DeepSpeed's adapter loads external state at the next step, or raises; accelerate's launcher may use it too.
        if _deepspeed_plugin() is None or not inner.external_state:
            check_resumed(inner, state, self.require_state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        *_: Any,
        logs: dict[str, float] | None = None,
        optimizer: object = None,
        **__: Any,
    ) -> None:
        inner = inner_optimizer(optimizer)
        if logs is not None and "loss" in logs and isinstance(inner, Shampoo):
            logged = {key: value for key, value in logs.items() if key.startswith(PREFIX)}  # from the mixin
            self.history.append({"step": state.global_step, **(logged or _prefixed(inner.metrics()))})


class NamedOptimizerCheck(TrainerCallback):
    """Raises an error at the start of training if ``optim="shampoo"`` is not what trains. All Trainers have it."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, *_: Any, optimizer: object = None, **__: Any
    ) -> None:
        if args.optim != NAME:
            return
        _refuse_deepspeed(_deepspeed_plugin(), None)
        check_inner_optimizer(
            optimizer, 'optim="shampoo" asks for Shampoo too; leave out one of them, as only one optimizer can train'
        )


def _warn_of_ignored_fsdp(args: TrainingArguments) -> None:
    """accelerate says nothing when it ignores FSDP, as it does on CPUs."""
    state = AcceleratorState()
    if args.fsdp and state.distributed_type != DistributedType.FSDP:
        message = "FSDP was requested, but accelerate does not use it on %s: this run is %s"
        logger.warning(message, args.device.type, state.distributed_type.value)


def build(model: nn.Module, options: Mapping[str, Any], rule: DecayRule) -> Shampoo:
    """Return Shampoo for a model's trainable parameters, without weight decay for those that the rule leaves out."""
    # FSDP1 leaves its own part out of some names.
    named = [(clean_path(model, n), p) for n, p in model.named_parameters() if p.requires_grad]
    if any(is_flat(p) for _, p in named):  # the rule does not see the parameters inside a flat tensor
        options = {"no_decay": TRAINER_NO_DECAY, **options}
    decayed = set(dict(named)) if "no_decay" in options else {clean_path(model, n) for n in rule(model)}
    groups: list[dict[str, Any]] = [
        {"params": [(n, p) for n, p in named if n in decayed]},
        {"params": [(n, p) for n, p in named if n not in decayed], "weight_decay": 0.0},
    ]
    return Shampoo([group for group in groups if group["params"]], model=model, **options)


@dataclass(frozen=True)
class _Prebuilt:
    """A finished optimizer in the form of a factory."""

    optimizer: Shampoo = field(repr=False)

    def __call__(self) -> Callable[..., Shampoo]:
        return self.for_model

    def for_model(self, model: nn.Module, **_: Any) -> Shampoo:
        refuse_foreign_parameters(
            model,
            self.optimizer,
            "model_init= makes a new model; use optimizers=(deferred(lr=...), None)",
        )
        for adapter in adapters():
            adapter.attach_model(model)  # under FSDP1 the model is wrapped by now
        return self.optimizer


def _trainer_rule(model: nn.Module) -> list[str]:
    """Apply the Trainer's own rule, which looks only at the model."""
    return Trainer.get_decay_parameter_names(object.__new__(Trainer), model)


def _named(arguments: TrainingArguments) -> Deferred:
    """Return the options in ``optim_args``; the Trainer's own options are "auto" unless they are given there."""
    given = options_from_text(arguments.optim_args or "")
    return Deferred(dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto") | given)


def _deepspeed_plugin() -> DeepSpeedPlugin | None:
    """Return how accelerate uses DeepSpeed, by TrainingArguments or by its launcher; None if it does not."""
    found: DeepSpeedPlugin | None = getattr(AcceleratorState(), "deepspeed_plugin", None)
    return found


def _json_names_shampoo(arguments: TrainingArguments, plugin: DeepSpeedPlugin | None) -> bool:
    """Whether DeepSpeed's JSON asks for Shampoo; accelerate may ignore that of the arguments (ACCELERATE_USE_CPU)."""
    known = (getattr(arguments, "hf_deepspeed_config", None), plugin.hf_ds_config if plugin is not None else None)
    optimizers = [json.config.get("optimizer", {}) for json in known if json is not None]
    return any(str(optimizer.get("type", "")).lower() == NAME for optimizer in optimizers)


def _prefixed(metrics: Mapping[str, float]) -> dict[str, float]:
    return {PREFIX + key: value for key, value in metrics.items()}


def _is_ours(optimizer: object) -> TypeGuard[Shampoo | Deferred]:
    return isinstance(optimizer, (Shampoo, Deferred))


def _check_scheduler(optimizer: Shampoo | Deferred, scheduler: LRScheduler | None) -> None:
    if scheduler is None or isinstance(optimizer, Shampoo) and getattr(scheduler, "optimizer", None) is optimizer:
        return
    raise ValueError(
        "the scheduler in optimizers= was built for another optimizer and would not set this one's learning rate; "
        "leave it out to use that of TrainingArguments, or pass Shampoo(...) with a scheduler built for it"
    )


def _refuse_deepspeed(plugin: DeepSpeedPlugin | None, scheduler: LRScheduler | None) -> None:
    """Raise an error for entries of DeepSpeed's JSON that would silently replace ``optimizers=``."""
    if plugin is None:
        return
    config: Mapping[str, Any] = plugin.hf_ds_config.config
    if "optimizer" in config:
        raise ValueError(
            'the DeepSpeed JSON has an "optimizer" section, and the Trainer would use that and drop optimizers= '
            "or optim=; leave out one of them"
        )
    if scheduler is not None and "scheduler" in config:
        raise ValueError(
            'the DeepSpeed JSON has a "scheduler" section, and the Trainer would use that and drop the scheduler '
            "in optimizers=; leave out one of them"
        )
    refuse_offload(config)
