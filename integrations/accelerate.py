"""Plain accelerate loops: ``prepare`` wraps ``Accelerator.prepare``. Its checks also serve the Trainer's adapter.

``accelerator.prepare(model, Shampoo(...))`` alone trains the same parameters in a single process and under DDP, FSDP1,
FSDP2 and DeepSpeed. But it does not divide the work among DDP's replicas, and ``save_state`` then does not include
Shampoo's state. Nor does it notice if another optimizer trains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from shampoo_deepspeed import Shampoo
from shampoo_deepspeed.state.unwrap import inner_optimizer

from .checkpoints import add_to_save_state

__all__ = ["prepare"]


def prepare(accelerator: Accelerator, *objects: Any) -> Any:
    """Prepare a model and its Shampoo, as ``accelerator.prepare(*objects)`` does, and return what that returns.

    ``model, optimizer, loader = prepare(accelerator, model, Shampoo(model.named_parameters(), ...), loader)``

    In addition, the work is divided among the replicas under DDP, and ``accelerator.save_state`` and ``load_state``
    include Shampoo's state. It is an error if another optimizer would silently train. FSDP1 with
    ``use_orig_params=False`` needs two steps: first ``model = accelerator.prepare(model)``, then Shampoo is built with
    ``model=model`` and prepared.

    Raises:
        TypeError: if the objects do not hold exactly one Shampoo, or hold more than one model.
        ValueError: if accelerate would replace the optimizer, or has replaced the parameters that it was built from; or
            if a scheduler was built for another optimizer.
        RuntimeError: if another optimizer than Shampoo trains afterwards.
    """
    optimizers = [place for place, given in enumerate(objects) if isinstance(given, Shampoo)]
    models = [place for place, given in enumerate(objects) if isinstance(given, nn.Module)]
    if len(optimizers) != 1 or len(models) > 1:
        raise TypeError(f"pass one Shampoo and its model; got {len(optimizers)} Shampoo, {len(models)} models")
    _refuse_foreign_schedules(objects)
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is not None:
        refuse_offload(plugin.hf_ds_config.config)
    prepared = accelerator.prepare(*objects)
    everything = prepared if isinstance(prepared, (tuple, list)) else [prepared]
    optimizer = everything[optimizers[0]]
    check_inner_optimizer(
        optimizer, 'pass a Shampoo to prepare(), and leave "optimizer" out of the DeepSpeed configuration'
    )
    if models and plugin is None:
        model, inner = everything[models[0]], inner_optimizer(optimizer)
        refuse_foreign_parameters(
            model,
            inner,
            "with FSDP1 and use_orig_params=False prepare the model alone and build "
            "Shampoo(model.named_parameters(), model=model) from the result",
        )
        inner.attach_model(model)
    add_to_save_state(accelerator, optimizer)
    return prepared


def _refuse_foreign_schedules(objects: Sequence[object]) -> None:
    """Raise a ValueError if a scheduler among the objects is for an optimizer that is not among them."""
    optimizers = [given for given in objects if isinstance(given, torch.optim.Optimizer)]
    for given in objects:
        scheduled = getattr(given, "optimizer", None)
        if isinstance(given, LRScheduler) and all(scheduled is not optimizer for optimizer in optimizers):
            raise ValueError(
                f"{type(given).__name__} was built for another optimizer ({type(scheduled).__name__}) and would not "
                "set Shampoo's learning rate; build it for the Shampoo that is prepared"
            )


def refuse_foreign_parameters(model: nn.Module, optimizer: Shampoo, remedy: str) -> None:
    """Raise an error if an optimizer would train another model's parameters.

    Raises:
        ValueError: with the remedy.
    """
    own = {id(p) for p in model.parameters()}
    given = [p for group in optimizer.param_groups for p in group["params"]]
    foreign = sum(id(p) not in own for p in given)
    if foreign:
        raise ValueError(
            f"{foreign} of the optimizer's {len(given)} parameters are not the model's and would not be trained: "
            f"Shampoo was built from another model, or a wrapper has replaced its parameters; {remedy}"
        )


def check_inner_optimizer(optimizer: object, remedy: str) -> Shampoo:
    """Return the Shampoo that trains.

    Raises:
        RuntimeError: if another optimizer trains; the message ends with the remedy.
    """
    inner = inner_optimizer(optimizer)
    if not isinstance(inner, Shampoo):
        found = f"{type(inner).__module__}.{type(inner).__qualname__}"
        raise RuntimeError(f"the optimizer that trains is {found}, not Shampoo; {remedy}")
    return inner


def refuse_offload(config: Mapping[str, Any]) -> None:
    """Raise an error for a DeepSpeed configuration with which accelerate replaces the optimizer.

    Raises:
        ValueError: with the line to write.
    """
    offload = (config.get("zero_optimization") or {}).get("offload_optimizer") or {}
    if str(offload.get("device", "none")) != "none" and config.get("zero_force_ds_cpu_optimizer", True):
        raise ValueError(
            "with offload_optimizer accelerate replaces Shampoo by DeepSpeedCPUAdam; "
            'write "zero_force_ds_cpu_optimizer": false into the DeepSpeed JSON'
        )
