"""What a rank does in the Trainer checks: trains with a stock Trainer and returns everything observable."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from shampoo_deepspeed.options.config import OPTION_NAMES
from tests.distributed.ranks.folders import shared_folder
from tests.support.trainings import Training, make_data, make_model

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # an inference kernel that takes a minute to compile


class Watch(TrainerCallback):
    """Observes the inner optimizer, as DeepSpeed has it, and each of its steps."""

    def __init__(self) -> None:
        self.trainer: Trainer
        self.seen: dict[str, Any] = {"rates": [], "losses": [], "norms": []}

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        engine: Any = self.trainer.model_wrapped
        optimizer = engine.basic_optimizer
        inner = engine.optimizer
        while not isinstance(inner, torch.optim.Optimizer):
            inner = inner.optimizer
        group = optimizer.param_groups[0]
        self.seen |= {
            "class": f"{type(inner).__module__}.{type(inner).__name__}",
            "inner_optimizer": inner is optimizer,
            "untested": engine.zero_allow_untested_optimizer(),
            "options": {k: group[k] for k in OPTION_NAMES} | {"lr": group["initial_lr"]},
            "names": [entry.parameter.key for entry in optimizer.entries],
        }
        optimizer.register_step_pre_hook(lambda o, *_: self.seen["rates"].append(o.param_groups[0]["lr"]))

    def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
        if logs is not None and "loss" in logs:
            self.seen["losses"].append(logs["loss"])
            self.seen["norms"].append(logs.get("grad_norm"))


def train(training: Training) -> dict[str, Any]:
    """Train; with `save_at`, train again from there, and return the uninterrupted run's results as `whole`."""
    deepspeed.init_distributed("gloo")
    with shared_folder() as folder, logged() as messages:
        seen = train_once(training, folder)
        if training.save_at:
            drop(folder / f"checkpoint-{training.steps}")
            seen = train_once(training, folder, resume=True) | {"whole": seen}
    return seen | {"messages": messages}


def refused(training: Training) -> dict[str, str]:
    """Return the error of Trainer.train()."""
    deepspeed.init_distributed("gloo")
    with shared_folder() as folder:
        try:
            train_once(training, folder)
        except Exception as error:
            return {"kind": type(error).__name__, "message": str(error)}
    return {"kind": "nothing was refused", "message": ""}


def train_once(training: Training, folder: Path, resume: bool = False) -> dict[str, Any]:
    with clean_process(), trainer_of(training, folder) as (trainer, watch):
        trainer.train(resume_from_checkpoint=resume)
        return watch.seen | {"parameters": full_parameters(model_of(trainer))}


@contextmanager
def clean_process() -> Iterator[None]:
    """Remove all traces of a Trainer from this process afterwards, because others follow."""
    environment, linear = dict(os.environ), F.linear
    try:
        yield
    finally:
        F.linear = linear  # ZeRO-3 replaces it and never restores it
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        unset_hf_deepspeed_config()
        os.environ.clear()
        os.environ.update(environment)


def model_of(trainer: Trainer) -> nn.Module:
    assert trainer.model is not None
    return trainer.model


@contextmanager
def trainer_of(training: Training, folder: Path) -> Iterator[tuple[Trainer, Watch]]:
    """Return a stock Trainer, whose engine is destroyed afterwards."""
    config: Any = training.deepspeed_config()
    model: Any = make_model(training.model)
    if training.loaded:
        model.save_pretrained(folder / "start")  # only on the first rank
        dist.barrier()
    if training.file:
        config = write_json(config, folder)
    arguments = TrainingArguments(str(folder), deepspeed=config, **training.arguments(dist.get_world_size()))
    watch = Watch()
    if training.loaded:
        model = AutoModelForCausalLM.from_pretrained(folder / "start")
    trainer = Trainer(model, arguments, train_dataset=make_data(training.steps), callbacks=[watch])
    watch.trainer = trainer
    try:
        yield trainer, watch
    finally:
        engine: Any = trainer.model_wrapped
        if hasattr(engine, "destroy"):
            engine.destroy()


def full_parameters(model: nn.Module) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    sharded = [p for p in named.values() if hasattr(p, "ds_id")]
    with deepspeed.zero.GatheredParameters(sharded) if sharded else nullcontext():
        return {n: p.detach().clone().cpu() for n, p in named.items()}


def write_json(config: dict[str, Any], folder: Path) -> str:
    path = folder / f"config{dist.get_rank()}.json"
    path.write_text(json.dumps(config))
    return str(path)


def drop(checkpoint: Path) -> None:
    """Remove the last checkpoint, so that the Trainer resumes from the previous one."""
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(checkpoint)
    dist.barrier()


@contextmanager
def logged() -> Iterator[list[str]]:
    """Collect what the package logs within this context."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("shampoo_deepspeed")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
