"""Options: every bad value is an error that names key, value and what is allowed; good ones survive JSON."""

from __future__ import annotations

import inspect
import json
import logging
import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from shampoo_deepspeed import OptionError, Shampoo, ShampooConfig
from shampoo_deepspeed.algorithm.preconditioners.shampoo import relative_ridge
from shampoo_deepspeed.options.choices import (
    DAMPINGS,
    DTYPES,
    ELEMENTWISE_METHODS,
    GRAFTING_METHODS,
    MATMUL_PRECISIONS,
    OF_BASES,
    PRECONDITIONERS,
)
from shampoo_deepspeed.options.config import OPTION_NAMES, SHARED, options_with
from shampoo_deepspeed.options.names import ALIASES, COUNTERPARTS, FOREIGN, IGNORED, INSTEAD, ONLY_FALSE, nearest
from tests.support.stepping import parameter

NUMBER = "a number >= 0"


def keyword(name: str, value: object) -> dict[str, Any]:
    """A keyword argument that a type checker need not look at."""
    return {name: value}


FRACTION = "a number in [0, 1)"
BETAS = "two numbers [beta1, beta2] with 0 <= beta1 < 1 and 0 < beta2 <= 1"
COUNT = "an integer >= 1"
FLAG = "true or false"
METHODS = "one of none, sgd, adagrad, rmsprop, adam"
PATTERNS = "a list of name patterns"
DTYPE = "one of float32, float64, bfloat16"

