"""What a rank does in the checks of model kinds: builds Shampoo without names under a framework, and one with names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from shampoo_deepspeed import Shampoo
from shampoo_deepspeed.state.unwrap import unwrap
from tests.distributed.ranks import zero  # noqa: F401  switches off a kernel that DeepSpeed would compile
from tests.support.model_kinds import MODELS, policies_of

OPTIONS: dict[str, Any] = {"weight_decay": 0.1, "no_decay": ["kind:norm", "*bias"]}


def fsdp1(model: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


def fsdp2(model: nn.Module) -> nn.Module:
    fully_shard(model)
    return model


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda model: model,
    "ddp": DistributedDataParallel,
    "fsdp1": fsdp1,
    "fsdp2": fsdp2,
}


def compare(framework: str) -> dict[str, dict[str, Any]]:
    """For each model, the trained parameters whose kinds and policy are not those that a named construction gives."""
    deepspeed.init_distributed("gloo")
    return {kind: different(framework, *build_both(kind)) for kind in MODELS}


def build_both(kind: str) -> tuple[nn.Module, dict[str, Any]]:
    """A model, and the policies of another of its kind, whose parameters come with names and with the model."""
    torch.manual_seed(5)
    build, heads, tokens = MODELS[kind]
    named = build()
    wanted = policies_of(Shampoo(trainable(named), model=named, **OPTIONS))
    assert {n for n, (kinds, _) in wanted.items() if "lm_head" in kinds} == heads
    assert {n for n, (_, policy) in wanted.items() if policy.rate == "embedding_lr"} == tokens
    return build(), wanted


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]


def different(framework: str, model: nn.Module, wanted: dict[str, Any]) -> dict[str, Any]:
    if not framework.startswith("zero"):
        wrapped = WRAPPERS[framework](model)
        found = policies_of(Shampoo([p for _, p in trainable(wrapped)], **OPTIONS))
    else:
        # Else stage 3 would replace torch.nn.functional.linear for all checks that follow, which rounds otherwise.
        stage = {"stage": int(framework[-1]), "memory_efficient_linear": False}
        config = {"train_batch_size": dist.get_world_size(), "zero_optimization": stage}
        engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=lambda ps: Shampoo(ps, **OPTIONS))
        found = policies_of(unwrap(engine))
        engine.destroy()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}  # DeepSpeed passes them on too
    names = {*wanted, *found} - frozen
    return {name: (wanted.get(name), found.get(name)) for name in names if wanted.get(name) != found.get(name)}
