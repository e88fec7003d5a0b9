"""What a rank does in the checks of expert parallelism: trains DeepSpeed's MoE layer, with two of four experts."""

from __future__ import annotations

import copy
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups
from torch import Tensor, nn
from torch.nn import functional as F

from tests.distributed.ranks import zero  # noqa: F401  its settings of DeepSpeed
from tests.distributed.ranks.zero_checkpoints import shared_folder
from tests.support.moe import EXPERTS, HIDDEN, OPTIONS, STEPS, make_dense, make_expert
from tests.support.zoo import GLOBAL_BATCH, VOCABULARY, WIDTH, make_batch, micro_batches

EXPERT_RANKS = 2
LOCAL = EXPERTS // EXPERT_RANKS


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(WIDTH, HIDDEN)
        self.mixture = MoE(HIDDEN, make_expert(), EXPERTS, EXPERT_RANKS, k=1, drop_tokens=False, use_rts=False)
        self.leave = nn.Linear(HIDDEN, VOCABULARY)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        h = torch.tanh(self.enter(x))
        return F.cross_entropy(self.leave(h + self.mixture(h)[0]).flatten(0, 1), targets.flatten())


def dense_name(name: str) -> str:
    """Return a parameter's name in the dense model, where experts are counted over the ranks of an expert group."""
    name = name.replace("mixture.deepspeed_moe.gate.wg", "gate")
    head, found, rest = name.partition("mixture.deepspeed_moe.experts.deepspeed_experts.")
    if not found:
        return name
    local, _, tail = rest.partition(".")
    return f"experts.{dist.get_rank() % EXPERT_RANKS * LOCAL + int(local)}.{tail}"


def train(argument: tuple[int, dict[str, Any], str]) -> dict[str, Tensor]:
    """Train, with a reload of the state in between, and return this rank's parameters by the dense model's names."""
    stage, extra, reload = argument
    engine = make_engine(stage, extra)
    train_steps(engine, range(STEPS // 2))
    with shared_folder() as folder:
        if reload == "state dict":
            engine.basic_optimizer.consolidate_state_dict()
            engine.basic_optimizer.load_state_dict(copy.deepcopy(engine.basic_optimizer.state_dict()))
        if reload == "checkpoint":
            engine.save_checkpoint(str(folder))
            engine.destroy()
            engine = make_engine(stage, extra)
            engine.load_checkpoint(str(folder))
        train_steps(engine, range(STEPS // 2, STEPS))
    final = {dense_name(n): p.detach().clone() for n, p in engine.module.named_parameters()}
    engine.destroy()
    return final


def train_steps(engine: Any, steps: range) -> None:
    for step in steps:
        for piece in micro_batches(make_batch("wide", step), dist.get_rank(), dist.get_world_size()):
            engine.backward(engine(**piece))
            engine.step()


def make_engine(stage: int, extra: dict[str, Any]) -> Any:
    values = dict(make_dense(torch.float32).named_parameters())
    model = Mixture()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(values[dense_name(name)])
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH // dist.get_world_size(),
        "gradient_clipping": 0.0,
        "optimizer": {"type": "Shampoo", "params": {**OPTIONS, **extra, "no_decay": ["*bias"]}},
        "zero_optimization": {"stage": stage},
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)
    assert groups._get_expert_parallel_rank(f"ep_size_{EXPERT_RANKS}") == dist.get_rank() % EXPERT_RANKS
    return engine
