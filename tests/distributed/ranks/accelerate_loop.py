"""What a rank does in the accelerate checks: runs a plain training loop around `prepare`, or returns its error."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.state import DistributedType, PartialState
from accelerate.utils import DummyOptim, DummyScheduler
from torch import Tensor, nn
from transformers import get_scheduler

from shampoo_deepspeed import Shampoo
from shampoo_deepspeed.integrations.accelerate import prepare
from shampoo_deepspeed.options.choices import TRAINER_NO_DECAY
from shampoo_deepspeed.state.unwrap import inner_optimizer
from tests.distributed.ranks.trainer import clean_process, shared_folder
from tests.distributed.ranks.trainer_optimizers import whole
from tests.support.trainings import DECAY, GLOBAL_BATCH, RATE, Training, make_data, make_model, trainer_groups


def train(argument: tuple[str, str, Training]) -> dict[str, Any]:
    """Train with `accelerator.prepare` ("stock") or `prepare`, perhaps resumed in between, and return the results."""
    route, framework, training = argument
    deepspeed.init_distributed("gloo")
    with shared_folder() as folder, clean_process():
        if route == "dummy":
            accelerator = accelerator_for(framework, training, {"optimizer": in_json(training)})
            model, optimizer, inner, schedule = placeholders(accelerator, training)
        else:
            accelerator = accelerator_for(framework, training)
            model, optimizer, inner = made(route, accelerator, framework, training)
            schedule = get_scheduler(training.schedule, inner, training.warmup, training.steps)
        losses = []
        for step in range(training.steps):
            loss = model(**own_part(training, step)).loss
            accelerator.backward(loss)
            if not framework.startswith("zero"):  # DeepSpeed's engine clips by itself
                accelerator.clip_grad_norm_(model.parameters(), training.clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(mean(loss))
            if step + 1 == training.save_at:
                save_and_load(accelerator, folder)
        result: dict[str, Any] = {
            "losses": losses,
            "wrapper": type(model).__name__,
            "parameters": whole(unwrapped(model)),
        }
        result |= {"traffic": inner.comm_stats(), "metrics": inner.metrics()}
        engine: Any = model
        if hasattr(engine, "destroy"):
            engine.destroy()
        return result


def in_json(training: Training) -> dict[str, Any]:
    """Return the optimizer's section of DeepSpeed's JSON; accelerate fills "auto" from its DummyOptim."""
    params = training.own_options() | training.trainer_options() | {"lr": "auto", "weight_decay": "auto"}
    return {"type": "Shampoo", "params": params}


def placeholders(accelerator: Accelerator, training: Training) -> tuple[nn.Module, Any, Shampoo, Any]:
    """Return what accelerate's example `deepspeed_with_config_support` gets: the JSON's optimizer and a scheduler."""
    model = make_model(training.model)
    dummy = DummyOptim(model.parameters(), lr=RATE, weight_decay=DECAY)
    schedule = DummyScheduler(
        dummy, lr_scheduler_callable=lambda inner: get_scheduler("cosine", inner, training.warmup, training.steps)
    )
    model, optimizer, schedule = accelerator.prepare(model, dummy, schedule)
    inner = inner_optimizer(optimizer)
    assert isinstance(inner, Shampoo) and training.schedule == "cosine"
    return model, optimizer, inner, schedule


def refused(argument: tuple[str, str, dict[str, Any]]) -> str:
    """Return the error of `prepare`."""
    route, framework, change = argument
    deepspeed.init_distributed("gloo")
    with clean_process():
        training = Training(steps=1)
        try:
            made(route, accelerator_for(framework, training, change), framework, training)
        except (TypeError, ValueError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
    return "nothing was refused"


def made(route: str, accelerator: Accelerator, framework: str, training: Training) -> tuple[nn.Module, Any, Shampoo]:
    """Return the prepared model and optimizer, and Shampoo itself."""
    model = make_model(training.model)
    given = make_model(training.model) if route == "other_model" else model
    options = training.trainer_options() | training.own_options()
    if route == "after":  # the model first, as accelerate demands for FSDP1
        model = accelerator.prepare(model)
        inner = Shampoo(model.named_parameters(), model=model, no_decay=TRAINER_NO_DECAY, **options)
        return model, prepare(accelerator, inner), inner
    inner = Shampoo(trainer_groups(given), model=given, **options)
    prepared = accelerator.prepare(model, inner) if route == "stock" else prepare(accelerator, model, inner)
    return *prepared, inner


def accelerator_for(framework: str, training: Training, change: dict[str, Any] | None = None) -> Accelerator:
    if framework == "ddp":
        return Accelerator(cpu=True)
    if framework.startswith("zero"):
        config = {
            "zero_optimization": {"stage": int(framework[4])},
            "gradient_clipping": training.clip,
            "train_micro_batch_size_per_gpu": GLOBAL_BATCH // dist.get_world_size(),
        }
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"  # otherwise accelerate uses DDP on CPUs
        PartialState(cpu=True)
        return Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config | (change or {})))
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU  # accelerate shards nothing on CPUs
    PartialState._shared_state["device"] = torch.device("cpu")
    flat: dict[str, Any] = {"use_orig_params": not framework.endswith("flat"), "sync_module_states": False}
    return Accelerator(cpu=True, fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=int(framework[4]), **flat))


def own_part(training: Training, step: int) -> dict[str, Tensor]:
    """Return this rank's part of a step's global batch."""
    each = GLOBAL_BATCH // dist.get_world_size()
    first = step * GLOBAL_BATCH + dist.get_rank() * each
    rows = make_data(training.steps)[first : first + each]
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def mean(loss: Tensor) -> float:
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def save_and_load(accelerator: Accelerator, folder: Path) -> None:
    accelerator.save_state(str(folder / "state"))
    accelerator.wait_for_everyone()
    accelerator.load_state(str(folder / "state"))


def unwrapped(model: Any) -> nn.Module:
    """Return the inner model, because DDP and DeepSpeed change the names of parameters."""
    inner: nn.Module = model.module if type(model).__name__ in ("DistributedDataParallel", "DeepSpeedEngine") else model
    return inner
