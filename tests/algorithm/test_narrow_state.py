"""State in narrower formats: its bytes, and the same training wherever blocks lie, when a run resumes or converts."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from shampoo_deepspeed import OptionError, Shampoo, ShampooConfig, load_shampoo, save_shampoo
from shampoo_deepspeed.algorithm import block_stack
from shampoo_deepspeed.algorithm.block_stack import BlockStack
from shampoo_deepspeed.estimate.model_shapes import parameters_of
from shampoo_deepspeed.estimate.planner import block_bytes, estimate
from shampoo_deepspeed.options.choices import PRECONDITIONERS
from shampoo_deepspeed.options.presets import MEMORIES, MEMORY
from tests.support.largest import Largest
from tests.support.stepping import drive, made_up, parameter, same_bits, shampoo, snapshot

NARROW: dict[str, dict[str, Any]] = {
    "packed": {"factor_format": "packed", "root_format": "packed"},
    "adamw": {"memory": "adamw"},
    "bfloat16": {"factor_format": "bfloat16", "root_format": "bfloat16", "moment_format": "bfloat16"},
    "half": {"memory": "half"},
}
REFRESHES = ("sync", "staggered", "background")


def named() -> dict[str, nn.Parameter]:
    """Return matrices that are cut into blocks of several shapes, and a vector."""
    return {"w": parameter(21, 16), "v": parameter(16, 9, seed=1), "u": parameter(8, 8, seed=2), "b": parameter(7)}


def run(
    steps: range, like: dict[str, nn.Parameter] | None = None, **options: Any
) -> tuple[list[nn.Parameter], Shampoo]:
    params = {name: nn.Parameter(p.detach().clone()) for name, p in (like or named()).items()}
    optimizer = shampoo(params.items(), **options)
    drive(optimizer, list(params.values()), steps)
    return list(params.values()), optimizer


def bytes_of_blocks(optimizer: Shampoo) -> int:
    """Return the sum of the storages of all blocks' state."""
    stacks = [stack for unit in optimizer.units for stack in unit.stacks]
    storages = [t.untyped_storage() for stack in stacks for t in stack.tensors.values()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


# Bytes for each parameter of the matrices of a model like Llama: at most, and at least.
BYTES: dict[str, tuple[float, float, dict[str, Any]]] = {
    "full": (20.1, 20.0, {}),
    "packed": (16.0, 12.0, NARROW["packed"]),
    "adamw": (8.0, 7.0, {"memory": "adamw"}),
    "half": (4.0, 3.0, {"memory": "half"}),
}


def test_half_is_at_most_four_bytes_for_all_parameters_of_llama_3_8b() -> None:
    made = estimate(parameters_of("llama-3-8b"), 8, "fsdp2", ShampooConfig.from_options({"memory": "half"}))
    assert sum(made.state_bytes) / made.elements <= 4.0
    assert sum(made.state["exp_avg"]) + sum(made.state["second_moment"]) > 0


@pytest.mark.parametrize(("most", "least", "options"), BYTES.values(), ids=BYTES)
def test_a_model_like_llama_needs_so_many_bytes(most: float, least: float, options: dict[str, Any]) -> None:
    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 32}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    optimizer = Shampoo(model.named_parameters(), model=model, max_preconditioner_dim=64, **options)
    model(input_ids=torch.arange(32)[None], labels=torch.arange(32)[None]).loss.backward()
    optimizer.step()
    elements = sum(p.numel() for name, p in model.named_parameters() if "proj" in name)
    assert least <= bytes_of_blocks(optimizer) / elements <= most


@pytest.mark.parametrize(("most", "least", "options"), BYTES.values(), ids=BYTES)
def test_llama_3_8b_needs_so_many_bytes_by_its_plan(most: float, least: float, options: dict[str, Any]) -> None:
    made = estimate(parameters_of("llama-3-8b"), 8, "zero3", ShampooConfig.from_options(options))
    size = 4 if options.get("memory") == "half" else 8  # both of Adam's moments of embeddings and norms
    others = size * (made.elements - made.preconditioned)
    assert least <= (sum(made.state_bytes) - others) / made.preconditioned <= most


@pytest.mark.parametrize("refresh", REFRESHES)
@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_packed_training_is_the_same_to_the_bit(preconditioner: str, refresh: str) -> None:
    options: dict[str, Any] = {"preconditioner": preconditioner, "refresh": refresh}
    whole, other = run(range(11), **options)
    packed, optimizer = run(range(11), **options, **NARROW["packed"])
    assert same_bits(snapshot(packed), snapshot(whole))
    has_roots = preconditioner in ("shampoo", "kl_shampoo")
    if preconditioner != "muon":
        assert bytes_of_blocks(optimizer) < (0.75 if has_roots else 0.9) * bytes_of_blocks(other)


@pytest.mark.parametrize("preconditioner", ["kl_shampoo", "kl_soap", "muon"])
@pytest.mark.parametrize("options", NARROW.values(), ids=NARROW)
def test_a_block_is_trained_alike_wherever_it_lies(options: dict[str, Any], preconditioner: str) -> None:
    """Alone in its stack, as on one of many ranks, in few rows at a time, and with the others."""
    together, _ = run(range(9), preconditioner=preconditioner, **options)
    for number, (name, p) in enumerate(named().items()):
        own = nn.Parameter(p.detach().clone())
        optimizer = shampoo([(name, own)], preconditioner=preconditioner, **options)
        for step in range(9):
            own.grad = made_up(own, step, number)
            optimizer.step()
        assert same_bits(snapshot([own]), snapshot([together[number]]))


