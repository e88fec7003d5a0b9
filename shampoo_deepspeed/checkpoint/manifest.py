"""The manifest of a checkpoint, one JSON file next to the tensors, and how it is read: strictly, and checked first."""

from __future__ import annotations

import json
import math
import os
import re
import stat
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shampoo_deepspeed.checkpoint.errors import CheckpointError, MissingError, printable, quoted
from shampoo_deepspeed.checkpoint.schema import FORMAT, SchemaError, check
from shampoo_deepspeed.checkpoint.tensor_files import TensorFiles, open_file, read_range
from shampoo_deepspeed.state.block_codec import BlockLayout

NAME = "manifest.json"
# A manifest is shorter than the data that it describes, except that of parameters without state. More is not read.
MOST_BYTES, MOST_VALUES = 1 << 24, 1 << 19
DATA_PER_VALUE = 16  # bytes
LONGEST_NUMBER = 20  # digits; 64 bits have 19

_HEAD = re.compile(rb'\{"format": ([0-9]{1,9}), "crc32": "([0-9a-f]{8})", "body": ')


@dataclass(frozen=True)
class Manifest:
    """The contents of ``manifest.json``; ``schema.py`` has the kind and the range of every field.

    Args:
        directory: name of the folder next to this file that holds the tensors.
        world_size: number of ranks that saved.
        groups: options of each parameter group, by its number.
        parameters: for each stored name ``shape``, ``group``, ``steps``, and ``options``: the number of the group or of
            a rule in it, with a suffix for blocks of another dtype or of an earlier save. Also ``merged``, the shape
            that is cut into blocks, and ``cuts``, their lengths along each dim (both None if element-wise). With
            expert parallelism also ``parts``, the number of ranks that hold different ones. ``blocks`` and
            ``tensors`` say where its state is, with checksums; `tensor_files` reads them.
        layouts: a block's tensors, by ``"options:shape"`` as ``layout_key`` gives it.
        files: ``bytes`` of each file in the folder.
        versions: of this package and torch, when it was written; for people.
        kept_by_others: what schedulers and users keep in each parameter group, such as ``initial_lr``, by its number.
    """

    directory: str
    world_size: int
    rejected_steps: int
    groups: Mapping[str, Mapping[str, Any]]
    parameters: Mapping[str, Mapping[str, Any]]
    layouts: Mapping[str, BlockLayout]
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    kept_by_others: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read the manifest of a checkpoint.

        Raises:
            CheckpointError: if there is none, or it is damaged, of another format, or says what no save can have said.
        """
        file = path / NAME
        try:
            data = _data_bytes(path)
            content = _content(file, MOST_BYTES + data)
        except MissingError:
            begun = any(path.glob("data-*")) if path.is_dir() else False
            raise CheckpointError(
                f"{path} holds no complete Shampoo checkpoint: it has no {NAME}"
                + ("; a save into it was interrupted" if begun else "")
            ) from None
        except ValueError as error:  # a null byte in the path, or text that cannot be encoded
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        body = _body(file, content, MOST_VALUES + data // DATA_PER_VALUE)
        try:
            check(body)
        except SchemaError as error:
            raise CheckpointError(f"{file} is not valid: {error}") from None
        layouts = {
            key: [(name, kind, tuple(shape)) for name, kind, shape in layout] for key, layout in body["layouts"].items()
        }
        return cls(**{**body, "layouts": layouts})

    def open_files(self, path: Path) -> TensorFiles:
        """The data files that belong to this manifest of a checkpoint."""
        return TensorFiles(path / self.directory, self.files, self.parameters, self.layouts)


def _content(file: Path, most_bytes: int) -> bytes:
    with open_file(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > most_bytes:
            raise CheckpointError(
                f"{file} is damaged: it has {size:,} bytes, and the data next to it need at most {most_bytes:,}"
            )
        content = bytearray(size)
        read_range(stream, file, 0, memoryview(content))
    return bytes(content)


def _data_bytes(path: Path) -> int:
    """How much data lies in a checkpoint's folder, of any save; holes in files do not count."""
    found = 0
    for folder in path.glob("data-*"):
        with suppress(OSError):
            if not folder.is_symlink():
                stats = [entry.stat(follow_symlinks=False) for entry in os.scandir(folder)]
                found += sum(min(s.st_size, 8 * 512 * s.st_blocks) for s in stats if stat.S_ISREG(s.st_mode))
    return found


