"""What a rank does in the FSDP and tensor-parallel checks: trains a sharded model and returns full parameters."""

from __future__ import annotations

import gc
import math
import pickle
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import CustomPolicy
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from shampoo_deepspeed import LayoutError, Shampoo
from shampoo_deepspeed.checkpoint import load_shampoo, save_shampoo
from shampoo_deepspeed.distributed.exchange import Exchange, Transit
from shampoo_deepspeed.options.parameter_names import clean_name
from tests.distributed.ranks.folders import shared_folder
from tests.support.fsdp_runs import FROZEN, Run
from tests.support.zoo import cast, make_batch, make_model, micro_batches


def sharded(run: Run) -> tuple[nn.Module, DeviceMesh]:
    """Return the model, and the mesh over which batches are divided."""
    world = dist.get_world_size()
    model = make_model(run.model, run.torch_dtype)
    if run.layout in ("hsdp", "tensor_parallel", "uneven_tensor_parallel", "meshes"):
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("outer", "inner"))
        return model, over_two_dims(model, run.layout, mesh)
    mesh = init_device_mesh("cpu", (world,))
    if run.layout in ("beside_plain", "ignored"):  # all ranks get the same batch
        mesh = init_device_mesh("cpu", (1, world), mesh_dim_names=("outer", "inner"))
        parallelize_module(model, mesh["inner"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        if run.layout == "ignored":
            fully_shard(model, mesh=mesh["outer"], ignored_params=set(model.norm.parameters()))  # type: ignore
        return model, mesh["outer"]
    if run.layout == "replicas":
        return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True), mesh
    if run.fsdp1:
        return fsdp1(model, run), mesh
    of_layout: dict[str, dict[str, Any]] = {
        "columns": {"shard_placement_fn": by_columns},
        "offload": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
        "bf16": {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)},
    }
    options = of_layout.get(run.layout, {})
    for child in (m for m in model.children() if run.layout == "nested" and any(True for _ in m.parameters())):
        fully_shard(child, mesh=mesh)
    fully_shard(model, mesh=mesh, **options)
    return model, mesh


def over_two_dims(model: Any, layout: str, mesh: DeviceMesh) -> DeviceMesh:
    """Shard over both dims of a mesh, and return the mesh of the batches."""
    if layout == "hsdp":
        fully_shard(model, mesh=mesh)
        return mesh
    if layout == "meshes":  # ranks of one column get equal batches, so `up` may be sharded over the rows only
        fully_shard(model.up, mesh=mesh["inner"])
        fully_shard(model.down, mesh=mesh)
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        return mesh["inner"]
    up = ColwiseParallel(use_local_output=layout == "tensor_parallel")  # plain tensors cannot be uneven
    parallelize_module(model, mesh["inner"], {"up": up, "down": RowwiseParallel()})
    fully_shard(model, mesh=mesh["outer"])
    return mesh["outer"]


def fsdp1(model: nn.Module, run: Run) -> nn.Module:
    """Wrap the model by FSDP1. The strategy is the end of the layout's name.

    If parameters are flat, frozen layers are separate units. With ``units``, so are all children but the tied ones.
    """
    form, _, strategy = run.layout.partition("_")
    mesh = None
    if strategy == "hybrid_shard":
        mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
    units: set[nn.Module] = {m for m in model.children() if isinstance(m, (nn.LayerNorm, nn.Conv1d))}
    if form != "fsdp1":
        units |= {m for m in model.children() if not any(p.requires_grad for p in m.parameters())}
    if form == "units":
        units |= {m for n, m in model.named_children() if n not in ("embed", "head")}
    low = None
    if strategy.startswith("bf16"):
        kept = strategy.endswith("gradients")
        reduced = torch.bfloat16 if kept else torch.float32
        low = MixedPrecision(torch.bfloat16, reduce_dtype=reduced, keep_low_precision_grads=kept)
    return FullyShardedDataParallel(
        model,
        sharding_strategy=getattr(ShardingStrategy, strategy.upper(), ShardingStrategy.FULL_SHARD),
        auto_wrap_policy=CustomPolicy(lambda module: module in units),
        mixed_precision=low,
        use_orig_params=form == "fsdp1",
        device_id=torch.device("cpu"),
        device_mesh=mesh,
    )


