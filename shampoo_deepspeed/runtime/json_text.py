"""Reads JSON that others have written: any text is a value or a ValueError, also if it is nested deeply."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def parse(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: if it is no JSON, nested too deeply, or has an integer of too many digits.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read(path: Path) -> Any:
    """The value of a JSON file in UTF-8.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is not UTF-8, and as ``parse``.
    """
    return parse(path.read_text(encoding="utf-8"))
