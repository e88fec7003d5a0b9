"""FSDP2, HSDP and tensor parallelism: DTensors as boxes of the model's parameters. FSDP1 is in fsdp1/.

A DTensor says by its placements which boxes of the global tensor lie in its local one; replicas hold equal boxes.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shampoo_deepspeed.distributed.frameworks import (
    Entry,
    Layout,
    LayoutError,
    NewTensor,
    Parameter,
    Shard,
    compute_dtype,
)
from shampoo_deepspeed.geometry.boxes import Box

from .placements import local_boxes


class DTensorAdapter:
    """The adapter; process groups that span several mesh dims are made once and kept."""

    def __init__(self) -> None:
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}

    def model_under_construction(self, options: dict[str, Any], given: Sequence[Any]) -> nn.Module | None:
        """FSDP2 builds no optimizers."""
        return None

    def attach_model(self, model: nn.Module) -> None:
        """DTensors tell all about themselves."""

    def admit(self, optimizer_class: type) -> None:
        """FSDP2 takes every optimizer."""

    def global_shape(self, parameter: Tensor) -> tuple[int, ...] | None:
        """A DTensor's own shape is the global one already."""
        return None

    def parts(self, tensor: Tensor, name: str | None) -> None:
        """A DTensor is one parameter."""

    def joining(self, waiting: Sequence[NewTensor]) -> list[NewTensor]:
        """None: all ranks of a mesh have a gradient or none has, also where the local part is empty.

        FSDP2 sets it after a reduce-scatter, of all or of none of a module's ranks; where ranks use different
        parameters ``set_reduce_scatter_unused_params`` gives zeros to those that have not. Tensor parallelism runs the
        same operations on all ranks.
        """
        return []

    def layouts(
        self, optimizer: torch.optim.Optimizer, entries: Sequence[Entry], fresh: Sequence[NewTensor]
    ) -> list[Layout] | None:
        """One layout for each mesh and dtype; None where no tensor is a DTensor.

        Raises:
            LayoutError: for DTensors beside plain tensors, and for tensors that are not the optimizer's parameters.
        """
        sharded = [item for item in fresh if _is_dtensor(item.tensor)]
        if not sharded:
            return None
        if len(sharded) != len(fresh):
            raise LayoutError(
                f"{len(fresh) - len(sharded)} of {len(fresh)} parameters with a gradient are not sharded though the "
                "others are DTensors; call fully_shard on the root module too"
            )
        units: dict[tuple[Any, torch.dtype], list[NewTensor]] = {}
        # A rank outside of a mesh holds nothing and takes no part.
        for item in (item for item in sharded if _dtensor(item.tensor).device_mesh.get_coordinate() is not None):
            units.setdefault((_dtensor(item.tensor).device_mesh, compute_dtype(item.tensor)), []).append(item)
        return [self._layout(mesh, items, entries) for (mesh, _), items in units.items()]

    def _layout(self, mesh: Any, items: Sequence[NewTensor], entries: Sequence[Entry]) -> Layout:
        parameters = [_parameter_of(item, entries) for item in items]
        tensors = [item.tensor for item in items]
        layout = Layout(
            parameters,
            tensors,
            [item.group for item in items],
            [],
            self._group(mesh),
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

    def _group(self, mesh: Any) -> dist.ProcessGroup | None:
        """The process group of all ranks of a mesh; None for a single rank."""
        ranks = tuple(mesh.mesh.flatten().tolist())
        if len(ranks) == 1:
            return None
        if len(ranks) == dist.get_world_size():
            return dist.group.WORLD
        if mesh.ndim == 1:
            group: dist.ProcessGroup = mesh.get_group()
            return group
        if ranks not in self._groups:
            with _not_split():
                made = dist.new_group(list(ranks), use_local_synchronization=True)
            assert made is not None
            self._groups[ranks] = made
        return self._groups[ranks]


@contextmanager
def _not_split() -> Iterator[None]:
    """Groups are made of their own ranks alone.

    Where the job's NCCL group is bound to a device (``init_process_group(device_id=...)``) torch makes others by
    splitting it, in which all ranks of the job must take part, also those that have no such group.
    """
    world: Any = dist.group.WORLD
    bound = world.bound_device_id
    world.bound_device_id = None
    try:
        yield
    finally:
        world.bound_device_id = bound


def _is_dtensor(tensor: Tensor) -> bool:
    """Where nobody has imported DTensor there is none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _dtensor(tensor: Tensor) -> Any:
    """A DTensor in the eyes of the type checker, which is not to import it."""
    return tensor


def _local(tensor: Tensor) -> Tensor:
    part: Tensor = _dtensor(tensor.detach()).to_local()
    return part


def _local_gradient(tensor: Tensor) -> Tensor | None:
    """The gradient in the parameter's own placements; tensor parallelism may leave it as a sum still to be made."""
    if tensor.grad is None:
        return None
    gradient, placements = _dtensor(tensor.grad), _dtensor(tensor).placements
    if gradient.placements != placements:
        gradient = gradient.redistribute(placements=placements)
    part: Tensor = gradient.to_local()
    return part


def _boxes(tensor: Tensor) -> list[tuple[Box, int]]:
    """What of the global tensor lies in the local one, and where."""
    mesh, placements = _dtensor(tensor).device_mesh, _dtensor(tensor).placements
    return local_boxes(tensor.shape, placements, mesh.shape, mesh.get_coordinate(), _local(tensor).shape)


def _parameter_of(item: NewTensor, entries: Sequence[Entry]) -> Parameter:
    """The parameter that a DTensor is: the very one, or (fully_shard after the optimizer was built) by its place."""
    for entry in entries:
        if entry.reference() is item.tensor:
            return entry.parameter
    group = [entry for entry in entries if entry.parameter.group == item.group]
    if item.place < len(group) and group[item.place].parameter.shape == tuple(item.tensor.shape):
        group[item.place].stand_in = weakref.ref(item.tensor)
        return group[item.place].parameter
    raise LayoutError(
        f"the DTensor of shape {tuple(item.tensor.shape)} at place {item.place} of group {item.group} is none of the "
        "parameters that the optimizer was built with"
    )


ADAPTER = DTensorAdapter()
