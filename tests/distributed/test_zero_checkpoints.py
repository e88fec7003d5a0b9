"""DeepSpeed's own save_checkpoint, load_checkpoint and universal checkpoints include the optimizer's state."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.launch import Ask, Check, named, run_checks
from tests.support.scenarios import BOUND, Scenario
from tests.support.zoo import relative_error

SCHEDULE = {
    "type": "WarmupLR",
    "params": {
        "warmup_min_lr": [1e-3, 4e-4],
        "warmup_max_lr": [1e-2, 3e-3],
        "warmup_num_steps": 7,
        "warmup_type": "linear",
    },
}
BASE = Scenario(accumulate=2, groups=True, config={"scheduler": SCHEDULE}, options={"momentum": 0.5})
PIECES = {"sub_group_size": 50, "stage3_param_persistence_threshold": 0}
WIDE_SUMS = {"scheduler": SCHEDULE, "data_types": {"grad_accum_dtype": "fp32"}}  # makes DeepSpeed's BF16_Optimizer
SCENARIOS = {
    "zero0": BASE,
    "zero1": replace(BASE, stage=1),
    "zero2": replace(BASE, stage=2, zero={"offload_optimizer": {"device": "cpu"}}),
    "zero3": replace(BASE, stage=3, zero=PIECES),
    "bf16_zero0": replace(BASE, half="bf16"),
    "bf16_zero2": replace(BASE, half="bf16", stage=2),
    "bf16_optimizer": replace(BASE, half="bf16", stage=1, config=WIDE_SUMS),
}
# Each stage with each other preconditioner, and the refresh modes in turn; saved in the middle of a window.
REFRESHES = ("sync", "staggered", "background")
FAMILY = {
    f"{p}_{REFRESHES[(stage + n) % 3]}_zero{stage}": replace(
        BASE, stage=stage, options={**BASE.options, "preconditioner": p, "refresh": REFRESHES[(stage + n) % 3]}
    )
    for stage in range(4)
    for n, p in enumerate(("shampoo", "soap", "kl_shampoo"))
    if n or stage > 1
}


def check(name: str, function: str, argument: Any) -> Check:
    return Check(f"checkpoint_{name}", 2, f"zero_checkpoints:{function}", argument)


# Another launch, with one rank, resumes from what two ranks have saved and converted.
FOLDERS = tempfile.TemporaryDirectory(prefix="checkpoints")
WAYS = [check(name, "all_ways", (scenario, Path(FOLDERS.name) / name)) for name, scenario in SCENARIOS.items()]
RESUMED = [check(f"resumed_{name}", "same_way", scenario) for name, scenario in FAMILY.items()]
CONVERTED = [c for c in WAYS if c.argument[0].stage > 0]
FEWER = [c for c in WAYS if c.name != "checkpoint_bf16_zero2"]
MOVED = [c for c in FEWER if c.name == "checkpoint_zero2"]
CLIENT = [
    check(f"client_zero{stage}{'_universal' * universal}", "client", (replace(BASE, stage=stage), universal))
    for stage, universal in ((0, False), (3, False), (1, True), (3, True))
]
MISSING = [check(f"missing_zero{stage}", "missing", Scenario(stage=stage)) for stage in (0, 3)]
ADAMW = [check(f"from_adamw_zero{stage}", "from_adamw", Scenario(stage=stage)) for stage in (0, 2, 3)]
WITHOUT = [check(f"without_states_zero{stage}", "without_states", Scenario(stage=stage)) for stage in (0, 2)]
STAGES = [check("zero1_to_2", "other_stage", (replace(BASE, stage=1), replace(BASE, stage=2)))]
ROUND_ROBIN = [check("round_robin", "round_robin", Scenario(stage=2))]


@pytest.mark.parametrize("check", WAYS, ids=named)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(check: Check, ask: Ask) -> None:
    for seen in ask(check):
        assert seen["latest"] == "saved"
        resumed = seen["resumed"]
        assert all(torch.equal(seen["whole"][n], resumed["parameters"][n]) for n in seen["whole"])
        assert resumed["options"] == seen["options"]


@pytest.mark.parametrize("check", RESUMED, ids=named)
def test_each_preconditioner_and_each_schedule_resumes_to_the_bit(check: Check, ask: Ask) -> None:
    for seen in ask(check):
        assert seen["preconditioner"] == check.argument.options["preconditioner"]
        assert seen["refresh"] == check.argument.options["refresh"]
        assert all(torch.equal(seen["whole"][n], seen["resumed"][n]) for n in seen["whole"])


@pytest.mark.parametrize("check", WAYS, ids=named)
def test_the_state_is_stored_once(check: Check, ask: Ask) -> None:
    """DeepSpeed's files hold only its path, a step per partition, and placeholders of one byte."""
    for seen in ask(check):
        inner = seen["inner"]
        assert inner["shampoo"] == ["external", "format"]
        partitions = len(inner["moments"])
        assert 0 < inner["bytes"] <= partitions * (4 + 2)
        if check in CONVERTED:
            assert inner["moments"] == [["exp_avg", "exp_avg_sq"]] * partitions