def _body(file: Path, content: bytes, most_values: int) -> Any:
    """What a manifest says; only its checksum and its format have been checked.

    Raises:
        CheckpointError: if it is damaged, or of another format.
    """
    head = _HEAD.match(content)
    try:
        if head is None or int(head[1]) != FORMAT:
            raise CheckpointError(_other_format(file, parse(content, most_values)))
        inner = content[head.end() : -2]
        if content[-2:] != b"}\n" or checksum(inner).encode() != head[2]:
            raise CheckpointError(f"{file} is damaged: its checksum is not the one that was saved")
        return parse(inner, most_values)
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged: {printable(str(error))}") from None


def _other_format(file: Path, content: Any) -> str:
    """Why a JSON file that does not begin like a manifest of this format cannot be read."""
    found = content.get("format") if isinstance(content, dict) else None
    if found is None and isinstance(content, dict) and isinstance(content.get("body"), dict):
        found = content["body"].get("format")
    if found == 1:
        return (
            f"{file} is of format 1, which only development versions before the first release wrote, and which is no "
            "longer read because reading it could run code: load it with the version that saved it"
        )
    if found is None or found == FORMAT:
        return f"{file} is damaged: it does not begin as a manifest of format {FORMAT} does"
    return f"{file} has format {quoted(found)}, and this version of shampoo_deepspeed reads {FORMAT}"


def other_saves(path: Path) -> list[str]:
    """Folders with a complete save in or below a checkpoint's folder, other than the one that its manifest names."""
    found = []
    for file in sorted({*path.glob("*/manifest.json"), *path.glob("*/*/manifest.json")}):
        with suppress(CheckpointError, OSError):
            if (file.parent / Manifest.read(file.parent).directory).is_dir():
                found.append(printable(str(file.parent)))
    return found


def open_checkpoint(path: Path) -> tuple[Manifest, TensorFiles]:
    """The manifest and the open files of a checkpoint; those of the new one if a save replaces it now.

    Raises:
        CheckpointError: if there is no complete checkpoint, or a file is missing or does not fit the manifest.
    """
    manifest = Manifest.read(path)
    while True:
        try:
            return manifest, manifest.open_files(path)
        except MissingError as error:
            again = Manifest.read(path)
            if again.directory == manifest.directory:
                raise CheckpointError(_missing(path, manifest, error)) from None
            manifest = again


def _missing(path: Path, manifest: Manifest, error: MissingError) -> str:
    """What to say of a manifest whose files are not there."""
    if (path / manifest.directory).exists():
        return str(error)
    there = sorted(printable(found.name) for found in path.glob("data-*")) or ["none"]
    saves = other_saves(path)
    return (
        f"{path / NAME} names {manifest.directory}, which is missing; the folders of data there are "
        f"{', '.join(there[:3])}{', ...' * (len(there) > 3)}, and "
        + (f"other complete saves are {', '.join(saves[:3])}" if saves else "no other complete save is in it")
    )


def checksum(content: bytes | bytearray | memoryview) -> str:
    """CRC-32 of bytes, as eight hexadecimal digits."""
    return f"{zlib.crc32(content):08x}"


def parse(content: bytes, most_values: int) -> Any:
    """The value of a JSON text.

    Args:
        most_values: more values than this are refused before any is built.

    Raises:
        ValueError: for anything else than JSON in UTF-8: also for NaN and infinite numbers, for a key that appears
            twice in an object, for numbers of more than 20 digits, and for too many or too deeply nested values.
    """
    found = sum(content.count(mark) for mark in (b",", b"[", b"{", b":"))  # a key takes as much memory as a value
    if found > most_values:
        raise ValueError(f"it has about {found:,} values, and at most {most_values:,} are read")
    try:
        return json.loads(
            content.decode("utf-8"),
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_finite,
            parse_constant=_not_a_number,
        )
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in made if names.count(name) > 1)
        raise ValueError(f"the key {twice[:100]!r} appears twice")
    return made


def _integer(digits: str) -> int:
    if len(digits) > LONGEST_NUMBER:
        raise ValueError(f"a number has {len(digits):,} digits")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits[:20]} is too large")
    return value


def _not_a_number(name: str) -> float:
    raise ValueError(f"{name} is not a number")
