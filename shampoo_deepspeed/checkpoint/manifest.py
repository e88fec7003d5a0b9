"""The manifest of a checkpoint: one JSON file next to the tensors, which completes a save when it appears."""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shampoo_deepspeed._version import __version__
from shampoo_deepspeed.geometry.blocks import even_cuts
from shampoo_deepspeed.options.config import OPTION_NAMES, ShampooConfig
from shampoo_deepspeed.runtime.progress import LARGE, UNSHOWN, mebibytes, progress
from shampoo_deepspeed.state.block_codec import BlockLayout

FORMAT = 1
NAME = "manifest.json"

_ADDED = ("versions", "kept_by_others")  # fields that early manifests do not have
_NUMBERED = re.compile(r"(.+)@[0-9]*", re.DOTALL)


class CheckpointError(RuntimeError):
    """A checkpoint is incomplete, damaged, of an unknown format, or does not fit; the message says which and why."""


@dataclass(frozen=True)
class Manifest:
    """The contents of ``manifest.json``.

    Args:
        directory: name of the folder next to this file that holds the tensors.
        world_size: number of ranks that saved.
        groups: options of each parameter group, by its number.
        parameters: for each stored name ``shape``, ``group``, ``steps``, and ``options``: the number of the group or of
            a rule in it, with a suffix for blocks of another dtype or of an earlier save. Also ``merged``, the shape
            that is cut into blocks, and ``cuts``, their lengths along each dim (both None if element-wise). With
            expert parallelism also ``parts``, the number of ranks that hold different ones.
        layouts: a block's bytes, by ``"options:shape"`` as ``layout_key`` gives it.
        files: ``bytes`` and ``crc32`` of each file in the folder.
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
            CheckpointError: if there is none, or it is damaged or of another format.
        """
        file = path / NAME
        if not file.is_file():
            begun = any(path.glob("data-*")) if path.is_dir() else False
            raise CheckpointError(
                f"{path} holds no complete Shampoo checkpoint: it has no {NAME}"
                + ("; a save into it was interrupted" if begun else "")
            )
        try:
            content = json.loads(file.read_bytes())
            body = content["body"]
            intact = content["crc32"] == _checksum(body)
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{file} is damaged: {error!r}") from error
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error
        if not intact:
            raise CheckpointError(f"{file} is damaged: its checksum is not the one that was saved")
        if body.get("format") != FORMAT:
            raise CheckpointError(
                f"{file} has format {body.get('format')!r}, and this version of shampoo_deepspeed reads {FORMAT}"
            )
        known = {name: body[name] for name in (f.name for f in fields(cls)) if name in body or name not in _ADDED}
        known["parameters"] = {name: _completed(record) for name, record in body["parameters"].items()}
        known["layouts"] = {
            key: [(name, dtype, tuple(shape)) for name, dtype, shape in layout]
            for key, layout in body["layouts"].items()
        }
        return cls(**known)

    def commit(self, path: Path) -> None:
        """Put the manifest into its place by one rename, so that a reader sees the old checkpoint or the new one."""
        body = {"format": FORMAT, **asdict(self)}
        content = json.dumps({"crc32": _checksum(body), "body": body}, indent=1)
        aside = path / f"{NAME}.{self.directory}"
        try:
            with aside.open("w", encoding="utf-8") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(aside, path / NAME)
        except OSError:
            aside.unlink(missing_ok=True)
            raise
        sync_directory(path)


def _completed(record: dict[str, Any]) -> dict[str, Any]:
    """Complete a record from before rules existed: blocks had one size, ``max_dim``, and the group's options."""
    if "cuts" in record:
        return record
    cuts = [list(along) for along in even_cuts(record["merged"], record["max_dim"])] if record["merged"] else None
    return {**record, "options": record["group"], "cuts": cuts}


def stored_name(key: str, part: int | None) -> str:
    """A parameter's key in checkpoints: with expert parallelism, ranks hold different ones under the same name.

    A key that looks like that of a part gets an "@" at its end.
    """
    if part is None:
        return f"{key}@" if _NUMBERED.fullmatch(key) else key
    return f"{key}@{part}"


def base_key(name: str) -> str:
    """A parameter's key without the number of its expert-parallel part."""
    found = _NUMBERED.fullmatch(name)
    return found[1] if found else name


def layout_key(options: int | str, shape: Sequence[int]) -> str:
    """The key of a block layout: saved number of its options and block shape."""
    return f"{options}:{'x'.join(map(str, shape))}"


def options_record(config: ShampooConfig, lr: float | Tensor) -> dict[str, Any]:
    """A group's options as a manifest has them, in JSON types; ``lr`` is the present one."""
    record: dict[str, Any] = json.loads(
        json.dumps({name: getattr(config, name) for name in OPTION_NAMES} | {"lr": float(lr)})
    )
    return record


def versions() -> dict[str, str]:
    """The versions that a manifest records."""
    return {"shampoo_deepspeed": __version__, "torch": torch.__version__}


def check_files(directory: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Check files in a folder against what a manifest records of them.

    Raises:
        CheckpointError: naming the first file that is not as it was written.
    """
    total = sum(expected["bytes"] for expected in files.values())
    with progress("checking the checkpoint", total, mebibytes) if total >= LARGE else UNSHOWN as advance:
        for name, expected in sorted(files.items()):
            file = directory / name
            if not file.is_file():
                raise CheckpointError(f"{file} is missing")
            size = file.stat().st_size
            if size != expected["bytes"]:
                raise CheckpointError(
                    f"{file} has {size} bytes and should have {expected['bytes']}: it was cut short or changed"
                )
            if checksum(file, advance) != expected["crc32"]:
                raise CheckpointError(f"{file} is damaged: its checksum is not the one that was saved")


def checksum(file: Path, advance: Callable[[int], None] = lambda _: None) -> str:
    """CRC-32 of a file's bytes, as eight hexadecimal digits."""
    value = 0
    with file.open("rb") as stream:
        while piece := stream.read(1 << 22):
            value = zlib.crc32(piece, value)
            advance(len(piece))
    return f"{value:08x}"


def sync_directory(path: Path) -> None:
    """Make a rename in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksum(body: Any) -> str:
    return f"{zlib.crc32(json.dumps(body, sort_keys=True).encode()):08x}"