# (key, bad value, the allowed values in the message)
BAD_VALUES: list[tuple[str, Any, str]] = [
    ("lr", -1e-3, NUMBER),
    ("lr", "0.001", NUMBER),
    ("lr", None, NUMBER),
    ("lr", True, NUMBER),
    ("lr", math.nan, NUMBER),
    ("lr", math.inf, NUMBER),
    ("lr", 10**400, NUMBER),
    ("lr", torch.ones(2), "a Tensor with one such element"),
    ("lr", torch.tensor(-1.0), "a Tensor with one such element"),
    ("lr", torch.tensor(math.nan), "a Tensor with one such element"),
    ("lr", "3e-3", "it is text, as YAML reads an exponent after a number without a point: write 0.003"),
    ("weight_decay", "1E-2", "write 0.01"),
    ("betas", 0.9, BETAS),
    ("betas", [0.9], BETAS),
    ("betas", [0.9, 0.99, 0.999], "three are of another optimizer, as Adan, AdEMAMix or Adafactor: keep two"),
    ("betas", [1.0, 0.999], BETAS),
    ("betas", [-0.1, 0.999], BETAS),
    ("betas", [0.9, 0.0], BETAS),
    ("betas", [0.9, 1.1], BETAS),
    ("betas", ["0.9", 0.999], BETAS),
    ("eps", -1e-8, NUMBER),
    ("eps", "1e-8", NUMBER),
    ("normalize_gradients", 1, FLAG),
    ("normalize_gradients", "rms", FLAG),
    ("weight_decay", -0.1, NUMBER),
    ("decoupled_weight_decay", 1, FLAG),
    ("decoupled_weight_decay", "true", FLAG),
    ("no_decay", "*bias*", PATTERNS),
    ("no_decay", [1], PATTERNS),
    ("epsilon", -1e-12, NUMBER),
    ("relative_epsilon", 1.0, FRACTION),
    ("relative_epsilon", -1e-6, FRACTION),
    ("max_preconditioner_dim", 0, COUNT),
    ("max_preconditioner_dim", -1, COUNT),
    ("max_preconditioner_dim", 128.0, COUNT),
    ("max_preconditioner_dim", "1024", COUNT),
    ("max_preconditioner_dim", True, COUNT),
    ("precondition_frequency", 0, COUNT),
    ("precondition_frequency", 2.5, COUNT),
    ("statistics_frequency", 0, f"null or {COUNT}"),
    ("statistics_frequency", "auto", COUNT),
    ("refresh", "later", "one of sync, staggered, background"),
    ("refresh", True, "one of sync, staggered, background"),
    ("start_preconditioning_step", 0, "an integer >= 1, or -1"),
    ("start_preconditioning_step", -2, "an integer >= 1, or -1"),
    ("start_preconditioning_step", 5.0, "an integer >= 1, or -1"),
    ("refresh_growth", 0.005, "null or 0, or a number in [0.01, 1]"),
    ("factor_beta", 0.0, "null or a number in (0, 1]"),
    ("early_relative_epsilon", 1.0, "a number in [0, 1)"),
    ("grafting", "lamb", METHODS),
    ("preconditioner", "lamb", "one of shampoo, soap, kl_shampoo, kl_soap, soap_muon, muon"),
    ("preconditioner", None, "one of shampoo, soap, kl_shampoo, kl_soap, soap_muon, muon"),
    ("refresh_tolerance", -0.1, "null or a number in [0, 1)"),
    ("refresh_tolerance", 1, "null or a number in [0, 1)"),
    ("refresh_tolerance", "0.1", "null or a number in [0, 1)"),
    ("grafting", 1, METHODS),
    ("beta3", 1.0, "null or a number in [0, 1)"),
    ("beta3", "0.9", "null or a number in [0, 1)"),
    ("weight_decay_type", "adamw", "null or one of l2, decoupled, corrected, independent"),
    ("weight_decay_type", 1, "null or one of l2, decoupled, corrected, independent"),
    ("peak_lr", 0.0, "null or a number > 0"),
    ("merge_small_dims", 0, FLAG),
    ("large_dim", "cut", "one of block, diagonal, identity, adagrad"),
    ("one_sided", "both", "null or one of smaller, left, right"),
    ("one_sided", True, "null or one of smaller, left, right"),
    ("batch_dims", 2, "0, or 1 if the first dim"),
    ("batch_dims", True, "0, or 1 if the first dim"),
    ("split", [4096], "a list of lengths >= 1"),
    ("split", [4, 0], "a list of lengths >= 1"),
    ("split", 3, "a list of lengths >= 1"),
    ("split", [2.0, 3], "a list of lengths >= 1"),
    ("exponent_override", [4, "2"], "null or a number p from 0.001 to 1000"),
    ("exponent_override", [], "null or a number p from 0.001 to 1000"),
    ("exclude", ["kind:norms"], "'kind:norms' is not a kind; kinds are embedding"),
    ("rules", {"match": "*q*"}, "a list of rules such as"),
    ("rules", [{"match": "*q*"}], "a list of rules such as"),
    ("rules", [{"max_preconditioner_dim": 3}], "a list of rules such as"),
    ("damping", "pseudo_inverse", "one of shift, cutoff, saturate"),
    ("shrinkage", -0.5, NUMBER),
    ("solver", "svd", "one of auto, eigh, qr, coupled_newton"),
    ("solver", None, "one of auto, eigh, qr, coupled_newton"),
    ("grafting_beta2", 0.0, "null or a number in (0, 1)"),
    ("grafting_beta2", 1.0, "null or a number in (0, 1)"),
    ("grafting_beta2", "0.9", "null or a number in (0, 1)"),
    ("elementwise_lr", -1.0, "a number >= 0"),
    ("embedding_lr", -1.0, "null or a number >= 0"),
    ("tied_embedding_lr", -1.0, "null or a number >= 0"),
    ("elementwise_betas", [0.9, 2.0], "null or two numbers [beta1, beta2]"),
    ("elementwise", "adamw", METHODS),
    ("elementwise", "rms", METHODS),
    ("momentum", 1.0, FRACTION),
    ("momentum", -0.1, FRACTION),
    ("momentum", False, FRACTION),
    ("dampening", 1.0, FRACTION),
    ("nesterov", "yes", FLAG),
    ("ema_decay", 1.0, "a number in [0, 1)"),
    ("ema_decay", "auto", "a number in [0, 1)"),
    ("nesterov", True, "true only together with momentum > 0"),
    ("use_bias_correction", 0, FLAG),
    ("exponent_override", 0, "null or a number p from 0.001 to 1000"),
    ("exponent_override", -2.0, "null or a number p from 0.001 to 1000"),
    ("exclude", "*embed*", PATTERNS),
    ("exclude", [None], PATTERNS),
    ("factor_dtype", "float16", "one of float32, float64"),
    ("factor_dtype", "bfloat16", "one of float32, float64"),
    ("factor_dtype", torch.int64, "one of float32, float64"),
    ("root_dtype", "fp32", DTYPE),
    ("root_dtype", None, DTYPE),
    ("factor_format", "int4", "one of float32, packed, bfloat16, int8"),
    ("root_format", None, "one of float32, packed, bfloat16, int8"),
    ("moment_format", "packed", "one of float32, bfloat16, int8"),
    ("elementwise_format", "int8", "one of float32, bfloat16"),
    ("apply_dtype", "fp8", DTYPE),
    ("matmul_precision", "tf32", "one of highest, high, medium"),
    ("matmul_precision", "High", "one of highest, high, medium"),
    ("matmul_precision", None, "one of highest, high, medium"),
    ("communication_dtype", "int8", DTYPE),
    ("compute_device", "gpu", "auto, shard, or a device"),
    ("compute_device", "meta", "auto, shard, or a device"),
    ("compute_device", None, "auto, shard, or a device"),
    *[
        ("compute_device", wrong, "auto, shard, or a device")
        for wrong in (1, -1, 2**63, -(2**70), True, 1.5, "cuda:x", f"cuda:{2**70}", "cuda:-2", "\udcff", "c\0", "")
    ],
    ("bucket_mb", -1, "null or a number >= 0"),
    ("bucket_mb", "auto", "null or a number >= 0"),
    ("master_weights", "no", FLAG),
    ("stochastic_rounding", 1, FLAG),
    ("stochastic_rounding", True, "true only together with master_weights = false"),
    ("overlap", 0, FLAG),
    ("failure_limit", 0, COUNT),
    ("strict_names", "yes", FLAG),
]
IDS = [f"{key}-{n}" for n, (key, _, _) in enumerate(BAD_VALUES)]


def message_of(error: pytest.ExceptionInfo[OptionError], key: str, value: object, allowed: str) -> None:
    text = str(error.value)
    assert repr(key) in text, text
    assert repr(value) in text, text
    assert allowed in text, text


