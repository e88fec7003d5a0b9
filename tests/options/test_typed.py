"""Editors complete option names: the types list every option of ShampooConfig, with what a user may write for it."""

from __future__ import annotations

import inspect
from dataclasses import fields

import pytest
from torch import nn

from shampoo_deepspeed import OptionError, Shampoo, ShampooConfig
from shampoo_deepspeed.integrations.trainer import deferred
from shampoo_deepspeed.options.config import GIVEN_NAMES
from shampoo_deepspeed.options.presets import MEMORIES, MEMORY, PRESET, PRESETS
from shampoo_deepspeed.options.typed import DeferredOptions, Options

OTHERS = {  # what an option holds, and what may be written for it
    "tuple[float, float]": "Sequence[float]",
    "tuple[float, float] | None": "Sequence[float] | None",
    "tuple[str, ...]": "Sequence[str]",
    "tuple[int, ...]": "Sequence[int]",
    "tuple[dict[str, Any], ...]": "Sequence[Mapping[str, Any]]",
    "float | tuple[float | None, ...] | None": "float | Sequence[float | None] | None",
}
AUTO = ("betas", "eps", "weight_decay")


def hints(options: type) -> dict[str, str]:
    return {name: hint.__forward_arg__ for name, hint in options.__annotations__.items()}


def test_the_types_are_those_of_the_options() -> None:
    expected = {f.name: OTHERS.get(str(f.type), str(f.type)) for f in fields(ShampooConfig) if f.name != "lr"}
    for name, presets in ((PRESET, PRESETS), (MEMORY, MEMORIES)):
        expected[name] = f"Literal[{', '.join(map(repr, presets))}] | None"
    assert hints(Options) == expected
    auto = {name: f"{hint} | Literal['auto']" for name, hint in expected.items() if name in AUTO}
    assert hints(DeferredOptions) == expected | auto


@pytest.mark.parametrize("function", [Shampoo, deferred], ids=["Shampoo", "deferred"])
def test_a_notebook_completes_every_option(function: object) -> None:
    assert callable(function)
    assert set(inspect.signature(function).parameters) >= set(GIVEN_NAMES)


def test_a_wrong_name_or_type_is_an_error_for_a_type_checker_too() -> None:
    """`make lint` finds here that mypy knows the options: it reports a mark that is not needed."""
    model = nn.Linear(2, 2)
    Shampoo(model.named_parameters(), precondition_frequency=5, betas=[0.9, 0.95], exclude=["*"])
    with pytest.raises(OptionError, match="precondition_frequency"):
        Shampoo(model.named_parameters(), precondition_frequncy=5)  # type: ignore[call-arg]
    with pytest.raises(OptionError, match="precondition_frequency"):
        Shampoo(model.named_parameters(), precondition_frequency="5")  # type: ignore[arg-type]
