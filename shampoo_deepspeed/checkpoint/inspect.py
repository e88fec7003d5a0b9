"""What a checkpoint holds, as text: `python -m shampoo_deepspeed inspect PATH`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shampoo_deepspeed.checkpoint.errors import CheckpointError, printable
from shampoo_deepspeed.checkpoint.manifest import NAME, Manifest, open_checkpoint, other_saves
from shampoo_deepspeed.checkpoint.tensor_files import TensorFiles
from shampoo_deepspeed.options.config import ShampooConfig


def describe(path: Path) -> str:
    """Parameters, options, sizes and health of a checkpoint; nothing in it can act on a terminal.

    Raises:
        CheckpointError: if there is no complete checkpoint, or a file is damaged.
    """
    manifest, files = _opened(path)
    unfit = files.verify(0, 1, set(manifest.parameters))
    size = sum(facts["bytes"] for facts in manifest.files.values())
    steps = {record["steps"] for record in manifest.parameters.values()}
    ranks = f"{manifest.world_size} rank{'s' * (manifest.world_size != 1)}"
    lines = [
        f"Shampoo checkpoint {path}",
        f"saved by {ranks} with {_versions(manifest.versions)}",
        f"{len(manifest.files)} files, {_megabytes(size)}, all checksums match",
        f"steps: {_range(steps)}; rejected: {manifest.rejected_steps}",
    ]
    lines += [f"{problem.upper()}: {tensor}" for tensor, problem in unfit.values()]
    lines += [f"group {number}: {_changed(options)}" for number, options in sorted(manifest.groups.items())]
    rows = [_row(name, record) for name, record in manifest.parameters.items()]
    header = ("parameter", "shape", "group", "steps", "state")
    widths = [max(len(row[n]) for row in [header, *rows]) for n in range(len(header))]
    lines += ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in [header, *rows]]
    return "\n".join(map(printable, lines))


def _opened(path: Path) -> tuple[Manifest, TensorFiles]:
    """The checkpoint in this folder; the error names one that is farther below, as in a Trainer's checkpoint."""
    try:
        return open_checkpoint(path)
    except OSError as error:  # such as for a name that is too long
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    except CheckpointError as error:
        below = [] if (path / NAME).exists() else other_saves(path)
        if not below:
            raise
        raise CheckpointError(f"{error}; there is one in {below[0]}") from None


def _versions(found: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in sorted(found.items())) or "unknown versions"


def _row(name: str, record: Mapping[str, Any]) -> tuple[str, str, str, str, str]:
    shape = "x".join(map(str, record["shape"])) or "scalar"
    state = "element-wise"
    if record["merged"] is not None:
        count = math.prod(map(len, record["cuts"]))
        largest = "x".join(str(max(lengths, default=0)) for lengths in record["cuts"])
        state = f"{count} block{'s' * (count != 1)}, largest {largest}"
    return name, shape, str(record["group"]), str(record["steps"]), state


def _changed(options: Mapping[str, Any]) -> str:
    """The options that differ from the defaults."""
    defaults = ShampooConfig().to_json()
    changed = [f"{k} = {v}" for k, v in options.items() if k not in defaults or defaults[k] != v]
    return ", ".join(changed) or "all options at their defaults"


def _range(values: set[int]) -> str:
    return str(min(values)) if len(values) == 1 else f"{min(values, default=0)} to {max(values, default=0)}"


def _megabytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
