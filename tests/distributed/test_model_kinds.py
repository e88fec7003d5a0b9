"""Parameters without names have the policies of named ones, for many models under every framework."""

from __future__ import annotations

import pytest

from tests.support.launch import Ask, Check, named
from tests.support.model_kinds import MODELS

FRAMEWORKS = ("plain", "ddp", "fsdp1", "fsdp2", "zero1", "zero3")
CHECKS = [Check(f"kinds_{name}", 2, "model_kinds:compare", name) for name in FRAMEWORKS]


@pytest.mark.parametrize("check", CHECKS, ids=named)
def test_parameters_without_names_have_the_policies_of_named_ones(check: Check, ask: Ask) -> None:
    for different in ask(check):
        assert different == dict.fromkeys(MODELS, {})
