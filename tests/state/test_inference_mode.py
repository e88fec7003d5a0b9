"""State that is made within ``torch.inference_mode``, as in an evaluation, can be trained with afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from shampoo_deepspeed import Shampoo, load_shampoo, save_shampoo
from tests.support.stepping import drive, parameter, same_bits, shampoo, snapshot

OPTIONS = {"ema_decay": 0.5, "momentum": 0.9, "refresh": "staggered"}


class Run:
    """A model of three parameters, its optimizer, and a folder."""

    def __init__(self, folder: Path, steps: int) -> None:
        own = [parameter(12, 10), parameter(5), parameter(12, 10, seed=1, dtype=torch.bfloat16)]
        self.model, self.folder = nn.ParameterList(own), folder
        self.params = list(self.model)
        self.optimizer: Shampoo = shampoo(self.model.named_parameters(), **OPTIONS)
        drive(self.optimizer, self.params, range(steps))


def by_folder(run: Run, source: Run) -> None:
    load_shampoo(run.optimizer, run.folder)


def by_state_dict(run: Run, source: Run) -> None:
    run.optimizer.load_state_dict(copy.deepcopy(source.optimizer.state_dict()))


def by_torchs_helpers(run: Run, source: Run) -> None:
    found = get_optimizer_state_dict(source.model, source.optimizer)
    set_optimizer_state_dict(run.model, run.optimizer, found)


def by_helpers_and_a_save(run: Run, source: Run) -> None:
    by_torchs_helpers(run, source)
    save_shampoo(run.optimizer, run.folder.parent / "again")


def by_a_copy(run: Run, source: Run) -> None:
    again, run.optimizer = copy.deepcopy((source.params, source.optimizer))
    run.params = again


def with_averages(run: Run, source: Run) -> None:
    by_folder(run, source)
    with run.optimizer.averaged_weights():
        pass


def consolidated(run: Run, source: Run) -> None:
    by_folder(run, source)
    run.optimizer.consolidate_state_dict()


LOADS = (by_folder, by_state_dict, by_torchs_helpers, by_helpers_and_a_save, by_a_copy, with_averages, consolidated)


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("load", LOADS)
def test_what_is_loaded_in_inference_mode_trains_on(
    load: Callable[[Run, Run], None], steps: int, tmp_path: Path
) -> None:
    """Into an optimizer that has stepped, or has not."""
    source = Run(tmp_path / "saved", 5)
    save_shampoo(source.optimizer, source.folder)
    run = Run(source.folder, steps)
    with torch.no_grad():
        for target, p in zip(run.params, source.params, strict=True):
            target.copy_(p)
    with torch.inference_mode():
        load(run, source)
    drive(run.optimizer, run.params, range(5, 9))
    drive(source.optimizer, source.params, range(5, 9))
    assert same_bits(snapshot(run.params), snapshot(source.params))
    with run.optimizer.averaged_weights(), source.optimizer.averaged_weights():
        assert same_bits(snapshot(run.params), snapshot(source.params))
