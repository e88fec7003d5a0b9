"""Settings that cannot work under DeepSpeed are refused before any computation, on all ranks, with the reason."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.launch import Ask, Check
from tests.support.scenarios import Scenario

Case = tuple[str, Scenario, tuple[str, ...]]
CPU = {"device": "cpu"}


def option(name: str, options: dict[str, Any], *parts: str) -> Case:
    return name, Scenario(stage=2, options=options), parts


def setting(name: str, stage: int, zero: dict[str, Any], *parts: str) -> Case:
    return name, Scenario(stage=stage, zero=zero), parts


OPTIONS = [
    option(
        "stray_key",
        {"precondition_frequncy": 5},
        "'precondition_frequncy' = 5",
        "mean 'precondition_frequency'",
        "All options: docs/options.md",
    ),
    option("alien_key", {"rho": 0.1}, "'rho' = 0.1", "All options: docs/options.md"),
    option(
        "text_for_a_number",
        {"max_preconditioner_dim": "large"},
        "'max_preconditioner_dim' = 'large'",
        "an integer >= 1",
    ),
    option(
        "fraction_for_an_integer", {"precondition_frequency": 2.5}, "'precondition_frequency' = 2.5", "an integer >= 1"
    ),
    option("number_for_a_flag", {"use_bias_correction": 1}, "'use_bias_correction' = 1", "true or false"),
    option("negative_lr", {"lr": -1e-3}, "'lr' = -0.001", "a number >= 0"),
    option("beta1_of_one", {"betas": [1.0, 0.9]}, "'betas' = [1.0, 0.9]", "0 <= beta1 < 1"),
    option("large_beta2", {"betas": [0.9, 1.5]}, "1.5", "'betas'", "0 < beta2 <= 1"),
    option("one_beta", {"betas": 0.9}, "'betas' = 0.9", "two numbers"),
    option(
        "slow_growth",
        {"refresh_growth": 0.001},
        "'refresh_growth' = 0.001",
        "0, or a number in [0.01, 1]",
    ),
    option("unknown_grafting", {"grafting": "lamb"}, "'grafting' = 'lamb'", "one of none, sgd, adagrad"),
    option(
        "left_over_auto",
        {"lr": "auto"},
        "'lr' = 'auto'",
        "a number >= 0",
        "only the Hugging Face Trainer fills in 'auto'",
    ),
    option("left_over_auto_betas", {"betas": "auto"}, "'betas' = 'auto'", "two numbers"),
]
SETTINGS = [
    setting(
        "nvme",
        3,
        {"offload_optimizer": {"device": "nvme", "nvme_path": "/nowhere"}},
        "offload_optimizer.device = 'nvme'",
        "use 'cpu'",
    ),
    setting(
        "nvme_parameters",
        3,
        {"offload_param": {"device": "nvme", "nvme_path": "/nowhere"}, "offload_optimizer": CPU},
        "offload_param.device = 'nvme'",
        "use 'cpu'",
    ),
    (
        "ranks_that_skip_alone",
        Scenario(
            stage=2,
            zero={"compute_grad_norm": False},
            config={"torch_autocast": {"enabled": True, "dtype": "float16"}},
        ),
        ("compute_grad_norm = false", "skip steps on its own"),
    ),
    setting(
        "zenflow",
        2,
        {"offload_optimizer": CPU, "zenflow": {"topk_ratio": 0.1}},
        "zero_optimization.zenflow",
        "its own CPU Adam",
    ),
    setting(
        "partial_offload",
        3,
        {"offload_optimizer": {**CPU, "ratio": 0.5}},
        "offload_optimizer.ratio = 0.5",
        "DeepSpeedCPUAdam; use 1.0",
    ),
    setting(
        "super_offload",
        3,
        {"offload_optimizer": {**CPU, "super_offload": True}},
        "offload_optimizer.super_offload = true",
        "DeepSpeedCPUAdam",
    ),
    (
        "autotp",
        Scenario(model="llama", config={"tensor_parallel": {"autotp_size": 2}}),
        ("tensor_parallel.autotp_size = 2", "weights are cut"),
    ),
]
REASON = "Shampoo cannot run with this DeepSpeed configuration: "
FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}  # DeepSpeed's BF16_Optimizer
LAYOUTS = {
    **{f"zero{stage}": (Scenario(stage=stage), "up.weight" if stage < 3 else "embed.weight") for stage in (1, 2, 3)},
    "bf16_optimizer": (Scenario(stage=1, half="bf16", config=FP32_SUMS), "up.weight"),
}


def checks(cases: list[Case]) -> list[Any]:
    found = [(Check(f"refuse_{name}", 2, "refusals:refused", scenario, 30.0), parts) for name, scenario, parts in cases]
    return [pytest.param(check, parts, id=check.name) for check, parts in found]


@pytest.mark.parametrize("check, parts", checks(OPTIONS))
def test_a_wrong_option_in_the_json_is_refused_by_name(check: Check, parts: tuple[str, ...], ask: Ask) -> None:
    for value in ask(check):
        assert value["kind"] == "OptionError" and value["forwards"] == 0, value
        assert all(part in value["message"] for part in parts), value["message"]


@pytest.mark.parametrize("check", [Check(f"two_optimizers_{s}", 2, "refusals:two_optimizers", s) for s in (1, 3)])
def test_a_second_optimizer_in_the_json_is_refused(check: Check, ask: Ask) -> None:
    for value in ask(check):
        assert value["kind"] == "LayoutError", value
        assert 'its "optimizer" section next to initialize(optimizer=...)' in value["message"]


@pytest.mark.parametrize("check, parts", checks(SETTINGS))
def test_a_setting_that_cannot_work_is_refused_with_its_reason(check: Check, parts: tuple[str, ...], ask: Ask) -> None:
    for value in ask(check):
        assert value["kind"] == "LayoutError" and value["forwards"] == 0, value
        assert value["message"].startswith(REASON) and all(part in value["message"] for part in parts), value["message"]


@pytest.mark.parametrize(
    "check, parameter",
    [pytest.param(Check(f"corrupted_{n}", 2, "refusals:corrupted", s, 30.0), p, id=n) for n, (s, p) in LAYOUTS.items()],
)
def test_a_partition_that_holds_something_else_is_an_error_on_all_ranks(check: Check, parameter: str, ask: Ask) -> None:
    """Only the last rank can see it; the first one must not wait for the last one forever."""
    for value in ask(check):
        assert value["kind"] == "LayoutError", value
        assert f"rank 1: the float32 master does not equal the model's parameter {parameter}" in value["message"]


UNSEEN = {
    **{f"zero{stage}": Scenario(stage=stage) for stage in (1, 2, 3)},
    "bf16": Scenario(stage=0, half="bf16"),
}
NO_ENGINE = "the DeepSpeedEngine that it belongs to was not found: call engine.step()"


def unseen(name: str, scenario: Scenario, *methods: str) -> Any:
    return pytest.param(Check(f"unseen_{name}", 2, "refusals:unseen", (scenario, methods), 30.0), id=name)


@pytest.mark.parametrize("check", [unseen(name, scenario, "BUILDS", "STEPS") for name, scenario in UNSEEN.items()])
def test_deepspeed_s_tensors_without_an_engine_are_never_trained(check: Check, ask: Ask) -> None:
    """This happens if another version of DeepSpeed renames methods; names, options and checkpoints would be lost."""
    for value in ask(check):
        assert value["kind"] == "LayoutError" and NO_ENGINE in value["message"], value


@pytest.mark.parametrize("check", [unseen(f"json{stage}", Scenario(stage=stage), "BUILDS") for stage in (0, 2)])
def test_an_optimizer_that_was_built_from_the_json_unseen_is_never_trained(check: Check, ask: Ask) -> None:
    for value in ask(check):
        assert value["kind"] == "LayoutError" and "from its JSON without calling" in value["message"], value
