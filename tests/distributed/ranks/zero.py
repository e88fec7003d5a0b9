"""What a rank does in the DeepSpeed checks: trains a scenario with an engine and returns the full parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.utils import groups, safe_get_full_fp32_param
from torch import Tensor, nn
from torch.nn import functional as F

import shampoo_deepspeed  # noqa: F401  registers the optimizer
from tests.distributed.ranks.folders import shared_folder
from tests.support.pipelines import SYNC, Stage, stage_data
from tests.support.scenarios import SECOND_GROUP, BadStep, Scenario
from tests.support.zoo import MODELS, cast, make_batch, make_model, micro_batches

# An inference kernel that takes DeepSpeed a minute to compile.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
type(get_accelerator()).is_fp16_supported = lambda self: True  # the kernels exist; DeepSpeed demands fast ones


def build(scenario: Scenario) -> nn.Module:
    """Build the model, with zero.Init if the scenario says so."""
    model = make_model(scenario.model)
    if not scenario.zero_init:
        return model
    with deepspeed.zero.Init(config_dict_or_path=scenario.deepspeed_config()):
        sharded = MODELS[scenario.model]()
    values = dict(model.named_parameters())
    with torch.no_grad(), deepspeed.zero.GatheredParameters(list(sharded.parameters()), modifier_rank=0):
        for name, p in sharded.named_parameters():
            if dist.get_rank() == 0:
                p.copy_(values[name])
            p.requires_grad_(values[name].requires_grad)
    return sharded


def parameters(scenario: Scenario, model: nn.Module) -> list[Any]:
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    second = scenario.second_group(list(trained))
    if not second:
        return list(model.parameters())
    return [
        {"params": [p for n, p in trained.items() if n not in second]},
        {"params": [trained[n] for n in second], **SECOND_GROUP},
    ]


@contextmanager
def engine_of(scenario: Scenario, model: nn.Module | None = None) -> Iterator[Any]:
    linear = F.linear
    model = model or build(scenario)
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=parameters(scenario, model), config=scenario.deepspeed_config()
    )
    try:
        yield engine
    finally:
        engine.destroy()
        F.linear = linear  # ZeRO-3 replaces it for the whole process by one that rounds 16-bit results differently


def train(engine: Any, scenario: Scenario, steps: range) -> None:
    """Train these steps of the scenario; like a scheduler, `decay` multiplies the learning rates after each."""
    for step in steps:
        for loss in losses(engine, scenario, step):
            engine.backward(loss)
            engine.step()
        for group in engine.optimizer.param_groups:
            group["lr"] *= scenario.decay


def losses(engine: Any, scenario: Scenario, step: int) -> Iterator[Tensor]:
    """Yield the losses of this rank's micro-batches of one step."""
    batch = cast(make_batch(scenario.model, step, scenario.unused), scenario.dtype)
    for piece in micro_batches(batch, dist.get_rank(), dist.get_world_size(), scenario.accumulate):
        yield engine(**piece)


def full_parameters(engine: Any) -> dict[str, Tensor]:
    """Return the model's own parameters, which are the masters in float32 training."""
    named = dict(engine.module.named_parameters())
    sharded = [p for p in named.values() if hasattr(p, "ds_id")]
    with deepspeed.zero.GatheredParameters(sharded) if sharded else nullcontext():
        return {n: p.detach().clone().cpu() for n, p in named.items()}


def full_masters(engine: Any) -> dict[str, Tensor]:
    """Return the float32 masters of 16-bit training."""
    named = {n: p for n, p in engine.module.named_parameters() if p.requires_grad}
    if engine.zero_optimization_stage() == 0 and hasattr(engine.optimizer, "fp16_groups"):
        lows, highs = (chain(*groups) for groups in (engine.optimizer.fp16_groups, engine.optimizer.fp32_groups))
        masters = {id(low): high for low, high in zip(lows, highs, strict=True)}
        return {n: masters[id(p)].detach().clone() for n, p in named.items()}
    return {n: safe_get_full_fp32_param(p).detach().clone() for n, p in named.items()}


def final_parameters(scenario: Scenario) -> dict[str, Tensor]:
    with engine_of(scenario) as engine:
        train(engine, scenario, range(scenario.steps))
        return full_masters(engine) if scenario.half else full_parameters(engine)


def every_step(scenario: Scenario) -> list[dict[str, dict[str, Tensor]]]:
    """Return the float32 masters after each step of 16-bit training, and the weights for the next gradients."""
    steps = []
    with engine_of(scenario) as engine:
        for step in range(scenario.steps):
            train(engine, scenario, range(step, step + 1))
            steps.append({"masters": full_masters(engine), "weights": full_parameters(engine)})
    return steps


def reject(bad: BadStep) -> dict[str, Any]:
    """Train, insert one step with a non-finite gradient on the last rank, and train on."""
    scenario, last = bad.scenario, dist.get_world_size() - 1
    with engine_of(scenario) as engine:
        train(engine, scenario, range(4))
        read = full_masters if scenario.half else full_parameters
        before = read(engine)
        for loss in losses(engine, scenario, 99):
            engine.backward(loss * bad.value if bad.everywhere and dist.get_rank() == last else loss)
            if bad.parameter is not None and dist.get_rank() == last:
                gradient = dict(engine.module.named_parameters())[bad.parameter].grad
                gradient.view(-1)[-1] = bad.value  # after DeepSpeed's exchange: other ranks' gradients stay finite
            if bad.group is not None and dist.get_rank() == last:
                gradients_in_turn(engine)[bad.group].view(-1)[0] = bad.value
            engine.step()
        after = read(engine)
        unchanged = all(torch.equal(before[n], after[n]) for n in before)
        train(engine, scenario, range(4, scenario.steps))
        return {"unchanged": unchanged, "final": read(engine)}


