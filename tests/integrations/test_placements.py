"""Boxes of DTensors are those that torch itself puts on each rank, in a fake process group."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from shampoo_deepspeed import LayoutError
from shampoo_deepspeed.geometry.boxes import tiling_error, whole
from shampoo_deepspeed.integrations.fsdp import _group, _local, _local_gradient
from shampoo_deepspeed.integrations.fsdp.placements import local_boxes

WORLD = 8
SIZES = [*range(1, 28), 40, 41, 63]


@contextmanager
def world(rank: int) -> Iterator[None]:
    """Make this process one rank of eight that never communicate."""
    dist.init_process_group("fake", rank=rank, world_size=WORLD, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def numbered(*shape: int) -> Tensor:
    """Return a tensor whose elements are their own flat indices."""
    return torch.arange(float(math.prod(shape))).view(shape)


def boxes_of(tensor: Any, mesh: Any) -> list[Any]:
    """Return a DTensor's boxes. The mesh is an argument, because torch keeps those of earlier worlds and ranks."""
    assert tensor.device_mesh.shape == mesh.shape
    return local_boxes(tensor.shape, tensor.placements, mesh.shape, mesh.get_coordinate(), tensor.to_local().shape)


def assert_holds(tensor: Any, whole: Tensor, found: Sequence[Any]) -> None:
    """Check that the boxes, cut out of the whole tensor, make up the local tensor in its order."""
    flat = tensor.to_local().detach().reshape(-1)
    assert sum(box.numel for box, _ in found) == flat.numel()
    for box, offset in found:
        part = whole[tuple(slice(o, e) for o, e in zip(box.offsets, box.ends, strict=True))]
        assert torch.equal(flat[offset : offset + box.numel], part.reshape(-1))


class Rows(nn.Module):
    """Parameters of many sizes, cut by tensor parallelism along ``dim``."""

    def __init__(self, mesh: DeviceMesh, dim: int) -> None:
        super().__init__()
        made = [
            distribute_tensor(numbered(n, 3) if dim == 0 else numbered(3, n), mesh, [Shard(dim)], src_data_rank=None)
            for n in SIZES
        ]
        self.all = nn.ParameterList([nn.Parameter(tensor) for tensor in made])


MESHES = {
    "2x4": ((2, 4), ("data", "tensor")),
    "4x2": ((4, 2), ("data", "tensor")),
    "hybrid": ((2, 2, 2), ("replicate", "data", "tensor")),
}


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("mesh", list(MESHES))
def test_rows_that_fsdp2_cuts_out_of_tensor_parallel_ones_are_found(mesh: str, dim: int) -> None:
    """This holds even if rows do not divide evenly and placements give another number of rows than FSDP2 holds."""
    shape, names = MESHES[mesh]
    held: list[set[Any]] = [set() for _ in SIZES]
    for rank in range(WORLD):
        with world(rank):
            whole = init_device_mesh("cpu", shape, mesh_dim_names=names)
            model = Rows(whole["tensor"], dim)
            fully_shard(model, mesh=whole[names[:-1]])
            for number, parameter in enumerate(model.all):
                assert isinstance(parameter, DTensor)
                found = boxes_of(parameter, whole)
                assert_holds(parameter, numbered(*parameter.shape), found)
                held[number] |= {box for box, _ in found}
    for size, boxes in zip(SIZES, held, strict=True):
        assert tiling_error((size, 3) if dim == 0 else (3, size), boxes) is None


def strided(dim: int, factor: int) -> Any:
    return _StridedShard(dim, split_factor=factor)


PLACEMENTS: list[list[Any]] = [
    [Shard(0), Replicate()],
    [Replicate(), Shard(1)],
    [Shard(0), Shard(0)],
    [Shard(1), Shard(0)],
    [Shard(0), strided(0, 2)],
    [strided(0, 2), Replicate()],
    [strided(0, 3), Replicate()],
    [strided(0, 3), Shard(0)],
    [strided(0, 3), Shard(1)],
    [strided(0, 2), strided(0, 3)],
    [Shard(0), strided(0, 3)],
    [strided(1, 2), Shard(0)],
    [strided(1, 3), strided(0, 2)],
]


