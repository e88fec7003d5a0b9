"""Finds out who is calling, from call frames, if a framework has no public API for it. No other file looks at frames.

docs/internals.md lists every search, and what happens if the framework renames what is searched for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType

# How many frames to search: between the framework's function and the search are ours and those of users' wrappers.
NEAR = 24


def calling_frame(wanted: Callable[[FrameType], bool]) -> FrameType | None:
    """Return the nearest calling frame that is wanted, or None."""
    frame: FrameType | None = sys._getframe(1)
    for _ in range(NEAR):
        if frame is None:
            return None
        if wanted(frame):
            return frame
        frame = frame.f_back
    return None


def frame_in_module(module: str, *functions: str) -> FrameType | None:
    """Return the nearest calling frame in a module that runs one of these functions (or any), or None."""
    return calling_frame(
        lambda frame: frame.f_globals.get("__name__") == module and (not functions or frame.f_code.co_name in functions)
    )
