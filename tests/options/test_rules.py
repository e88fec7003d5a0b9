"""Rules: options of single parameters, without parameter groups, as if each had its own group."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

from shampoo_deepspeed import OptionError, Shampoo, ShampooConfig
from shampoo_deepspeed.options.config import GROUP_ONLY, OPTION_NAMES, options_with
from shampoo_deepspeed.options.rules import STRIDE, expanded
from tests.support.mixtures import MixtureLayer, TopKRouter
from tests.support.reference import Reference
from tests.support.stepping import drive, parameter, same_bits, shampoo, snapshot, state_of, through_a_file
from tests.support.zoo import gradients, make_batch, make_model, relative_error

RULES: list[dict[str, Any]] = [
    {"match": "up.weight", "preconditioner": "shampoo", "max_preconditioner_dim": 5, "one_sided": "smaller"},
    {"match": ["small*", "kind:3d"], "precondition_frequency": 2, "grafting": "rmsprop", "betas": [0.5, 0.9]},
    {"match": "shape:9", "elementwise": "sgd"},
    {"match": "down.weight", "split": [4, 5], "beta3": 0.3},
    {"match": "*.weight", "preconditioner": "shampoo", "exponent_override": 3.0},
]
# The rule that applies to each parameter of the odd model, by its index in RULES.
UNDER = {
    "up.weight": 0,
    "conv.weight": 1,
    "small.weight": 1,
    "small.bias": 1,
    "mix.bias": 2,
    "down.bias": 2,
    "back.bias": 2,
    "sometimes.bias": 2,
    "down.weight": 3,
}


def test_a_run_under_rules_is_that_of_the_reference_with_options_of_each_parameter() -> None:
    model = make_model("odd", torch.float64)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    options: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "precondition_frequency": 3}
    options["max_preconditioner_dim"] = 8
    overrides = {}
    for name in trained:
        rule = UNDER.get(name, 4 if name.endswith(".weight") else None)
        if rule is not None:
            overrides[name] = {k: v for k, v in RULES[rule].items() if k != "match"}
    reference = Reference(trained, overrides, exclude=("embed.weight",), **options)
    wide: dict[str, Any] = {"factor_dtype": "float64", "root_dtype": "float64"}
    optimizer = Shampoo(trained.items(), rules=RULES, **wide, **options)
    for step in range(10):
        gradients(model, make_batch("odd", step, unused=2))
        reference.step({n: p.grad for n, p in trained.items()})
        optimizer.step()
    deviations = {n: relative_error(trained[n].detach(), value) for n, value in reference.values().items()}
    assert max(deviations.values()) < 1e-10, deviations


def test_a_run_under_rules_goes_on_bit_for_bit_from_a_file() -> None:
    def made() -> tuple[dict[str, nn.Parameter], Shampoo]:
        own = {"up.weight": parameter(17, 9), "small.bias": parameter(5), "down.weight": parameter(9, 17)}
        return own, shampoo(own.items(), rules=RULES)

    (own, optimizer), (other, resumed) = made(), made()
    drive(optimizer, list(own.values()), range(5))
    for name, p in own.items():
        other[name].data.copy_(p.data)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    for one, params in ((optimizer, own), (resumed, other)):
        drive(one, list(params.values()), range(5, 9))
    assert same_bits(snapshot(own.values()), snapshot(other.values()))
    assert same_bits(state_of(optimizer), state_of(resumed))


def test_rules_of_a_loaded_state_are_those_that_it_was_saved_with() -> None:
    p, other = parameter(12, 10), parameter(12, 10)
    optimizer = shampoo([("w", p)], rules=[{"match": "w", "max_preconditioner_dim": 4}])
    drive(optimizer, [p], range(4))
    fresh = shampoo([("w", other)])
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    other.data.copy_(p.data)
    for one, own in ((optimizer, p), (fresh, other)):
        drive(one, [own], range(4, 8))
    assert torch.equal(p, other)


def test_the_learning_rate_and_decay_are_those_of_the_group() -> None:
    """A rule changes only what blocks do; the framework's groups stay as they are."""
    p, twin = parameter(12, 10), parameter(12, 10)
    ruled = shampoo([("w", p)], rules=[{"match": "w", "precondition_frequency": 1}])
    plain = shampoo([("w", twin)], precondition_frequency=1)
    for optimizer, own in ((ruled, p), (plain, twin)):
        optimizer.param_groups[0].update(lr=0.5, weight_decay=0.3)
        drive(optimizer, [own], range(5))
    assert len(ruled.param_groups) == 1 and torch.equal(p, twin)