@pytest.mark.parametrize(("key", "value", "allowed"), BAD_VALUES, ids=IDS)
def test_a_bad_value_is_an_error_that_names_key_value_and_what_is_allowed(key: str, value: Any, allowed: str) -> None:
    with pytest.raises(OptionError) as error:
        Shampoo([parameter(3)], **{key: value})
    message_of(error, key, value, allowed)
    assert isinstance(error.value, ValueError)  # what torch's own optimizers raise


@pytest.mark.parametrize(("key", "value", "allowed"), BAD_VALUES, ids=IDS)
def test_a_bad_value_in_a_group_is_the_same_error(key: str, value: Any, allowed: str) -> None:
    if key in options_with(SHARED):
        allowed = "all groups share one value"
    with pytest.raises(OptionError) as error:
        Shampoo([{"params": [parameter(3)]}, {"params": [parameter(4)], key: value}])
    message_of(error, key, value, allowed)


def test_every_option_has_a_bad_value_above() -> None:
    assert {key for key, _, _ in BAD_VALUES} == set(OPTION_NAMES)


IN_JSON = [(k, v) for k, v, _ in BAD_VALUES if not isinstance(v, torch.Tensor) and v != 10**400]


@pytest.mark.parametrize(("key", "value"), IN_JSON)
def test_a_bad_value_from_json_is_the_same_error(key: str, value: Any) -> None:
    if isinstance(value, torch.dtype):
        value = str(value)
    with pytest.raises(OptionError, match=re.escape(repr(key))):
        ShampooConfig.from_options(json.loads(json.dumps({key: value})))


@pytest.mark.parametrize("key", [name for name in OPTION_NAMES if name not in ("solver", "compute_device")])
def test_auto_is_an_error_for_every_option_but_the_solver_and_the_device(key: str) -> None:
    with pytest.raises(OptionError, match=f"{key!r} = 'auto' is not allowed"):
        ShampooConfig.from_options({key: "auto"})


@pytest.mark.parametrize("key", ["lr", "betas", "eps", "weight_decay", "momentum"])
def test_auto_where_the_trainer_would_fill_it_in_says_so(key: str) -> None:
    with pytest.raises(OptionError, match="only the Hugging Face Trainer fills in 'auto'"):
        ShampooConfig.from_options({key: "auto"})


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("learning_rate", None), ("weight_decy", "weight_decay"), ("precondition_freq", "precondition_frequency")],
)
def test_an_unknown_option_is_an_error_that_suggests_the_nearest(wrong: str, meant: str | None) -> None:
    with pytest.raises(OptionError) as error:
        Shampoo([parameter(3)], **keyword(wrong, 0.5))
    text = str(error.value)
    assert f"Unknown Shampoo option {wrong!r} = 0.5" in text
    assert ("did you mean" in text) == (meant is not None)
    assert meant is None or f"did you mean {meant!r}" in text
    assert "All options: docs/options.md" in text


@pytest.mark.parametrize("key", [5, None, ("lr",), b"lr", 0.5])
def test_a_name_that_is_no_text_is_an_error_and_in_a_group_a_warning(
    key: Any, caplog: pytest.LogCaptureFixture
) -> None:
    weights = parameter(3)
    for build in (
        lambda: ShampooConfig.from_options({key: 1}),
        lambda: Shampoo([("w", weights)], rules=[{"match": "*", key: 1}]),
    ):
        with pytest.raises(OptionError, match=re.escape(f"Unknown Shampoo option {key!r} = 1: names of options are")):
            build()
    with caplog.at_level(logging.WARNING, logger="shampoo_deepspeed"):
        optimizer = Shampoo([{"params": [weights], key: 1, "extra": 2}])
    assert f"Shampoo has no option {key!r} (= 1 in a parameter group) and ignores it" in caplog.text
    weights.grad = torch.ones_like(weights)
    optimizer.step()
    saved = optimizer.state_dict()
    assert saved["param_groups"][0][key] == 1 and repr(optimizer)
    optimizer.load_state_dict(saved)


@pytest.mark.parametrize(
    ("foreign", "advice"), [("learning_rate", "the learning rate is 'lr'"), ("distributed_config", "leave it out")]
)
def test_an_option_of_other_optimizers_is_an_error_that_says_what_to_do(foreign: str, advice: str) -> None:
    with pytest.raises(OptionError, match=advice):
        Shampoo([parameter(3)], **keyword(foreign, None))


def test_what_a_json_keeps_of_another_optimizer_is_named_together_with_whose_it_is() -> None:
    """People change "type" alone; one look at the message must be enough."""
    adams = {"lr": 1e-3, "torch_adam": True, "adam_w_mode": True, "bias_correction": True, "amsgrad": False}
    with pytest.raises(OptionError) as error:
        ShampooConfig.from_options(adams)
    text = str(error.value)
    assert "delete them (of Adam: 'adam_w_mode' = True, 'bias_correction' = True, 'amsgrad' = False)" in text
    assert "torch_adam" not in text and len(text) < 250
    with pytest.raises(OptionError, match="of Adam: 'fp32_optimizer_states' = False; of Muon: 'ns_steps' = 5"):
        ShampooConfig.from_options({"fp32_optimizer_states": False, "ns_steps": 5, "momentum": 0.95})


