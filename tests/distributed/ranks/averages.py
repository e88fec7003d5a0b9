"""What a rank does in the checks of averaged weights."""

from __future__ import annotations

import contextlib
import gc
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel

from shampoo_deepspeed import Shampoo
from shampoo_deepspeed.options.parameter_names import clean_name
from tests.distributed.ranks import zero
from tests.distributed.ranks.folders import shared_folder
from tests.distributed.ranks.fsdp import built, cast, full, mesh_rank, sharded
from tests.distributed.ranks.zero_checkpoints import client_engine
from tests.support.fsdp_runs import Run
from tests.support.scenarios import Scenario
from tests.support.zoo import make_batch, micro_batches


def under_zero(scenario: Scenario) -> dict[str, Any]:
    with zero.engine_of(scenario) as engine:
        zero.train(engine, scenario, range(scenario.steps))
        optimizer: Shampoo = engine.basic_optimizer
        seen = observed(optimizer, lambda: zero.full_parameters(engine))
        return seen if scenario.half else seen | {"forward": forward_with_averages(engine, scenario)}


def resumed_under_zero(argument: tuple[Scenario, bool]) -> dict[str, Any]:
    """What new engines, and one that has stepped, evaluate right after a load, and their weights after later steps."""
    scenario, given = argument
    last, made = scenario.steps - 1, client_engine if given else zero.engine_of
    seen: dict[str, Any] = {}
    with shared_folder() as folder, made(scenario) as engine:
        zero.train(engine, scenario, range(last))
        engine.save_checkpoint(str(folder))
        weights, averages = both(engine)
        zero.train(engine, scenario, range(last, scenario.steps))
        seen["whole"] = {"weights": weights, "averages": averages, "final": zero.full_parameters(engine)}
        seen["again"] = after_a_load(engine, scenario, folder)
        with made(scenario) as other:
            seen["new"] = after_a_load(other, scenario, folder)
    return seen


def after_a_load(engine: Any, scenario: Scenario, folder: Path) -> dict[str, Any]:
    engine.load_checkpoint(str(folder))
    weights, averages = both(engine)
    zero.train(engine, scenario, range(scenario.steps - 1, scenario.steps))
    return {"weights": weights, "averages": averages, "final": zero.full_parameters(engine)}


def both(engine: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    with engine.basic_optimizer.averaged_weights():
        averages = zero.full_parameters(engine)
    return zero.full_parameters(engine), averages


def forward_with_averages(engine: Any, scenario: Scenario) -> list[bool]:
    """Whether the model computes with the averages, and then with its weights again."""
    losses = [float(next(zero.losses(engine, scenario, 0)))]
    with engine.basic_optimizer.averaged_weights():
        losses.append(float(next(zero.losses(engine, scenario, 0))))
    losses.append(float(next(zero.losses(engine, scenario, 0))))
    return [losses[0] != losses[1], losses[0] == losses[2]]


def under_fsdp(run: Run) -> dict[str, Any]:
    """The steps of a run; before one of them a new optimizer takes over the state."""
    model, mesh = sharded(run)
    optimizer = built(model, run)
    for step in range(run.steps):
        if run.resumed_at and step == run.resumed_at:
            state = pickle.loads(pickle.dumps(optimizer.state_dict()))
            optimizer = built(model, run)
            optimizer.load_state_dict(state)
        batch: dict[str, Any] = cast(make_batch(run.model, step), run.torch_dtype)
        (piece,) = micro_batches(batch, mesh_rank(mesh), mesh.size())
        optimizer.zero_grad()
        model(**piece).backward()
        optimizer.step()

    def parameters() -> dict[str, Tensor]:
        if not run.fsdp1:
            return {clean_name(n): full(p) for n, p in model.named_parameters()}
        with FullyShardedDataParallel.summon_full_params(model):
            return {clean_name(n): p.detach().clone() for n, p in model.named_parameters()}

    seen = observed(optimizer, parameters)
    return seen | {"forward": evaluated_with_averages(model, optimizer, piece)}


def evaluated_with_averages(model: torch.nn.Module, optimizer: Shampoo, piece: dict[str, Any]) -> list[bool]:
    """Whether evaluations and the next training step compute with what the optimizer has put into the model.

    The first averages come right after a step, the second ones after a forward. Then modules are hidden from the
    garbage collector too, as scripts do to save time.
    """

    @torch.no_grad()
    def evaluated() -> float:
        model.eval()
        loss = float(model(**piece))
        model.train()
        return loss

    weights, averages = list[float](), list[float]()
    for hides in (lambda: None, gc.freeze):
        hides()
        with optimizer.averaged_weights():
            averages.append(evaluated())
        weights.append(float(model(**piece).detach()))
    gc.unfreeze()
    return [averages[0] != weights[0], averages[0] == averages[1], weights == weights[:1] * 2]


def observed(optimizer: Shampoo, parameters: Callable[[], dict[str, Tensor]]) -> dict[str, Any]:
    """All parameters before, with averages, and afterwards, and which errors stopped a step and a save meanwhile."""
    before, errors = parameters(), []
    with optimizer.averaged_weights():
        averages = parameters()
        for call in (optimizer.step, optimizer.state_dict):
            with contextlib.suppress(RuntimeError):
                call()
                errors.append(call.__name__)
    return {"before": before, "averages": averages, "after": parameters(), "not_refused": errors}
