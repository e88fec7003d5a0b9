"""What a rank does in the checks of `optimizers=`: one training, requested in each way and sharded in each way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from accelerate.state import DistributedType, PartialState
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp._flat_param import FlatParamHandle
from transformers import Trainer, TrainingArguments

from shampoo_deepspeed import Shampoo
from shampoo_deepspeed.integrations.displacement import Displacement
from shampoo_deepspeed.integrations.trainer import (
    ShampooCallback,
    ShampooFactory,
    ShampooTrainer,
    deferred,
    register_with_transformers,
)
from shampoo_deepspeed.options.parameter_names import clean_name
from shampoo_deepspeed.state.unwrap import inner_optimizer
from tests.distributed.ranks.folders import shared_folder
from tests.distributed.ranks.trainer import clean_process, drop, full_parameters
from tests.support.trainings import Training, make_data, make_model, trainer_groups


class Losses(ShampooCallback):
    """A ShampooCallback that also keeps the logs and the learning rate of each step."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []
        self.rates: list[float] = []

    def on_train_begin(self, *args: Any, optimizer: Any = None, **_: Any) -> None:
        super().on_train_begin(*args, optimizer=optimizer)
        inner_optimizer(optimizer).register_step_pre_hook(self.note_rate)

    def note_rate(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Note the learning rate; ZeRO steps once per param group, always with the same rate."""
        rate = optimizer.param_groups[0]["lr"]
        if self.rates[-1:] != [rate]:
            self.rates.append(rate)

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        super().on_log(*_, logs=logs, **__)
        if "loss" in logs:
            self.losses.append(logs["loss"])


def train(argument: tuple[str, str, Training]) -> dict[str, Any]:
    """Train and return the results; with `save_at`, those of a resumed run, and the uninterrupted ones as `whole`."""
    training = argument[2]
    deepspeed.init_distributed("gloo")
    with shared_folder() as folder:
        seen = train_once(*argument, folder)
        if training.save_at:
            drop(folder / f"checkpoint-{training.steps}")
            seen = train_once(*argument, folder, resume=True) | {"whole": seen}
    return seen


def train_once(route: str, framework: str, training: Training, folder: Path, resume: bool = False) -> dict[str, Any]:
    with clean_process():
        seen, moved = Losses(), Displacement()
        trainer = make_trainer(route, framework, training, folder, [seen, moved])
        trainer.train(resume_from_checkpoint=resume)
        wrapped: Any = trainer.model_wrapped
        assert trainer.model is not None
        result: dict[str, Any] = {"losses": seen.losses, "rates": seen.rates, "wrapper": type(wrapped).__name__}
        result |= {"parameters": whole(trainer.model), "traffic": inner_optimizer(trainer.optimizer).comm_stats()}
        result |= {"squares": moved.squares(), "moved": moved.history}
        result |= {"history": seen.history, "logs": trainer.state.log_history, "phases": phases_of(trainer.optimizer)}
        if hasattr(wrapped, "destroy"):
            wrapped.destroy()
        return result


def phases_of(optimizer: Any) -> list[int | None]:
    """Return for each block that this rank owns its phase, or None if all blocks refresh together."""
    units = inner_optimizer(optimizer).units
    return [unit.plan.blocks[block].phase for unit in units for block in unit.plan.owned[unit.rank]]


def refused(argument: tuple[str, dict[str, Any]]) -> str:
    """Return the error of a ShampooTrainer, or of its train(), under a DeepSpeed configuration."""
    route, change = argument
    deepspeed.init_distributed("gloo")
    with shared_folder() as folder, clean_process():
        training = Training(stage=2, steps=1)
        try:
            make_trainer(route, "zero2", training, folder, [ShampooCallback()], change).train()
        except (ValueError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
    return "nothing was refused"


def make_trainer(
    route: str,
    framework: str,
    training: Training,
    folder: Path,
    callbacks: list[Any],
    change: dict[str, Any] | None = None,
) -> Trainer:
    options = training.trainer_options() | training.own_options()
    config: Any = None
    if framework.startswith("zero"):
        config = training.deepspeed_config() | {"zero_optimization": {"stage": int(framework[4])}}
        if framework.endswith("offload"):
            config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
            config["zero_force_ds_cpu_optimizer"] = False
        if route != "json":
            del config["optimizer"]
        config |= change or {}
    common = training.arguments(dist.get_world_size())
    fsdp = framework.startswith("fsdp")
    sharding: dict[str, Any] = {}
    if fsdp:
        kept = not framework.endswith("flat")
        config_of_fsdp = {"version": int(framework[4]), "use_orig_params": kept, "sync_module_states": False}
        sharding = {"fsdp": True, "fsdp_config": config_of_fsdp}
    if route == "name":
        register_with_transformers()
        common |= {"optim": "shampoo", "optim_args": training.optim_args()}
    arguments = TrainingArguments(str(folder), deepspeed=config, **sharding, **common)
    if fsdp:
        pretend_to_have_accelerators(arguments)
    model = make_model(training.model)
    given: dict[str, Any] = {"train_dataset": make_data(training.steps), "callbacks": callbacks}
    if route in ("json", "factory", "name"):
        if route == "factory":
            given["optimizer_cls_and_kwargs"] = (ShampooFactory, options)
        return Trainer(model, arguments, **given)
    if route == "deferred":
        return ShampooTrainer(model, arguments, optimizers=(deferred(**options), None), **given)
    optimizer = Shampoo(trainer_groups(model), model=model, **options)
    scheduler = None
    if route == "scheduler":  # a scheduler other than that of the arguments
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, halved)
    return ShampooTrainer(model, arguments, optimizers=(optimizer, scheduler), **given)


def halved(step: int) -> float:
    return 0.5**step


def pretend_to_have_accelerators(arguments: TrainingArguments) -> None:
    """Make accelerate use its FSDP plugin, which it ignores on CPUs although FSDP2 itself works there."""
    assert arguments.device.type == "cpu"
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
    PartialState._shared_state["device"] = torch.device("cpu")
    FlatParamHandle.to_cpu = as_it_is  # type: ignore[assignment, method-assign]


@contextmanager
def as_it_is(handle: FlatParamHandle) -> Iterator[None]:
    """Skip FSDP1's copy to the CPU, which crashes on CPUs (_flat_param.py, ``to_cpu``).

    It frees the original after copying it. On CPUs nothing is copied, so torch would read freed memory.
    """
    assert handle.flat_param.device.type == "cpu"
    yield


def whole(model: nn.Module) -> dict[str, Tensor]:
    """Return full parameters under every framework."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model):
            return {clean_name(n): p.detach().clone() for n, p in model.named_parameters()}
    if not any(hasattr(p, "full_tensor") for p in model.parameters()):
        return full_parameters(model)
    return {n: p.full_tensor().detach().clone() for n, p in model.named_parameters()}  # type: ignore[attr-defined]