@pytest.mark.parametrize(("owner", "key"), [(owner, key) for owner, keys in FOREIGN.items() for key in keys])
def test_other_optimizers_keys_are_known(owner: str, key: str) -> None:
    with pytest.raises(OptionError, match=re.escape(f"delete them (of {owner}: {key!r} = None)")):
        ShampooConfig.from_options({key: None})
    assert f"an option of {owner}" in nearest(key, OPTION_NAMES)
    assert key not in {*OPTION_NAMES, *ALIASES, *INSTEAD, *COUNTERPARTS}


@pytest.mark.parametrize(("theirs", "ours"), list(COUNTERPARTS.items()))
def test_what_other_packages_call_by_another_name_is_named(theirs: str, ours: str) -> None:
    with pytest.raises(OptionError, match=f"{theirs!r} = 7: here it is {ours!r}"):
        ShampooConfig.from_options({theirs: 7})
    assert ours in OPTION_NAMES and theirs not in {*OPTION_NAMES, *ALIASES, *INSTEAD}


def test_keys_of_deepspeed_s_own_optimizers_are_known() -> None:
    """Read from the installed DeepSpeed and torch, which may gain some."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
    from deepspeed.ops.lamb import FusedLamb
    from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion

    torchs = [getattr(torch.optim, name) for name in ("Adam", "AdamW", "NAdam", "RAdam", "Adagrad", "RMSprop", "SGD")]
    torchs += [torch.optim.Muon] if hasattr(torch.optim, "Muon") else []
    for optimizer in (DeepSpeedCPUAdam, FusedAdam, FusedLamb, DeepSpeedCPULion, FusedLion, *torchs):
        keys = set(inspect.signature(optimizer.__init__).parameters) - {"self", "params", "model_params"}
        known = {*OPTION_NAMES, *ALIASES, *IGNORED, *ONLY_FALSE, *(key for keys in FOREIGN.values() for key in keys)}
        assert keys <= known, (optimizer, keys - known)


def test_an_error_fits_on_a_screen() -> None:
    """It names three options at most, and shows the beginning of a long value."""
    with pytest.raises(OptionError) as unknown:
        Shampoo([parameter(3)], **keyword("weight_decy", ["a"] * 10_000))
    assert "did you mean 'weight_decay', 'weight_decay_type' or 'decoupled_weight_decay'?" in str(unknown.value)
    with pytest.raises(OptionError) as wrong:
        Shampoo([parameter(3)], **keyword("exclude", [3] * 10_000))
    assert "'exclude' = [3, 3," in str(wrong.value) and "(30,000 characters)" in str(wrong.value)
    for error in (unknown, wrong):
        assert len(str(error.value)) < 1_000


def test_a_misspelt_option_of_a_group_is_an_error_and_a_framework_s_own_key_is_not() -> None:
    with pytest.raises(OptionError, match="did you mean 'weight_decay'"):
        Shampoo([{"params": [parameter(3)], "weight_decy": 0.1}])
    optimizer = Shampoo([{"params": [parameter(3)], "name": "experts", "moe": True, "initial_lr": 0.1}])
    assert (optimizer.param_groups[0]["name"], optimizer.param_groups[0]["moe"]) == ("experts", True)


def test_an_unknown_key_of_a_group_stays_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    optimizer = Shampoo([{"params": [parameter(3)], "name": "experts", "initial_lr": 0.1}])
    assert not caplog.text
    optimizer.add_param_group({"params": [parameter(4)], "wd": 0.1})
    assert optimizer.param_groups[1]["wd"] == 0.1
    assert "no option 'wd' (= 0.1 in a parameter group)" in caplog.text
    assert "All options: docs/options.md" in caplog.text
    optimizer.add_param_group({"params": [parameter(5)], "wd": 0.2})
    assert caplog.text.count("no option") == 1


def test_a_list_of_parameters_that_is_a_module_is_taken() -> None:
    assert len(Shampoo(nn.ParameterList([parameter(3), parameter(4)])).param_groups[0]["params"]) == 2


def test_adamw_s_kernel_options_in_deepspeed_s_json_are_ignored() -> None:
    assert ShampooConfig.from_options({"torch_adam": True, "fused": True}) == ShampooConfig()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((nn.Linear(2, 2),), r"params is a Module; give its named_parameters\(\); allowed: an iterable"),
        ((nn.Linear(2, 2).state_dict(),), "params is OrderedDict; allowed: an iterable of parameters"),
        ((torch.ones(2),), "params is Tensor; allowed: an iterable of parameters"),
        (([parameter(3)], {"model": 3}), "model = 3 is not allowed: None, or the nn.Module"),
        (([parameter(3)], {"process_group": 3}), "process_group = 3 is not allowed: None, or a torch"),
    ],
)
def test_a_wrong_type_is_an_error_before_the_first_step(arguments: tuple[Any, ...], message: str) -> None:
    params, options = arguments if len(arguments) == 2 else (arguments[0], {})
    with pytest.raises(TypeError, match=message):
        Shampoo(params, **options)


@pytest.mark.parametrize("key", options_with(SHARED))
def test_what_all_groups_share_cannot_differ_in_one(key: str) -> None:
    values = {"communication_dtype": "bfloat16", "bucket_mb": 1, "overlap": False, "failure_limit": 3}
    value = {**values, "strict_names": True, "compute_device": "shard"}[key]
    Shampoo([{"params": [parameter(3)], key: value}], **keyword(key, value))
    with pytest.raises(OptionError, match=f"{key!r} = {value!r} in a parameter group.*all groups share one value"):
        Shampoo([{"params": [parameter(3)], key: value}])


def test_a_changed_group_is_checked_at_the_next_step() -> None:
    optimizer = Shampoo([p := parameter(6, 5)])
    p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.param_groups[0]["betas"] = (0.9, 2.0)
    before = p.detach().clone()
    with pytest.raises(OptionError, match="'betas' = \\(0.9, 2.0\\)"):
        optimizer.step()
    assert torch.equal(p, before)


README_NAMES: list[tuple[str, Any, str]] = [
    ("grafting_epsilon", 1e-6, "eps"),
    ("use_decoupled_weight_decay", False, "decoupled_weight_decay"),
    ("use_nesterov", False, "nesterov"),
    ("grafting_type", "rmsprop", "grafting"),
]


@pytest.mark.parametrize(("alias", "value", "name"), README_NAMES)
def test_names_of_the_distributed_shampoo_readme_are_taken(alias: str, value: Any, name: str) -> None:
    assert getattr(ShampooConfig.from_options({alias: value}), name) == value
    group = Shampoo([{"params": [parameter(3)], alias: value}]).param_groups[0]
    assert group[name] == value and alias not in group
    with pytest.raises(OptionError, match=f"option {name!r} is given twice \\(as {alias!r}"):
        ShampooConfig.from_options({name: value, alias: value})


def test_every_alias_is_tested_and_names_an_option() -> None:
    assert {alias: name for alias, _, name in README_NAMES} == ALIASES
    assert set(ALIASES.values()) <= set(OPTION_NAMES)


def test_json_lists_and_dtypes_become_what_the_code_uses() -> None:
    options = json.loads('{"betas": [0.8, 1], "exclude": ["*head*"], "no_decay": [], "lr": 1, "grafting": "Adam"}')
    config = ShampooConfig.from_options({**options, "root_dtype": torch.bfloat16, "factor_dtype": "torch.float64"})
    assert (config.betas, config.exclude, config.no_decay, config.lr) == ((0.8, 1.0), ("*head*",), (), 1.0)
    assert (config.grafting, config.root_dtype, config.factor_dtype) == ("adam", "bfloat16", "float64")


numbers = st.floats(0, 1e6)
fractions = st.floats(0, 1, exclude_max=True)
counts = st.integers(1, 10_000)
patterns = st.lists(st.sampled_from(["*embed*", "kind:layernorm", "gamma\u00e9", '"*"']), max_size=3).map(tuple)
dtypes = st.sampled_from(list(DTYPES))
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "lr": numbers,
    "betas": st.tuples(st.floats(0, 1, exclude_min=True, exclude_max=True), st.floats(0, 1, exclude_min=True)),
    "beta3": st.none() | fractions,
    "factor_beta": st.none() | st.floats(0, 1, exclude_min=True),
    "early_relative_epsilon": fractions,
    "refresh_growth": st.none() | st.just(0.0) | st.floats(0.01, 1.0),
    "eps": numbers,
    "normalize_gradients": st.booleans(),
    "weight_decay": st.floats(0, 1e-12),  # times any learning rates it is below 2
    "decoupled_weight_decay": st.booleans(),
    "weight_decay_type": st.none() | st.just("l2"),
    "peak_lr": st.none() | st.floats(1e-6, 1.0),
    "no_decay": patterns,
    "epsilon": numbers,
    "relative_epsilon": fractions,
    "preconditioner": st.sampled_from(PRECONDITIONERS),
    "refresh_tolerance": st.none() | fractions,
    "max_preconditioner_dim": counts,
    "merge_small_dims": st.booleans(),
    "large_dim": st.sampled_from(["block", "adagrad"]),
    "one_sided": st.sampled_from([None, "left", "right"]),
    "batch_dims": st.sampled_from([0, 1]),
    "split": st.sampled_from([(), (3, 4)]),
    "precondition_frequency": counts,
    "statistics_frequency": st.none() | counts,
    "refresh": st.sampled_from(["sync", "staggered", "background"]),
    "start_preconditioning_step": st.just(-1) | st.integers(10_000, 20_000),
    "grafting": st.none() | st.sampled_from(GRAFTING_METHODS),
    "grafting_beta2": st.none() | st.floats(0, 1, exclude_min=True, exclude_max=True),
    "elementwise": st.none() | st.sampled_from(ELEMENTWISE_METHODS),
    "elementwise_lr": numbers,
    "embedding_lr": st.none() | numbers,
    "tied_embedding_lr": st.none() | numbers,
    "elementwise_betas": st.none() | st.tuples(fractions, st.floats(0, 1, exclude_min=True)),
    "momentum": st.floats(0, 1, exclude_min=True, exclude_max=True),
    "dampening": fractions,
    "nesterov": st.booleans(),
    "ema_decay": st.floats(0, 1, exclude_max=True),
    "use_bias_correction": st.booleans(),
    "exponent_override": st.none() | st.floats(0.1, 100) | st.tuples(st.none(), st.floats(0.1, 100)),
    "damping": st.sampled_from(DAMPINGS),
    "shrinkage": numbers,
    "solver": st.sampled_from(OF_BASES),
    "exclude": patterns,
    "rules": st.sampled_from([(), ({"match": ("*q*", "kind:2d"), "max_preconditioner_dim": 8, "betas": (0.5, 0.9)},)]),
    "factor_dtype": st.sampled_from(["float32", "float64"]),
    "root_dtype": dtypes,
    "factor_format": st.sampled_from(["float32", "packed", "bfloat16", "int8"]),
    "root_format": st.sampled_from(["float32", "packed", "bfloat16", "int8"]),
    "moment_format": st.sampled_from(["float32", "bfloat16", "int8"]),
    "elementwise_format": st.sampled_from(["float32", "bfloat16"]),
    "master_weights": st.just(False),
    "stochastic_rounding": st.booleans(),
    "apply_dtype": st.none() | dtypes,
    "matmul_precision": st.sampled_from(MATMUL_PRECISIONS),
    "communication_dtype": st.none() | dtypes,
    "compute_device": st.sampled_from(["auto", "shard", "cpu", "cuda:1"]),
    "bucket_mb": st.none() | numbers,
    "overlap": st.booleans(),
    "failure_limit": counts,
    "strict_names": st.booleans(),
}


@given(st.fixed_dictionaries(VALUES))
def test_options_survive_json(options: dict[str, Any]) -> None:
    assert VALUES.keys() == set(OPTION_NAMES)
    if options["preconditioner"] != "shampoo":  # options that the others do not allow
        options = {**options, "exponent_override": None, "one_sided": None, "damping": "shift"}
    if options["preconditioner"] not in ("shampoo", "kl_shampoo"):
        options = {**options, "shrinkage": 0.0}
    if options["preconditioner"] == "muon":
        options = {**options, "refresh_tolerance": None, "solver": "auto"}
    config = ShampooConfig.from_options(options)
    assert {name: getattr(config, name) for name in OPTION_NAMES} == options
    assert ShampooConfig.from_options(json.loads(json.dumps(config.to_json()))) == config


def test_a_tensor_learning_rate_becomes_a_number_in_json() -> None:
    assert json.loads(json.dumps(ShampooConfig(lr=torch.tensor(0.5)).to_json()))["lr"] == 0.5


@given(st.integers(1, 9), st.integers(1, 30) | st.just(-1), st.integers(1, 60))
def test_refreshes_come_at_the_start_step_and_at_multiples_of_the_frequency(freq: int, start: int, step: int) -> None:
    config = ShampooConfig(precondition_frequency=freq, start_preconditioning_step=start, refresh_growth=0.0)
    first = freq if start == -1 else start
    assert config.start == first
    assert config.refreshes_at(step) == (step == first or (step > first and step % freq == 0))


def test_refreshes_are_dense_at_first_and_thin_out_to_the_frequency() -> None:
    """KL-Shampoo does so unless told otherwise."""
    for config in (ShampooConfig(refresh="sync"), ShampooConfig(preconditioner="soap", refresh_growth=0.25)):
        due = [step for step in range(1, 72) if config.refreshes_at(step)]
        assert due == [2, 3, 4, 5, 6, 7, 8, 10, 12, 15, 18, 22, 27, 33, 41, 51, 61, 71]


def test_early_refreshes_and_sampled_statistics_are_kl_shampoos_own_unless_told_otherwise() -> None:
    own = {name: ShampooConfig(preconditioner=name) for name in PRECONDITIONERS}
    assert {name: c.growth for name, c in own.items()} == dict.fromkeys(PRECONDITIONERS, 0.0) | {"kl_shampoo": 0.25}
    assert {name: c.sampling for name, c in own.items()} == dict.fromkeys(PRECONDITIONERS, 1) | {
        "kl_shampoo": 2,
        "kl_soap": 2,
    }
    assert {name: c.start for name, c in own.items()} == dict.fromkeys(PRECONDITIONERS, 10) | {"kl_shampoo": 2}
    for name in PRECONDITIONERS:
        config = ShampooConfig(preconditioner=name, refresh_growth=0.0, statistics_frequency=3)
        assert (config.growth, config.sampling, config.start) == (0.0, 3, 10)


def test_windows_as_long_as_the_frequency_are_not_early() -> None:
    """With a refresh in every step no window is shorter, so statistics are sampled from the first refresh on."""
    for frequency in (1, 2, 3):
        config = ShampooConfig(precondition_frequency=frequency)
        begins = config.early_windows
        lengths = [after - before for before, after in zip(begins, begins[1:], strict=False)]
        assert all(length < frequency for length in lengths)
        assert config.refresh_window(begins[-1]) == (begins[-1], frequency)
    assert ShampooConfig(precondition_frequency=1).dense_statistics == 2


def test_tracked_bases_take_two_steps_in_early_refreshes() -> None:
    tracked, regular = ShampooConfig(solver="qr"), ShampooConfig().early_windows[-1]
    assert [tracked.orthogonal_steps(step) for step in (2, regular - 1, regular, 10 * regular)] == [2, 2, 1, 1]
    assert {ShampooConfig().orthogonal_steps(step) for step in (2, regular)} == {0}
    assert {ShampooConfig(preconditioner="soap").orthogonal_steps(step) for step in (10, 20)} == {1}
    assert ShampooConfig(solver="qr", refresh_growth=0.0).orthogonal_steps(10) == 1


@given(st.integers(1, 12), st.floats(0.01, 1.0) | st.just(0.0), st.integers(1, 20), st.integers(1, 300))
def test_windows_of_refreshes_follow_each_other(freq: int, growth: float, start: int, step: int) -> None:
    config = ShampooConfig(precondition_frequency=freq, refresh_growth=growth, start_preconditioning_step=start)
    begin, length = config.refresh_window(start + step)
    assert begin <= start + step < begin + length and 1 <= length <= freq
    if begin > start:
        before, shorter = config.refresh_window(begin - 1)
        assert before + shorter == begin and shorter <= length


def test_early_steps_have_a_larger_ridge() -> None:
    config = ShampooConfig(relative_epsilon=1e-4, early_relative_epsilon=0.01)
    assert [relative_ridge(config, step) for step in (1, 50, 1000)] == [0.01, 2e-4, 1e-4]


def test_factor_matrices_decay_by_their_own_beta_or_with_null_as_second_moments_do() -> None:
    assert ShampooConfig(betas=(0.9, 0.97)).factors_decay == 0.95
    assert ShampooConfig(betas=(0.9, 0.97), factor_beta=None).factors_decay == 0.97
    config = ShampooConfig(betas=(0.9, 0.97), factor_beta=0.9)
    assert (config.factors_decay, config.second_moment_beta) == (0.9, 0.97)


def test_the_grafting_second_moment_decays_as_the_factors_do_unless_told_otherwise() -> None:
    assert ShampooConfig(betas=(0.9, 0.95)).second_moment_beta == 0.95
    assert ShampooConfig(betas=(0.9, 1.0)).second_moment_beta == 0.999  # an EMA with decay 1 would never move
    assert ShampooConfig(betas=(0.9, 0.95), grafting_beta2=0.5).second_moment_beta == 0.5


def test_grafting_is_the_preconditioners_own_unless_told_otherwise() -> None:
    own = {name: ShampooConfig(preconditioner=name).grafting_method for name in PRECONDITIONERS}
    assert own == dict.fromkeys(PRECONDITIONERS, "rms") | {"soap": "none", "kl_soap": "none"}
    for name in PRECONDITIONERS:
        for given_method in GRAFTING_METHODS:
            config = ShampooConfig(preconditioner=name, grafting=given_method)
            assert config.grafting_method == given_method
            assert config.warm_method == ("adam" if given_method in ("none", "rms") else given_method)


def test_kl_shampoo_takes_no_other_root() -> None:
    with pytest.raises(OptionError, match="'exponent_override' = 4.0 is not allowed: null with preconditioner kl_sha"):
        ShampooConfig(preconditioner="kl_shampoo", exponent_override=4.0)
    assert ShampooConfig(preconditioner="soap", exponent_override=4.0).exponent_override == 4.0


def test_elementwise_parameters_follow_the_grafting_method_unless_told_otherwise() -> None:
    assert ShampooConfig(grafting="rmsprop").elementwise_method == "rmsprop"
    assert ShampooConfig(grafting="none").elementwise_method == "adam"
    assert ShampooConfig(grafting="rms").elementwise_method == "adam"
    assert ShampooConfig(grafting="none", elementwise="sgd").elementwise_method == "sgd"


SPLIT: dict[str, Any] = {"preconditioner": "shampoo", "split": [2, 3]}
IMPOSSIBLE: list[tuple[dict[str, Any], str]] = [
    ({"dampening": 0.1}, "'dampening' = 0.1 is not allowed: 0 unless momentum > 0"),
    ({"beta3": 0.5, "betas": (0.0, 0.9)}, "'beta3' = 0.5.*null if betas"),
    ({"weight_decay_type": "corrected", "decoupled_weight_decay": False}, "'weight_decay_type' = 'corrected'"),
    ({**SPLIT, "large_dim": "diagonal"}, "'large_dim' = 'diagonal'.*together with split"),
    ({**SPLIT, "one_sided": "smaller"}, "'one_sided' = 'smaller'.*together with split"),
    ({"large_dim": "diagonal"}, "'large_dim' = 'diagonal'.*block or adagrad with.*kl_shampoo; or preconditioner = sh"),
    ({"one_sided": "left"}, "'one_sided' = 'left'.*null with preconditioner kl_shampoo; or preconditioner = shampoo"),
    ({"exponent_override": 2}, "'exponent_override' = 2.0.*null with.*kl_shampoo.*; or preconditioner = shampoo"),
    ({"preconditioner": "soap", "one_sided": "left"}, "'one_sided' = 'left'.*null with preconditioner soap"),
    (
        {"preconditioner": "soap", "solver": "coupled_newton"},
        "'solver' = 'coupled_newton'.*auto, eigh or qr with.*soap",
    ),
    ({"preconditioner": "soap", "exponent_override": [2, 4]}, "'exponent_override'.*null or a number with"),
    (
        {"refresh_tolerance": 0.1, "solver": "coupled_newton"},
        "'solver' = 'coupled_newton'.*together with refresh_tolerance",
    ),
    (
        {"preconditioner": "shampoo", "damping": "cutoff", "solver": "coupled_newton"},
        "'solver' = 'coupled_newton'.*auto, eigh or qr if damping is cutoff",
    ),
    ({"damping": "saturate", "solver": "coupled_newton"}, "'solver' = 'coupled_newton'.*if damping is saturate"),
    ({"preconditioner": "kl_shampoo", "damping": "cutoff"}, "'damping' = 'cutoff'.*shift or saturate with.*never see"),
    ({"preconditioner": "soap", "damping": "saturate"}, "'damping' = 'saturate'.*shift with preconditioner soap"),
    ({"preconditioner": "soap", "shrinkage": 0.1}, "'shrinkage' = 0.1.*0 with preconditioner soap"),
    ({"preconditioner": "kl_soap", "damping": "cutoff"}, "'damping' = 'cutoff'.*shift with preconditioner kl_soap"),
    (
        {"preconditioner": "soap_muon", "solver": "coupled_newton"},
        "'solver' = 'coupled_newton'.*auto, eigh or qr with.*soap_muon",
    ),
    ({"preconditioner": "muon", "solver": "qr"}, "'solver' = 'qr'.*auto with preconditioner muon, which has no factor"),
    ({"preconditioner": "muon", "exponent_override": 2}, "'exponent_override' = 2.0.*null with.*muon, which has no"),
    ({"preconditioner": "muon", "refresh_tolerance": 0.1}, "'refresh_tolerance' = 0.1.*null with.*muon, which has no"),
    (
        {"preconditioner": "muon", "damping": "saturate"},
        "'damping' = 'saturate'.*shift with.*muon, which has no factor",
    ),
    ({"preconditioner": "muon", "shrinkage": 0.1}, "'shrinkage' = 0.1.*0.0 with.*muon, which has no factor matrices"),
    ({"preconditioner": "muon", "one_sided": "left"}, "'one_sided' = 'left'.*null with preconditioner muon"),
]


@pytest.mark.parametrize(("options", "message"), IMPOSSIBLE)
def test_options_that_contradict_one_another_are_an_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Shampoo([parameter(3)], **options)


def test_roots_are_twice_the_number_of_preconditioned_dims_unless_overridden() -> None:
    """KL-Shampoo's are always 2."""

    def roots(**options: Any) -> list[float]:
        config = ShampooConfig.from_options(options)
        return [config.root(n) for n in (1, 2, 3)]

    assert roots() == [2.0, 2.0, 2.0]
    assert roots(preconditioner="shampoo") == [2.0, 4.0, 6.0]
    assert roots(preconditioner="shampoo", exponent_override=3) == [3.0, 3.0, 3.0]
    assert roots(preconditioner="shampoo", exponent_override=[None, 3]) == [2.0, 3.0, 6.0]