@pytest.mark.parametrize("placements", PLACEMENTS, ids=str)
def test_other_strided_shards_are_several_boxes(placements: list[Any]) -> None:
    if torch.__version__.startswith("2.8.") and any(isinstance(p, _StridedShard) for p in placements):
        pytest.skip("torch 2.8 contradicts itself about strided shards, unless they are FSDP2's own")
    for rank in range(WORLD):
        with world(rank):
            mesh = init_device_mesh("cpu", (4, 2))
            flat = ((n, m) for n in (1, 5, 8, 12, 17, 24, 31) for m in (1, 6, 7))
            for shape in (*flat, (3, 8, 5), (4, 12, 6), (1, 24, 2)):  # such as fused weights of experts
                tensor: Any = distribute_tensor(numbered(*shape), mesh, placements, src_data_rank=None)
                found = boxes_of(tensor, mesh)
                assert_holds(tensor, numbered(*shape), found)
                _, offsets = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
                if found:
                    assert found[0][0].offsets == offsets


def test_a_scalar_is_replicated_whole() -> None:
    assert local_boxes((), [Replicate(), Replicate()], [2, 4], [0, 1], ()) == [(whole(()), 0)]


def test_a_local_tensor_that_the_placements_do_not_explain_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"local shape is \(3, 4\), but its placements .* give \(2, 4\)"):
        local_boxes((4, 4), [Shard(0)], [2], [0], (3, 4))
    with pytest.raises(LayoutError, match="neither sharded nor replicated"):
        local_boxes((4, 4), [Partial()], [2], [0], (4, 4))


def test_a_group_of_some_ranks_is_made_without_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a job that is bound to a device, torch would split the job's group, which waits for ranks that never join."""
    with world(0):
        mesh = DeviceMesh("cpu", torch.arange(4).view(2, 2))
        job: Any = dist.group.WORLD
        job.bound_device_id = bound = torch.device("cpu", 0)
        seen: list[Any] = []
        made = dist.new_group

        def new_group(ranks: list[int], timeout: Any, use_local_synchronization: bool) -> Any:
            seen.append((ranks, use_local_synchronization, job.bound_device_id))
            return made(ranks, timeout, use_local_synchronization=use_local_synchronization)

        monkeypatch.setattr(dist, "new_group", new_group)
        assert _group(mesh) is _group(mesh)
        assert seen == [([0, 1, 2, 3], True, None)] and job.bound_device_id == bound


@pytest.mark.parametrize("others", [0, 1])
def test_ranks_in_different_numbers_of_groups_are_an_error_and_not_a_wait(
    others: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a rank of a pipeline's stage may be, whose first and last stages share a group for tied embeddings."""
    with world(0):
        mesh = DeviceMesh("cpu", torch.arange(4).view(2, 2))
        seen: list[Any] = []

        def all_reduce(values: Tensor, operation: Any, group: Any) -> None:
            """Along the second dim there is a rank that is in more groups."""
            assert operation == dist.ReduceOp.MAX
            seen.append(group)
            if group is mesh.get_group(1):
                values[0] += others

        monkeypatch.setattr(dist, "all_reduce", all_reduce)
        if others:
            with pytest.raises(RuntimeError, match=r"ranks \[0, 1, 2, 3\] are in (\d) to (?!\1)\d process groups"):
                _group(mesh)
        else:
            assert _group(mesh) is not None
        assert seen == [mesh.get_group(0), mesh.get_group(1)]


def test_a_gradient_that_is_summed_again_is_there_once_it_is_read() -> None:
    """Tensor parallelism may leave partial sums; each operation on an unfinished collective's result is Python's."""
    with world(0):
        mesh = init_device_mesh("cpu", (WORLD,))
        weight: Any = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Replicate()]))
        weight.grad = DTensor.from_local(torch.ones(4, 4), mesh, [Partial()], run_check=False)
        assert type(_local_gradient(weight)) is Tensor
        assert type(_local(weight)) is Tensor and _local(weight).data_ptr() == weight.to_local().data_ptr()


def test_a_second_job_in_a_process_makes_groups_of_its_own() -> None:
    """A mesh of two dims over some of the ranks needs a group that torch does not make, and that ends with its job."""
    for _ in range(2):
        with world(0):
            group = _group(DeviceMesh("cpu", torch.arange(4).view(2, 2)))
            assert group is not None and dist.get_process_group_ranks(group) == [0, 1, 2, 3]
