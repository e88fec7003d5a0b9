"""Settings of all tests: one thread, property tests without deadlines (machines are shared) and reproducible; which of
them start processes, and which must run in one worker where several run."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest
from hypothesis import settings

from tests.support.launch import Check

settings.register_profile("suite", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("suite")


def pytest_collection_finish() -> None:
    """What has been imported by now is no business of the garbage collector: the Trainer, which starts a full
    collection in each training, would go through half a million objects of torch, transformers and deepspeed."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Under pytest-xdist a worker runs all tests of a launch, and of a file."""
    for item in items:
        values = getattr(getattr(item, "callspec", None), "params", {}).values()
        ranks = {value.ranks for value in values if isinstance(value, Check)}
        item.add_marker(pytest.mark.xdist_group(f"{ranks.pop()} ranks" if ranks else item.location[0]))
        if "distributed" in item.path.parts:
            item.add_marker(pytest.mark.slow)
