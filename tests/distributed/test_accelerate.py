"""A plain accelerate loop under DDP, FSDP1, FSDP2, ZeRO-1 and ZeRO-3 trains exactly as one process does."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.launch import Ask, Check, named
from tests.support.trainings import BOUND, Training, expected
from tests.support.zoo import relative_error

TRAINING = Training(steps=7)
DEFAULT = Training(steps=7, settings="default")
SAVED = Training(steps=7, save_at=4)  # between two refreshes
WRAPPERS = {"ddp": "DistributedDataParallel", "fsdp1": "FullyShardedDataParallel", "fsdp2": "FSDPLlamaForCausalLM"}


def run(route: str, framework: str, training: Training = TRAINING, name: str = "accelerate") -> Check:
    return Check(f"{name}_{route}_{framework}", 2, "accelerate_loop:train", (route, framework, training))


OWN_LINE = [run("stock", framework) for framework in ("ddp", "fsdp1", "fsdp2", "zero1", "zero3")]
PREPARED = [run("ours", framework, DEFAULT) for framework in ("ddp", "fsdp1", "fsdp2", "zero1", "zero3")]
AFTER = [run("after", "fsdp1")]
DUMMY = [run("dummy", framework) for framework in ("zero1", "zero3")]
RESUMED = [run("ours", framework, SAVED, "accelerate_saved") for framework in ("ddp", "zero1", "zero3")]


def refusal(name: str, route: str, framework: str, change: dict[str, Any] | None = None) -> Check:
    return Check(f"accelerate_refused_{name}", 2, "accelerate_loop:refused", (route, framework, change or {}))


OFFLOADED = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
IN_JSON = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}}
FOREIGN = "ValueError: 35 of the optimizer's 35 parameters are not the model's"
REFUSED = [
    (refusal("flat", "ours", "fsdp1flat"), FOREIGN),
    (refusal("other_model", "other_model", "ddp"), FOREIGN),
    (refusal("offload", "ours", "zero2", OFFLOADED), 'write "zero_force_ds_cpu_optimizer": false'),
    (refusal("json_optimizer", "ours", "zero2", IN_JSON), "ValueError: You cannot specify an optimizer in the config"),
]


@pytest.mark.parametrize("check", OWN_LINE + PREPARED + AFTER + DUMMY + RESUMED, ids=named)
def test_the_loop_is_the_training_of_one_process(check: Check, ask: Ask, record_property: Any) -> None:
    """The runs in RESUMED save and load in between."""
    _, framework, training = check.argument
    wanted, bound = expected(training), BOUND[training.settings]
    for seen in ask(check):
        assert seen["wrapper"] == WRAPPERS.get(framework, "DeepSpeedEngine")
        assert seen["losses"] == pytest.approx(wanted.losses, rel=bound)
        assert seen["parameters"].keys() == wanted.parameters.keys()
        error, name = max((relative_error(p, wanted.parameters[n]), n) for n, p in seen["parameters"].items())
        record_property("worst", f"{name} {error:.1e}")
        assert error <= bound, f"{name} deviates by {error:.2e}"


@pytest.mark.parametrize("alone, divided", [(run("stock", "ddp"), run("ours", "ddp", DEFAULT))], ids=named)
def test_prepare_divides_the_work_among_replicas(alone: Check, divided: Check, ask: Ask) -> None:
    assert not any(seen["traffic"]["bytes_received"] for seen in ask(alone))
    assert all(seen["traffic"]["bytes_received"] for seen in ask(divided))


@pytest.mark.parametrize("check, message", REFUSED, ids=named)
def test_what_would_silently_train_without_shampoo_is_refused(check: Check, message: str, ask: Ask) -> None:
    for seen in ask(check):
        assert message in seen
