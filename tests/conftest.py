"""Settings of all tests: one thread, and reproducible property tests without deadlines, because machines are shared.

Also marks the tests that start processes as slow, and keeps tests that share a launch of ranks in one worker.
"""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # else blocks would be computed there

import pytest
from hypothesis import settings

from shampoo_deepspeed.checkpoint.async_writer import WRITER
from tests.support.backgrounds import wait_for_refreshes
from tests.support.torch_settings import assert_same_settings, torch_settings

settings.register_profile("suite", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("suite")


def pytest_collection_finish() -> None:
    """Exempt all objects of imported modules from garbage collection.

    The Trainer starts a full collection in each training, which would otherwise visit half a million objects of torch,
    transformers and deepspeed.
    """
    gc.collect()
    gc.freeze()


def pytest_itemcollected(item: pytest.Item) -> None:
    if "distributed" in item.path.parts:
        item.add_marker(pytest.mark.slow)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With pytest-xdist, give all tests that share launches of ranks to one worker, and others to workers by file."""
    from xdist.scheduler import LoadScopeScheduling

    class ByLaunch(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::", 1)[0]
            return "launches" if _asks_ranks(config.rootpath / file) else file

    return ByLaunch(config, log)


@functools.cache
def _asks_ranks(file: Path) -> bool:
    return "ask: Ask" in file.read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def _leaves_torch_as_it_was() -> Iterator[None]:
    """Else other tests would pass or fail by their order."""
    before = torch_settings()
    yield
    assert_same_settings(before)


@pytest.fixture(autouse=True)
def _leaves_no_refresh_under_way(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Else its thread would still compute during the next test, where operators are counted or replaced.

    It asks for ``monkeypatch`` so that what the test has replaced is still in place meanwhile.
    """
    yield
    wait_for_refreshes()


@pytest.fixture(autouse=True)
def _leaves_no_failure_of_a_save() -> Iterator[None]:
    """Else `wait_for_saves` of the next test in this process would raise it."""
    yield
    if WRITER.unfinished:
        WRITER.thread.submit(int).result(timeout=60)  # the thread writes one after another
        WRITER.forget()
