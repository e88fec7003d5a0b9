"""What a rank does with a code block of the docs: executes its text, then trains with the resulting objects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from shampoo_deepspeed.state.unwrap import inner_optimizer
from tests.distributed.ranks.trainer import clean_process, shared_folder
from tests.distributed.ranks.trainer_optimizers import Losses, whole
from tests.support.snippets import Snippet
from tests.support.trainings import make_data, make_model

STEPS = 12  # beyond the first refresh at the default frequency
RATE = 3e-3
WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPLlamaForCausalLM")
AUTOMATIC = dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto")


def execute(snippet: Snippet) -> dict[str, Any]:
    """Execute the text, which finds `model`, `args`, `data` and others as in a script, and train; return results."""
    deepspeed.init_distributed("gloo")
    with shared_folder() as folder, clean_process():
        if snippet.language == "json":
            return trained_by(json_trainer(folder, snippet.text))
        names: dict[str, Any] = {
            "model": make_model("llama"),
            "data": repeated_data(),
            "args": TrainingArguments(**settings(folder)),
            "settings": settings(folder),
            "device": torch.device("cpu"),
            "config": {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 2}},
        }
        # With these empty lines, line numbers in tracebacks are those of the page.
        exec(compile("\n" * (snippet.line - 1) + snippet.text, snippet.page, "exec"), names)
        if "trainer" in names:
            return trained_by(names["trainer"])
        if "engine" in names:
            return loop(names["engine"], names["engine"].optimizer, names["engine"])
        return loop(names["model"], names["optimizer"])


def repeated_data() -> list[dict[str, Tensor]]:
    """Return one global batch repeatedly, so that every optimizer learns it."""
    return make_data(1) * STEPS


def settings(folder: Path) -> dict[str, Any]:
    """Return settings for TrainingArguments."""
    return {
        "output_dir": str(folder),
        "learning_rate": RATE,
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }


def json_trainer(folder: Path, fragment: str) -> Trainer:
    """Return the stock Trainer with a DeepSpeed JSON that has the block as its "optimizer"."""
    config = json.loads("{" + fragment + "}") | AUTOMATIC | {"zero_optimization": {"stage": 2}}
    arguments = TrainingArguments(**settings(folder), deepspeed=config)
    return Trainer(make_model("llama"), arguments, train_dataset=repeated_data())


def trained_by(trainer: Trainer) -> dict[str, Any]:
    losses = Losses()
    trainer.add_callback(losses)
    trainer.train()
    return seen_of(trainer.model_wrapped, inner_optimizer(trainer.optimizer), losses.losses)


def loop(model: Any, optimizer: Any, engine: Any = None) -> dict[str, Any]:
    """Run a plain loop on one global batch, of which each rank has a part if a framework joins the ranks."""
    joined = engine is not None or type(model).__name__ in WRAPPERS
    rows = make_data(1)[dist.get_rank() :: dist.get_world_size()] if joined else make_data(1)
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    losses = []
    for _ in range(STEPS):
        loss = model(**batch).loss
        losses.append(loss.item())
        if engine is not None:
            engine.backward(loss)
            engine.step()
            continue
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return seen_of(model, inner_optimizer(optimizer), losses)


def seen_of(wrapped: Any, optimizer: Any, losses: list[float]) -> dict[str, Any]:
    parameters = whole(unwrapped(wrapped))
    seen = {
        "wrapper": type(wrapped).__name__,
        "class": type(optimizer).__name__,
        "preconditioned": sum(len(unit.plan.blocks) for unit in optimizer.units),
        "losses": losses,
        "sum": [p.double().sum().item() for p in parameters.values()],
        "bytes": optimizer.comm_stats()["bytes_received"],
    }
    if hasattr(wrapped, "destroy"):
        wrapped.destroy()
    return seen


def unwrapped(model: Any) -> nn.Module:
    inner: nn.Module = model.module if hasattr(model, "destroy") or type(model).__name__.startswith("Dist") else model
    return inner