@pytest.mark.parametrize("options", NARROW.values(), ids=NARROW)
def test_few_rows_at_a_time_give_the_same_bits(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    usual, _ = run(range(9), **options)
    monkeypatch.setattr(block_stack, "CACHED_BYTES", 1)
    monkeypatch.setattr(block_stack, "REFRESHED_BYTES", 1)
    few, _ = run(range(9), **options)
    assert same_bits(snapshot(few), snapshot(usual))


@pytest.mark.parametrize("options", NARROW.values(), ids=NARROW)
def test_no_copy_of_a_whole_stack_is_made(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A step decodes a few blocks at a time; so does the first one, and the start of new state."""
    count, d = 40, 32
    monkeypatch.setattr(block_stack, "CACHED_BYTES", 2 * 4 * d * d)
    config = ShampooConfig.from_options({"precondition_frequency": 2, "refresh": "sync", **options})
    with Largest() as largest:
        stack = BlockStack([f"w/{n}" for n in range(count)], (d, d), config, torch.device("cpu"), torch.float32)
        kept = max(tensor.nbytes for tensor in stack.tensors.values())
        assert largest.nbytes <= max(kept, 8 * d * d)
        largest.nbytes = 0
        gradients = torch.randn(count, d, d)
        for step in range(1, 5):
            largest.nbytes = 0
            stack.step(0, gradients.clone(), [step] * count, config, None)
            assert largest.nbytes <= gradients.nbytes  # the copy made here


@pytest.mark.parametrize("options", NARROW.values(), ids=NARROW)
@pytest.mark.parametrize("backwards", [False, True], ids=["narrower", "wider"])
def test_a_load_into_other_formats_converts_and_says_so(
    options: dict[str, Any], backwards: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before, after = (options, {}) if backwards else ({}, options)
    params, optimizer = run(range(5), **before)
    save_shampoo(optimizer, tmp_path)
    like = dict(zip(named(), params, strict=True))
    found, other = run(range(0), like, **after)
    load_shampoo(other, tmp_path)
    with caplog.at_level(logging.WARNING, logger="shampoo_deepspeed"):
        drive(other, found, range(5, 9))
    said = [text for text in caplog.messages if "other formats, and are converted" in text]
    of_blocks = [text for text in said if text.startswith("blocks of shape ")]
    assert len(of_blocks) == len(other.units[0].stacks) and all("factor_0 from " in text for text in of_blocks)
    assert len(said) - len(of_blocks) == (options.get("memory") == "half")  # of the vector's moments
    drive(optimizer, params, range(5, 9))
    for a, b, start in zip(found, params, named().values(), strict=True):
        assert (a - b).norm() <= (0.0 if options == NARROW["packed"] else 0.1) * (b - start).norm()
    assert other.param_groups[0]["factor_format"] == ShampooConfig.from_options(after).factor_format


def test_a_state_dict_with_other_formats_is_converted(caplog: pytest.LogCaptureFixture) -> None:
    """Groups take the options of a state dict, as torch does; formats may be changed then, before the next step."""
    params, optimizer = run(range(5))
    saved = copy.deepcopy(optimizer.state_dict())
    found, other = run(range(0), dict(zip(named(), params, strict=True)))
    other.load_state_dict(saved)
    other.param_groups[0].update(MEMORIES["half"])
    drive(other, found, range(5, 6))
    assert "are converted: " in caplog.text
    assert {t.dtype for s in other.units[0].stacks for n, t in s.tensors.items() if n.startswith("exp_avg")} == {
        torch.int8
    }
    with pytest.raises(OptionError, match="'factor_format' = 'packed' is not allowed: it was 'int8'"):
        other.param_groups[0]["factor_format"] = "packed"
        drive(other, found, range(6, 7))


def test_checkpoints_hold_the_narrow_bytes(tmp_path: Path) -> None:
    sizes = {}
    for name, options in {"full": {}, **NARROW}.items():
        like = {"w": parameter(128, 128)}
        _, optimizer = run(range(2), like, max_preconditioner_dim=64, **options)
        save_shampoo(optimizer, tmp_path / name)
        sizes[name] = sum(f.stat().st_size for f in (tmp_path / name).rglob("*.safetensors"))
        assert sizes[name] <= bytes_of_blocks(optimizer) + 16_000
    assert sizes["half"] < 0.3 * sizes["full"] and sizes["adamw"] < 0.5 * sizes["full"]


def test_given_formats_take_precedence_over_memory() -> None:
    config = ShampooConfig.from_options({MEMORY: "half", "moment_format": "bfloat16"})
    assert config.formats == {"factor": "int8", "root": "int8", "moment": "bfloat16"}
    assert ShampooConfig.from_options({MEMORY: None}).formats == ShampooConfig().formats
    with pytest.raises(OptionError, match="'memory' = 'tiny' is not allowed: null or one of full, adamw, half"):
        ShampooConfig.from_options({MEMORY: "tiny"})


def test_bytes_of_a_block_are_those_of_its_formats() -> None:
    d = 1024
    for name, expected in {"full": 20.0, "adamw": 7.04, "half": 3.1}.items():
        found = block_bytes((d, d), ShampooConfig.from_options({MEMORY: name}))
        assert sum(found.values()) / d**2 == pytest.approx(expected, abs=0.02)
