"""What a rank does in the FSDP2 and tensor-parallel checks: trains a sharded model and gives back full parameters."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from shampoo_deepspeed import LayoutError, Shampoo
from shampoo_deepspeed.naming import clean_name
from tests.distributed.fsdp_runs import Run
from tests.zoo import cast, make_batch, make_model, micro_batches


def sharded(run: Run) -> tuple[nn.Module, DeviceMesh]:
    """The model, and the mesh over which batches are divided."""
    world = dist.get_world_size()
    model = make_model(run.model, run.torch_dtype)
    if run.layout == "hsdp":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
        fully_shard(model, mesh=mesh)
        return model, mesh
    if run.layout == "tensor_parallel":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("data", "tensor"))
        parallelize_module(model, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(model, mesh=mesh["data"])
        return model, mesh["data"]
    mesh = init_device_mesh("cpu", (world,))
    if run.layout == "replicas":
        return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True), mesh
    if run.layout.startswith("fsdp1"):
        return fsdp1(model, run.layout), mesh
    if run.layout == "columns":
        fully_shard(model, mesh=mesh, shard_placement_fn=by_columns)
    else:
        for child in (m for m in model.children() if run.layout == "nested" and any(True for _ in m.parameters())):
            fully_shard(child, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model, mesh


def fsdp1(model: nn.Module, layout: str) -> nn.Module:
    """The strategy is the layout's end; the frozen layer of the odd model is a unit of its own, as FSDP1 may ask."""
    strategy = ShardingStrategy[layout.removeprefix("fsdp1_").upper()]
    mesh = None
    if strategy is ShardingStrategy.HYBRID_SHARD:
        mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
    policy = ModuleWrapPolicy({nn.LayerNorm, nn.Conv1d})
    return FullyShardedDataParallel(
        model,
        sharding_strategy=strategy,
        auto_wrap_policy=policy,
        use_orig_params=True,
        device_id=torch.device("cpu"),
        device_mesh=mesh,
    )


def by_columns(parameter: nn.Parameter) -> Shard | None:
    """Cut the second dim where it divides evenly, as FSDP2 demands."""
    return Shard(1) if parameter.ndim == 2 and parameter.shape[1] % dist.get_world_size() == 0 else None


def final_parameters(run: Run) -> dict[str, Tensor]:
    if run.built_before:
        return trained(*built_before_sharding(run), run)
    model, mesh = sharded(run)
    return trained(model, Shampoo(model.named_parameters(), model=model, **run.options()), mesh, run)


def built_before_sharding(run: Run) -> tuple[nn.Module, Shampoo, DeviceMesh]:
    """The optimizer sees whole parameters, and its groups get the sharded ones later, as accelerate does it."""
    whole = make_model(run.model, run.torch_dtype)
    optimizer = Shampoo([(n, p) for n, p in whole.named_parameters() if p.requires_grad], **run.options())
    model, mesh = sharded(run)
    optimizer.param_groups[0]["params"] = [p for p in model.parameters() if p.requires_grad]
    return model, optimizer, mesh


def trained(model: nn.Module, optimizer: Shampoo, mesh: DeviceMesh, run: Run) -> dict[str, Tensor]:
    divided, rank = mesh.size(), dist.get_rank() if run.layout != "tensor_parallel" else mesh.get_local_rank()
    for step in range(run.steps):
        batch: dict[str, Any] = cast(make_batch(run.model, step, run.unused), run.torch_dtype)
        (piece,) = micro_batches(batch, rank, divided)
        optimizer.zero_grad()
        model(**piece).backward()
        optimizer.step()
    if run.layout.startswith("fsdp1"):
        with FullyShardedDataParallel.summon_full_params(model):
            return {clean_name(n): p.detach().clone() for n, p in model.named_parameters()}
    return {clean_name(n): full(p) for n, p in model.named_parameters()}


def full(parameter: Any) -> Tensor:
    """The whole parameter; frozen ones are not sharded in every layout."""
    whole: Tensor = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return whole.detach().clone()


def refused(use_orig_params: bool) -> str:
    """The error of the first step of FSDP1 parameters that nobody has explained to the optimizer."""
    model = FullyShardedDataParallel(make_model("wide"), use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    optimizer = Shampoo(model.named_parameters(), model=None if use_orig_params else model)
    (piece,) = micro_batches(make_batch("wide", 0), dist.get_rank(), dist.get_world_size())
    model(**piece).backward()
    try:
        optimizer.step()
    except LayoutError as error:
        return str(error)
    return ""


def traffic(run: Run) -> dict[str, int]:
    """What the last step moved."""
    model, mesh = sharded(run)
    optimizer = Shampoo(model.named_parameters(), model=model, **run.options())
    trained(model, optimizer, mesh, run)
    return optimizer.comm_stats()
