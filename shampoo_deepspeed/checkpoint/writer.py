"""Writes a checkpoint: a rank's data file, then the manifest, each durable before the next step of a save.

Contents are made when they are written, one at a time, so that no second copy of everything is held. That is why the
`safetensors` library, which takes all tensors at once, does not write the files; it opens each of them before a save is
complete.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from operator import itemgetter
from pathlib import Path
from typing import Any

import safetensors

from shampoo_deepspeed.checkpoint.errors import CheckpointError, printable
from shampoo_deepspeed.checkpoint.manifest import NAME, Manifest
from shampoo_deepspeed.checkpoint.schema import FORMAT, SchemaError, check
from shampoo_deepspeed.checkpoint.tensor_files import (
    Item,
    Written,
    checksums_of,
    file_name,
    in_hexadecimal,
    laid_out,
    memory_of,
    name_of,
    problem_of,
    sizes,
    write_range,
)
from shampoo_deepspeed.runtime.progress import LARGE, UNSHOWN, mebibytes, progress

# The most bytes of a manifest that a save keeps until its own is in place. That of ten million blocks has less.
LARGEST_BEFORE = 1 << 30


def write(items: Sequence[Item], directory: Path, rank: int) -> tuple[list[Written], int]:
    """Write a rank's file; returns what is in it, and its size in bytes.

    Raises:
        CheckpointError: if a tensor has values that are not finite, or the `safetensors` library cannot open the file.
        OSError: if it cannot be written.
    """
    header, starts, end = laid_out([(item.place, item.form) for item in items], directory.name)
    file = directory / file_name(rank)
    total = sum(map(itemgetter(1), sizes(items)))
    shown = progress("saving", total, mebibytes) if total >= LARGE else UNSHOWN
    written = []
    with file.open("xb", buffering=0) as stream, shown as advance:
        write_range(stream, 0, memoryview(header))
        for item, places in zip(items, starts, strict=True):
            checksums: list[int] = []
            made = [item.contents()] if item.place.box is not None else item.contents()
            for content, part, start in zip(made, item.form, places, strict=True):
                tensor = content.detach().to("cpu").contiguous()
                if (tensor.dtype, tuple(tensor.shape)) != part[1:]:
                    raise CheckpointError(f"{name_of(item.place, part)} has changed while it was saved")
                problem = problem_of(tensor.view(-1), part, item.place)
                if problem is not None:
                    raise CheckpointError(
                        f"{printable(name_of(item.place, part))} has values that are {problem}: a run cannot resume "
                        "from them, so nothing is saved, and an earlier checkpoint stays"
                    )
                memory = memory_of(tensor)
                checksums += checksums_of(memory, item.place.piece)
                write_range(stream, start, memory)
                advance(len(memory))
            written.append(Written(item.place, in_hexadecimal(checksums), str(item.form[0][1]).removeprefix("torch.")))
        os.fsync(stream.fileno())
    _open_with_the_library(file, sum(len(item.form) for item in items))
    return written, end


def _open_with_the_library(file: Path, tensors: int) -> None:
    """Raise CheckpointError unless anyone can open a file that was written."""
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            found = len(opened.keys())
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"the safetensors library cannot open {file}: {error}") from error
    if found != tensors:
        raise CheckpointError(f"the safetensors library finds {found} tensors in {file}, and {tensors} were written")


def write_manifest(manifest: Manifest, path: Path) -> None:
    """Put the manifest into its place by one rename, so that a reader sees the old checkpoint or the new one.

    Raises:
        CheckpointError: if it could not be read again: the ranks' parts do not make up a whole.
    """
    body = json.loads(json.dumps(vars(manifest)))
    try:
        check(body)
    except SchemaError as error:
        raise CheckpointError(f"the ranks' parts do not make up a whole checkpoint: {error}") from None
    file, aside, content = path / NAME, path / f"{NAME}.{manifest.directory}", encoded(body)
    before = _in_place(file)
    try:
        _write(aside, content)
        os.replace(aside, file)
    except BaseException:
        with suppress(OSError):  # where a rename is not atomic, one that fails may have lost the old one
            if before is not None and _in_place(file) not in (before, content):
                _write(file, before)
        aside.unlink(missing_ok=True)
        raise
    sync_directory(path)


def _in_place(file: Path) -> bytes | None:
    """The manifest that a save is about to replace; None if none is there, or what is there cannot be one."""
    try:  # O_NONBLOCK: opening a pipe would wait for a writer
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENXIO):  # the last two: a link, a socket
            return None
        raise
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_size > LARGEST_BEFORE:
        os.close(descriptor)
        return None
    with open(descriptor, "rb") as stream:
        return stream.read()


def encoded(body: Mapping[str, Any]) -> bytes:
    """The file of a manifest; each parameter and each layout is on a line of its own, for people."""
    parts = []
    for name, value in body.items():
        text = json.dumps(value)
        if name in ("parameters", "layouts", "groups") and value:
            text = "{\n" + ",\n".join(f"{json.dumps(key)}: {json.dumps(item)}" for key, item in value.items()) + "}"
        parts.append(f"{json.dumps(name)}: {text}")
    inner = ("{\n" + ",\n".join(parts) + "}").encode()
    return b'{"format": %d, "crc32": "%s", "body": %s}\n' % (FORMAT, b"%08x" % zlib.crc32(inner), inner)


def _write(file: Path, content: bytes) -> None:
    """Write a file and make it durable; an error too if the file system takes no bytes and reports none."""
    with file.open("wb", buffering=0) as stream:
        left = memoryview(content)
        while left:
            count = os.write(stream.fileno(), left)
            if not count:
                raise OSError(errno.EIO, f"{os.strerror(errno.EIO)}: nothing could be written", str(file))
            left = left[count:]
        os.fsync(stream.fileno())


def sync_directory(path: Path) -> None:
    """Make what was created and renamed in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
