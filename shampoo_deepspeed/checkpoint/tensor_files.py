"""The data files of a checkpoint: one per rank in the safetensors format, every byte of it under a checksum.

What a file holds, and where, follows from the manifest alone: its tensors in the manifest's order, those with wider
elements first. So a header is not trusted but compared, and a file is read without any parser.

Real folders and files are opened only, never what a link leads to. Links above the checkpoint's folder are the user's
own, and are followed. Names in the files:

``blocks/<parameter>/<index>/<tensor>`` a tensor of a block, and its ``status``, see ``state/block_codec.py``;
``elementwise/<parameter>/<moment>[0:8]`` elements of a moment of an unpreconditioned parameter (flattened);
``shards/<parameter>/<kind>[0:4, 0:6]`` a box of momentum or master weights (in the parameter's shape).
The last two are written and read in boxes, so every sharding can read what any other has written.
"""

from __future__ import annotations

import ctypes
import errno
import io
import itertools
import json
import logging
import math
import os
import stat
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shampoo_deepspeed.checkpoint.errors import CheckpointError, MissingError, printable, quoted
from shampoo_deepspeed.checkpoint.schema import DIGITS, PIECE, layout_key
from shampoo_deepspeed.geometry.boxes import Box
from shampoo_deepspeed.runtime.progress import LARGE, UNSHOWN, mebibytes, progress
from shampoo_deepspeed.state.block_codec import STATUS, TRIANGLE, BlockLayout

logger = logging.getLogger("shampoo_deepspeed")

_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFDIR: "a folder",
    stat.S_IFREG: "a file",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}

CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int8: "I8",
}  # fmt: skip
# A block's tensors as they are stored: name, dtype, shape.
StoredForm = tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]
SLAB = 32 * PIECE  # bytes of a box that are in memory at a time


@dataclass(frozen=True)
class Place:
    """Where something is stored: the block of a number, or a box of a tensor.

    Args:
        parameter: its stored name.
        part: the number of a block, or what tensor: "elementwise/<moment>" or "shards/<kind>".
        box: of the tensor.
    """

    parameter: str
    part: int | str
    box: Box | None = None

    def __str__(self) -> str:
        """The name in the file, for a block that of its tensors up to the last slash."""
        if isinstance(self.part, int):
            return f"blocks/{self.parameter}/{self.part}"
        kind, _, name = self.part.partition("/")
        assert self.box is not None
        box = zip(self.box.offsets, self.box.lengths, strict=True)
        ranges = (f"{start}:{start + length}" for start, length in box)
        return f"{kind}/{self.parameter}/{name}[{', '.join(ranges)}]"

    @property
    def piece(self) -> int | None:
        """How many bytes share a checksum; None: all of a tensor's."""
        return None if self.box is None else PIECE

    @property
    def order(self) -> tuple[Any, ...]:
        """A file's tensors are in this order, apart from their dtypes."""
        if isinstance(self.part, int):
            return self.parameter, 0, self.part
        assert self.box is not None
        return self.parameter, 1, self.part, self.box.offsets, self.box.lengths


@dataclass(frozen=True)
class Item:
    """A block, or a box of a tensor, that this rank can write.

    Args:
        form: name in the block, dtype and shape of each of its tensors; of a box the name is empty.
        contents: makes these tensors, of a box the only one.
    """

    place: Place
    form: StoredForm
    contents: Callable[[], Any]


@dataclass(frozen=True)
class Written:
    """What a rank has written for an item: the checksums of its tensors' pieces, in hexadecimal."""

    place: Place
    checksums: str
    dtype: str


@dataclass(frozen=True, slots=True)
class Stored:
    """Where an item is in a rank's file: ``starts`` of its tensors, and their ``size`` in bytes."""

    place: Place
    form: StoredForm
    checksums: str
    starts: tuple[int, ...]
    size: int


def size_of(part: tuple[str, torch.dtype, tuple[int, ...]]) -> int:
    return math.prod(part[2]) * part[1].itemsize


def sizes(items: Sequence[Item]) -> list[tuple[Place, int]]:
    """The place of each item, and its bytes."""
    return [(item.place, sum(map(size_of, item.form))) for item in items]