@pytest.mark.parametrize("check", CONVERTED, ids=named)
def test_a_converted_checkpoint_resumes_to_the_bit_on_the_same_number_of_ranks(check: Check, ask: Ask) -> None:
    """Each group has its own options again, although under ZeRO-3 DeepSpeed gives all groups those of the first one."""
    for seen in ask(check):
        converted = seen["converted"]
        assert all(torch.equal(seen["whole"][n], converted["parameters"][n]) for n in seen["whole"])
        assert converted["options"] == seen["options"]
        assert len({(g["lr"], g["weight_decay"]) for g in seen["options"]}) == 2


@pytest.fixture(scope="module")
def alone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, ask: Ask) -> dict[str, Any]:
    """Return the results of resuming the selected checkpoints on one rank."""
    own = [item for item in request.session.items if item.path == request.path and "alone" in item.fixturenames]  # type: ignore[attr-defined]
    selected = [item.callspec.params["check"] for item in own]  # type: ignore[attr-defined]
    later = []
    for saved in dict.fromkeys(c.name for c in selected):
        chosen = next(c for c in FEWER if c.name == saved)
        ask(chosen)
        scenario, folder = chosen.argument
        single = (replace(scenario, ranks=1, accumulate=4), folder)
        later.append(Check(saved, 1, "zero_checkpoints:resumed_elsewhere", single))
        if chosen in MOVED:
            later.append(Check("moved", 1, "zero_checkpoints:moved", single))
    results = run_checks(later, tmp_path_factory.mktemp("alone"))
    failures = [result.failure for result in results.values() if result.failure]
    assert not failures, "\n".join(failures)
    return {name: result.values[0] for name, result in results.items()}


@pytest.mark.parametrize("check", FEWER, ids=named)
def test_a_checkpoint_resumes_on_fewer_ranks(check: Check, ask: Ask, alone: dict[str, Any]) -> None:
    """Except at stage 0, it is converted first, as DeepSpeed demands."""
    whole, seen = ask(check)[0], alone[check.name]
    found = {n: relative_error(seen["parameters"][n], whole["whole"][n]) for n in whole["whole"]}
    print(f"worst: {max(found.values()):.1e}")  # shown by pytest -rP
    bound = 2e-3 if check.argument[0].half else BOUND["strict"]  # 16-bit gradients are summed in another order
    assert max(found.values()) <= bound, found
    assert seen["options"] == whole["options"]


@pytest.mark.parametrize("check", MOVED, ids=named)
def test_moved_files_find_their_state(check: Check, alone: dict[str, Any]) -> None:
    seen, wanted = alone["moved"], alone[check.name]["parameters"]
    for message in seen["error"]:
        assert message.startswith("CheckpointError: Shampoo's state data-") and "SHAMPOO_CHECKPOINT" in message
    for way in ("by_variable", "next_to_it"):
        assert all(torch.equal(seen[way]["parameters"][n], wanted[n]) for n in wanted)


@pytest.mark.parametrize("check", CLIENT, ids=named)
def test_an_optimizer_that_the_user_built_is_loaded_before_its_first_step(check: Check, ask: Ask) -> None:
    for seen in ask(check):
        whole = seen.pop("whole")
        for way, found in seen.items():
            assert all(torch.equal(whole[n], found[n]) for n in whole), way


@pytest.mark.parametrize("check", MISSING, ids=named)
def test_a_checkpoint_without_its_state_is_refused(check: Check, ask: Ask) -> None:
    for seen in ask(check):
        assert seen["blocked"].startswith("CheckpointError: ") and seen["latest"] == "second"
        for message in seen["other"]:
            assert "holds another save (data-" in message and "SHAMPOO_START_ANEW=1" in message
        for message in seen["gone"]:
            assert "holds no complete Shampoo checkpoint" in message and "load_optimizer_states=False" in message
        assert seen["loaded"] and seen["steps"] == {3}


@pytest.mark.parametrize("check", ADAMW, ids=named)
def test_a_run_begun_with_adamw_continues_with_shampoo(check: Check, ask: Ask) -> None:
    for seen in ask(check):
        assert len(seen["refused"]) == (1 if check.argument.stage == 0 else 3)
        for message in seen["refused"]:
            assert "was not saved by Shampoo" in message and "load_optimizer_states=False" in message
        for way in sorted(set(seen) - {"refused"}):
            assert seen[way] == {"loaded": True, "kept": True, "moved": True, "steps": {3}}, way


@pytest.mark.parametrize("check", WITHOUT, ids=named)
def test_without_optimizer_states_the_state_stays(check: Check, ask: Ask) -> None:
    assert ask(check) == [{"steps": {6}}] * 2


@pytest.mark.parametrize("check", STAGES, ids=named)
def test_stage_2_loads_what_stage_1_has_saved(check: Check, ask: Ask) -> None:
    for seen in ask(check):
        found = {n: relative_error(seen["resumed"][n], seen["whole"][n]) for n in seen["whole"]}
        assert max(found.values()) <= BOUND["strict"], found


@pytest.mark.parametrize("check", ROUND_ROBIN, ids=named)
def test_what_deepspeed_would_corrupt_is_refused(check: Check, ask: Ask) -> None:
    first, second = ask(check)
    assert "it was saved with round_robin_gradients = true" in first["converter"] and not second["converter"]
    for message in (first, second):
        assert "load_universal = true with round_robin_gradients = true" in message["engine"]
        assert "elastic_checkpoint = true" in message["elastic"]
