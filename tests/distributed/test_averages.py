"""Moving averages of the weights are those of the unsharded reference under every framework, and weights come back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.support.exactness import assert_ranks_agree
from tests.support.fsdp_runs import Run, expected
from tests.support.launch import Ask, Check, named
from tests.support.scenarios import Scenario, reference_run
from tests.support.zoo import relative_error

EXTRA: dict[str, Any] = {"ema_decay": 0.7}
ZERO = [
    Check(f"averages_zero{stage}{name}", 2, "averages:under_zero", Scenario(stage=stage, options=EXTRA, **more))
    for stage, name, more in (
        (0, "", {}),
        (1, "", {}),
        (2, "", {"zero": {"offload_optimizer": {"device": "cpu"}}}),
        (3, "", {}),
        (3, "_persistent", {"zero": {"stage3_param_persistence_threshold": 0, "sub_group_size": 100}}),
        (1, "_bf16", {"half": "bf16", "model": "wide", "steps": 4}),
        (3, "_bf16", {"half": "bf16", "model": "wide", "steps": 4}),
        (
            0,
            "_fp16",
            {"half": "fp16", "model": "wide", "steps": 4, "config": {"fp16": {"enabled": True, "loss_scale": 1.0}}},
        ),
    )
]
RESUMED = [
    Check(
        f"averages_resumed_zero{stage}_{'given' if given else 'json'}{ranks}",
        ranks,
        "averages:resumed_under_zero",
        (Scenario(stage=stage, options=EXTRA, steps=5, ranks=ranks, groups=groups, zero=zero), given),
    )
    for stage, given, ranks, groups, zero in (
        (0, True, 2, True, {}),
        (1, True, 2, True, {}),
        (2, False, 2, True, {}),
        (2, True, 1, True, {}),
        (3, False, 2, True, {"sub_group_size": 100}),
        (3, True, 2, True, {}),
        (3, False, 1, False, {}),
    )
]
RUN = Run(settings="default", dtype="float64", steps=8, resumed_at=4, extra=EXTRA)
LAYOUTS: list[tuple[str, int, str, dict[str, Any]]] = [
    ("rows", 2, "odd", {}),
    ("hsdp", 4, "odd", {}),
    ("replicas", 2, "odd", {"resumed_at": 0}),
    ("fsdp1_full_shard", 2, "odd", {}),
    ("fsdp1_shard_grad_op", 2, "odd", {}),
    ("units_full_shard", 2, "odd", {}),
    ("tensor_parallel", 4, "wide", {}),
]
FSDP = [
    Check(f"averages_{layout}", ranks, "averages:under_fsdp", replace(RUN, layout=layout, model=model, **more))
    for layout, ranks, model, more in LAYOUTS
]


@pytest.mark.parametrize("check", FSDP, ids=named)
def test_averages_are_those_of_the_reference_under_fsdp(check: Check, ask: Ask) -> None:
    """Also across a new optimizer that takes over the state."""
    seen = ask(check)
    assert_ranks_agree([s["averages"] for s in seen])
    found, wanted = seen[0]["averages"], expected(check.argument, averages=True)
    assert max(relative_error(found[n], wanted[n]) for n in wanted) <= 1e-10
    assert_weights_come_back(seen)


@pytest.mark.parametrize("check", [c for c in ZERO if not c.argument.half], ids=named)
def test_averages_are_those_of_the_reference_under_zero(check: Check, ask: Ask) -> None:
    seen = ask(check)
    assert_ranks_agree([s["averages"] for s in seen])
    found, wanted = seen[0]["averages"], reference_run(check.argument, averages=True)
    assert max(relative_error(found[n], wanted[n].float()) for n in wanted) <= 1e-5
    assert_weights_come_back(seen)


@pytest.mark.parametrize("check", RESUMED, ids=named)
def test_averages_are_used_right_after_a_load_under_zero(check: Check, ask: Ask) -> None:
    """Before any step; the steps that follow are those of the uninterrupted run."""
    for seen in ask(check):
        assert any(not torch.equal(seen["whole"]["weights"][n], a) for n, a in seen["whole"]["averages"].items())
        for name, wanted in seen["whole"].items():
            for way in ("new", "again"):
                assert all(torch.equal(seen[way][name][n], w) for n, w in wanted.items()), f"{way}: {name}"


@pytest.mark.parametrize("check", [c for c in ZERO if c.argument.half], ids=named)
def test_models_of_16_bits_get_averages_of_their_masters(check: Check, ask: Ask) -> None:
    assert_weights_come_back(ask(check))


def assert_weights_come_back(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        before, averages, after = rank["before"], rank["averages"], rank["after"]
        assert all(torch.equal(before[n], after[n]) for n in before)
        assert any(not torch.equal(before[n], averages[n]) for n in before)
        assert rank["not_refused"] == [] and all(rank.get("forward", []))
