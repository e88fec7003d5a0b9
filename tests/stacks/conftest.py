"""A folder with a text, a tokenizer and a tiny model, for stacks that read files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState

from tests.support.tiny_text import prepare, save_weights


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    prepare(folder)
    save_weights(folder)
    return folder


@pytest.fixture(autouse=True)
def separate(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is asked of the network, and accelerate's global state does not outlive a test."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
