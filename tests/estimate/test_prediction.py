"""Predicted times are work over stated speeds, and whole steps do what the planner says; advice keeps budgets."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from shampoo_deepspeed import Shampoo, ShampooConfig
from shampoo_deepspeed.__main__ import main
from shampoo_deepspeed.distributed.frameworks import Parameter
from shampoo_deepspeed.estimate import estimate
from shampoo_deepspeed.estimate.hardware import HARDWARE, Hardware, calibrated
from shampoo_deepspeed.estimate.model_shapes import parameters_of
from shampoo_deepspeed.estimate.prediction import BY_QUALITY, RankWork, advise, predict, predict_rank
from shampoo_deepspeed.estimate.work import (
    AT_ONCE_LAUNCHES,
    BUCKET_LAUNCHES,
    ELEMENTWISE_LAUNCHES,
    ELEMENTWISE_PASSES,
    FLOAT,
    HELD_PASSES,
    STACK_LAUNCHES,
    STEP_LAUNCHES,
    guarded_launches,
    guarded_work,
    plain_launches,
    plain_work,
    refresh_work,
)
from shampoo_deepspeed.geometry.plan import Plan
from shampoo_deepspeed.options.choices import MATMUL_PRECISIONS, PRECONDITIONERS
from tests.support.device_work import counted
from tests.support.simulated_device import Mode, on_device, quiet, simulate, values_of
from tests.support.stepping import made_up, parameter

# One TFLOP/s and one TB/s of each kind, all of which is reached, and no time of the CPU.
UNIT = Hardware(
    "unit", 1.0, 2.0, 4.0, 1000.0, 10.0, 5.0, 1.0,
    product_share=1.0, memory_share=1.0, link_share=1.0, factorization_share=0.5, decomposition_share=0.25,
    model_share=0.5, launch=0.0, read=0.0,
)  # fmt: skip
BIG = (1024, 1024)


def matrices(*of: tuple[int, ...]) -> list[Parameter]:
    return [Parameter(f"layer{n}", shape, 0, f"layer{n}") for n, shape in enumerate(of)]


def rank(count: float, **more: Any) -> RankWork:
    found = {"stacks": {(0, BIG): count}, "buckets": 1, "moved": 0.0, "held": 0.0, "elementwise": 0.0, "ranks": 1}
    return RankWork(**{**found, **more})


# --- the whole step


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
@pytest.mark.parametrize(
    ("shapes", "buckets"),
    [
        ([(64, 96)], 1),
        ([(64, 96)] * 6, 1),
        ([(64, 96)] * 6, 3),
        ([(64, 96), (64, 64)], 1),
        ([(64, 96), (4000,)], 1),
    ],
)
def test_launches_and_bytes_of_a_whole_step(
    preconditioner: str, shapes: list[tuple[int, ...]], buckets: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step without a refresh, in one process: what stacks do, and what there is in addition."""
    device = simulate(monkeypatch)
    schedule: dict[str, Any] = {"refresh": "sync", "precondition_frequency": 5, "start_preconditioning_step": 5}
    schedule |= {"refresh_growth": 0.0, "preconditioner": preconditioner, "statistics_frequency": 1}
    schedule |= {"bucket_mb": 2 * 64 * 96 * 4 / 2**20} if buckets > 1 else {}
    with Mode():
        params = {f"layer{n}": nn.Parameter(on_device(parameter(*s, seed=n))) for n, s in enumerate(shapes)}
        optimizer = Shampoo(params.items(), **schedule)
        for step in range(8):
            for n, p in enumerate(params.values()):
                p.grad = on_device(made_up(values_of(p), step, n))
            with counted() as found:
                optimizer.step()
            with quiet(device):
                device.catch_up()
    config = ShampooConfig(**schedule).for_blocks
    blocks = [shape for shape in shapes if len(shape) == 2]
    stacks, elementwise = len(set(blocks)), sum(shape[0] for shape in shapes if len(shape) == 1)
    slices = stacks + buckets - 1
    launches: float = STEP_LAUNCHES + BUCKET_LAUNCHES * buckets + STACK_LAUNCHES * (stacks - 1)
    launches -= AT_ONCE_LAUNCHES * (buckets > 1)
    of_stack, once = guarded_launches(config, 2)
    launches += once + slices * (plain_launches(config, 2) + of_stack) + (ELEMENTWISE_LAUNCHES if elementwise else 0)
    assert found.launches == launches
    own = sum((plain_work(shape, config) + guarded_work(shape, config)).nbytes for shape in blocks)
    passes = HELD_PASSES - 2 * (buckets > 1)  # no buffer of updates is written and read
    nbytes = own + FLOAT * (passes * sum(m * n for m, n in blocks) + ELEMENTWISE_PASSES * elementwise)
    assert found.other_bytes == pytest.approx(nbytes, rel=0.04)


