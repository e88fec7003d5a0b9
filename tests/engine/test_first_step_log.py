"""The first step warns of likely mistakes: patterns that match nothing, and matrices without names."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from torch import nn

from shampoo_deepspeed import Shampoo
from shampoo_deepspeed.engine import parameter_registry
from tests.support.stepping import drive, parameter

NAMELESS = "of the preconditioned parameters 1 have no names"


@pytest.fixture(autouse=True)
def _as_in_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parameter_registry, "WARNED", [])


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


def test_matrices_without_names_are_warned_of_once_in_a_process(caplog: pytest.LogCaptureFixture) -> None:
    """And not once for each optimizer, as of a script that builds one for each layer."""
    w, b = parameter(8, 6), parameter(6)
    assert NAMELESS in warnings_of(caplog, [w, b], [w, b])
    warnings_of(caplog, [w, b], [w, b])
    assert caplog.text.count(NAMELESS) == 1


@pytest.mark.parametrize(
    "options",
    [{"exclude": []}, {"preconditioner": "shampoo", "max_preconditioner_dim": 1, "large_dim": "identity"}],
)
def test_no_warning_if_names_would_change_nothing(caplog: pytest.LogCaptureFixture, options: dict[str, Any]) -> None:
    w, b = parameter(8, 6), parameter(6)
    assert not warnings_of(caplog, [w, b], [w, b], **options)


def test_the_table_has_columns_that_line_up_and_fit_on_a_screen(caplog: pytest.LogCaptureFixture) -> None:
    """Layers share a line, numbers end below each other, and a long name keeps its two ends."""
    named: list[tuple[str, nn.Parameter]] = [
        *((f"layers.{n}.mlp.up.weight", parameter(8, 6, seed=n)) for n in range(12)),
        (f"{'a' * 70}.weight", parameter(128, 4)),
        ("bias", parameter(6)),
    ]
    caplog.set_level(logging.INFO, logger="shampoo_deepspeed")
    drive(Shampoo(named, max_preconditioner_dim=8), [p for _, p in named], range(1))
    (text,) = [message for message in caplog.messages if message.startswith("Shampoo preconditions")]
    _, head, rule, *rows, total = text.splitlines()
    assert head.split() == ["parameter", "shape", "count", "policy", "why"]
    assert set(rule) == {"-", " "} and len(rule) < 130
    assert rows[0].split()[:3] == ["layers.*.mlp.up.weight", "8x6", "12"] and len(rows) == 3
    assert rows[1].split()[0] == f"{'a' * 28}...{'a' * 21}.weight"
    assert rows[0].index("8x6") + len("8x6") == rows[1].index("128x4") + len("128x4")
    assert total == "1,088 of 1,094 elements (99.5%) are preconditioned"