def gradients_in_turn(engine: Any) -> list[Tensor]:
    """Return a gradient of each of the groups or sub-groups that DeepSpeed steps one after another."""
    if engine.zero_offload_optimizer() is not None:
        return [partition.grad for partition in engine.optimizer.single_partition_of_fp32_groups]
    found = engine.optimizer.averaged_gradients
    return [next(g for g in found[number] if g.numel()) for number in sorted(found)]


def pipeline(argument: tuple[int, dict[str, Any], int]) -> dict[str, Any]:
    """Train a pipeline of a stage per rank, with one non-finite gradient on one of them; see what that step changes."""
    stage, zero, bad = argument
    deepspeed.init_distributed("gloo")
    found_there = dict(vars(groups))  # the pipeline's process groups stay there, for the next engine
    torch.manual_seed(50)
    layers = [LayerSpec(Stage) for _ in range(dist.get_world_size())]
    module = PipelineModule(layers, num_stages=dist.get_world_size(), loss_fn=F.mse_loss, partition_method="uniform")
    scenario = Scenario(stage=stage, ranks=1, accumulate=2, zero=zero)
    engine, *_ = deepspeed.initialize(
        model=module, model_parameters=list(module.parameters()), config=scenario.deepspeed_config()
    )
    spoiled = [False]
    weight = next(module.parameters())
    if dist.get_rank() == bad:
        weight.register_hook(lambda gradient: gradient * float("nan") if spoiled[0] else gradient)
    moved = []
    for step in range(4):
        spoiled[0] = step == 2
        rows = torch.Generator().manual_seed(step)
        data = [torch.randn(8, 8, generator=rows).split(4) for _ in range(scenario.accumulate)]
        before = weight.detach().clone()
        engine.train_batch(iter([(torch.cat(x), torch.cat(x[::-1])) for x in data]))
        moved.append(not torch.equal(before, weight))
    optimizer = engine.basic_optimizer
    optimizer.finish_step()
    steps = sorted({step for unit in optimizer.units for step in unit.steps})
    engine.destroy()
    vars(groups).update(found_there)
    return {"moved": moved, "steps": steps, "finite": bool(torch.isfinite(weight).all())}


def stages(saved: bool) -> dict[str, Any]:
    """Train a pipeline of one layer per rank and save in between; with `saved`, continue from there in a new engine."""
    deepspeed.init_distributed("gloo")
    found_there = dict(vars(groups))
    scenario = Scenario(stage=1, ranks=1, accumulate=2, options=SYNC)
    seen: dict[str, Any] = {}
    with shared_folder() as folder:
        for engine_steps in (range(6), range(3, 6))[: 1 + saved]:
            torch.manual_seed(50)
            layers = [LayerSpec(Stage) for _ in range(dist.get_world_size())]
            module = PipelineModule(layers, num_stages=dist.get_world_size(), loss_fn=F.mse_loss)
            engine, *_ = deepspeed.initialize(
                model=module, model_parameters=list(module.parameters()), config=scenario.deepspeed_config()
            )
            seen.setdefault("begin", {n: p.detach().clone() for n, p in module.named_parameters()})
            if engine_steps.start:
                engine.load_checkpoint(str(folder))
            losses = []
            for step in engine_steps:
                losses.append(float(engine.train_batch(iter(stage_data(scenario.accumulate)))))
                if step == 2 and not engine_steps.start:
                    engine.save_checkpoint(str(folder))
            seen["losses"] = [*seen.get("losses", [])[: engine_steps.start], *losses]
            seen["weights"] = {n: p.detach().clone() for n, p in module.named_parameters()}
            seen["state"] = sorted(engine.basic_optimizer.policies)
            engine.destroy()
            vars(groups).update(found_there)
    return seen


def traffic(scenario: Scenario) -> dict[str, Any]:
    """Return the bytes of the last step, as counted and planned by the optimizer and as seen at all_to_all_single."""
    with engine_of(scenario) as engine:
        train(engine, scenario, range(scenario.steps - 1))
        with watched_traffic() as seen:
            train(engine, scenario, range(scenario.steps - 1, scenario.steps))
        return dict(engine.basic_optimizer.comm_stats()) | seen


@contextmanager
def watched_traffic() -> Iterator[dict[str, int]]:
    """Count what this rank sends to and receives from others by uneven exchanges, which DeepSpeed's step never uses."""
    seen = {"seen_sent": 0, "seen_received": 0}
    original: Any = dist.all_to_all_single

    def counting(
        output: Tensor,
        input: Tensor,
        output_splits: Any = None,
        input_splits: Any = None,
        group: Any = None,
        **rest: Any,
    ) -> Any:
        own = dist.get_rank(group)
        seen["seen_sent"] += sum(n for r, n in enumerate(input_splits) if r != own) * input.element_size()
        seen["seen_received"] += sum(n for r, n in enumerate(output_splits) if r != own) * output.element_size()
        return original(output, input, output_splits, input_splits, group=group, **rest)

    dist.all_to_all_single = counting  # type: ignore[assignment]
    try:
        yield seen
    finally:
        dist.all_to_all_single = original
