"""FSDP1, FSDP2, HSDP and tensor parallelism: what each leaves on a rank, as boxes of the model's parameters.

A DTensor (FSDP2, tensor parallel) says by its placements which box of the global tensor lies in its local one; replicas
hold equal boxes. An FSDP1 parameter is a flat interval, which the wrapped model tells.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shampoo_deepspeed.boxes import Box, interval_to_boxes
from shampoo_deepspeed.hosts import Entry, Fresh, Layout, LayoutError, Parameter, Shard, compute_dtype


class DTensorHost:
    """The adapter; process groups that span several mesh dims are made once and kept."""

    def __init__(self) -> None:
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}

    def model_under_construction(self, options: dict[str, Any], given: Sequence[Any]) -> nn.Module | None:
        """FSDP2 builds no optimizers."""
        return None

    def note_model(self, model: nn.Module) -> None:
        """DTensors tell all about themselves."""

    def admit(self, optimizer_class: type) -> None:
        """FSDP2 takes every optimizer."""

    def global_shape(self, parameter: Tensor) -> tuple[int, ...] | None:
        """A DTensor's own shape is the global one already."""
        return None

    def layouts(
        self, optimizer: torch.optim.Optimizer, entries: Sequence[Entry], fresh: Sequence[Fresh]
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
        units: dict[tuple[Any, torch.dtype], list[Fresh]] = {}
        for item in sharded:
            units.setdefault((_dtensor(item.tensor).device_mesh, compute_dtype(item.tensor)), []).append(item)
        return [self._layout(mesh, items, entries) for (mesh, _), items in units.items()]

    def _layout(self, mesh: Any, items: Sequence[Fresh], entries: Sequence[Entry]) -> Layout:
        parameters = [_parameter_of(item, entries) for item in items]
        tensors = [item.tensor for item in items]
        layout = Layout(
            parameters,
            tensors,
            [item.group for item in items],
            [],
            self._group(mesh),
            one_each=True,
            local=_local,
            gradient=_local_gradient,
        )
        for number, tensor in enumerate(tensors):
            box = _local_box(tensor)
            held = tuple(_local(tensor).shape)
            if held != box.lengths and 0 not in (*held, *box.lengths):
                layout.problem = f"{parameters[number].key} holds {held} where its placements say {box.lengths}"
            elif 0 not in box.lengths:
                layout.shards.append(Shard(number, box, number, 0))
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
            made = dist.new_group(list(ranks), use_local_synchronization=True)
            assert made is not None
            self._groups[ranks] = made
        return self._groups[ranks]


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


def _local_box(tensor: Tensor) -> Box:
    """The box of the global tensor that lies on this rank; a length is 0 where it holds nothing.

    Each mesh dim cuts as torch.chunk does. FSDP2 over tensor parallelism cuts from the right to the left, which a
    placement of its own (``_StridedShard``) tells.
    """
    mesh, placements = _dtensor(tensor).device_mesh, _dtensor(tensor).placements
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return Box((0,) * tensor.ndim, (0,) * tensor.ndim)
    offsets, lengths = [0] * tensor.ndim, list(tensor.shape)
    cuts = [(n, p) for n, p in enumerate(placements) if not p.is_replicate()]
    strided = [cut for cut in cuts if hasattr(cut[1], "split_factor")]
    for mesh_dim, placement in [c for c in cuts if c not in strided] + strided[::-1]:
        dim = getattr(placement, "dim", None)
        if dim is None:
            raise LayoutError(f"a parameter with placement {placement} is neither sharded nor replicated")
        chunk = -(-lengths[dim] // mesh.size(mesh_dim))
        start = min(chunk * coordinate[mesh_dim], lengths[dim])
        offsets[dim] += start
        lengths[dim] = min(chunk, lengths[dim] - start)
    return Box(tuple(offsets), tuple(lengths))


def _parameter_of(item: Fresh, entries: Sequence[Entry]) -> Parameter:
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


@dataclass(frozen=True)
class _Piece:
    """What FSDP1 knows of an original parameter: its flat interval [start, stop) on this rank, and the ranks."""

    parameter: weakref.ref[Tensor]
    shape: tuple[int, ...]
    start: int
    stop: int
    group: dist.ProcessGroup


class FullyShardedHost:
    """FSDP1 with ``use_orig_params=True``: parameters are 1-D pieces that only the wrapped model can explain.

    Hybrid sharding is over the world: replicas of a shard group hold equal intervals.
    """

    def __init__(self) -> None:
        self._pieces: dict[int, _Piece] = {}

    def model_under_construction(self, options: dict[str, Any], given: Sequence[Any]) -> nn.Module | None:
        """FSDP1 builds no optimizers."""
        return None

    def note_model(self, model: nn.Module) -> None:
        """Learn the intervals of a wrapped model's parameters (torch/distributed/fsdp/_flat_param.py)."""
        module = sys.modules.get("torch.distributed.fsdp")
        if module is None:
            return
        self._pieces = {key: piece for key, piece in self._pieces.items() if piece.parameter() is not None}
        for wrapped in module.FullyShardedDataParallel.fsdp_modules(model):
            handle = wrapped._handle
            if handle is None or not handle._use_orig_params:
                continue
            hybrid = getattr(wrapped, "_inter_node_pg", None) is not None
            group: Any = dist.group.WORLD if hybrid else wrapped.process_group
            flat = handle.flat_param
            for parameter, shape, info in zip(flat._params, flat._shapes, flat._shard_param_infos, strict=True):
                start, stop = (info.intra_param_start_idx, info.intra_param_end_idx + 1) if info.in_shard else (0, 0)
                self._pieces[id(parameter)] = _Piece(weakref.ref(parameter), tuple(shape), start, stop, group)

    def admit(self, optimizer_class: type) -> None:
        """FSDP1 takes every optimizer."""

    def global_shape(self, parameter: Tensor) -> tuple[int, ...] | None:
        """The shape before flattening."""
        piece = self._piece(parameter)
        return piece.shape if piece is not None else None

    def layouts(
        self, optimizer: torch.optim.Optimizer, entries: Sequence[Entry], fresh: Sequence[Fresh]
    ) -> list[Layout] | None:
        """One layout for each process group and dtype of the optimizer's wrapped parameters; None where there is none.

        All trainable parameters join at once, also those of which this rank holds nothing, as their gradient never
        shows here.
        """
        if not any(self._piece(item.tensor) is not None for item in fresh):
            return None
        units: dict[tuple[int, torch.dtype], list[tuple[Entry, Tensor, _Piece]]] = {}
        for entry in entries:
            tensor = entry.reference()
            piece = self._piece(tensor) if tensor is not None else None
            if tensor is not None and piece is not None and tensor.requires_grad:
                units.setdefault((id(piece.group), compute_dtype(tensor)), []).append((entry, tensor, piece))
        return [_fsdp1_layout(members) for members in units.values()]

    def _piece(self, tensor: Tensor) -> _Piece | None:
        piece = self._pieces.get(id(tensor))
        return piece if piece is not None and piece.parameter() is tensor else None


def _fsdp1_layout(members: Sequence[tuple[Entry, Tensor, _Piece]]) -> Layout:
    group = members[0][2].group
    layout = Layout(
        [entry.parameter for entry, _, _ in members],
        [tensor for _, tensor, _ in members],
        [entry.parameter.group for entry, _, _ in members],
        [],
        group if dist.get_world_size(group) > 1 else None,
        agrees=True,
        one_each=True,
    )
    for number, (_, _, piece) in enumerate(members):
        offset = 0
        for box in interval_to_boxes(piece.shape, piece.start, piece.stop):
            layout.shards.append(Shard(number, box, number, offset))
            offset += box.numel
    return layout


HOST = DTensorHost()
FSDP1_HOST = FullyShardedHost()
