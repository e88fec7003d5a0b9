"""`optimizers=`, a deferred Shampoo, the factory, the name and the JSON train equally under DDP, ZeRO and FSDP."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.launch import Ask, Check, named
from tests.support.trainer_routes import DEFAULT, FIRST, ROUTES, TRAINING, WRAPPERS, run
from tests.support.trainings import BOUND, RATE, Expected, Training, expected, make_model
from tests.support.zoo import relative_error

FLAT = [run(route, "fsdp1_flat") for route in ("deferred", "factory", "name")]
OFFLOAD = [run("prebuilt", "zero2_offload"), run("deferred", "zero3_offload")]
JSON = [run("json", "zero1"), run("json", "zero3")]
# Rounding at the default settings depends on the framework, not on how the optimizer was requested.
WAYS = {"prebuilt": "ddp", "factory": "zero1", "name": "fsdp2"}
DEFAULT_ROUTES = [run(route, framework, DEFAULT, "default_optimizers") for route, framework in WAYS.items()]
DEFAULT_ROUTES += [run("json", "zero3", DEFAULT, "default_optimizers")]
SAVED = Training(save_at=4, options={"momentum": 0.5})  # between two refreshes
RESUMED = [run("scheduler", framework, SAVED, "resumed") for framework in ("ddp", "zero1", "zero3")]
RESUMED += [run("deferred", "ddp", SAVED, "resumed")]
DIVIDED = [run("prebuilt", "ddp"), run("deferred", "ddp")]
STAGGERED = Training(steps=7, options={"refresh_growth": 0.0})  # whole windows, in which phases differ
SYNC = Training(steps=7, options={"refresh": "sync", "refresh_growth": 0.0})
WATCHED = {"deferred": "ddp", "factory": "zero3", "name": "fsdp2"}
MEASURED = [run(route, framework, STAGGERED, "staggered_optimizers") for route, framework in WATCHED.items()]
MEASURED += [run(route, framework, SYNC, "sync_optimizers") for route, framework in WATCHED.items()]
OWN_SCHEDULE = [run("scheduler", framework) for framework in ("ddp", "zero3", "fsdp1", "fsdp2")]


def refusal(name: str, route: str, change: dict[str, Any]) -> Check:
    return Check(f"optimizers_refused_{name}", 2, "trainer_optimizers:refused", (route, change))


OFFLOADED = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
IN_JSON = {"optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}}}  # DeepSpeed's is compiled
SCHEDULED = {"scheduler": {"type": "WarmupLR", "params": {}}}
REFUSED = [
    (refusal("json_optimizer", "prebuilt", IN_JSON), 'ValueError: the DeepSpeed JSON has an "optimizer" section'),
    (refusal("json_and_deferred", "deferred", IN_JSON), 'ValueError: the DeepSpeed JSON has an "optimizer" section'),
    (
        refusal("json_and_factory", "factory", IN_JSON),
        "RuntimeError: the optimizer that trains is torch.optim.adamw.AdamW",
    ),
    (refusal("two_schedulers", "scheduler", SCHEDULED), 'ValueError: the DeepSpeed JSON has a "scheduler" section'),
    (refusal("offload", "prebuilt", OFFLOADED), 'write "zero_force_ds_cpu_optimizer": false'),
    (refusal("offload_and_name", "name", OFFLOADED), 'write "zero_force_ds_cpu_optimizer": false'),
]


def assert_is(wanted: Expected, seen: dict[str, Any], record_property: Any, bound: float) -> None:
    error, name = max((relative_error(p, wanted.parameters[n]), n) for n, p in seen["parameters"].items())
    record_property("worst", f"{name} {error:.1e}")
    assert seen["parameters"].keys() == wanted.parameters.keys()
    assert error <= bound, f"{name} deviates by {error:.2e}"
    assert seen["losses"] == pytest.approx(wanted.losses, rel=bound)


@pytest.mark.parametrize("check", ROUTES + FLAT + OFFLOAD + JSON + DEFAULT_ROUTES, ids=named)
def test_every_way_is_the_training_of_one_process(check: Check, ask: Ask, record_property: Any) -> None:
    for seen in ask(check):
        assert seen["wrapper"] == WRAPPERS.get(check.argument[1], "DeepSpeedEngine")
        training = check.argument[2]
        assert_is(expected(training), seen, record_property, BOUND[training.settings])


@pytest.mark.parametrize("first, check", [(FIRST, other) for other in ROUTES[1:] + FLAT + OFFLOAD + JSON], ids=named)
def test_all_ways_agree(first: Check, check: Check, ask: Ask) -> None:
    wanted, seen = ask(first)[0], ask(check)[0]
    assert seen["losses"] == pytest.approx(wanted["losses"], rel=BOUND["strict"])


@pytest.mark.parametrize("check", ROUTES + FLAT + OFFLOAD + JSON, ids=named)
def test_ranks_know_how_far_their_weights_have_moved(check: Check, ask: Ask) -> None:
    """Ranks hold all of the weights or parts of them, so that sums over ranks have the ratio of the whole."""
    ranks = ask(check)
    first = {name: p.detach().double() for name, p in make_model(TRAINING.model).named_parameters()}
    last = ranks[0]["parameters"]
    moved = sum((last[name].double() - p).square().sum().item() for name, p in first.items())
    begun = sum(p.square().sum().item() for p in first.values())
    squares = [sum(seen["squares"][n] for seen in ranks) for n in (0, 1)]
    assert squares[0] / squares[1] == pytest.approx(moved / begun, rel=1e-4)
    for seen in ranks:
        history = [entry["displacement"] for entry in seen["moved"]]
        assert len(history) == TRAINING.steps and history[0] == 0.0 < history[1] < history[-1]  # the first rate is 0
        logged = [entry["displacement"] for entry in seen["logs"] if "displacement" in entry]
        assert logged in ([], history)


@pytest.mark.parametrize("check", OWN_SCHEDULE, ids=named)
def test_a_given_scheduler_sets_the_rate(check: Check, ask: Ask) -> None:
    """The stock Trainer drops it under DeepSpeed and refuses it under FSDP."""
    for seen in ask(check):
        assert seen["rates"] == pytest.approx([RATE * 0.5**step for step in range(TRAINING.steps)])


@pytest.mark.parametrize("check, message", REFUSED, ids=named)
def test_what_would_silently_replace_shampoo_is_refused(check: Check, message: str, ask: Ask) -> None:
    for seen in ask(check):
        assert message in seen


@pytest.mark.parametrize("check", RESUMED, ids=named)
def test_a_resumed_run_goes_on_as_the_uninterrupted_one(check: Check, ask: Ask) -> None:
    for seen in ask(check):
        left, uninterrupted = SAVED.steps - SAVED.save_at, seen["whole"]
        assert seen["losses"][-left:] == pytest.approx(uninterrupted["losses"][-left:], rel=1e-6)
        assert seen["rates"] == pytest.approx(uninterrupted["rates"][-left:], rel=1e-12)
        parameters = seen["parameters"].items()
        assert max(relative_error(p, uninterrupted["parameters"][n]) for n, p in parameters) <= 1e-6


def shares(phases: list[int | None]) -> list[float]:
    """Return how many of a rank's blocks each step refreshes: from step 3 on, every third step or in their phase."""
    due = [[(phase or 0) == step % 3 for phase in phases] for step in range(3, TRAINING.steps + 1)]
    return [0.0, 0.0] + [sum(step) / len(phases) for step in due]