# --- times


def test_milliseconds_are_work_over_speed() -> None:
    config = ShampooConfig(solver="qr", matmul_precision="high", precondition_frequency=4, refresh="sync")
    found = predict_rank(rank(3.0), {0: config}, UNIT, model=100.0)
    plain = (plain_work(BIG, config) + guarded_work(BIG, config)).times(3.0)
    refresh = refresh_work(BIG, config, 3.0).times(3.0)
    assert found.products == pytest.approx(1e3 * plain.lowered / 2e12)
    assert found.passes == pytest.approx(1e3 * plain.nbytes / 1e12)
    once = refresh.full / 1e12 + refresh.nbytes / 1e12 + refresh.factorizations / 0.5e12
    assert found.refresh == pytest.approx(1e3 * once / 4)
    assert found.plain == pytest.approx(found.products + found.passes)
    assert found.mean == pytest.approx(found.plain + found.refresh)
    assert found.slowest == pytest.approx(found.plain + 4 * found.refresh)
    assert found.over_model == pytest.approx(found.mean / 100.0)
    assert (found.launches, found.reads, found.exchange, found.offload) == (0.0, 0.0, 0.0, 0.0)


def test_eigendecompositions_count_25_cubes() -> None:
    config = ShampooConfig(solver="eigh", precondition_frequency=1)
    found = predict_rank(rank(1.0), {0: config}, UNIT, None)
    work = refresh_work(BIG, config, 1.0)
    seconds = 25 * 2 * 1024**3 / 0.25e12 + work.full / 1e12 + work.nbytes / 1e12
    assert found.refresh == pytest.approx(1e3 * seconds)
    assert found.over_model is None and found.over_adamw is None


def test_the_cpu_bounds_a_step_of_many_launches_and_waits_add_up() -> None:
    config = ShampooConfig(solver="eigh", precondition_frequency=1)
    slow = replace(UNIT, launch=1e6, read=1e5)
    found = predict_rank(rank(1.0), {0: config}, slow, None)
    launches = STEP_LAUNCHES + BUCKET_LAUNCHES + plain_launches(config, 2) + sum(guarded_launches(config, 2)) + 106
    assert found.launches == pytest.approx(1e6 * launches / 1e3)
    assert found.reads == pytest.approx(2 * 1e5 / 1e3)
    assert found.mean == pytest.approx(found.launches + found.reads)


def test_exchange_and_offload_are_hidden_up_to_the_first_and_last_bucket() -> None:
    config = ShampooConfig(preconditioner="shampoo")
    alone = predict_rank(rank(100.0, buckets=10), {0: config}, UNIT, None)
    busy = alone.products + alone.passes
    few = predict_rank(rank(100.0, buckets=10, ranks=8, moved=1e6), {0: config}, UNIT, None)
    assert few.exchange == pytest.approx(0.2 * 1e6 / 10e9 * 1e3)
    much = predict_rank(rank(100.0, buckets=10, ranks=8, moved=1e12), {0: config}, UNIT, None)
    assert much.exchange == pytest.approx(1e5 - much.products - much.passes)
    far = predict_rank(rank(100.0, buckets=10, ranks=9, moved=1e12), {0: config}, UNIT, None)
    assert far.exchange == pytest.approx(1e6 - far.products - far.passes)  # by the network
    work = rank(100.0, buckets=10, held=1e11, offloaded=True)
    assert predict_rank(work, {0: config}, UNIT, None).offload > 4e11 / 5e9 * 1e3 - busy - 1e3 * 10 * 4e11 / 1e12 - 1.0
    assert few.buffers == 16 * 1e5 + 7 * 2 * 2 * (4 << 20)


