"""The first step warns of likely mistakes: patterns that match nothing, and matrices without names."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from shampoo_deepspeed import Shampoo
from tests.support.stepping import drive, parameter

NAMELESS = "of the preconditioned parameters 1 have no names"


def warnings_of(caplog: pytest.LogCaptureFixture, params: Any, tensors: list[nn.Parameter], **options: Any) -> str:
    drive(Shampoo(params, **options), tensors, range(2))
    return "\n".join(record.getMessage() for record in caplog.records if record.levelname == "WARNING")


def test_a_pattern_that_matches_nothing_is_named(caplog: pytest.LogCaptureFixture) -> None:
    w, b = parameter(8, 6), parameter(6)
    options = {
        "exclude": ["*typo*", "*embed*"], "no_decay": ["b", "nrom*"],
        "rules": [{"match": ["w", "*q_porj*"], "max_preconditioner_dim": 4}],
    }  # fmt: skip
    logged = warnings_of(caplog, [("w", w), ("b", b)], [w, b], **options)
    assert logged.split("\n") == [
        "exclude: no parameter of the optimizer matches '*typo*'",
        "no_decay: no parameter of the optimizer matches 'nrom*'",
        "rules: no parameter of the optimizer matches '*q_porj*'",
    ]


def test_a_pattern_of_one_group_may_match_in_another(caplog: pytest.LogCaptureFixture) -> None:
    """Options are usually given once for all groups, as under the Trainer."""
    w, b = parameter(8, 6), parameter(6)
    groups = [{"params": [("w", w)]}, {"params": [("b", b)]}]
    assert not warnings_of(caplog, groups, [w, b], exclude=["b"], no_decay=["kind:1d"], rules=[])


def test_matrices_without_names_are_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    w, b = parameter(8, 6), parameter(6)
    assert NAMELESS in warnings_of(caplog, [w, b], [w, b])
    assert caplog.text.count(NAMELESS) == 1


@pytest.mark.parametrize("options", [{"exclude": []}, {"max_preconditioner_dim": 1, "large_dim": "identity"}])
def test_no_warning_if_names_would_change_nothing(caplog: pytest.LogCaptureFixture, options: dict[str, Any]) -> None:
    w, b = parameter(8, 6), parameter(6)
    assert not warnings_of(caplog, [w, b], [w, b], **options)