@pytest.mark.parametrize("check", MEASURED, ids=named)
def test_each_rank_has_its_metrics(check: Check, ask: Ask) -> None:
    """They are in the logs of a Trainer with the mixin, and in the callback of a stock Trainer."""
    for rank, seen in enumerate(ask(check)):
        entries = seen["history"]
        assert [entry["step"] for entry in entries] == list(range(1, TRAINING.steps + 1))
        moved = seen["traffic"]["bytes_sent"] + seen["traffic"]["bytes_received"]
        assert all(entry["shampoo/bytes_moved"] == moved for entry in entries)
        assert all((entry["shampoo/exchange_ms"] > 0) == (moved > 0) for entry in entries)
        refreshed = [entry["shampoo/refreshed_share"] for entry in entries]
        assert refreshed == shares(seen["phases"]), f"rank {rank}"
        staggered = check.argument[2] != SYNC
        assert all((phase is not None) == staggered for phase in seen["phases"])
        assert set(refreshed[2:]) <= {0.0, 1.0} if not staggered else max(refreshed) < 1.0
        logged = [log for log in seen["logs"] if "loss" in log]
        mixed = check.argument[0] in ("prebuilt", "deferred")
        assert all(("shampoo/refresh_ms" in log) == mixed for log in logged)


@pytest.mark.parametrize("alone, divided", [DIVIDED], ids=named)
def test_a_deferred_optimizer_divides_its_work_among_the_replicas(alone: Check, divided: Check, ask: Ask) -> None:
    """Each rank receives the updates of the other's blocks; without process_group, a finished one divides nothing."""
    assert not any(seen["traffic"]["bytes_received"] for seen in ask(alone))
    assert all(seen["traffic"]["bytes_received"] for seen in ask(divided))