def test_the_peak_of_a_scaled_decay_is_the_learning_rate_that_a_group_starts_with() -> None:
    group = {"params": [parameter(3)], "lr": 0.5}
    optimizer = Shampoo([group, {"params": [parameter(3)]}], lr=0.25, weight_decay_type="corrected")
    assert [g["peak_lr"] for g in optimizer.param_groups] == [0.5, 0.25]
    assert Shampoo([parameter(3)], lr=0.25).param_groups[0]["peak_lr"] is None
    with pytest.raises(OptionError, match="'peak_lr' = None is not allowed: a number > 0 if lr starts at 0"):
        Shampoo([parameter(3)], lr=0.0, weight_decay_type="independent")
    optimizer = Shampoo([parameter(3)], lr=0.0, weight_decay_type="independent", peak_lr=0.1)
    assert optimizer.param_groups[0]["peak_lr"] == 0.1


@pytest.mark.parametrize("kind", [{}, {"weight_decay_type": "decoupled"}, {"decoupled_weight_decay": False}], ids=str)
def test_a_peak_that_nothing_reads_is_an_error(kind: dict[str, Any]) -> None:
    name = "l2" if "decoupled_weight_decay" in kind else "decoupled"
    expected = f"'peak_lr' = 0.1 is not allowed: null if weight decay is {name}; only corrected and independent"
    with pytest.raises(OptionError, match=expected):
        Shampoo([parameter(3)], peak_lr=0.1, weight_decay=0.1, **kind)
    with pytest.raises(OptionError, match=expected):
        Shampoo([{"params": [parameter(3)], "peak_lr": 0.1, **kind}], weight_decay=0.1)
    groups = [{"params": [parameter(3)], "weight_decay_type": "corrected"}, {"params": [parameter(3)], **kind}]
    optimizer = Shampoo(groups, lr=0.2, peak_lr=0.1)  # which one of the groups reads
    assert [group["peak_lr"] for group in optimizer.param_groups] == [0.1, 0.1]
    optimizer.param_groups[0]["weight_decay_type"] = "decoupled"  # by hand, while the group keeps its peak
    optimizer.configs()
