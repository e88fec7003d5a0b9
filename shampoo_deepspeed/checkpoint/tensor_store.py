"""A directory of tensors that all ranks write together, each tensor in boxes, through torch.distributed.checkpoint.

Writers and readers may cut a tensor differently. Contents are created when they are written and consumed when they
are read, one at a time, so that neither side holds a second copy of everything.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from shampoo_deepspeed.geometry.boxes import Box
from shampoo_deepspeed.runtime.progress import LARGE, UNSHOWN, mebibytes, progress

INDEX = ".metadata"  # torch's own name for the list of all tensors and their places


class StorageError(RuntimeError):
    """A checkpoint cannot be written or read; the message names the file or the tensor."""


@dataclass(frozen=True)
class Item:
    """A box of a tensor that this rank can write; equal boxes of several ranks are written once.

    ``shape`` is that of the whole tensor; ``content`` makes the box's tensor.
    """

    key: str
    shape: tuple[int, ...]
    box: Box
    dtype: torch.dtype
    content: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        """The size of the box."""
        return math.prod(self.box.lengths) * self.dtype.itemsize


@dataclass(frozen=True)
class Wanted:
    """A box of a stored tensor that this rank wants; ``take`` gets it as a CPU tensor."""

    key: str
    box: Box
    take: Callable[[Tensor], object]


def write(items: Sequence[Item], directory: Path, group: dist.ProcessGroup | None) -> None:
    """Write the items of all ranks of a group (None: of this process alone) into a new directory. A collective.

    Raises:
        StorageError: on all ranks, if one of them fails or the boxes do not make up whole tensors.
    """
    # The contents are on the CPU. Copying ahead is not needed, and torch would use the first device for it.
    writer = dcp.FileSystemWriter(directory, sync_files=True, per_thread_copy_ahead=0)
    try:
        total = sum(item.bytes for item in items)
        shown = progress("saving", total, mebibytes) if total >= LARGE else UNSHOWN
        with warnings.catch_warnings(), shown as advance:
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            planner = _Writer(items, advance)
            dcp.save({}, storage_writer=writer, planner=planner, process_group=group, no_dist=group is None)
    except CheckpointException as error:  # derives from BaseException
        causes = {f"rank {rank}: {cause[0]!r}" for rank, cause in error.failures.items()}
        raise StorageError("; ".join(sorted(causes))) from error


class Store:
    """Reads the tensors of a directory, without the other ranks.

    Raises:
        StorageError: if the directory has no readable index.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._reader = dcp.FileSystemReader(directory)
        try:
            self._index: Metadata = self._reader.read_metadata()
        except (OSError, EOFError, ValueError, KeyError, AttributeError, ImportError) as error:
            raise StorageError(f"{directory / INDEX} cannot be read: {error!r}") from error
        except Exception as error:
            if "Unpickling" not in type(error).__name__:
                raise
            raise StorageError(f"{directory / INDEX} cannot be read: {error!r}") from error

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype, list[Box]]]:
        """Shape, dtype and stored boxes of every tensor."""
        out = {}
        for key, found in self._index.state_dict_metadata.items():
            assert isinstance(found, TensorStorageMetadata)
            boxes = [Box(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in found.chunks]
            out[key] = (tuple(found.size), found.properties.dtype, boxes)
        return out

    def read(self, wanted: Iterable[Wanted]) -> None:
        """Read boxes; each goes to its ``take`` as soon as it is complete.

        Raises:
            StorageError: if a tensor or a part of it is missing, or a file cannot be read.
        """
        planner = _Reader(wanted, self._index)
        total = planner.bytes()
        with progress("loading", total, mebibytes) if total >= LARGE else UNSHOWN as planner.advance:
            self._read(planner)

    def _read(self, planner: _Reader) -> None:
        try:
            self._reader.set_up_storage_reader(self._index, is_coordinator=True)
            plan = self._reader.prepare_local_plan(planner.create_local_plan())
            self._reader.read_data(plan, planner).wait()
        except OSError as error:
            raise StorageError(f"a file of {self.directory} cannot be read: {error}") from error
        planner.check_complete()

    def read_one(self, key: str, box: Box) -> Tensor:
        """One box as a CPU tensor."""
        out: list[Tensor] = []
        self._read(_Reader([Wanted(key, box, out.append)], self._index))
        return out[0]


class _Writer(DefaultSavePlanner):
    """Offers items as shards; torch's global plan drops copies and checks that the rest covers every tensor."""

    def __init__(self, items: Sequence[Item], advance: Callable[[int], None]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._advance = advance  # called with the bytes of each item that is about to be written
        self._items = {(item.key, item.box.offsets): item for item in items}

    def create_local_plan(self) -> SavePlan:
        return SavePlan([_write_item(item) for item in self._items.values()])

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        assert write_item.index.offset is not None
        item = self._items[write_item.index.fqn, tuple(write_item.index.offset)]
        self._advance(item.bytes)
        # torch.save stores a view's whole storage.
        return item.content().detach().cpu().clone(memory_format=torch.contiguous_format)


def _write_item(item: Item) -> WriteItem:
    offsets = torch.Size(item.box.offsets)
    data = TensorWriteData(
        chunk=ChunkStorageMetadata(offsets=offsets, sizes=torch.Size(item.box.lengths)),
        properties=TensorProperties(dtype=item.dtype),
        size=torch.Size(item.shape),
    )
    return WriteItem(index=MetadataIndex(item.key, offsets), type=WriteItemType.SHARD, tensor_data=data)


class _Reader(LoadPlanner):
    """Fills a buffer for each wanted box and hands it over once complete."""

    def __init__(self, wanted: Iterable[Wanted], index: Metadata) -> None:
        self._wanted = {(w.key, w.box.offsets): w for w in wanted}
        self._left = {place: math.prod(w.box.lengths) for place, w in self._wanted.items()}
        self._buffers: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        self._index = index
        self.advance: Callable[[int], None] = lambda _: None  # called with the bytes that were read

    def bytes(self) -> int:
        """The size of all that is still to be read."""
        stored = self._index.state_dict_metadata  # what it lacks is reported by the plan
        return sum(count * self._dtype(key).itemsize for (key, _), count in self._left.items() if key in stored)

    def _dtype(self, key: str) -> torch.dtype:
        found = self._index.state_dict_metadata[key]
        assert isinstance(found, TensorStorageMetadata)
        return found.properties.dtype

    def create_local_plan(self) -> LoadPlan:
        items: list[ReadItem] = []
        for w in self._wanted.values():
            found = self._index.state_dict_metadata.get(w.key)
            if not isinstance(found, TensorStorageMetadata):
                raise StorageError(f"the checkpoint does not hold {w.key!r}")
            chunk = ChunkStorageMetadata(offsets=torch.Size(w.box.offsets), sizes=torch.Size(w.box.lengths))
            items += create_read_items_for_chunk_list(w.key, found, [chunk])
        return LoadPlan(items)

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        place = _place(read_item)
        if place not in self._buffers:
            lengths = self._wanted[place].box.lengths
            self._buffers[place] = torch.empty(lengths, dtype=self._dtype(place[0]), device="cpu")
        part = self._buffers[place]
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            part = part.narrow(dim, start, length)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        place = _place(read_item)
        self._left[place] -= tensor.numel()
        self.advance(tensor.nbytes)
        if self._left[place] == 0:
            self._wanted[place].take(self._buffers.pop(place))

    def check_complete(self) -> None:
        """Raise StorageError if something wanted was not there."""
        for (key, offsets), left in self._left.items():
            if left:
                raise StorageError(f"the checkpoint lacks {left} elements of {key!r} from {offsets} on")

    # The rest of the interface is for readers that plan together, or store pickled objects.
    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        raise NotImplementedError

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        raise NotImplementedError

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise StorageError(f"{read_item.dest_index.fqn!r} is not a tensor")


def _place(read_item: ReadItem) -> tuple[str, tuple[int, ...]]:
    assert read_item.dest_index.offset is not None
    return read_item.dest_index.fqn, tuple(read_item.dest_index.offset)