@pytest.mark.parametrize("device", list(HARDWARE.values()), ids=list(HARDWARE))
def test_the_table_of_devices_is_plausible(device: Hardware) -> None:
    assert 0 < device.float32 <= device.tf32 <= device.bfloat16
    shares = [getattr(device, f.name) for f in fields(device) if f.name.endswith("_share")]
    assert len(shares) == 6 and all(0 < share < 1 for share in shares)
    assert device.network <= device.link <= device.memory
    assert HARDWARE[device.name] is device and not device.calibrated


def test_each_device_has_its_source() -> None:
    text = (Path(__file__).parents[2] / "shampoo_deepspeed/estimate/hardware.py").read_text(encoding="utf-8")
    for name in HARDWARE:
        before = text[: text.index(f'"{name}", ')].splitlines()
        assert any("# " in line for line in before[-5:]), name


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_less_precise_products_take_less_time_and_rare_refreshes_too(preconditioner: str) -> None:
    made = {
        (p, f): predict(
            estimate(
                matrices(*[BIG] * 20),
                1,
                "ddp",
                ShampooConfig(preconditioner=preconditioner, matmul_precision=p, precondition_frequency=f),
            ),
            HARDWARE["h100"],
        )
        for p in MATMUL_PRECISIONS
        for f in (1, 10)
    }
    assert made["medium", 1].products <= made["high", 1].products <= made["highest", 1].products
    assert all(made[p, 10].mean <= made[p, 1].mean for p in MATMUL_PRECISIONS)


def test_a_calibration_measures_this_machine() -> None:
    found = calibrated(1.0)
    assert found.calibrated and found.name.startswith("this CPU")
    rates = (found.float32, found.memory, found.factorization_share, found.decomposition_share, found.launch)
    assert all(rate > 0 for rate in rates)
    assert found.tf32 == found.bfloat16 == found.float32
    assert not found.accelerator
    with pytest.raises(ValueError, match=r"seconds 0.5 is not allowed: a number >= 1"):
        calibrated(0.5)


def test_a_cpu_takes_its_own_solvers() -> None:
    config = ShampooConfig(precondition_frequency=1)
    cpu, cubes = HARDWARE["cpu"], 2 * 1024**3
    found = predict_rank(rank(1.0), {0: config}, cpu, None)
    assert found.refresh > 1e3 * 25 * cubes / (cpu.decomposition_share * cpu.float32 * 1e12)
    assert refresh_work(BIG, config, 1.0, accelerator=False).decomposed == cubes
    tracked = refresh_work(BIG, replace(config, solver="qr"), 1.0, accelerator=False)
    assert tracked.decomposed == pytest.approx(0.7 * cubes) and tracked.factorizations == 0.0


# --- buckets


