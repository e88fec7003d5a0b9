"""What a rank does in the refusal checks: starts DeepSpeed with a wrong setting and returns the error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.module_inject import layers
from deepspeed.runtime import torch_autocast
from deepspeed.utils import groups
from torch import nn

import shampoo_deepspeed.integrations.deepspeed as adapter
from shampoo_deepspeed import Shampoo
from tests.distributed.ranks.zero import engine_of, train
from tests.support.scenarios import Scenario
from tests.support.trainings import make_model as make_transformer
from tests.support.zoo import make_model


def refused(scenario: Scenario) -> dict[str, Any]:
    """Return the error of deepspeed.initialize, which is before any computation."""
    model = make_transformer("llama") if "tensor_parallel" in scenario.config else make_model(scenario.model)
    forwards: list[nn.Module] = []
    model.register_forward_pre_hook(lambda module, _: forwards.append(module))
    with global_groups():
        try:
            with engine_of(scenario, model):
                return {"kind": "nothing was refused", "message": ""}
        except Exception as error:
            return described(error) | {"forwards": len(forwards)}


def two_optimizers(stage: int) -> dict[str, Any]:
    """Return the error of the first step if the configuration has an optimizer too."""
    scenario = Scenario(stage=stage)
    model = make_model(scenario.model)
    config = scenario.deepspeed_config()
    assert config["optimizer"]["type"] == "Shampoo"
    engine, *_ = deepspeed.initialize(model=model, optimizer=Shampoo(model.parameters()), config=config)
    try:
        train(engine, scenario, range(1))
    except Exception as error:
        return described(error)
    finally:
        engine.destroy()
    return {"kind": "nothing was refused", "message": ""}


def corrupted(scenario: Scenario) -> dict[str, Any]:
    """Return the error of the first step if the last rank's float32 partition begins elsewhere than expected.

    DeepSpeed's own records then say so too; if they say what is expected, a user has changed weights.
    """
    with engine_of(scenario) as engine:
        if dist.get_rank() == dist.get_world_size() - 1:
            partition(engine)[1] += 1.0
            for parameter in engine.module.parameters():
                if scenario.stage == 3 and parameter.requires_grad:
                    owner = parameter._z3_optimizer
                    owner.grad_position[owner.get_param_id(parameter)][1] += 1
                elif getattr(parameter, "_hp_mapping", None) is not None:
                    parameter._hp_mapping.lp_fragment_address.start += 1
        try:
            train(engine, scenario, range(1))
        except Exception as error:
            return described(error)
    return {"kind": "nothing was refused", "message": ""}


def unseen(argument: tuple[Scenario, tuple[str, ...]]) -> dict[str, Any]:
    """Return the error of the first step if DeepSpeed's methods had other names than the adapter searches for."""
    scenario, methods = argument
    with pytest.MonkeyPatch.context() as patch:
        for name in methods:
            patch.setattr(adapter, name, () if name == "STEPS" else "renamed")
        try:
            with engine_of(scenario) as engine:
                train(engine, scenario, range(1))
        except Exception as error:
            return described(error)
    return {"kind": "nothing was refused", "message": ""}


def partition(engine: Any) -> torch.Tensor:
    """Return the first flat float32 partition; ZeRO-3 keeps it out of `param_groups` between steps."""
    flat: list[torch.Tensor] = (
        engine.basic_optimizer.param_groups[0]["params"] or engine.optimizer.fp32_partitioned_groups_flat
    )
    return flat[0].detach()


def described(error: Exception) -> dict[str, Any]:
    return {"kind": type(error).__name__, "message": str(error)}


@contextmanager
def global_groups() -> Iterator[None]:
    """Undo what tensor-parallel and autocast engines set for the whole process."""
    before, autocast, mode = dict(vars(groups)), dict(vars(torch_autocast)), layers.DEEPSPEED_AUTOTP_MODE
    try:
        yield
    finally:
        vars(groups).update(before)
        vars(torch_autocast).update(autocast)
        layers.DEEPSPEED_AUTOTP_MODE = mode
