"""What a rank does in checks of unusual situations: client optimizers, shuffled state, layers frozen in between."""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param
from torch import Tensor, nn

from shampoo_deepspeed import Shampoo
from tests.distributed.ranks.folders import shared_folder
from tests.distributed.ranks.zero import build, engine_of, full_masters, full_parameters, train
from tests.support.scenarios import FROZEN_STEPS, Scenario, new_weights
from tests.support.zoo import gradients, make_batch


def client_optimizer(scenario: Scenario) -> dict[str, Tensor]:
    """Train with optimizers that the user has built, instead of one from the JSON; they must train alike.

    One is finished, and has names. The other one is built by DeepSpeed's call of a function, which gives it none.
    """
    config = scenario.deepspeed_config()
    options = config.pop("optimizer")["params"]
    model = build(scenario)
    finished = Shampoo(model.named_parameters(), **options, no_decay=["*bias", "norm*"])
    function = partial(Shampoo, **options)
    ways: list[tuple[nn.Module, Any]] = [(model, finished), (build(scenario), function)]
    finals = []
    for model, optimizer in ways:
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=copy.deepcopy(config))
        assert engine.basic_optimizer is optimizer or optimizer is function
        train(engine, scenario, range(scenario.steps))
        finals.append(full_parameters(engine))
        keys = {entry.parameter.key for entry in engine.basic_optimizer.entries}
        assert keys <= {name for name, _ in model.named_parameters()}, keys
        engine.destroy()
    assert all(torch.equal(finals[0][name], finals[1][name]) for name in finals[0])
    return finals[1]


def with_state_elsewhere(scenario: Scenario) -> dict[str, Any]:
    """Continue from a state dict whose blocks are on other ranks than those that own them."""
    with engine_of(scenario) as engine:
        train(engine, scenario, range(4))
        with whole_groups(engine):
            saved = copy.deepcopy(engine.basic_optimizer.state_dict())
            stacks = gathered(saved["shampoo"]["stacks"])
            assert any(stacks), "no rank owns a block"
            saved["shampoo"]["stacks"] = stacks[dist.get_rank() - 1]
            engine.basic_optimizer.load_state_dict(saved)
        train(engine, scenario, range(4, scenario.steps))
        return full_parameters(engine)


def with_a_lost_block(scenario: Scenario) -> str:
    """Return the error if one rank's state lacks a block; every rank must get it."""
    with engine_of(scenario) as engine:
        train(engine, scenario, range(4))
        with whole_groups(engine):
            saved = copy.deepcopy(engine.basic_optimizer.state_dict())
            if dist.get_rank() == 1:
                saved["shampoo"]["stacks"] = saved["shampoo"]["stacks"][1:]
            engine.basic_optimizer.load_state_dict(saved)
        try:
            train(engine, scenario, range(4, 5))
        except ValueError as error:
            return str(error)
        return ""


@contextmanager
def whole_groups(engine: Any) -> Iterator[None]:
    """Fill ``param_groups``, which ZeRO-3 empties between steps, as its own saving and loading do."""
    stage3 = engine.zero_optimization_stage() == 3
    if stage3:
        engine.optimizer._set_fp32_optimizer_param_groups()
    yield
    if stage3:
        engine.optimizer._clear_fp32_optimizer_param_groups()


def frozen_for_a_while(argument: tuple[Scenario, str]) -> dict[str, Tensor]:
    """Freeze one parameter after the engine is built, and unfreeze it later."""
    scenario, name = argument
    with engine_of(scenario) as engine:
        parameter = dict(engine.module.named_parameters())[name]
        parameter.requires_grad_(False)
        train(engine, scenario, range(FROZEN_STEPS))
        parameter.requires_grad_(True)
        train(engine, scenario, range(FROZEN_STEPS, scenario.steps))
        return full_parameters(engine)