def test_stacked_experts_of_a_model_are_matrices_of_their_own_by_default(caplog: pytest.LogCaptureFixture) -> None:
    model = MixtureLayer(TopKRouter())
    optimizer = Shampoo(model.parameters(), model=model)
    with caplog.at_level(logging.INFO, logger="shampoo_deepspeed"):
        drive(optimizer, list(model.parameters()), [0])
    lines = {line.split()[0]: line for line in caplog.text.splitlines()}
    assert "3 blocks of at most 1x8x4 (-, matrix, matrix)" in lines["experts.gate_up_proj"]
    assert "under the rule for 'kind:experts'" in lines["experts.gate_up_proj"]
    assert "excluded by '*bias'" in lines["experts.down_proj_bias"]
    assert "excluded by 'kind:router'" in lines["gate.weight"]


def test_rules_have_numbers_of_their_own() -> None:
    config = ShampooConfig.from_options({"rules": [{"match": "a", "eps": 0.5}, {"match": "b", "eps": 0.25}]})
    found = expanded({0: config, 3: ShampooConfig(rules=())})
    assert {number: c.eps for number, c in found.items()} == {0: 1e-8, STRIDE: 0.5, 2 * STRIDE: 0.25, 3: 1e-8}


@pytest.mark.parametrize("name", options_with(GROUP_ONLY))
def test_a_rule_cannot_set_an_option_of_a_group(name: str) -> None:
    with pytest.raises(OptionError, match=f"'{name}' belongs to a parameter group and not to a rule"):
        ShampooConfig.from_options({"rules": [{"match": "*", name: getattr(ShampooConfig(), name)}]})
    assert name in OPTION_NAMES


NEWTON: dict[str, Any] = {"preconditioner": "shampoo", "solver": "coupled_newton", "exponent_override": 2.5}
BAD: list[tuple[dict[str, Any], str]] = [
    ({"match": "*q*", "max_preconditioner_dims": 8}, "Unknown Shampoo option 'max_preconditioner_dims'"),
    ({"match": "*q*", "betas": [0.9, 2.0]}, r"'betas' = \[0.9, 2.0\]"),
    ({"match": "q", **NEWTON}, r"in the rule for \['q'\].*'solver' = 'coupled_newton'"),
    ({"match": "q", "one_sided": "left"}, r"in the rule for \['q'\].*'one_sided' = 'left'.*preconditioner = shampoo"),
    ({"match": ["kind:what"], "eps": 0.1}, "'kind:what' is not a kind"),
    ({"match": [], "eps": [0.1]}, "'eps' = "),
    ({"match": "*q*", "max_preconditioner_dim": 0}, r"in the rule for \['\*q\*'\].*'max_preconditioner_dim' = 0"),
    ({"match": "*q*"}, "{'match': '\\*q\\*'} lacks options other than 'match'"),
    ({"mach": "*q*", "eps": 0.1}, "'eps': 0.1} lacks 'match'"),
]


@pytest.mark.parametrize(("rule", "message"), BAD)
def test_a_bad_rule_is_an_error_when_the_optimizer_is_built(rule: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Shampoo([parameter(3)], rules=[rule])


def test_rules_cannot_change_once_there_is_state() -> None:
    optimizer = shampoo([("w", p := parameter(12, 10))])
    drive(optimizer, [p], [0])
    optimizer.param_groups[0]["rules"] = [{"match": "w", "max_preconditioner_dim": 4}]
    with pytest.raises(OptionError, match="'rules'"):
        drive(optimizer, [p], [1])
