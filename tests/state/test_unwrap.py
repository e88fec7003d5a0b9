"""The Shampoo inside frameworks' wrappers is found, also by the functions that save and load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from shampoo_deepspeed import load_shampoo, save_shampoo, unwrap
from tests.support.stepping import drive, parameter, shampoo


class Holder:
    """Holds an optimizer as a DeepSpeed engine, its ZeRO optimizer, AcceleratedOptimizer and a Trainer do."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer


def test_saving_and_loading_accept_wrappers_of_the_optimizer(tmp_path: Path) -> None:
    params = [parameter(8, 6)]
    inner = shampoo([("w", params[0])])
    drive(inner, params, range(2))
    held = Holder(Holder(inner))
    assert unwrap(held) is inner and unwrap(inner) is inner
    save_shampoo(held, tmp_path)
    again = shampoo([("w", params[0])])
    assert load_shampoo(Holder(again), tmp_path).loaded == ("w",)


def test_attributes_of_the_optimizer_itself_do_not_mislead() -> None:
    inner = shampoo([("w", parameter(8, 6))])
    inner.optimizer = "a note of the user's"  # type: ignore[attr-defined]
    assert unwrap(Holder(inner)) is inner
    circle = Holder(None)
    circle.optimizer = circle
    with pytest.raises(TypeError, match="a Shampoo optimizer is needed"):
        unwrap(circle)


@pytest.mark.parametrize(
    "wrong, found",
    [
        (None, "builtins.NoneType"),
        (Holder(None), "tests.state.test_unwrap.Holder$"),  # like a Trainer before training
        (Holder(torch.optim.SGD([torch.ones(1)])), "Holder with torch.optim.sgd.SGD inside"),
    ],
)
def test_an_object_without_a_shampoo_inside_is_named(wrong: Any, found: str, tmp_path: Path) -> None:
    for use in (unwrap, lambda o: save_shampoo(o, tmp_path), lambda o: load_shampoo(o, tmp_path)):
        with pytest.raises(TypeError, match=f"a Shampoo optimizer is needed, .*this is .*{found}"):
            use(wrong)
