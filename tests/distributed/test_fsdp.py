"""Under DDP, FSDP1, FSDP2, HSDP and tensor parallelism the trajectory is that of the unsharded reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.support.exactness import assert_ranks_agree
from tests.support.fsdp_checks import BOUND, SETTINGS, covering, final
from tests.support.fsdp_runs import Run, expected, replayed
from tests.support.launch import Ask, Check, named
from tests.support.scenarios import FAMILY, RULES
from tests.support.zoo import relative_error


def single_features() -> list[Check]:
    """Return runs of single features, in float64, where any mistake shows."""
    exact = Run(settings="default", dtype="float64")
    flat = replace(exact, layout="units_full_shard", unused=2)
    spared = {"no_decay": ("*bias", "norm*"), "weight_decay": 0.3}
    found = [
        final("flat_names", replace(flat, given="names"), 2),
        final("flat_parameters", replace(flat, given="parameters"), 2),
        final("flat_no_shard_parameters", replace(flat, given="parameters", layout="units_no_shard"), 2),
        final("fsdp1_parameters", replace(flat, given="parameters", layout="fsdp1_full_shard"), 2),
        final("fsdp2_parameters", replace(flat, given="parameters", layout="rows"), 2),
        final("replicas_parameters", replace(flat, given="parameters", layout="replicas"), 2),
        final("flat_no_decay", replace(flat, extra=spared), 2),
        final("flat_resumed", replace(flat, resumed_at=4, extra={"momentum": 0.5}), 2),
        final("fsdp1_unfrozen", replace(exact, layout="fsdp1_full_shard", frozen_steps=3), 4),
    ]
    options = {"momentum": 0.8, "nesterov": True, "grafting": "normalized_adam", "lr": 1e-3}
    found.append(final("fsdp2_momentum", Run(settings="default", dtype="float64", extra=options), 2))
    sides: dict[str, Any] = {
        "preconditioner": "shampoo",
        "large_dim": "diagonal",
        "beta3": 0.5,
        "weight_decay_type": "independent",
        "one_sided": "smaller",
    }
    sampled = {"statistics_frequency": 2}
    for name, extra in (("sides", sides), ("rules", {"rules": RULES}), ("statistics", sampled)):
        found.append(final(f"fsdp2_{name}", Run(settings="default", dtype="float64", extra=extra), 2))
    for name, extra in FAMILY.items():
        found += [final(f"fsdp2_{name}", replace(base, steps=13, extra=extra), 2) for base in SETTINGS]
    muon = Run(model="wide", layout="tensor_parallel", extra=FAMILY["muon"])
    found += [final("tensor_parallel_muon", muon, 4), final("fsdp1_muon", replace(muon, layout="fsdp1_full_shard"), 2)]
    coupled = {"weight_decay": 0.3, "decoupled_weight_decay": False}
    found.append(Check("flat_moved_to_fsdp2", 2, "fsdp:moved", MOVED))
    found.append(final("hsdp_coupled", Run(settings="default", dtype="float64", extra=coupled, layout="hsdp"), 4))
    for layout in ("beside_plain", "ignored"):  # tensor parallelism that leaves plain parameters, as Transformers' does
        found.append(final(f"{layout}_momentum", Run(model="wide", layout=layout, extra={"momentum": 0.5}), 2))
        found.append(final(f"{layout}_exact", replace(exact, model="wide", layout=layout), 2))
    return found


TINY_BUCKETS = {"bucket_mb": 0.0005}
WAITING = Run(model="wide", extra=TINY_BUCKETS | {"overlap": False})
IN_ORDER = [
    Check("fsdp2_waiting", 2, "fsdp:waited", WAITING),
    final("fsdp2_overlapped", replace(WAITING, extra=TINY_BUCKETS), 2),
]
REFUSED = [
    (Check("fsdp1_refused_original", 2, "fsdp:refused", "original"), "build the optimizer after wrapping"),
    (Check("fsdp1_refused_swapped", 2, "fsdp:refused", "swapped"), "build the optimizer after wrapping"),
    (Check("fsdp1_refused_ignored", 2, "fsdp:refused", "ignored"), "1 of 2 parameters with a gradient are not FSDP1's"),
    (Check("fsdp1_refused_hybrid", 4, "fsdp:refused", "hybrid"), "sharded over 2 of 4 ranks"),
    (Check("fsdp2_sharded_after", 2, "fsdp:sharded_after", "fsdp2"), "are no longer the model's and would never be"),
    (Check("fsdp1_sharded_after", 2, "fsdp:sharded_after", "fsdp1"), "are no longer the model's and would never be"),
    (Check("fsdp1_refused_tensor_parallel", 4, "fsdp:refused", "tensor_parallel"), "over tensor parallelism"),
]
PRECISION = ("bf16", "fsdp1_bf16", "flat_bf16", "flat_bf16_gradients")
LOW = [Check(f"recorded_{layout}", 2, "fsdp:recorded", Run(layout=layout)) for layout in PRECISION]
APART = [Check("apart_rows_4ranks", 4, "fsdp:recorded", Run(apart=True))]
APART += [
    Check(f"apart_{layout}", 2, "fsdp:recorded", Run(apart=True, layout=layout))
    for layout in ("rows", "replicas", "fsdp1_full_shard", "flat_full_shard")
]
UNITS = Run(layout="units_full_shard", steps=1)
KEYS = [
    Check(f"keys_{given}", 2, "fsdp:keys", replace(UNITS, given=given)) for given in ("model", "names", "parameters")
]
MOVED = Run(settings="default", dtype="float64", layout="units_full_shard", extra={"momentum": 0.5})
DIVIDED = [Check(f"replicas_traffic_{n}ranks", n, "fsdp:traffic", Run(layout="replicas", steps=3)) for n in (2, 4)]
ALIGNED = Check("fsdp2_aligned", 2, "fsdp:traffic", Run(model="wide", extra={"max_preconditioner_dim": 4}, steps=3))


@pytest.mark.parametrize("check", covering() + single_features(), ids=named)
def test_the_trajectory_is_that_of_the_reference(check: Check, ask: Ask) -> None:
    run: Run = check.argument
    values, wanted = ask(check), expected(run)
    assert_ranks_agree(values)
    found = {n: relative_error(values[0][n], wanted[n]) for n in wanted}
    worst = max(found, key=lambda n: found[n])
    print(f"{worst} deviates by {found[worst]:.1e}")  # shown by pytest -rP
    assert found[worst] <= BOUND[run.settings, run.dtype], found


@pytest.mark.parametrize("waiting, overlapped", [IN_ORDER], ids=["tiny_buckets"])
def test_without_overlap_every_bit_is_the_same(waiting: Check, overlapped: Check, ask: Ask) -> None:
    """`overlap=False`, for debugging, waits for each collective, and nothing else changes."""
    ((one, over), *_), (other, *_) = ask(waiting), ask(overlapped)
    assert len(over) > 100 and all(over)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("check", [ALIGNED], ids=named)
def test_shards_that_line_up_with_blocks_move_nothing(check: Check, ask: Ask) -> None:
    """Every matrix has 12, 20 or 36 rows per rank, a multiple of the block size; only the readout has 13."""
    for stats in ask(check):
        assert stats["bytes_sent"] == stats["planned_bytes_sent"]
        assert stats["bytes_sent"] + stats["bytes_received"] <= 4 * 2 * 4 * 24


@pytest.mark.parametrize("check", DIVIDED, ids=named)
def test_replicas_divide_the_work_and_exchange_updates_only(check: Check, ask: Ask) -> None:
    """Each rank receives the updates of the others' blocks once; together, N - 1 times all updates are received."""
    stats, run = ask(check), check.argument
    matrices = sum(w.numel() for n, w in expected(run).items() if w.squeeze().ndim > 1 and n != "embed.weight")
    assert sum(s["bytes_received"] for s in stats) == (check.ranks - 1) * matrices * 4
    assert all(0 < s["bytes_received"] < matrices * 4 for s in stats)
    assert all(s["bytes_received"] == s["planned_bytes_received"] for s in stats)


@pytest.mark.parametrize("check", LOW + APART, ids=named)
def test_the_step_is_exact_for_the_gradients_that_were_seen(check: Check, ask: Ask) -> None:
    """Gradients come from bfloat16, or from ranks that use different layers; the shards are in float32."""
    found = ask(check)
    assert_ranks_agree([values for values, _ in found])
    values, seen = found[0]
    wanted = replayed(check.argument, seen)
    assert len(seen) == check.argument.steps and all(step.keys() >= wanted.keys() for step in seen)
    assert max(relative_error(values[n], wanted[n]) for n in wanted) <= BOUND["strict", "float32"]


@pytest.mark.parametrize("check", KEYS, ids=named)
def test_flat_tensors_have_the_state_keys_of_the_plain_model(check: Check, ask: Ask) -> None:
    for sharded, plain in ask(check):
        assert sharded == plain and "embed.weight" in plain and "up.bias" in plain


@pytest.mark.parametrize("check, message", REFUSED, ids=[check.name for check, _ in REFUSED])
def test_fsdp1_parameters_without_their_model_are_never_trained_as_vectors(
    check: Check, message: str, ask: Ask
) -> None:
    for found in ask(check):
        assert message in found
