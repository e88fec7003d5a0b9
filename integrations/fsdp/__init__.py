"""FSDP2, HSDP and tensor parallelism: describes DTensors as boxes of the model's parameters. FSDP1 is in ``fsdp1/``.

The placements of a DTensor show which boxes of the global tensor its local one holds; replicas hold equal boxes.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from shampoo_deepspeed.distributed.frameworks import (
    Adapter,
    Entry,
    Layout,
    LayoutError,
    NewTensor,
    Parameter,
    Shard,
    compute_dtype,
    plain_layouts,
)
from shampoo_deepspeed.distributed.process_groups import group_of_ranks
from shampoo_deepspeed.geometry.boxes import Box
from shampoo_deepspeed.options.model_search import living_modules
from shampoo_deepspeed.state.dtensor_blocks import is_dtensor
from shampoo_deepspeed.state.stateful_optimizer import BlockOptimizer

from .placements import local_boxes

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


class DTensorAdapter(Adapter):
    """The adapter for DTensors. FSDP2 accepts every optimizer, and a DTensor shows everything about its sharding.

    It does not override ``joining``: either all ranks of a mesh have a gradient or none has, even if the local part is
    empty. FSDP2 sets gradients after a reduce-scatter over all ranks of a module. If ranks use different parameters,
    ``set_reduce_scatter_unused_params`` gives zeros to those that have none. Tensor parallelism runs the same
    operations on all ranks.
    """

    def layouts(
        self, optimizer: torch.optim.Optimizer, entries: Sequence[Entry], fresh: Sequence[NewTensor]
    ) -> list[Layout] | None:
        """Return one layout for each mesh and dtype, or None if no tensor of the optimizer is a DTensor.

        Plain tensors next to DTensors are replicas on all ranks of the mesh, as tensor parallelism leaves norms and
        embeddings. That their gradients are equal is checked at each step, as with all replicas.

        Raises:
            LayoutError: for plain tensors next to DTensors of several meshes of which none contains the others, and
                for tensors that are not the optimizer's parameters.
        """
        tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
        meshes = dict.fromkeys(_dtensor(tensor).device_mesh for tensor in tensors if is_dtensor(tensor))
        if not meshes:
            return None
        units: dict[tuple[DeviceMesh, torch.dtype], list[NewTensor]] = {}
        # A rank outside a mesh holds nothing and takes no part.
        for item in (item for item in fresh if is_dtensor(item.tensor)):
            if _dtensor(item.tensor).device_mesh.get_coordinate() is not None:
                units.setdefault((_dtensor(item.tensor).device_mesh, compute_dtype(item.tensor)), []).append(item)
        plain = [item for item in fresh if not is_dtensor(item.tensor)]
        sharded = [_layout(mesh, items, entries) for (mesh, _), items in units.items()]
        return [*sharded, *_replicated(list(meshes), plain, len(fresh), entries)]

    def weights_will_change(self, optimizer: BlockOptimizer) -> None:
        """Free whole parameters. After a forward without a backward, FSDP2 keeps the root's for the next forward."""
        module: Any = sys.modules.get("torch.distributed.fsdp")
        tensors = (tensor for group in optimizer.param_groups for tensor in group["params"])
        if module is not None and any(map(is_dtensor, tensors)):
            # The root may hold none of the tensors while its parameters are whole, so it is not searched for by them.
            wrapped: list[Any] = living_modules(module.FSDPModule, optimizer.registry.models)
            for part in wrapped:
                part.reshard()


