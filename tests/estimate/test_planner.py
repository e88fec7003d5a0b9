"""The planner is exact for a real optimizer, balanced, quick for a thousand ranks, and names wrong arguments."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import shampoo_deepspeed
import shampoo_deepspeed.estimate.model_shapes as model_shapes
from shampoo_deepspeed import Shampoo, ShampooConfig
from shampoo_deepspeed.__main__ import _parser, main
from shampoo_deepspeed.distributed.frameworks import Parameter
from shampoo_deepspeed.estimate import Estimate, Step, estimate
from shampoo_deepspeed.estimate.deepspeed_json import read_deepspeed
from shampoo_deepspeed.estimate.expected_shards import FRAMEWORKS, SUB_GROUP_SIZE, layouts
from shampoo_deepspeed.estimate.model_shapes import (
    LLAMA_LIKE,
    ModelError,
    llama_shapes,
    parameters_of,
    parameters_of_file,
)
from shampoo_deepspeed.estimate.recommend import BLOCK_SIZES, Speed, expected_overhead, recommend
from shampoo_deepspeed.geometry.boxes import Box, tiling_error
from tests.support.strategies import shapes
from tests.support.zoo import gradients, make_batch, make_model

GIB = 2**30
SMALL = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 97,
}


def config(**options: Any) -> ShampooConfig:
    return ShampooConfig.from_options(options)


def matrices(*of: tuple[int, ...]) -> list[Parameter]:
    return [Parameter(f"layer{n}", shape, 0, f"layer{n}") for n, shape in enumerate(of)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9, "ema_decay": 0.9},
        {"grafting": "rms"},
        {"grafting": "rms", "preconditioner": "soap"},
        {"preconditioner": "kl_soap"},
        {"preconditioner": "soap_muon"},
        {"preconditioner": "muon", "grafting": "none"},
        {"solver": "qr"},
        {"betas": (0.0, 1.0), "grafting": "none", "elementwise": "sgd"},
        {"factor_dtype": "float64", "root_dtype": "bfloat16", "grafting": "sgd"},
        {"factor_format": "packed", "root_format": "packed"},
        {"preconditioner": "kl_soap", "root_format": "bfloat16", "moment_format": "bfloat16"},
        {"factor_format": "int8", "root_format": "int8", "moment_format": "int8", "elementwise_format": "bfloat16"},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_state_is_that_of_an_optimizer_in_one_process(options: dict[str, Any], dtype: str) -> None:
    options = {"max_preconditioner_dim": 8, "precondition_frequency": 2, **options}
    model = make_model("odd", getattr(torch, dtype))
    optimizer = Shampoo(model.named_parameters(), model=model, **options)
    gradients(model, make_batch("odd", 0))
    optimizer.step()
    (unit,) = optimizer.units
    tensors = [tensor for stack in unit.stacks for tensor in stack.tensors.values()]
    tensors += [tensor for _, tensor in unit.elementwise.tensors]
    tensors += [buffer for buffers in unit.buffers.values() for buffer in buffers.values()]
    parameters = [e.parameter for e in optimizer.entries if e.parameter.key != "frozen.weight"]
    made = estimate(parameters, 1, "ddp", config(**options), weights_dtype=dtype)
    assert made.state_bytes == [sum(t.nbytes for t in tensors)]
    assert made.elements == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (made.sent, made.received, made.collectives, made.imbalance) == ([0], [0], 0, 1.0)


@settings(max_examples=100)
@given(st.lists(shapes, min_size=1, max_size=5), st.integers(1, 6), st.sampled_from(FRAMEWORKS), st.integers(0, 60))
def test_every_layout_covers_every_parameter_once(
    of: Sequence[tuple[int, ...]], ranks: int, framework: str, sub_group_size: int
) -> None:
    """Replicas hold equal boxes; local tensors are as long as their boxes and padding."""
    sharded = next(n for n in (3, 2, 1) if ranks % n == 0)
    units = layouts(framework, of, ranks, sharded, sub_group_size)
    assert [n for unit in units for n in unit.parameters] == list(range(len(of)))
    for unit in units:
        shards = [unit.shards.of_rank(rank) for rank in range(ranks)]
        for index, number in enumerate(unit.parameters):
            boxes = {box for held in shards for n, box in held if n == index}
            assert tiling_error(of[number], boxes) is None
        for held, size in zip(shards, unit.sizes, strict=True):
            assert sum(box.numel for _, box in held) <= size


def test_hsdp_replicates_across_and_shards_within() -> None:
    (unit,) = layouts("hsdp", [(4, 2)], 4, shard_ranks=2)
    shards = [unit.shards.of_rank(rank) for rank in range(4)]
    assert shards == [[(0, Box((0, 0), (2, 2)))], [(0, Box((2, 0), (2, 2)))]] * 2


@pytest.mark.slow
@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("ranks", [8, 24, 64, 256])
def test_the_slowest_rank_of_llama_3_8b_is_within_five_percent(framework: str, ranks: int) -> None:
    made = estimate(parameters_of("llama-3-8b"), ranks, framework, config(), shard_ranks=8)
    assert made.blocks == 6656
    assert made.imbalance <= 1.05


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["zero2", "zero3", "fsdp2", "hsdp"])
@pytest.mark.parametrize("ranks", [8, 64])
def test_every_step_of_a_staggered_window_is_balanced_and_as_long_as_any_other(framework: str, ranks: int) -> None:
    """At 64 ranks, a rank has 104 equal blocks, 10.4 for each step of the window."""
    made = estimate(parameters_of("llama-3-8b"), ranks, framework, config(refresh="staggered"), shard_ranks=8)
    assert made.imbalance <= 1.05
    assert all(step.slowest <= 1.05 * step.mean for step in made.window)
    assert made.slowest_step <= 1.01 * made.fastest_step


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["zero2", "fsdp2"])
def test_llama_3_70b_on_1024_ranks_takes_seconds(framework: str) -> None:
    """It takes about three seconds of CPU time; a search over all ranks for every block would take hours."""
    begun = time.process_time()
    made = estimate(parameters_of("llama-3-70b"), 1024, framework, config(), shard_ranks=8)
    assert time.process_time() - begun < 10.0
    assert made.elements == 70_553_706_496
    assert made.imbalance <= 1.05
    assert sum(made.sent) == sum(made.received)


def test_memory_of_square_blocks_is_four_floats_an_element_and_the_moment_one() -> None:
    """KL-Shampoo has one more number for each block."""
    made = estimate(matrices((64, 64), (32, 96)), 2, "zero3", config(max_preconditioner_dim=32))
    elements = 64 * 64 + 32 * 96
    assert made.blocks == 4 + 3
    assert sum(made.state_bytes) == 4 * (elements * (2 + 2 + 1) + made.blocks)
    assert sum(made.adamw) == 4 * elements * 2


def test_work_is_spread_over_the_window_as_the_refreshes_are() -> None:
    """With a single block, one step of a window recomputes all roots, and the others none."""
    made = estimate(matrices((64, 64)), 1, "ddp", config(max_preconditioner_dim=64, precondition_frequency=4))
    slowest = [step.slowest for step in made.window]
    assert [step.refresh for step in made.window] == [slowest[0] - slowest[1], 0.0, 0.0, 0.0]
    assert slowest[1:] == [slowest[1]] * 3 and slowest[0] > 2 * slowest[1]
    assert made.mean_step == pytest.approx(made.loads[0])
    assert made.slowest_step == slowest[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"framework": "fsdp"}, "framework 'fsdp' is not allowed: one of zero1"),
        ({"world_size": 0}, "world_size 0 is not allowed: an integer >= 1"),
        (
            {"framework": "hsdp", "shard_ranks": 3},
            "shard_ranks 3 is not allowed: it must divide world_size, which is 4",
        ),
        *(
            ({"framework": "hsdp", "shard_ranks": n}, f"shard_ranks {n} is not allowed: an integer >= 1")
            for n in (0, -1, -2)
        ),
        ({"weights_dtype": "float8"}, "weights_dtype 'float8' is not allowed"),
    ],
)
def test_impossible_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"world_size": 4, "framework": "ddp"} | arguments
    with pytest.raises(ValueError, match=message):
        estimate(matrices((8, 8)), given.pop("world_size"), given.pop("framework"), config(), **given)


# --- models


def test_llama_3_has_its_published_size() -> None:
    sizes = {name: sum(math.prod(p.shape) for p in parameters_of(name)) for name in ("llama-3-8b", "llama-3.2-1b")}
    assert sizes == {"llama-3-8b": 8_030_261_248, "llama-3.2-1b": 1_235_814_400}


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 12}),
        ("mistral", {"tie_word_embeddings": True}),
        ("qwen2", {}),
        ("qwen3", {"attention_bias": True, "head_dim": 16}),
    ],
)
def test_names_and_shapes_are_those_that_transformers_builds(kind: str, extra: dict[str, Any], tmp_path: Path) -> None:
    """They are in order, so that blocks and flat buffers are those of the run; a config.json is read as it is saved."""
    made = transformers.AutoConfig.for_model(**{**SMALL, **extra, "model_type": kind})
    made.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(made)
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    saved = parameters_of(str(tmp_path))
    assert [(p.name, p.shape) for p in saved] == list(expected.items())


OPTIONAL: dict[str, Any] = {
    "num_key_value_heads": 1,
    "head_dim": 16,
    "tie_word_embeddings": True,
    "attention_bias": True,
    "mlp_bias": True,
}


@pytest.mark.parametrize("kind", LLAMA_LIKE)
@pytest.mark.parametrize(
    "given", [{}, *({key: 1 if "_bias" not in key and key[0] != "t" else True} for key in OPTIONAL)]
)
def test_what_a_config_lacks_is_what_transformers_takes(kind: str, given: dict[str, Any], tmp_path: Path) -> None:
    """Every kind that the reader knows, with each key that a config.json may lack and without it."""
    needed = {key: value for key, value in SMALL.items() if key not in OPTIONAL} | given | {"model_type": kind}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(needed))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path))
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert {p.name: p.shape for p in parameters_of(str(path))} == expected


def test_a_null_means_as_many_groups_as_heads_and_as_wide_as_they_are() -> None:
    for kind in LLAMA_LIKE:
        found = llama_shapes({**SMALL, "model_type": kind, "num_key_value_heads": None, "head_dim": None}, "here")
        assert found["model.layers.0.self_attn.k_proj.weight"] == (64, 64)


@pytest.mark.parametrize("kind", LLAMA_LIKE)
def test_heads_without_a_width_are_refused(kind: str) -> None:
    small = {**SMALL, "model_type": kind, "hidden_size": 4, "head_dim": None}
    with pytest.raises(ModelError, match="here: num_attention_heads = 8 is not allowed: a divisor of hidden_size"):
        llama_shapes(small, "here")
    with pytest.raises(ModelError, match="here: tie_word_embeddings = 'no' is not allowed: true or false"):
        llama_shapes({**SMALL, "model_type": kind, "tie_word_embeddings": "no"}, "here")


def test_other_models_come_through_the_adapter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from shampoo_deepspeed.integrations.models import transformers_parameters

    class Point:
        def load(self) -> Any:
            return transformers_parameters

    def points(group: str) -> list[Point]:
        assert group == "shampoo_deepspeed.models"
        return [Point()]

    monkeypatch.setattr(model_shapes, "entry_points", points)
    transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=50).save_pretrained(tmp_path)
    found = {p.key: p for p in parameters_of(str(tmp_path))}
    assert found["transformer.h.0.attn.c_attn.weight"].shape == (32, 96)
    assert {"embedding", "lm_head"} <= found["transformer.wte.weight"].kinds
    with pytest.raises(ModelError, match="'no/such/folder' is not known"):
        parameters_of("no/such/folder")


def test_the_entry_point_is_declared() -> None:
    declared = (Path(__file__).parents[2] / "setup.cfg").read_text(encoding="utf-8")
    assert "shampoo_deepspeed.models =\n    transformers = shampoo_deepspeed.integrations.models:" in declared


def test_a_file_of_shapes(tmp_path: Path) -> None:
    path = tmp_path / "shapes.json"
    path.write_text(json.dumps({"a.weight": [4, 8], "a.bias": [4]}))
    assert [(p.name, p.shape) for p in parameters_of_file(str(path))] == [("a.weight", (4, 8)), ("a.bias", (4,))]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2]", "must hold one JSON object"),
        ("{", "is not a JSON file that can be read"),
        ('{"a": [4, 0]}', "'a' = \\[4, 0\\] is not allowed: a list of one or more integers > 0"),
        ('{"a": [true]}', "'a' = \\[True\\] is not allowed"),
        ('{"a": []}', "'a' = \\[\\] is not allowed"),
    ],
)
def test_a_bad_file_of_shapes_is_refused(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "shapes.json"
    path.write_text(content)
    with pytest.raises(ModelError, match=message):
        parameters_of_file(str(path))


def test_a_config_without_a_dim_is_refused() -> None:
    with pytest.raises(ModelError, match="here: intermediate_size = None is not allowed: an integer >= 1"):
        llama_shapes({key: value for key, value in SMALL.items() if key != "intermediate_size"}, "here")


# --- recommendations


def example(options: ShampooConfig) -> tuple[list[Parameter], Estimate]:
    parameters = matrices(*[(1024, 4096), (4096, 1024)] * 4)
    return parameters, estimate(parameters, 4, "zero3", options)


def test_a_recommended_block_size_fits_and_is_the_largest_that_does() -> None:
    """The next larger one, planned in full, needs more than the budget."""
    options = config(max_preconditioner_dim=256)
    parameters, made = example(options)
    needs = {
        size: max(estimate(parameters, 4, "zero3", replace(options, max_preconditioner_dim=size)).state_bytes)
        for size in (256, 1024, 2048)
    }
    assert needs[1024] * 1.1 < needs[2048]
    found = recommend(parameters, options, made, needs[1024] * 1.06)
    assert found is not None and found.max_preconditioner_dim == 1024
    assert needs[1024] <= found.state_bytes <= needs[1024] * 1.06
    assert found.frequency is None
    assert recommend(parameters, options, made, 0.5 * min(needs.values())) is None


EXPERTS = [{"match": "*", "batch_dims": 1}]


@pytest.mark.parametrize(
    ("options", "of"),
    [
        ({"rules": EXPERTS}, [(8, 512, 1024)] * 2),
        ({"rules": [{"match": "*", "preconditioner": "muon"}]}, [(1024, 2048)] * 4),
        ({"rules": [{"match": "layer1", "preconditioner": "soap", "max_preconditioner_dim": 256}]}, [(512, 512)] * 2),
        ({"preconditioner": "shampoo", "one_sided": "smaller"}, [(16, 4096)] * 4),
        ({"preconditioner": "shampoo", "large_dim": "diagonal"}, [(512, 8192)] * 4),
        ({"split": [3072, 1024, 1024]}, [(5120, 1024)] * 2),
        ({"batch_dims": 1, "factor_format": "packed"}, [(4, 640, 384)] * 3),
    ],
    ids=["experts", "rule", "rules", "one_sided", "diagonal", "split", "batch_dims"],
)
def test_recommended_state_is_that_of_a_full_plan(options: dict[str, Any], of: list[tuple[int, ...]]) -> None:
    """On one rank to the byte, with blocks as options and rules cut them."""
    parameters, own = matrices(*of), config(**options)
    made = estimate(parameters, 1, "ddp", own)
    for size in BLOCK_SIZES:
        state = max(estimate(parameters, 1, "ddp", replace(own, max_preconditioner_dim=size)).state_bytes)
        found = recommend(parameters, own, made, 1.001 * state)
        assert found is not None, size
        planned = replace(own, max_preconditioner_dim=found.max_preconditioner_dim)
        assert found.max_preconditioner_dim >= size
        assert found.state_bytes == max(estimate(parameters, 1, "ddp", planned).state_bytes)


def test_a_recommended_frequency_counts_work_as_a_full_plan_does() -> None:
    """Also of diagonals, of Muon's iterations, and of a rule's own frequency."""
    for options, of in (
        ({"preconditioner": "shampoo", "large_dim": "diagonal", "one_sided": "left"}, [(512, 8192)] * 4),
        ({"rules": [{"match": "layer0", "preconditioner": "muon"}]}, [(1024, 1024)] * 2),
        ({"rules": [{"match": "layer0", "precondition_frequency": 50}]}, [(1024, 1024)] * 2),
    ):
        parameters, own = matrices(*of), config(**options, max_preconditioner_dim=2048)
        speed = Speed(tokens=4096, tflops=1.0, optimizer_tflops=0.5, refresh_tflops=0.25)
        plans = {f: estimate(parameters, 1, "ddp", replace(own, precondition_frequency=f)) for f in (5, 10, 20)}
        shares = {f: expected_overhead(made, speed).mean for f, made in plans.items()}
        found = recommend(parameters, own, plans[10], 10 * GIB, speed, 1.051 * shares[10])
        assert found is not None and (found.max_preconditioner_dim, found.frequency) == (2048, 10), (options, shares)


def test_a_recommended_frequency_keeps_the_overhead_and_a_more_frequent_one_does_not() -> None:
    options = config(max_preconditioner_dim=1024)
    parameters, made = example(options)
    speed = Speed(tokens=65536, tflops=1.0, optimizer_tflops=0.5, refresh_tflops=0.25)
    shares = {
        f: expected_overhead(estimate(parameters, 4, "zero3", replace(options, precondition_frequency=f)), speed).mean
        for f in (5, 10, 20)
    }
    found = recommend(parameters, options, made, 1 * GIB, speed, overhead=shares[10] * 1.06)
    assert found is not None
    assert (found.max_preconditioner_dim, found.frequency) in {(1024, 10), (2048, 100), (2048, 50), (2048, 20)}
    small = recommend(parameters, options, made, max(made.state_bytes) * 1.06, speed, overhead=shares[10] * 1.06)
    assert small is not None and (small.max_preconditioner_dim, small.frequency) == (1024, 10)


def test_overhead_is_time_over_the_time_of_forward_and_backward() -> None:
    window = [Step(8e6, 3e6, 4e6), Step(2e6, 0.0, 1e6)]
    made = Estimate(2, elements=1000, sent=[300, 500], received=[400, 400], window=window)
    speed = Speed(tokens=100, tflops=1e-6, optimizer_tflops=0.5e-6, refresh_tflops=0.25e-6, bandwidth=1e-6)
    found = expected_overhead(made, speed)
    assert found.model_seconds == pytest.approx(6 * 1000 * 100 / 2 / 1e6)
    assert found.slowest == pytest.approx((5e6 / 0.5e6 + 3e6 / 0.25e6 + 500 / 1e3) / 0.3)
    assert found.mean == pytest.approx((found.slowest + (2e6 / 0.5e6 + 500 / 1e3) / 0.3) / 2)


# --- the command


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["estimate", *arguments]) == 0
    return capsys.readouterr().out


def test_the_table_and_the_json_say_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--model", "llama-3.2-1b", "--world-size", "16", "--framework", "fsdp2", "--option", "betas=[0.9, 0.95]"]
    speed = ["--tokens-per-step", "1e6", "--tflops", "400", "--bandwidth", "100", "--memory-budget", "2"]
    table, out = run(capsys, *common, *speed), json.loads(run(capsys, *common, *speed, "--json"))
    made = estimate(parameters_of("llama-3.2-1b"), 16, "fsdp2", config(betas=(0.9, 0.95)))
    assert out["state_bytes_total"]["largest"] == max(made.state_bytes)
    assert out["bytes_sent_per_step"] == {"mean": sum(made.sent) / 16, "largest": max(made.sent)}
    assert out["options"]["betas"] == [0.9, 0.95]
    assert f"{made.elements:,} parameters" in table and f"{made.blocks:,} blocks" in table
    assert f"{max(made.state_bytes) / GIB:,.2f} GiB" in table
    assert f"{out['overhead']['mean']:.1%} in the mean of 10 steps" in table
    assert f"max_preconditioner_dim {out['recommendation']['max_preconditioner_dim']}" in table


def test_early_refreshes_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    """At steps 2 to 8, 10, 12, 15, 18, 22, 27 and 33; from 41 on they are ten steps apart."""
    common = ["--model", "llama-3.2-1b", "--world-size", "2", "--framework", "ddp"]
    assert "each block refreshes 14 times from step 2 to step 41" in run(capsys, *common)
    assert "refresh_growth" not in run(capsys, *common, "--option", "refresh_growth=0")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["preconditioner=muon"], "whole matrices\n"),
        (["preconditioner=muon", "max_preconditioner_dim=512", "refresh_growth=0.25"], "blocks of at most 512\n"),
        (
            ["preconditioner=muon", 'rules=[{"match": "*q_proj*", "preconditioner": "soap"}]'],
            "whole matrices, refresh every 10 steps\n",
        ),
        (["preconditioner=soap"], "blocks of at most 1024, refresh every 10 steps\n"),
    ],
    ids=range(4),
)
def test_the_heading_has_blocks_and_refreshes_only_where_there_are_some(
    options: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [argument for option in options for argument in ("--option", option)]
    shown = run(capsys, "--model", "llama-3.2-1b", "--world-size", "2", "--framework", "ddp", *given)
    assert f"llama-3.2-1b under ddp on 2 ranks, {expected}" in shown and "refresh_growth" not in shown


def test_a_deepspeed_json_sets_framework_and_options(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    params = {"lr": "auto", "max_preconditioner_dim": 512, "precondition_frequency": 20}
    zero = {"stage": 3, "sub_group_size": 10_000_000}
    path.write_text(json.dumps({"optimizer": {"type": "Shampoo", "params": params}, "zero_optimization": zero}))
    common = ["--model", "llama-3.2-1b", "--world-size", "4", "--ds-config", str(path), "--json"]
    out = json.loads(run(capsys, *common))
    assert (out["framework"], out["options"]["precondition_frequency"]) == ("zero3", 20)
    assert out["step_units"] > 10
    out = json.loads(run(capsys, *common, "--precondition-frequency", "5"))
    assert (out["options"]["precondition_frequency"], out["options"]["max_preconditioner_dim"]) == (5, 512)


LLAMA = ["--model", "llama-3-8b", "--framework", "ddp"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "llama-3-8", "--framework", "ddp"], "'llama-3-8' is not known; did you mean 'llama-3-8b'"),
        (["--model", "llama-3-8b"], "--framework is missing: one of zero1"),
        (["--model", "llama-3-8b", "--framework", "ddp", "--option", "beta=1"], "Unknown Shampoo option 'beta'"),
        (
            ["--model", "llama-3-8b", "--framework", "ddp", "--option", "betas"],
            "--option 'betas' is not allowed: NAME=JSON",
        ),
        (["--model", "llama-3-8b", "--framework", "hsdp"], "--shard-ranks is missing"),
        (
            ["--model", "llama-3-8b", "--framework", "zero3", "--shard-ranks", "3"],
            "--shard-ranks 3 is not allowed with",
        ),
        (
            ["--model", "llama-3-8b", "--framework", "ddp", "--tflops", "4"],
            "--tokens-per-step and --tflops go together",
        ),
        (["--model", "llama-3-8b", "--framework", "ddp", "--tflops", "-4"], "--tflops -4 is not allowed: a number > 0"),
        *(
            (
                ["--model", "llama-3-8b", "--framework", "ddp", name, value],
                f"{name} {value} is not allowed: a number > 0",
            )
            for name in ("--tokens-per-step", "--tflops", "--bandwidth", "--memory-budget", "--overhead-budget")
            for value in ("nan", "inf", "-3", "0", "1e+300")
        ),
        *(
            (
                ["--model", "llama-3-8b", "--framework", "ddp", name, "3"],
                f"{name} is not allowed without --tokens-per-step",
            )
            for name in ("--optimizer-tflops", "--refresh-tflops", "--bandwidth", "--overhead-budget")
        ),
        (
            [*LLAMA, "--tflops", "4", "--tokens-per-step", "1e6", "--overhead-budget", "0.1"],
            "--overhead-budget is not allowed without --memory-budget, --device or --calibrate",
        ),
        (
            [*LLAMA, "--device", "h100", "--overhead-budget", "0.1"],
            "--overhead-budget is not allowed without --tokens-per-step",
        ),
        ([*LLAMA, "--world-size", "0"], "--world-size 0 is not allowed: an int"),
        (
            ["--model", "llama-3-8b", "--framework", "ddp", "--world-size", "9" * 30],
            "is not allowed: an integer from 1",
        ),
        (["--model", "llama-3-8b", "--ds-config", "missing.json"], "--ds-config 'missing.json' is not a JSON file"),
        (
            ["--model", "llama-3-8b", "--framework", "ddp", "--max-preconditioner-dim", "0"],
            "'max_preconditioner_dim' = 0",
        ),
    ],
)
def test_bad_arguments_are_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_shapes, "entry_points", lambda group: [])
    with pytest.raises(SystemExit) as error:
        main(["estimate", "--world-size", "2", *arguments])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


COMMANDS = ["estimate", "inspect", "report"]


@pytest.mark.parametrize("arguments", [[], *([name] for name in COMMANDS)], ids=["all", *COMMANDS])
def test_help_shows_examples_that_the_command_takes(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([*arguments, "--help"])
    shown = capsys.readouterr().out.partition("examples:\n")[2]
    assert all(len(line) <= 120 for line in shown.splitlines())
    lines = [line.strip() for line in shown.replace("\\\n", " ").splitlines()]
    examples = [line.split()[3:] for line in lines if line.startswith("python -m")]
    assert examples
    for example in examples:
        assert _parser().parse_args(example).command in (arguments or COMMANDS)


def test_the_version_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"shampoo-deepspeed {shampoo_deepspeed.__version__}\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"optimizer": {"type": "AdamW"}}, "optimizer.type = 'AdamW' is not allowed: Shampoo"),
        ({"zero_optimization": {"stage": 5}}, "zero_optimization.stage = 5 is not allowed: 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": 2}}, "--framework 'zero3' does not agree with"),
        ({"optimizer": {"params": {"lrr": 1}}, "zero_optimization": {"stage": 3}}, "Unknown Shampoo option 'lrr'"),
    ],
)
def test_a_bad_deepspeed_json_is_named(
    content: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(content))
    with pytest.raises(SystemExit):
        main(
            ["estimate", "--model", "llama-3-8b", "--world-size", "2", "--framework", "zero3", "--ds-config", str(path)]
        )
    assert message in capsys.readouterr().err


STAGE = "zero_optimization.stage = "
SIZE = "zero_optimization.sub_group_size = "
# In JSON, and as Python shows it.
SIZES = {
    "null": "None",
    "1e400": "inf",
    "NaN": "nan",
    '"x"': "'x'",
    "-5": "-5",
    "true": "True",
    "2.5": "2.5",
    "[]": "[]",
}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "must hold one JSON object, not []"),
        ("null", "must hold one JSON object, not None"),
        (b'{"optimizer": "\xff"}', "is not a JSON file that can be read: 'utf-8' codec"),
        ("[" * 100_000, "is not a JSON file that can be read: it is nested too deeply"),
        ('{"optimizer": null}', "optimizer = None is not allowed: a JSON object"),
        ('{"optimizer": []}', "optimizer = [] is not allowed: a JSON object"),
        ('{"optimizer": {"type": []}}', "optimizer.type = [] is not allowed: Shampoo"),
        ('{"optimizer": {"params": [1]}}', "optimizer.params = [1] is not allowed: a JSON object"),
        ('{"zero_optimization": null}', "zero_optimization = None is not allowed: a JSON object"),
        ('{"zero_optimization": []}', "zero_optimization = [] is not allowed"),
        ('{"zero_optimization": true}', "zero_optimization = True is not allowed"),
        ('{"zero_optimization": {"stage": []}}', f"{STAGE}[] is not allowed: 0, 1, 2 or 3"),
        ('{"zero_optimization": {"stage": true}}', f"{STAGE}True is not allowed"),
        ('{"zero_optimization": {"stage": null}}', f"{STAGE}None is not allowed"),
        *(
            (f'{{"zero_optimization": {{"stage": 3, "sub_group_size": {size}}}}}', f"{SIZE}{shown} is not allowed: an")
            for size, shown in SIZES.items()
        ),
    ],
    ids=range(22),
)  # fmt: skip
def test_a_deepspeed_json_of_any_form_is_taken_or_named(
    content: str | bytes, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "ds.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SystemExit) as ended:
        main(["estimate", "--model", "llama-3-8b", "--world-size", "2", "--ds-config", str(path)])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and message in error and f"--ds-config {str(path)!r}" in error


@pytest.mark.parametrize(("size", "expected"), [("1e8", 10**8), ('"auto"', SUB_GROUP_SIZE), ("0", 0), ("7", 7)])
def test_what_deepspeed_takes_is_read(size: str, expected: int, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    zero = f'{{"stage": 3, "sub_group_size": {size}}}'
    path.write_text(f'{{"optimizer": {{"type": "shampoo", "params": null}}, "zero_optimization": {zero}}}')
    assert read_deepspeed(str(path)) == ("zero3", {}, expected)


def test_nothing_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither weights nor state are allocated: all tensors are on the meta device."""

    def refuse(*_: Any, **kwargs: Any) -> Any:
        assert torch.device(kwargs["device"]).type == "meta", kwargs
        return original(*_, **kwargs)

    original = torch.zeros
    monkeypatch.setattr(torch, "zeros", refuse)
    monkeypatch.setattr(nn.Module, "__init__", None)
    assert estimate(parameters_of("llama-3-8b"), 8, "zero2", config()).blocks == 6656
