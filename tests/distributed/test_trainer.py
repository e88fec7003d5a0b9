"""A stock Trainer with `"type": "Shampoo"` in its JSON trains as one process does with the Trainer's own groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from shampoo_deepspeed.options.choices import TRAINER_NO_DECAY
from shampoo_deepspeed.options.parameter_names import matching, names_and_kinds
from tests.support.launch import Ask, Check, named
from tests.support.trainer_checks import ASKED, DECAY_ALL, EXACT, GPT, LLAMA, TIED_LLAMA, run
from tests.support.trainings import BETAS, BOUND, DECAY, RATE, Training, expected, make_model, trainer_decayed
from tests.support.zoo import relative_error

RESUMED = [run("resumed", Training(stage=stage, save_at=4, options={"momentum": 0.5})) for stage in (0, 2, 3)]
PAIRS = [(stages[0], other) for stages in (LLAMA, TIED_LLAMA, GPT) for other in stages[1:]]


def worst(values: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> tuple[float, str]:
    assert values.keys() == wanted.keys()
    found = {name: relative_error(values[name], wanted[name]) for name in wanted}
    assert all(error == error for error in found.values()), found
    return max((error, name) for name, error in found.items())


@pytest.mark.parametrize("check", EXACT, ids=named)
def test_parameters_and_losses_are_those_of_one_process(check: Check, ask: Ask, record_property: Any) -> None:
    """This includes weight decay: one process has the Trainer's own two groups, the JSON's optimizer gets one list."""
    training: Training = check.argument
    wanted = expected(training)
    for seen in ask(check):
        error, name = worst(seen["parameters"], wanted.parameters)
        record_property("worst", f"{name} {error:.1e}")
        assert error <= BOUND[training.settings], f"{name} deviates by {error:.2e}"
        assert seen["losses"] == pytest.approx(wanted.losses, rel=BOUND[training.settings])


@pytest.mark.parametrize("unsharded, sharded", PAIRS, ids=named)
def test_all_stages_agree(unsharded: Check, sharded: Check, ask: Ask, record_property: Any) -> None:
    first, other = ask(unsharded), ask(sharded)
    error, name = worst(other[0]["parameters"], first[0]["parameters"])
    record_property("worst", f"{name} {error:.1e}")
    assert error <= BOUND[sharded.argument.settings], f"{name} differs by {error:.2e}"
    assert all(torch.equal(other[0]["parameters"][n], p) for n, p in other[1]["parameters"].items())


@pytest.mark.parametrize("check", EXACT, ids=named)
def test_the_schedule_sets_the_rate_of_every_step(check: Check, ask: Ask) -> None:
    wanted = expected(check.argument).rates
    assert len(set(wanted)) > 4
    for seen in ask(check):
        assert seen["rates"] == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("check", [c for c in EXACT if c.argument.stage > 0], ids=named)
def test_gradients_are_clipped(check: Check, ask: Ask) -> None:
    """At stage 0, DeepSpeed gives the Trainer no norm, so only the parameters show it."""
    wanted = expected(check.argument)
    assert all(norm > check.argument.clip for norm in wanted.norms)
    for seen in ask(check):
        assert seen["norms"] == pytest.approx(wanted.norms, rel=BOUND[check.argument.settings])


@pytest.mark.parametrize("check", LLAMA + ASKED, ids=named)
def test_the_options_are_those_of_the_arguments_and_the_json(check: Check, ask: Ask) -> None:
    training: Training = check.argument
    arguments = {"lr": RATE, "betas": BETAS, "eps": training.eps, "weight_decay": DECAY}
    own = {k: tuple(v) if isinstance(v, list) else v for k, v in training.own_options().items()}
    for seen in ask(check):
        assert seen["class"] == "shampoo_deepspeed.optimizer.Shampoo" and seen["inner_optimizer"]
        assert not seen["untested"]  # zero_allow_untested_optimizer was not needed
        assert arguments.items() <= seen["options"].items() and own.items() <= seen["options"].items()


@pytest.mark.parametrize("check", LLAMA + TIED_LLAMA + GPT, ids=named)
def test_the_model_s_names_are_found_and_shown_once(check: Check, ask: Ask) -> None:
    names = [name for name, _ in make_model(check.argument.model).named_parameters()]
    first, *others = ask(check)
    assert all(seen["names"] == names for seen in (first, *others))
    assert not any("Shampoo preconditions" in m for seen in others for m in seen["messages"])
    (table,) = [m for m in first["messages"] if m.startswith("Shampoo preconditions:\n")]
    lines = {line.split()[0]: line for line in table.splitlines()[2:]}
    if check.argument.model == "gpt2":
        elementwise, no_decay = {"transformer.wte.weight", "transformer.wpe.weight"}, "transformer.h.*.ln_1.weight"
        preconditioned = "transformer.h.*.attn.c_attn.weight"
    else:
        elementwise, no_decay = {"model.embed_tokens.weight"}, "model.layers.*.input_layernorm.weight"
        preconditioned = "model.layers.*.mlp.up_proj.weight"
    if check.argument.model == "llama":
        elementwise.add("lm_head.weight")
    assert all("element-wise" in lines[n] and "excluded by" in lines[n] for n in elementwise)
    assert all("no weight decay" not in lines[n] for n in elementwise) and "no weight decay" in lines[no_decay]
    assert "blocks of" in lines[preconditioned]


@pytest.mark.parametrize("check", DECAY_ALL, ids=named)
def test_an_empty_no_decay_decays_everything(check: Check, ask: Ask) -> None:
    first = ask(check)[0]
    assert not any("no weight decay" in m for m in first["messages"])
    with_rule = expected(replace(check.argument, options={})).parameters
    for name in ("transformer.h.0.ln_1.weight", "transformer.h.1.mlp.c_fc.bias"):
        assert relative_error(first["parameters"][name], with_rule[name]) > 1e-4


@pytest.mark.parametrize("check", RESUMED, ids=named)
def test_a_resumed_run_goes_on_as_the_uninterrupted_one(check: Check, ask: Ask) -> None:
    """The checkpoint is between two refreshes: without its inverse roots and moments the next step would differ."""
    training: Training = check.argument
    for seen in ask(check):
        whole = seen["whole"]
        assert len(whole["losses"]) == training.steps
        assert seen["losses"] == whole["losses"][training.save_at :]
        assert seen["rates"] == whole["rates"][training.save_at :]
        assert all(torch.equal(seen["parameters"][n], p) for n, p in whole["parameters"].items())


STRAY = Check("trainer_stray_key", 2, "trainer:refused", Training(options={"precondition_frequncy": 3}))


@pytest.mark.parametrize("check", [STRAY], ids=named)
def test_an_unknown_key_in_the_json_is_named_to_the_user(check: Check, ask: Ask) -> None:
    for value in ask(check):
        assert value["kind"] == "OptionError"
        assert "'precondition_frequncy' = 3; did you mean 'precondition_frequency'" in value["message"]


@pytest.mark.parametrize("kind", ["bert", "gpt2", "gpt_neox", "llama", "opt", "qwen3", "t5", "vit"])
def test_the_no_decay_rule_is_the_trainer_s(kind: str) -> None:
    from transformers import AutoConfig, AutoModel

    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(kind))
    known = names_and_kinds(model).values()
    ours = {name for name, kinds in known if matching(TRAINER_NO_DECAY, name, kinds) is None}
    assert ours == trainer_decayed(model) & {name for name, _ in known}
    assert 0 < len(ours) < len(known)
