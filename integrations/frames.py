"""Who is calling: the one file that looks at call frames, for frameworks that offer no public way to learn it.

Every search is listed in docs/internals.md, with what happens if the framework renames what is searched for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType

# Frames between the framework's function and the search: ours, and those of wrappers that users put around.
NEAR = 24


def calling_frame(wanted: Callable[[FrameType], bool]) -> FrameType | None:
    """The nearest calling frame that is wanted, or None."""
    frame: FrameType | None = sys._getframe(1)
    for _ in range(NEAR):
        if frame is None:
            return None
        if wanted(frame):
            return frame
        frame = frame.f_back
    return None


def frame_in_module(module: str, *functions: str) -> FrameType | None:
    """The nearest calling frame in a module, of one of these functions (of any without names), or None."""
    return calling_frame(
        lambda frame: frame.f_globals.get("__name__") == module and (not functions or frame.f_code.co_name in functions)
    )
