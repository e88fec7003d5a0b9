"""Settings of all tests: one thread, property tests without deadlines (machines are shared) and reproducible."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

from hypothesis import settings

settings.register_profile("suite", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("suite")


def pytest_collection_finish() -> None:
    """What has been imported by now is no business of the garbage collector: the Trainer, which starts a full
    collection in each training, would go through half a million objects of torch, transformers and deepspeed."""
    gc.collect()
    gc.freeze()