def in_order(ranks: Sequence[Sequence[Written]]) -> list[tuple[int, Written]]:
    """What the ranks have written, in the order in which a manifest lists it, each with its rank."""
    every = [(rank, found) for rank, written in enumerate(ranks) for found in written]
    return sorted(every, key=lambda entry: entry[1].place.order)


def file_name(rank: int) -> str:
    """The name of the file that a rank writes."""
    return f"rank-{rank}.safetensors"


def stored_form(layout: BlockLayout) -> StoredForm:
    """Name, dtype and shape of each tensor of a stored block; a triangle is flat."""
    return tuple(
        (
            name,
            getattr(torch, kind.removesuffix(TRIANGLE)),
            (math.comb(shape[0] + 1, 2),) if kind.endswith(TRIANGLE) else tuple(shape),
        )
        for name, kind, shape in layout
    )


def name_of(place: Place, part: tuple[str, torch.dtype, tuple[int, ...]]) -> str:
    """The name in the file of a tensor of an item."""
    return f"{place}/{part[0]}" if place.box is None else str(place)


def laid_out(items: Sequence[tuple[Place, StoredForm]], directory: str) -> tuple[bytes, list[tuple[int, ...]], int]:
    """The header of a file with these items, where the tensors of each of them start, and where the file ends."""
    numbers = [
        (number, n, part)
        for number, (place, form) in sorted(enumerate(items), key=lambda item: item[1][0].order)
        for n, part in enumerate(form)
    ]
    numbers.sort(key=lambda entry: -entry[2][1].itemsize)  # readers want elements to be aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "save": directory}}
    starts, end = [[0] * len(form) for _, form in items], 0
    for number, n, part in numbers:
        start, end = end, end + size_of(part)
        starts[number][n] = start
        header[name_of(items[number][0], part)] = {
            "dtype": CODES[part[1]],
            "shape": list(part[2]),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    places = [tuple(begin + start for start in own) for own in starts]
    return len(text).to_bytes(8, "little") + text, places, begin + end


@contextmanager
def inner_folder(path: Path) -> Iterator[int]:
    """A descriptor of a folder within a checkpoint's, for `open_file`.

    Raises:
        CheckpointError: if it is missing or no folder.
    """
    descriptor = _checked(path, stat.S_IFDIR, os.O_DIRECTORY, None)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def open_file(path: Path, folder: int | None = None) -> io.FileIO:
    """A file that is open for reading until what is returned is dropped.

    Args:
        folder: the descriptor of its folder, which may have been moved since it was opened.

    Raises:
        CheckpointError: if it is missing, no regular file, or cannot be opened.
    """
    # O_NONBLOCK: should a pipe take its place now, opening it would wait for a writer.
    return io.FileIO(path, opener=lambda *_: _checked(path, stat.S_IFREG, os.O_NONBLOCK, folder))


def _checked(path: Path, kind: int, flags: int, folder: int | None) -> int:
    """Open a path if it is of this kind, both before and after it is opened."""
    name: str | Path = path if folder is None else path.name
    try:
        _check_kind(path, os.stat(name, dir_fd=folder, follow_symlinks=False), kind)
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | flags, dir_fd=folder)
    except (FileNotFoundError, NotADirectoryError):
        raise MissingError(f"{path} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        _check_kind(path, os.fstat(descriptor), kind)
    except CheckpointError:
        os.close(descriptor)
        raise
    return descriptor


def _check_kind(path: Path, found: os.stat_result, wanted: int) -> None:
    kind = stat.S_IFMT(found.st_mode)
    if kind != wanted:
        raise CheckpointError(
            f"{path} is {_KINDS.get(kind, 'something unknown')}, and must be {_KINDS[wanted]}: nothing in a "
            "checkpoint's folder may lead out of it"
        )


def read_range(file: io.FileIO, path: Path, start: int, memory: memoryview) -> None:
    """Fill memory with the bytes of a file from ``start`` on.

    Raises:
        CheckpointError: if they are not all there, or cannot be read.
    """
    done = 0
    while done < len(memory):
        try:
            count = os.preadv(file.fileno(), [memory[done:]], start + done)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        if not count:
            raise CheckpointError(f"{path} has no byte {start + done}: it was cut short")
        done += count


def write_range(file: io.FileIO, start: int, memory: memoryview) -> None:
    """Write bytes of a file from ``start`` on.

    Raises:
        OSError: if they cannot be written, also on a file system that takes none of them and reports no error.
    """
    while memory:
        count = os.pwrite(file.fileno(), memory, start)
        if not count:
            raise OSError(errno.EIO, f"{os.strerror(errno.EIO)}: nothing could be written", str(file.name))
        start, memory = start + count, memory[count:]


class TensorFiles:
    """The data files of a checkpoint, each open since it was checked that it fits the manifest.

    They can be read until this is dropped, even if they are deleted meanwhile.
    """

    def __init__(
        self,
        directory: Path,
        files: Mapping[str, Mapping[str, Any]],
        parameters: Mapping[str, Mapping[str, Any]],
        layouts: Mapping[str, BlockLayout],
    ) -> None:
        """Open the files; the arguments after the folder are the manifest's fields."""
        self.directory = directory
        # The tensors that are stored in boxes, by stored name and kind: dtype, shape, and rank and place of each box.
        self.tensors: dict[tuple[str, str], tuple[torch.dtype, tuple[int, ...], list[tuple[int, Stored]]]] = {}
        # The blocks, by stored name and number: rank, and where it is in the rank's file.
        self.blocks: dict[tuple[str, int], tuple[int, Stored]] = {}
        self._of_rank: dict[int, list[Stored]] = {}
        self._open: dict[int, io.FileIO] = {}
        self._paths: dict[int, Path] = {}
        found: dict[int, list[tuple[Place, StoredForm, str]]] = {
            int(name[len("rank-") : -len(".safetensors")]): [] for name in files
        }
        for rank, place, form, checksums in _stored(parameters, layouts):
            found[rank].append((place, form, checksums))
        with inner_folder(directory) as folder:
            for rank, items in sorted(found.items()):
                size = files[file_name(rank)]["bytes"]
                header, starts, end = laid_out([(place, form) for place, form, _ in items], directory.name)
                self._open_and_check(rank, folder, size, header, end)
                placed = zip(items, starts, strict=True)
                self._of_rank[rank] = [Stored(*item, own, sum(map(size_of, item[1]))) for item, own in placed]
        self._index(parameters)

    def __del__(self) -> None:
        for file in self._open.values():
            file.close()

    def _open_and_check(self, rank: int, folder: int, size: int, header: bytes, end: int) -> None:
        """Open a rank's file, if it has the size and the header that it must have.

        Args:
            folder: descriptor of its folder.
            size: in the manifest.
            header: that follows from the manifest, and ``end``, where such a file ends.
        """
        path = self._paths[rank] = self.directory / file_name(rank)
        if size != end:
            raise CheckpointError(
                f"the manifest is not valid: files[{path.name!r}]['bytes'] is {size:,}, and its tensors need {end:,}"
            )
        try:
            file = open_file(path, folder)
        except CheckpointError as error:
            cause = error.__cause__
            if not isinstance(cause, OSError) or cause.errno not in (errno.EMFILE, errno.ENFILE) or not self._open:
                raise
            self._keep_fewer_open()
            file = open_file(path, folder)
        found = os.fstat(file.fileno()).st_size
        if found != size:
            raise CheckpointError(f"{path} has {found} bytes and should have {size}: it was cut short or changed")
        content = bytearray(len(header))
        read_range(file, path, 0, memoryview(content))
        if content != header:
            place = next(n for n, (a, b) in enumerate(zip(content, header, strict=True)) if a != b)
            raise CheckpointError(
                f"{path} is damaged: from byte {place} on its header has {quoted(bytes(content[place : place + 40]))}, "
                f"and with the manifest's tensors it has {quoted(header[place : place + 40])}"
            )
        self._open[rank] = file

    def _keep_fewer_open(self) -> None:
        """Close half of the files, which are opened again when they are read."""
        logger.warning(
            "%s has more files than this process may have open: keep the folder until all of its state is in use, or "
            "raise `ulimit -n`",
            printable(str(self.directory)),
        )
        for rank in sorted(self._open)[len(self._open) // 2 :]:
            self._open.pop(rank).close()

    def _index(self, parameters: Mapping[str, Mapping[str, Any]]) -> None:
        for rank, items in self._of_rank.items():
            for stored in items:
                place = stored.place
                if isinstance(place.part, int):
                    self.blocks[place.parameter, place.part] = rank, stored
                else:
                    record = parameters[place.parameter]["shape"]
                    shape = (math.prod(record),) if place.part.startswith("elementwise/") else tuple(record)
                    key = place.parameter, place.part
                    self.tensors.setdefault(key, (stored.form[0][1], shape, []))[2].append((rank, stored))

    def verify(self, part: int, parts: int, names: set[str]) -> dict[str, tuple[str, str]]:
        """Verify one of several equal parts of all bytes of the parameters with these stored names, in little memory.

        Returns:
            By stored name of each parameter, a tensor of it with values that cannot be, and what they are: "not finite"
            or "negative".

        Raises:
            CheckpointError: naming the first file and tensor whose bytes are not those that were saved.
        """
        total = sum(s.size for items in self._of_rank.values() for s in items if s.place.parameter in names)
        mine, begin = range(total * part // parts, total * (part + 1) // parts), 0
        unfit: dict[str, tuple[str, str]] = {}
        memory = torch.empty(PIECE, dtype=torch.uint8, device="cpu")
        with progress("checking the checkpoint", len(mine), mebibytes) if total >= LARGE else UNSHOWN as advance:
            for rank, stored, n in self._in_file_order(names):
                size = size_of(stored.form[n])
                step = size if stored.place.box is None else SLAB
                for start in range(0, size, max(step, 1)):
                    if begin + start in mine:
                        stop = min(start + step, size)
                        problem = self._problem(rank, stored, n, range(start, stop), memory)
                        if problem is not None:
                            unfit[stored.place.parameter] = name_of(stored.place, stored.form[n]), problem
                        advance(stop - start)
                begin += size
        return unfit

    def _in_file_order(self, names: set[str]) -> Iterator[tuple[int, Stored, int]]:
        """Rank, item and number in it of each stored tensor of these parameters."""
        for rank, items in sorted(self._of_rank.items()):
            own = [stored for stored in items if stored.place.parameter in names]
            # Numbers, of which the garbage collector keeps no account; a collection takes as long as reading a GB.
            item_of = [number for number, stored in enumerate(own) for _ in stored.form]
            part_of = [n for stored in own for n in range(len(stored.form))]
            starts = [start for stored in own for start in stored.starts]
            for place in sorted(range(len(starts)), key=starts.__getitem__):
                yield rank, own[item_of[place]], part_of[place]

    def _problem(self, rank: int, stored: Stored, n: int, bytes_: range, memory: Tensor) -> str | None:
        """`problem_of` these bytes; raises CheckpointError if they are not those that were saved.

        Args:
            memory: for a piece of them.
        """
        value, sums, problem = 0, [], None
        for start in range(bytes_.start, bytes_.stop, PIECE):
            values = self._raw(rank, stored, n, range(start, min(start + PIECE, bytes_.stop)), memory)
            value = zlib.crc32(memory_of(values), value if stored.place.box is None else 0)
            sums += [value]
            problem = problem or problem_of(values.view(stored.form[n][1]), stored.form[n], stored.place, start)
        number = n if stored.place.box is None else bytes_.start // PIECE
        self._compare(rank, stored, n, number, sums[-1:] if stored.place.box is None else sums)
        if stored.form[n][0] == STATUS[0]:
            flags, failures = values.view(torch.int64).tolist()
            if not (0 <= flags <= 3 and 0 <= failures < 2**31):
                raise CheckpointError(
                    f"{self._paths[rank]} is not valid: {printable(name_of(stored.place, stored.form[n]))} is "
                    f"{[flags, failures]}; allowed: flags from 0 to 3, and how often a refresh has failed in a row"
                )
        return problem

    def items(self) -> Iterator[tuple[Place, StoredForm]]:
        """The place and the form of all that is stored."""
        yield from ((stored.place, stored.form) for items in self._of_rank.values() for stored in items)

    def values(self, rank: int, stored: Stored, n: int, start: int, stop: int, memory: Tensor | None = None) -> Tensor:
        """Elements of a stored tensor, from a range of its bytes; what is verified is what is returned.

        Args:
            memory: bytes for all of the tensor, where they are read if it is given.
        """
        size, piece = size_of(stored.form[n]), stored.place.piece
        step = piece or max(size, 1)
        first, last = start // step, max(start // step + 1, -(-stop // step))
        low = first * step
        values = self._raw(rank, stored, n, range(low, min(last * step, size)), memory)
        self._compare(rank, stored, n, n if piece is None else first, checksums_of(memory_of(values), piece))
        return values[start - low : stop - low].view(stored.form[n][1])

    def _raw(self, rank: int, stored: Stored, n: int, bytes_: range, memory: Tensor | None = None) -> Tensor:
        """Bytes of a stored tensor, not yet verified; in ``memory`` if it is given."""
        values = torch.empty(len(bytes_), dtype=torch.uint8, device="cpu") if memory is None else memory[: len(bytes_)]
        path = self._paths[rank]
        file = self._open.get(rank) or open_file(path)
        read_range(file, path, stored.starts[n] + bytes_.start, memory_of(values))
        return values

    def _compare(self, rank: int, stored: Stored, n: int, number: int, found: Sequence[int]) -> None:
        """Raise CheckpointError if checksums, from that of this number on, are not those that were saved."""
        expected = stored.checksums[number * DIGITS : (number + len(found)) * DIGITS]
        if in_hexadecimal(found) != expected:
            raise CheckpointError(
                f"{self.directory / file_name(rank)} is damaged: the bytes of "
                f"{printable(name_of(stored.place, stored.form[n]))} are not those that were saved"
            )


def _stored(
    parameters: Mapping[str, Mapping[str, Any]], layouts: Mapping[str, BlockLayout]
) -> Iterator[tuple[int, Place, StoredForm, str]]:
    """Each item of a checkpoint: the rank that wrote it, its place, tensors and checksums."""
    forms: dict[str, StoredForm] = {}
    for name, record in parameters.items():
        shapes = itertools.product(*record["cuts"]) if record["blocks"] else []
        for index, ((rank, checksums), shape) in enumerate(zip(record["blocks"], shapes, strict=True)):
            key = layout_key(record["options"], shape)
            if key not in forms:
                forms[key] = stored_form(layouts[key])
            yield rank, Place(name, index), forms[key], checksums
        for kind, found in record["tensors"].items():
            for rank, offsets, lengths, checksums in found["boxes"]:
                box = Box(tuple(offsets), tuple(lengths))
                yield rank, Place(name, kind, box), (("", getattr(torch, found["dtype"]), box.lengths),), checksums


def problem_of(
    values: Tensor, part: tuple[str, torch.dtype, tuple[int, ...]], place: Place, start: int = 0
) -> str | None:
    """What values are that no run can resume from, "not finite" or "negative" where they are means of squares.

    Only what is ever read counts: of a factor matrix the lower triangle.

    Args:
        part: name, dtype and shape of the stored tensor.
        place: where it is stored.
        start: the byte of it where the flat values begin.
    """
    name, dtype, shape = part
    if not dtype.is_floating_point or not values.numel():
        return None
    low, high = (value.item() for value in torch.aminmax(values))
    if math.isfinite(low) and math.isfinite(high):
        # Its root would be NaN. Codes of eight bits stand for no negative square.
        squares = (name or str(place.part)).endswith("second_moment")
        return "negative" if squares and low < 0.0 else None
    if not name.startswith("factor_") or len(shape) != 2:
        return "not finite"
    places = torch.isfinite(values).logical_not_().nonzero().view(-1) + start // dtype.itemsize
    return "not finite" if bool((places % shape[1] <= places // shape[1]).any()) else None


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, which must outlive what is returned."""
    if not tensor.numel():
        return memoryview(b"")
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


def checksums_of(memory: memoryview, piece: int | None) -> list[int]:
    step = piece or max(len(memory), 1)
    return [zlib.crc32(memory[start : start + step]) for start in range(0, max(len(memory), 1), step)]


def in_hexadecimal(checksums: Sequence[int]) -> str:
    return "".join(f"{value:08x}" for value in checksums)