@pytest.mark.parametrize("framework", ["ddp", "zero2", "fsdp2"])
def test_collectives_of_accelerators_are_those_of_their_plan(framework: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[Plan] = []
    made = Plan.__init__

    def noted(self: Plan, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        plans.append(self)

    monkeypatch.setattr(Plan, "__init__", noted)
    found = estimate(matrices(*[(2048, 4096)] * 23), 4, framework, ShampooConfig())
    (plan,) = plans
    again = Plan(plan.matrices, plan.shards, None, on_accelerators=True)
    assert found.accelerator_collectives == sum(again.gradients_move) + sum(again.updates_move)
    assert found.accelerator_buckets == again.bucket_count < plan.bucket_count
    assert 0 < found.accelerator_collectives < found.collectives


# --- advice


@pytest.mark.parametrize("overhead", [0.03, 0.1, 0.5])
def test_advice_keeps_the_budgets_and_is_the_first_that_does(overhead: float) -> None:
    parameters, h100 = parameters_of("llama-3.2-1b"), HARDWARE["h100"]
    made = estimate(parameters, 8, "fsdp2", ShampooConfig())
    # Advice is for the solver that is cheapest on accelerators, which keeps bases next to roots.
    budget = 1.1 * max(estimate(parameters, 8, "fsdp2", ShampooConfig(solver="qr")).state_bytes)
    found = advise(parameters, ShampooConfig(), made, h100, overhead, budget, tokens=131072)
    assert found is not None
    assert found.prediction.over_adamw is not None and found.prediction.over_adamw <= overhead
    assert found.state_bytes <= budget
    config = ShampooConfig.from_options(found.options())
    planned = predict(estimate(parameters, 8, "fsdp2", config), h100, 131072)
    assert planned.mean == pytest.approx(found.prediction.mean, rel=0.08)
    if found.precondition_frequency > 1:
        faster = predict(estimate(parameters, 8, "fsdp2", replace(config, precondition_frequency=1)), h100, 131072)
        assert faster.over_adamw is not None and faster.over_adamw > overhead
    assert found.preconditioner == BY_QUALITY[0]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"memory": "half"}, {"preconditioner": "kl_shampoo"}),
        ({"memory": "half", "factor_dtype": "float32", "elementwise_format": "float32"}, {}),
        ({"preconditioner": "shampoo", "one_sided": "left"}, {"preconditioner": "kl_shampoo", "one_sided": None}),
        ({"preconditioner": "shampoo", "large_dim": "diagonal"}, {"large_dim": "block"}),
        ({"split": [512, 512], "moment_format": "bfloat16"}, {}),
        ({"batch_dims": 1, "root_dtype": "bfloat16", "rules": [{"match": "*1", "factor_format": "packed"}]}, {}),
        # Only Shampoo takes what this rule sets.
        (
            {"preconditioner": "shampoo", "rules": [{"match": "*1", "one_sided": "right"}]},
            {"preconditioner": "shampoo"},
        ),
    ],
    ids=range(7),
)
def test_advice_keeps_the_options_that_were_given(options: dict[str, Any], expected: dict[str, Any]) -> None:
    """Together with these, it is what a full plan predicts."""
    parameters = [Parameter(f"w{n}", (1024, 4096), 0, f"w{n}") for n in range(4)]
    config, h100 = ShampooConfig.from_options(options), HARDWARE["h100"]
    made = estimate(parameters, 1, "ddp", config)
    found = advise(parameters, config, made, h100, 0.9, tokens=1e6)
    assert found is not None and expected.items() <= found.options().items()
    planned = estimate(parameters, 1, "ddp", ShampooConfig.from_options({**options, **found.options()}))
    assert found.state_bytes == max(planned.state_bytes)
    assert found.prediction.mean == pytest.approx(predict(planned, h100, 1e6).mean, rel=0.01)


