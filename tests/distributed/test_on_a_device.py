"""Ranks with a simulated accelerator, joined by a group like NCCL's: what moves, and faults of one rank."""

from __future__ import annotations

import pytest

from tests.support.launch import Ask, Check, named

CASES = ("replicas", "offloaded", "offloaded_gloo", "refresh_fails", "refresh_fails_offloaded", "no_memory_at_first")
CHECKS = {case: Check(f"device_{case}", 2, "on_a_device:trained", case) for case in CASES}


@pytest.mark.parametrize("check", [CHECKS[case] for case in CASES[:3]], ids=named)
def test_ranks_train_as_one_process_does_and_no_cpu_tensor_is_in_an_accelerators_collective(
    check: Check, ask: Ask
) -> None:
    for seen in ask(check):
        assert not seen["error"] and not seen["mixed"]
        assert seen["devices"] == ["cuda:0"] and seen["collectives"] > 0
        assert seen["apart"] <= 1e-5


@pytest.mark.parametrize("check", [CHECKS[case] for case in CASES[3:5]], ids=named)
def test_a_refresh_that_fails_on_one_rank_keeps_all_ranks_together(check: Check, ask: Ask) -> None:
    first, second = ask(check)
    assert not first["error"] and not second["error"] and not first["mixed"] and not second["mixed"]
    assert all((a == b).all() for a, b in zip(first["weights"], second["weights"], strict=True))
    assert 0 < first["apart"] < 0.1


@pytest.mark.parametrize("check", [CHECKS["no_memory_at_first"]], ids=named)
def test_a_state_that_does_not_fit_on_one_rank_is_an_error_on_all(check: Check, ask: Ask) -> None:
    for seen in ask(check):
        assert seen["error"].startswith("OutOfMemoryError: CUDA out of memory")
