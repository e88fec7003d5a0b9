"""Read and replace what a checkpoint's manifest says, with a right checksum, as a stranger could."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shampoo_deepspeed.checkpoint.manifest import NAME
from shampoo_deepspeed.checkpoint.writer import encoded


def body_of(folder: Path) -> Any:
    return json.loads((folder / NAME).read_bytes())["body"]


def put(folder: Path, body: Any) -> None:
    (folder / NAME).write_bytes(encoded(body))