def resumed(scenario: Scenario) -> dict[str, Any]:
    """Do an uninterrupted run, and one through a DeepSpeed checkpoint; only the second group has momentum."""

    def build_engine() -> Any:
        model = build(scenario)
        matrices = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
        others = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
        given = [{"params": others}, {"params": matrices, "momentum": 0.8}]
        return deepspeed.initialize(model=model, model_parameters=given, config=scenario.deepspeed_config())[0]

    folder = gathered(tempfile.mkdtemp() if dist.get_rank() == 0 else None)[0]
    engine = build_engine()
    train(engine, scenario, range(4))
    engine.save_checkpoint(folder)
    train(engine, scenario, range(4, scenario.steps))
    whole = full_parameters(engine)
    engine.destroy()
    engine = build_engine()
    engine.load_checkpoint(folder)
    train(engine, scenario, range(4, scenario.steps))
    again = full_parameters(engine)
    engine.destroy()
    return {"whole": whole, "again": again}


def plain_after_an_engine(scenario: Scenario) -> dict[str, Tensor]:
    """Step a plain optimizer, on one rank, with parameters of an engine that is finished but still referenced."""
    model = build(scenario)
    with engine_of(scenario, model) as engine:
        train(engine, scenario, range(2))
    named = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters() if p.requires_grad}
    for name, parameter in model.named_parameters():
        if name in named:
            parameter.data = named[name].detach().clone()
    optimizer = Shampoo(model.named_parameters(), **scenario.optimizer_options())
    if dist.get_rank() == 0:
        for step in range(3):
            gradients(model, make_batch(scenario.model, step))
            optimizer.step()
    assert engine is not None
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def engines_in_turn(scenarios: list[Scenario]) -> list[dict[str, Tensor]]:
    """Train one model by one engine after another."""
    model = build(scenarios[0])
    seen = []
    for scenario in scenarios:
        with engine_of(scenario, model) as engine:
            train(engine, scenario, range(scenario.steps))
            seen.append(full_parameters(engine))
    return seen


def with_new_weights(argument: tuple[Scenario, str]) -> dict[str, Any]:
    """Put new weights into an engine before its first step, in one of many ways, and train it."""
    scenario, way = argument
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("shampoo_deepspeed").addHandler(handler)
    try:
        with shared_folder() as folder, engine_of(scenario) as engine:
            if way == "load_checkpoint":
                with engine_of(scenario, model_with(new_weights(scenario), scenario)) as other:
                    other.save_checkpoint(folder)
                engine.load_checkpoint(folder, load_module_only=True)
            else:
                WAYS[way](engine, new_weights(scenario))
            train(engine, scenario, range(scenario.steps))
            final = full_masters(engine) if scenario.half else full_parameters(engine)
    finally:
        logging.getLogger("shampoo_deepspeed").removeHandler(handler)
    return {"final": final, "warned": any("was changed after deepspeed.initialize" in text for text in messages)}


def model_with(weights: dict[str, Tensor], scenario: Scenario) -> Any:
    model = build(scenario)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(weights[name])
    return model


def set_full(engine: Any, weights: dict[str, Tensor]) -> None:
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad and weights[name].numel() % 2 == 0:
            safe_set_full_fp32_param(parameter, weights[name])


def set_local(engine: Any, weights: dict[str, Tensor]) -> None:
    """Set this rank's parts, for ZeRO-3 only."""
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            part = parameter.ds_tensor.numel()
            padded = torch.zeros(part * dist.get_world_size())
            padded[: weights[name].numel()] = weights[name].flatten()
            safe_set_local_fp32_param(parameter, padded[part * dist.get_rank() :][:part])


def load_module(engine: Any, weights: dict[str, Tensor]) -> None:
    engine.module.load_state_dict(weights, strict=False)


WAYS = {"set_full": set_full, "set_local": set_local, "load_module": load_module}


def gathered(mine: Any) -> list[Any]:
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, mine)
    return everyones


def plain_collectives(nothing: None) -> dict[str, int]:
    """Count the collectives in a process group of one rank during a few steps of a plain model."""
    count = {"calls": 0}
    originals = {name: getattr(dist, name) for name in ("all_reduce", "all_to_all_single", "all_gather_object")}

    def counting(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            count["calls"] += 1
            return originals[name](*args, **kwargs)

        return call

    for name in originals:
        setattr(dist, name, counting(name))
    try:
        with engine_of(Scenario(ranks=1, stage=2)) as engine:
            before = count["calls"]
            for _ in range(4):
                for parameter in engine.basic_optimizer.param_groups[0]["params"]:
                    parameter.grad = torch.ones_like(parameter)
                engine.basic_optimizer.step()
            return {"calls": count["calls"] - before}
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
