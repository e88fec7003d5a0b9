"""`prepare` in a single process returns all objects in their order, and refuses what cannot work."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from shampoo_deepspeed import Shampoo
from shampoo_deepspeed.integrations.accelerate import check_inner_optimizer, prepare, refuse_offload
from shampoo_deepspeed.integrations.checkpoints import add_to_save_state
from shampoo_deepspeed.state.unwrap import inner_optimizer


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_all_objects_are_returned_in_order_and_train(accelerator: Accelerator) -> None:
    model = nn.Linear(6, 4)
    before = model.weight.detach().clone()
    shampoo = Shampoo(model.named_parameters(), lr=0.1)
    loader: DataLoader[torch.Tensor] = DataLoader([torch.ones(6)], batch_size=1)  # type: ignore[arg-type]
    given = (loader, LambdaLR(shampoo, lambda step: 1.0), model, shampoo)
    prepared_loader, scheduler, prepared_model, optimizer = prepare(accelerator, *given)
    assert prepared_model is model and inner_optimizer(optimizer) is shampoo and scheduler.scheduler is given[1]
    accelerator.backward(prepared_model(next(iter(prepared_loader))).sum())
    optimizer.step()
    assert not torch.equal(model.weight, before)


def test_one_shampoo_and_one_model_are_taken(accelerator: Accelerator) -> None:
    model = nn.Linear(6, 4)
    shampoo = Shampoo(model.parameters())
    for wrong in ((model,), (model, shampoo, shampoo), (model, nn.Linear(2, 2), shampoo)):
        with pytest.raises(TypeError, match="pass one Shampoo and its model; got"):
            prepare(accelerator, *wrong)
    assert inner_optimizer(prepare(accelerator, shampoo)) is shampoo


def test_the_model_must_hold_the_parameters(accelerator: Accelerator) -> None:
    with pytest.raises(ValueError, match="2 of the optimizer's 2 parameters are not the model's"):
        prepare(accelerator, nn.Linear(6, 4), Shampoo(nn.Linear(6, 4).parameters()))


def test_a_schedule_for_another_optimizer_is_refused(accelerator: Accelerator) -> None:
    model = nn.Linear(6, 4)
    other = torch.optim.AdamW(model.parameters())
    with pytest.raises(
        ValueError, match=r"LambdaLR was built for another optimizer \(AdamW\).*build it for the Shampoo"
    ):
        prepare(accelerator, model, Shampoo(model.parameters()), LambdaLR(other, lambda step: 1.0))


def test_the_wrapped_model_must_be_attached_before_the_first_step(accelerator: Accelerator) -> None:
    model = nn.Linear(6, 4)
    shampoo = Shampoo(model.parameters())
    model(torch.ones(6)).sum().backward()
    shampoo.step()
    with pytest.raises(RuntimeError, match="call attach_model\\(\\) before the first step"):
        shampoo.attach_model(model)


def test_another_optimizer_in_the_place_of_shampoo_is_named() -> None:
    other: Any = SimpleNamespace(optimizer=torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1))
    with pytest.raises(
        RuntimeError, match=r"the optimizer that trains is torch\.optim\.sgd\.SGD, not Shampoo; do this"
    ):
        check_inner_optimizer(other, "do this")


def prepared(accelerator: Accelerator, steps: int) -> tuple[nn.Module, Shampoo]:
    """A model and its Shampoo, prepared and trained after all earlier ones were dropped."""
    accelerator.free_memory()
    model = nn.Linear(8, 4)
    model, optimizer = prepare(accelerator, model, Shampoo(model.named_parameters(), model=model, lr=1e-2))
    for _ in range(steps):
        optimizer.zero_grad()
        accelerator.backward(model(torch.randn(3, 8)).square().mean())
        optimizer.step()
    return model, inner_optimizer(optimizer)


def test_an_attempt_that_was_given_up_is_not_kept_alive(accelerator: Accelerator) -> None:
    model, optimizer = prepared(accelerator, steps=1)
    alive = weakref.ref(model.weight), weakref.ref(optimizer)
    del model, optimizer
    accelerator.free_memory()
    gc.collect()
    assert [reference() for reference in alive] == [None, None]


def test_an_attempt_that_was_given_up_is_neither_saved_nor_resumed(accelerator: Accelerator, tmp_path: Path) -> None:
    given_up = prepared(accelerator, steps=3)  # an exception's traceback, too, may keep it alive
    _, optimizer = prepared(accelerator, steps=5)
    accelerator.save_state(str(tmp_path))
    assert [path.name for path in tmp_path.glob("shampoo*")] == ["shampoo"]
    for steps in (0, 2):
        _, resumed = prepared(accelerator, steps)
        accelerator.load_state(str(tmp_path))
        assert steps_of(resumed) == steps_of(optimizer) == {"weight": 5, "bias": 5}
    assert steps_of(given_up[1]) == {"weight": 3, "bias": 3}


def test_the_state_is_loaded_from_the_folder_that_the_optimizers_file_says(
    accelerator: Accelerator, tmp_path: Path
) -> None:
    """Another Shampoo, which is not prepared again, may have had the first folder."""
    other = Shampoo([("other", nn.Parameter(torch.ones(2)))])
    add_to_save_state(accelerator, other)
    prepared(accelerator, steps=5)
    accelerator.save_state(str(tmp_path))
    assert {path.name for path in tmp_path.glob("shampoo*")} == {"shampoo", "shampoo_1"}
    again = Accelerator(cpu=True)
    _, resumed = prepared(again, steps=0)
    again.load_state(str(tmp_path))
    assert steps_of(resumed) == {"weight": 5, "bias": 5}


def steps_of(optimizer: Shampoo) -> dict[str, int]:
    steps: dict[str, int] = optimizer.state_dict()["shampoo"]["steps"]
    return steps


@pytest.mark.parametrize(
    "config, refused",
    [
        ({}, False),
        ({"zero_optimization": {"offload_optimizer": {"device": "none"}}}, False),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, True),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}, "zero_force_ds_cpu_optimizer": True}, True),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}, "zero_force_ds_cpu_optimizer": False}, False),
    ],
)
def test_an_offload_that_replaces_the_optimizer_is_refused(config: dict[str, Any], refused: bool) -> None:
    if not refused:
        refuse_offload(config)
        return
    with pytest.raises(ValueError, match='write "zero_force_ds_cpu_optimizer": false'):
        refuse_offload(config)
