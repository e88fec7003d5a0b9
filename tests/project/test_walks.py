"""How many files a reader passes who follows a step, a save or a load: docs/how-a-step-works.md promises it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import shampoo_deepspeed
from shampoo_deepspeed import Shampoo, load_shampoo, save_shampoo

pytestmark = pytest.mark.slow

PACKAGE = Path(shampoo_deepspeed.__file__).parent

# Files, and changes from one file to another.
STEP, SAVE, LOAD = (12, 60), (10, 60), (20, 150)


def walk(work: Callable[[], object]) -> list[str]:
    """The package's files that run, in order; calls within a file are not counted."""
    passed: list[str] = []

    def on_event(frame: FrameType, event: str, _: object) -> None:
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(str(PACKAGE)) and passed[-1:] != [file]:
            passed.append(file)

    before = sys.getprofile()
    sys.setprofile(on_event)
    threading.setprofile(on_event)
    try:
        work()
    finally:
        sys.setprofile(before)
        threading.setprofile(None)
    return passed


@pytest.mark.parametrize("normalizes", [False, True])
def test_walks_are_short(normalizes: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 32))
    options: dict[str, Any] = {"precondition_frequency": 2, "normalize_gradients": normalizes}
    optimizer = Shampoo(model.named_parameters(), model=model, **options)

    def compute_gradients() -> None:
        optimizer.zero_grad()
        model(torch.randn(8, 32)).square().mean().backward()

    def load_and_step() -> None:
        load_shampoo(optimizer, tmp_path)
        compute_gradients()
        optimizer.step()

    for _ in range(7):
        compute_gradients()
        optimizer.step()
    compute_gradients()
    walks = {
        "step": (walk(optimizer.step), STEP),
        "save": (walk(lambda: save_shampoo(optimizer, tmp_path)), SAVE),
        "load": (walk(load_and_step), LOAD),
    }
    for name, (passed, (files, changes)) in walks.items():
        story = f"{name}: " + " > ".join(str(Path(file).relative_to(PACKAGE)) for file in passed)
        assert passed, name
        assert len(set(passed)) <= files and len(passed) <= changes, story