def test_formats_of_state_count_in_a_memory_budget(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "shapes.json"
    path.write_text(json.dumps({f"w{n}": [1024, 4096] for n in range(4)}))
    budgets = ["--memory-budget", "0.1", "--overhead-budget", "0.9", "--tokens-per-step", "1e6", "--device", "h100"]
    given = ["--shapes", str(path), "--world-size", "1", "--framework", "ddp", "--option", "memory=half"]
    assert main(["estimate", *given, *budgets]) == 0
    assert "predicted best within 90.0% over AdamW" in (text := capsys.readouterr().out)
    assert "a rank): preconditioner kl_shampoo" in text


def test_no_advice_where_nothing_fits() -> None:
    parameters = parameters_of("llama-3.2-1b")
    made = estimate(parameters, 8, "fsdp2", ShampooConfig())
    assert advise(parameters, ShampooConfig(), made, HARDWARE["h100"], 1e-6, tokens=131072) is None
    assert advise(parameters, ShampooConfig(), made, HARDWARE["h100"], 1.0, 1e6, tokens=131072) is None


# --- the command line, and the page


COMMON = ["estimate", "--model", "llama-3-8b", "--world-size", "8", "--framework", "fsdp2"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main([*COMMON, *arguments]) == 0
    return capsys.readouterr().out


def test_the_command_line_says_that_these_are_predictions(capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "--device", "h100", "--tokens-per-step", "131072", "--offload", "--option", "solver=qr")
    assert "predicted for h100 (published speeds), milliseconds; nothing of this has been measured in a run" in text
    for part in (
        "mean step",
        "offload not hidden",
        "fused AdamW",
        "slower than with AdamW",
        "predicted best within 5.0%",
    ):
        assert part in text
    assert "slower" not in run(capsys, "--device", "h100")


def test_json_holds_the_prediction(capsys: pytest.CaptureFixture[str]) -> None:
    out = json.loads(run(capsys, "--device", "a100", "--tokens-per-step", "131072", "--json"))
    made = estimate(parameters_of("llama-3-8b"), 8, "fsdp2", ShampooConfig())
    expected = predict(made, HARDWARE["a100"], 131072)
    assert out["predicted_ms"]["mean"] == pytest.approx(expected.mean)
    assert out["predicted_ms"]["over_adamw"] == pytest.approx(expected.over_adamw)
    assert out["device"]["name"] == "a100"
    assert out["advice"] is None or out["advice"]["matmul_precision"] in MATMUL_PRECISIONS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--offload"], "--offload is not allowed without --device or --calibrate"),
        (["--device", "h100", "--tflops", "400"], "--tflops is not allowed without --tokens-per-step"),
        (["--device", "h100", "--bandwidth", "3"], "--bandwidth is not allowed with --device, which has its own"),
        (["--calibrate", "--refresh-tflops", "3"], "--refresh-tflops is not allowed with --calibrate"),
        (["--device", "h300"], "invalid choice: 'h300'"),
        (["--device", "h100", "--calibrate"], "not allowed with argument"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main([*COMMON, *arguments])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_the_pages_arithmetic_is_what_the_planner_predicts() -> None:
    """Each row of both tables of docs/planner.md."""
    text = (Path(__file__).parents[2] / "docs/planner.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| `(\w+)` \| (.+) \|$", text, re.MULTILINE)
    assert len(rows) == 9
    for rule, solver, precision, cells in rows:
        numbers = [int(cell) for cell in cells.split(" | ")]
        found = []
        for frequency in (10, 1):
            config = ShampooConfig(
                preconditioner=rule,
                solver=solver,
                matmul_precision=precision,
                precondition_frequency=frequency,
                max_preconditioner_dim=1024,
            )
            found.append(predict(estimate(matrices(*[BIG] * 882), 1, "ddp", config), HARDWARE["h100"]))
        ten, one = found
        assert numbers == [round(t) for t in (ten.products, ten.passes, ten.plain, ten.mean, one.mean)], rule
    wide = re.findall(r"^\| (no|yes) \| (\d+) \| (\d+) \| `(\w+)` \| (\d+) \| ([\d.]+) % \|$", text, re.MULTILINE)
    assert len(wide) == 8
    for offload, block, frequency, precision, mean, share in wide:
        config = ShampooConfig(
            solver="qr",
            matmul_precision=precision,
            precondition_frequency=int(frequency),
            max_preconditioner_dim=int(block),
        )
        made = estimate(parameters_of("llama-3-8b"), 8, "fsdp2", config)
        timed = predict(made, HARDWARE["h100"], 131072, offloaded=offload == "yes")
        assert timed.over_adamw is not None
        assert (int(mean), float(share)) == (round(timed.mean), round(100 * timed.over_adamw, 1))
