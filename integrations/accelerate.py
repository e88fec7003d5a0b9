"""Plain accelerate loops: ``prepare`` around ``Accelerator.prepare``, and what the Trainer's adapter shares with it.

``accelerator.prepare(model, Shampoo(...))`` alone trains the same parameters in a single process and under DDP, FSDP1,
FSDP2 and DeepSpeed. What it does not do is divide the work among DDP's replicas, save and load Shampoo's state with
``save_state``, and refuse what would silently train without Shampoo.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator
from torch import nn

from shampoo_deepspeed import Shampoo
from shampoo_deepspeed.state.unwrap import inner_optimizer

from .checkpoints import add_to_save_state


def prepare(accelerator: Accelerator, *objects: Any) -> Any:
    """``model, optimizer, loader = prepare(accelerator, model, Shampoo(model.named_parameters(), ...), loader)``.

    ``accelerator.prepare(*objects)``, of which it returns the result, and more: under DDP the work is divided among
    the replicas, ``accelerator.save_state`` and ``load_state`` carry the state, and what would silently train without
    Shampoo is an error. FSDP1 with ``use_orig_params=False`` needs two
    steps: first ``model = accelerator.prepare(model)``, then Shampoo is built with ``model=model`` and prepared.

    Raises:
        TypeError: where not exactly one Shampoo is among the objects, or more than one model.
        ValueError: where accelerate would replace the optimizer, or the model's parameters without telling it.
        RuntimeError: where it is not Shampoo that trains afterwards.
    """
    optimizers = [place for place, given in enumerate(objects) if isinstance(given, Shampoo)]
    models = [place for place, given in enumerate(objects) if isinstance(given, nn.Module)]
    if len(optimizers) != 1 or len(models) > 1:
        raise TypeError(f"give one Shampoo and its model; here are {len(optimizers)} of Shampoo, {len(models)} models")
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is not None:
        refuse_offload(plugin.hf_ds_config.config)
    prepared = accelerator.prepare(*objects)
    everything = prepared if isinstance(prepared, (tuple, list)) else [prepared]
    optimizer = everything[optimizers[0]]
    check_inner_optimizer(
        optimizer, 'give prepare() a Shampoo, and leave "optimizer" out of the DeepSpeed configuration'
    )
    if models and plugin is None:
        _introduce(everything[models[0]], inner_optimizer(optimizer))
    add_to_save_state(accelerator, optimizer)
    return prepared


def _introduce(model: nn.Module, optimizer: Shampoo) -> None:
    """Tell an optimizer the wrapped model of its parameters."""
    own = {id(p) for p in model.parameters()}
    given = [p for group in optimizer.param_groups for p in group["params"]]
    foreign = sum(id(p) not in own for p in given)
    if foreign:
        raise ValueError(
            f"{foreign} of the optimizer's {len(given)} parameters are not the prepared model's and would not be "
            "trained: it was built from another model, or FSDP1 with use_orig_params=False has replaced them by flat "
            "vectors; prepare the model alone and build Shampoo(model.named_parameters(), model=model) from the result"
        )
    optimizer.attach_model(model)


def check_inner_optimizer(optimizer: Any, remedy: str) -> Shampoo:
    """The Shampoo that trains.

    Raises:
        RuntimeError: where it is another optimizer.
    """
    inner = inner_optimizer(optimizer)
    if not isinstance(inner, Shampoo):
        found = f"{type(inner).__module__}.{type(inner).__qualname__}"
        raise RuntimeError(f"the optimizer that trains is {found}, not Shampoo; {remedy}")
    return inner


def refuse_offload(config: Mapping[str, Any]) -> None:
    """A DeepSpeed configuration with which accelerate replaces the optimizer.

    Raises:
        ValueError: saying what to write.
    """
    offload = (config.get("zero_optimization") or {}).get("offload_optimizer") or {}
    if str(offload.get("device", "none")) != "none" and config.get("zero_force_ds_cpu_optimizer", True):
        raise ValueError(
            "with offload_optimizer accelerate replaces Shampoo by DeepSpeedCPUAdam; "
            'write "zero_force_ds_cpu_optimizer": false into the DeepSpeed JSON'
        )
