"""Editors complete option names: the types list every option of ShampooConfig, with what a user may write for it."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from shampoo_deepspeed import Shampoo, ShampooConfig
from shampoo_deepspeed.integrations.trainer import deferred
from shampoo_deepspeed.options.config import OPTION_NAMES
from shampoo_deepspeed.options.typed import DeferredOptions, Options

OTHERS = {  # what an option holds, and what may be written for it
    "tuple[float, float]": "Sequence[float]",
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
    assert hints(Options) == expected
    auto = {name: f"{hint} | Literal['auto']" for name, hint in expected.items() if name in AUTO}
    assert hints(DeferredOptions) == expected | auto


@pytest.mark.parametrize("function", [Shampoo, deferred], ids=["Shampoo", "deferred"])
def test_a_notebook_completes_every_option(function: object) -> None:
    assert callable(function)
    assert set(inspect.signature(function).parameters) >= set(OPTION_NAMES)


@pytest.mark.slow
def test_a_type_checker_knows_the_options(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from torch import nn\n"
        "from shampoo_deepspeed import Shampoo\n"
        "model = nn.Linear(2, 2)\n"
        "Shampoo(model.named_parameters(), precondition_frequency=5, betas=[0.9, 0.95], exclude=['*'])\n"
        "Shampoo(model.named_parameters(), precondition_frequncy=5)\n"
        "Shampoo(model.named_parameters(), precondition_frequency='5')\n"
    )
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", "--no-error-summary", str(script)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=600)
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stdout + done.stderr
    assert 'script.py:5: error: Unexpected keyword argument "precondition_frequncy"' in lines[0]
    assert "script.py:6: error: Argument" in lines[1] and 'expected "int"' in lines[1]