def by_columns(parameter: nn.Parameter) -> Shard | None:
    """Cut the second dim if it divides evenly, as FSDP2 demands."""
    return Shard(1) if parameter.ndim == 2 and parameter.shape[1] % dist.get_world_size() == 0 else None


def final_parameters(run: Run) -> dict[str, Tensor]:
    if run.built_before:
        return trained(*built_before_sharding(run), run)
    model, mesh = sharded(run)
    return trained(model, built(model, run), mesh, run)


def waited(run: Run) -> tuple[dict[str, Tensor], list[bool]]:
    """Return the final parameters, and for each collective of the exchange whether it was done once it was started."""
    over: list[bool] = []
    start = Exchange._start

    def watched(*args: Any) -> Transit:
        transit = start(*args)
        if transit.work is not None:
            over.append(transit.work.is_completed())
        return transit

    Exchange._start = watched  # type: ignore[assignment, method-assign]
    try:
        return final_parameters(run), over
    finally:
        Exchange._start = start  # type: ignore[method-assign]


def built(model: nn.Module, run: Run) -> Shampoo:
    if run.given == "parameters":
        return Shampoo(model.parameters(), **run.options())
    return Shampoo(model.named_parameters(), model=model if run.given == "model" else None, **run.options())


def built_before_sharding(run: Run) -> tuple[nn.Module, Shampoo, DeviceMesh]:
    """Build the optimizer with whole parameters, and put sharded ones into its groups later, as accelerate does."""
    whole = make_model(run.model, run.torch_dtype)
    optimizer = Shampoo([(n, p) for n, p in whole.named_parameters() if p.requires_grad], **run.options())
    model, mesh = sharded(run)
    optimizer.param_groups[0]["params"] = [p for p in model.parameters() if p.requires_grad]
    return model, optimizer, mesh


def trained(
    model: nn.Module,
    optimizer: Shampoo,
    mesh: DeviceMesh,
    run: Run,
    seen: list[dict[str, Tensor]] | None = None,
    first: int = 0,
) -> dict[str, Tensor]:
    """Return full parameters after the run; the full gradients of all steps are appended to `seen`."""
    for step in range(first, run.steps):
        if run.frozen_steps:
            freeze(model, step < run.frozen_steps)
        if run.resumed_at and step == run.resumed_at:
            state = pickle.loads(pickle.dumps(optimizer.state_dict()))
            optimizer = built(model, run)
            optimizer.load_state_dict(state)
        batch: dict[str, Any] = cast(make_batch(run.model, step, run.unused), run.torch_dtype)
        (piece,) = micro_batches(batch, mesh_rank(mesh), mesh.size())
        if run.apart:
            piece["use_sometimes"] = (step + mesh_rank(mesh)) % 2 == 0
        optimizer.zero_grad()
        model(**piece).backward()
        if seen is not None:
            seen.append(full_gradients(model))
        optimizer.step()
    if run.fsdp1:
        with FullyShardedDataParallel.summon_full_params(model):
            return {clean_name(n): p.detach().clone() for n, p in model.named_parameters()}
    return {clean_name(n): full(p) for n, p in model.named_parameters()}


def mesh_rank(mesh: DeviceMesh) -> int:
    """Return this rank's number among those that get different batches."""
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    return sum(c * math.prod(mesh.shape[n + 1 :]) for n, c in enumerate(coordinate))


def freeze(model: nn.Module, frozen: bool) -> None:
    for name, parameter in model.named_parameters():
        if clean_name(name) in FROZEN:
            parameter.requires_grad_(not frozen)


def full_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return full gradients: for FSDP2 by DTensor itself, for FSDP1 (fully sharded) from gathered flat gradients."""
    if not isinstance(model, FullyShardedDataParallel):
        return {clean_name(n): full(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    found = {}
    for name, wrapped in model.named_modules():
        handle = wrapped._handle if isinstance(wrapped, FullyShardedDataParallel) else None
        if handle is None or not handle.flat_param.requires_grad:
            continue
        flat = handle.flat_param
        assert flat.grad is not None
        parts = [torch.empty_like(flat.grad) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, flat.grad)
        pieces = iter(zip(flat._fqns, flat._shapes, strict=True))
        whole = torch.cat(parts)[: sum(flat._numels_with_padding)]
        for piece, padding in zip(whole.split(flat._numels_with_padding), flat._is_padding_mask, strict=True):
            if not padding:
                path, shape = next(pieces)
                found[clean_name(f"{name}.{path}".lstrip("."))] = piece.view(shape)
    return found


def recorded(run: Run) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Return final parameters and the gradients of all steps, which differ from the reference's in low precision."""
    model, mesh = sharded(run)
    if run.apart and isinstance(model, FSDPModule):
        model.set_reduce_scatter_unused_params(True)
    seen: list[dict[str, Tensor]] = []
    return trained(model, built(model, run), mesh, run, seen), seen


