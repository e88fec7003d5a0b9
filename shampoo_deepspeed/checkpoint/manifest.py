"""What a checkpoint is: one JSON file beside the tensors, whose appearance makes a save complete."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from shampoo_deepspeed.geometry.blocks import even_cuts
from shampoo_deepspeed.state.block_codec import BlockLayout

FORMAT = 1
NAME = "manifest.json"


class CheckpointError(RuntimeError):
    """A checkpoint is incomplete, damaged, of an unknown format, or does not fit; the message says which and why."""


@dataclass(frozen=True)
class Manifest:
    """The contents of ``manifest.json``.

    Args:
        directory: name of the folder beside this file that holds the tensors.
        world_size: number of ranks that saved.
        groups: options of each parameter group, by its number.
        parameters: by key ``shape``, ``group``, ``options`` (the group's number, or that of a rule within it, and what
            tells blocks of another dtype or of an earlier save from others under the same options), ``steps``, and
            (None where element-wise) ``merged``, the shape that is cut into blocks, and ``cuts``, their lengths along
            each dim. With expert parallelism also ``parts``, the number of ranks that hold different ones.
        layouts: a block's bytes, by ``"options:shape"`` as ``layout_key`` gives it.
        files: ``bytes`` and ``crc32`` of each file in the folder.
        versions: of what wrote it; for people.
    """

    directory: str
    world_size: int
    rejected_steps: int
    groups: Mapping[str, Mapping[str, Any]]
    parameters: Mapping[str, Mapping[str, Any]]
    layouts: Mapping[str, BlockLayout]
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read the manifest of a checkpoint.

        Raises:
            CheckpointError: where there is none, or it is damaged or of another format.
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
        known = {name: body[name] for name in (f.name for f in fields(cls))}
        known["parameters"] = {name: _completed(record) for name, record in body["parameters"].items()}
        known["layouts"] = {
            key: [(name, dtype, tuple(shape)) for name, dtype, shape in layout]
            for key, layout in body["layouts"].items()
        }
        return cls(**known)

    def commit(self, path: Path) -> None:
        """Put the manifest in its place in one step, so that a reader sees the old checkpoint or the new one."""
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
    """A record of before there were rules: blocks had one size, ``max_dim``, and options were those of the group."""
    if "cuts" in record:
        return record
    cuts = [list(along) for along in even_cuts(record["merged"], record["max_dim"])] if record["merged"] else None
    return {**record, "options": record["group"], "cuts": cuts}


def layout_key(options: int | str, shape: Sequence[int]) -> str:
    """The key of a block layout: saved number of its options and block shape."""
    return f"{options}:{'x'.join(map(str, shape))}"


def sync_directory(path: Path) -> None:
    """Make a rename in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksum(body: Any) -> str:
    return f"{zlib.crc32(json.dumps(body, sort_keys=True).encode()):08x}"