def _replicated(
    meshes: Sequence[DeviceMesh], plain: Sequence[NewTensor], given: int, entries: Sequence[Entry]
) -> list[Layout]:
    """Return the layouts of plain tensors next to DTensors of these meshes."""
    if not plain:
        return []
    ranks = [set(mesh.mesh.flatten().tolist()) for mesh in meshes]
    largest = max(range(len(meshes)), key=lambda n: len(ranks[n]))
    if not all(ranks[largest].issuperset(some) for some in ranks):
        raise LayoutError(
            f"{len(plain)} of {given} parameters with a gradient are not DTensors, and the others are sharded over "
            f"meshes of different ranks: {[sorted(some) for some in ranks]}. So it is unknown which ranks hold the "
            "same plain parameters; call fully_shard on the root module too"
        )
    here = meshes[largest].get_coordinate() is not None
    layouts = plain_layouts(entries, plain, _group(meshes[largest]) if here else None)
    names = ", ".join(sorted(parameter.key for layout in layouts for parameter in layout.parameters))
    for layout in layouts:
        layout.one_rank_saves = False
        layout.if_unequal = (
            f"these parameters are plain tensors though the others are DTensors: {names}. Under FSDP2, call "
            "fully_shard on the root module too, or their gradients are not averaged; under tensor parallelism, all "
            "ranks of the mesh must get the same batch, and plain parameters the same whole gradient"
        )
    return layouts


def _layout(mesh: DeviceMesh, items: Sequence[NewTensor], entries: Sequence[Entry]) -> Layout:
    """Return the layout of one step unit with these tensors."""
    parameters = [_parameter_of(item, entries) for item in items]
    tensors = [item.tensor for item in items]
    layout = Layout(
        parameters,
        tensors,
        [item.group for item in items],
        [],
        _group(mesh),
        homes=list(range(len(items))),
        local=_local,
        gradient=_local_gradient,
    )
    for number, tensor in enumerate(tensors):
        try:
            layout.shards += [Shard(number, box, number, offset) for box, offset in _boxes(tensor)]
        except LayoutError as error:  # raised on all ranks together
            layout.problem = f"{parameters[number].key}: {error}"
    return layout


def _group(mesh: DeviceMesh) -> dist.ProcessGroup | None:
    """Return the process group of all ranks of a mesh, or None for a single rank."""
    ranks = mesh.mesh.flatten().tolist()
    if len(ranks) == 1:
        return None
    if len(ranks) == dist.get_world_size():
        return dist.group.WORLD
    if mesh.ndim == 1:
        return mesh.get_group()
    return group_of_ranks(ranks, [mesh.get_group(dim) for dim in range(mesh.ndim)])


def _dtensor(tensor: Tensor) -> DTensor:
    """Return the tensor itself, which is a DTensor, for the type checker; none is imported."""
    return cast("DTensor", tensor)


def _local(tensor: Tensor) -> Tensor:
    return _dtensor(tensor).to_local().detach()  # in this order neither is an operation of DTensor's


def _local_gradient(tensor: Tensor) -> Tensor | None:
    """Return the gradient in the parameter's own placements; tensor parallelism may leave it as partial sums."""
    if tensor.grad is None:
        return None
    gradient, placements = _dtensor(tensor.grad), _dtensor(tensor).placements
    if gradient.placements != placements:
        gradient = gradient.redistribute(placements=placements)
    return gradient.to_local()


def _boxes(tensor: Tensor) -> list[tuple[Box, int]]:
    """Return the boxes of the global tensor that the local one holds, with their offsets in it."""
    mesh, placements = _dtensor(tensor).device_mesh, _dtensor(tensor).placements
    coordinate = mesh.get_coordinate()
    assert coordinate is not None  # a rank outside of the mesh has no layout
    return local_boxes(tensor.shape, placements, mesh.shape, coordinate, _local(tensor).shape)


def _parameter_of(item: NewTensor, entries: Sequence[Entry]) -> Parameter:
    """Return a DTensor's parameter: by identity, or by position if fully_shard ran after the optimizer was built."""
    for entry in entries:
        if entry.reference() is item.tensor:
            return entry.parameter
    group = [entry for entry in entries if entry.parameter.group == item.group]
    if item.place < len(group) and group[item.place].parameter.shape == tuple(item.tensor.shape):
        group[item.place].stand_in = weakref.ref(item.tensor)
        return group[item.place].parameter
    raise LayoutError(
        f"the DTensor of shape {tuple(item.tensor.shape)} at position {item.place} of group {item.group} is not one of "
        "the parameters that the optimizer was built with"
    )


ADAPTER = DTensorAdapter()