def moved(run: Run) -> dict[str, Tensor]:
    """Train half of the run under its layout, then continue from a checkpoint under FSDP2."""
    half, other = replace(run, steps=run.steps // 2), replace(run, layout="rows")
    model, mesh = sharded(half)
    optimizer = built(model, half)
    values = trained(model, optimizer, mesh, half)
    with shared_folder() as folder:
        save_shampoo(optimizer, folder)
        model, mesh = sharded(other)
        for name, parameter in model.named_parameters():
            target: Any = parameter.data
            target.copy_(distribute_tensor(values[name], target.device_mesh, target.placements))
        optimizer = built(model, other)
        load_shampoo(optimizer, folder)
        return trained(model, optimizer, mesh, other, first=half.steps)


def keys(run: Run) -> tuple[list[str], list[str]]:
    """Return the state's keys for a sharded model and for the plain one, after an earlier optimizer without names."""
    model, mesh = sharded(run)
    Shampoo(model.parameters())
    optimizer = built(model, run)
    trained(model, optimizer, mesh, run)
    plain = make_model(run.model, run.torch_dtype)
    alone = built(plain, run)
    plain(**cast(make_batch(run.model, 0), run.torch_dtype)).backward()
    alone.step()
    sharded_keys, plain_keys = (sorted(o.state_dict()["shampoo"]["steps"]) for o in (optimizer, alone))
    return sharded_keys, plain_keys


def full(parameter: Any) -> Tensor:
    """Return the whole parameter; frozen ones are not sharded in every layout."""
    whole: Tensor = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return whole.detach().clone()


def refused(case: str) -> str:
    """Return the error of the first step if the optimizer knows too little about FSDP1 parameters.

    ``gc.freeze`` hides the model, which would otherwise be found.
    """
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (2, world // 2)) if case == "hybrid" else None
    plain: Any = make_model("wide")
    if case == "tensor_parallel":
        both = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("outer", "inner"))
        parallelize_module(plain, both["inner"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        mesh = both["outer"]
    model = FullyShardedDataParallel(
        plain,
        use_orig_params=case == "original",
        device_id=torch.device("cpu"),
        device_mesh=mesh,
        sharding_strategy=ShardingStrategy.HYBRID_SHARD if case == "hybrid" else None,
        ignored_states=[plain.up.weight] if case == "ignored" else None,
    )
    gc.freeze()
    try:
        optimizer = Shampoo([torch.zeros(1)] if case == "swapped" else model.parameters())
        if case == "swapped":
            optimizer.param_groups[0]["params"] = list(model.parameters())
        (piece,) = micro_batches(make_batch("wide", 0), dist.get_rank(), world)
        model(**piece).backward()
        optimizer.step()
    except LayoutError as error:
        return str(error)
    finally:
        gc.unfreeze()
    return ""


def sharded_after(way: str) -> str:
    """Return the error of the first step if a plain loop shards the model after it has built the optimizer."""
    model: Any = make_model("wide")
    optimizer = Shampoo(model.parameters())
    if way == "fsdp2":
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    else:
        model = FullyShardedDataParallel(model, use_orig_params=False, device_id=torch.device("cpu"))
    (piece,) = micro_batches(make_batch("wide", 0), dist.get_rank(), dist.get_world_size())
    model(**piece).backward()
    try:
        optimizer.step()
    except LayoutError as error:
        return str(error)
    return ""


def traffic(run: Run) -> dict[str, int]:
    """Return what the last step moved."""
    model, mesh = sharded(run)
    optimizer = built(model, run)
    trained(model, optimizer, mesh, run)
    return optimizer.comm_stats()
