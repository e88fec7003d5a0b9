"""Presets: a name stands for the options of an algorithm or of a kind of training; given options win over it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from shampoo_deepspeed import CheckpointError, OptionError, Shampoo, ShampooConfig, load_shampoo, save_shampoo
from shampoo_deepspeed.__main__ import main
from shampoo_deepspeed.checkpoint.manifest import Manifest
from shampoo_deepspeed.checkpoint.schema import options_record
from shampoo_deepspeed.options.config import GROUP_ONLY, OPTION_NAMES, SHARED, options_with
from shampoo_deepspeed.options.presets import PRESET, PRESETS
from tests.support.reference import Reference
from tests.support.stepping import drive, made_up, parameter, same_bits, snapshot, state_of, through_a_file
from tests.support.zoo import relative_error

pytestmark = pytest.mark.slow

PAPER = PRESETS["paper"]
# Arguments of `python -m shampoo_deepspeed`; no weights are allocated.
ESTIMATE = ("estimate", "--model", "llama-3.2-1b", "--world-size", "2", "--json")


def of(found: Any) -> dict[str, Any]:
    """Return the preset's options as a config or a param group has them."""
    get = found.get if isinstance(found, dict) else lambda name: getattr(found, name)
    return {name: get(name) for name in PAPER}


def test_a_preset_stands_for_its_options() -> None:
    config = ShampooConfig.from_options({"preset": "paper"})
    assert of(config) == PAPER and config == ShampooConfig(**PAPER)
    assert [config.root(k) for k in (1, 2, 3)] == [2.0, 4.0, 6.0]
    assert (config.start, config.precondition_frequency, config.factors_decay) == (10, 10, 0.999)
    assert (config.growth, config.sampling, config.decay_type) == (0.0, 1, "decoupled")
    assert ShampooConfig.from_options({"preset": "Paper"}) == config
    assert ShampooConfig.from_options({"preset": None}) == ShampooConfig()
    assert PRESET not in config.to_json() and PRESET not in OPTION_NAMES


@pytest.mark.parametrize("name", PRESETS)
def test_presets_leave_what_a_framework_or_the_run_decides(name: str) -> None:
    """A Trainer fills in "auto" for the first four, also where the user has given nothing."""
    left = {"lr", "betas", "eps", "weight_decay", "exclude", "no_decay", "rules", *options_with(SHARED)}
    assert not left & PRESETS[name].keys() and PRESETS[name].keys() <= set(OPTION_NAMES)
    config = ShampooConfig(**PRESETS[name])
    assert {option: getattr(config, option) for option in PRESETS[name]} == PRESETS[name]


@pytest.mark.parametrize("option", [{"relative_epsilon": 1e-3}, {"grafting_type": "sgd"}, {"factor_beta": 0.5}])
@pytest.mark.parametrize("order", [1, -1])
def test_given_options_win_over_a_preset(option: dict[str, Any], order: int) -> None:
    given = dict([*option.items(), ("preset", "paper")][::order])
    expected = ShampooConfig.from_options(
        {**PAPER, **{{"grafting_type": "grafting"}.get(k, k): v for k, v in option.items()}}
    )
    assert ShampooConfig.from_options(given) == expected != ShampooConfig(**PAPER)
    group = Shampoo([parameter(3)], **given).param_groups[0]
    assert of(group) == of(expected) and PRESET not in group


def test_a_default_that_is_given_wins_too() -> None:
    config = ShampooConfig.from_options({"preset": "paper", "preconditioner": "kl_shampoo", "refresh_growth": None})
    assert (config.preconditioner, config.refresh_growth, config.grafting) == ("kl_shampoo", None, "adam")


def test_a_group_may_have_its_own_preset() -> None:
    optimizer = Shampoo(
        [{"params": [parameter(3)]}, {"params": [parameter(4)], "preset": "paper", "epsilon": 1e-6}],
        preconditioner="soap",
        relative_epsilon=1e-3,
        eps=1e-5,
    )
    assert (optimizer.param_groups[0]["preconditioner"], optimizer.param_groups[0]["relative_epsilon"]) == (
        "soap",
        1e-3,
    )
    assert of(optimizer.param_groups[1]) == {**PAPER, "epsilon": 1e-6}
    assert optimizer.param_groups[1]["eps"] == 1e-5  # which the preset leaves to the optimizer
    optimizer.add_param_group({"params": [parameter(5)], "preset": None})
    assert optimizer.param_groups[2]["preconditioner"] == "soap"
    assert not any(PRESET in group for group in [optimizer.defaults, *optimizer.param_groups])


def test_a_group_s_options_win_over_the_optimizer_s_preset(caplog: pytest.LogCaptureFixture) -> None:
    groups = [{"params": [parameter(3)], "preconditioner": "soap"}, {"params": [parameter(4)]}]
    optimizer = Shampoo(groups, preset="paper")
    assert of(optimizer.param_groups[0]) == {**PAPER, "preconditioner": "soap"}
    assert of(optimizer.param_groups[1]) == PAPER == of(optimizer.defaults)
    assert "no option" not in caplog.text


def test_a_rule_takes_what_a_rule_may_set() -> None:
    rule = {"match": "w", "preset": "paper", "grafting": "none"}
    config = ShampooConfig.from_options({"rules": [rule], "weight_decay_type": "l2", "decoupled_weight_decay": False})
    (under,) = config.by_rule
    kept = {name: value for name, value in PAPER.items() if name not in options_with(GROUP_ONLY)}
    assert {name: getattr(under, name) for name in kept} == {**kept, "grafting": "none"}
    assert (under.decay_type, config.preconditioner) == ("l2", "kl_shampoo")
    assert ShampooConfig.from_options(json.loads(json.dumps(config.to_json()))) == config
    plain = ShampooConfig.from_options({"preset": "paper", "rules": [{"match": "w", "preconditioner": "soap"}]})
    assert of(plain.by_rule[0]) == {**PAPER, "preconditioner": "soap"}


@pytest.mark.parametrize("value", ["papers", "", 1, True, ["paper"], "auto"])
def test_an_unknown_preset_is_an_error_that_names_the_known_ones(value: Any) -> None:
    message = f"Shampoo option 'preset' = {value!r} is not allowed: null or one of {', '.join(PRESETS)}."
    group: dict[str, Any] = {"params": [parameter(3)], "preset": value}
    builds = [
        lambda: ShampooConfig.from_options({"preset": value}),
        lambda: Shampoo([parameter(3)], preset=value),
        lambda: Shampoo([group]),
        lambda: ShampooConfig.from_options({"rules": [{"match": "w", "preset": value}]}),
    ]
    for build in builds:
        with pytest.raises(OptionError) as error:
            build()
        assert str(error.value) == message


def test_a_misspelled_preset_is_an_error_or_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(OptionError, match="Unknown Shampoo option 'preest'.*did you mean 'preset'"):
        ShampooConfig.from_options({"preest": "paper"})
    with pytest.raises(OptionError, match="did you mean 'preset'"):
        Shampoo([{"params": [parameter(3)], "presets": "paper"}])
    with pytest.raises(OptionError, match="lacks options other than 'match'"):
        Shampoo([parameter(3)], rules=[{"match": "w", "preset": None}])


def test_a_deepspeed_json_may_have_a_preset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """DeepSpeed passes the JSON's params as keyword arguments; the planner reads them from the file."""
    path = tmp_path / "ds.json"
    params = {"lr": 1e-3, "preset": "paper", "relative_epsilon": 1e-6}
    path.write_text(json.dumps({"optimizer": {"type": "Shampoo", "params": params}, "zero_optimization": {"stage": 2}}))
    read = json.loads(path.read_text())["optimizer"]["params"]
    assert of(Shampoo([parameter(3)], **read).param_groups[0]) == {**PAPER, "relative_epsilon": 1e-6}
    for arguments, epsilon in ([], 1e-6), (["--option", "relative_epsilon=1e-3"], 1e-3):
        assert main([*ESTIMATE, "--ds-config", str(path), *arguments]) == 0
        options = json.loads(capsys.readouterr().out)["options"]
        assert of(options) == {**PAPER, "relative_epsilon": epsilon} and PRESET not in options


def test_the_planner_takes_a_preset(capsys: pytest.CaptureFixture[str]) -> None:
    own = ["--framework", "zero3", "--option", "preset=paper", "--option", "statistics_frequency=2"]
    assert main([*ESTIMATE, *own]) == 0
    assert of(json.loads(capsys.readouterr().out)["options"]) == {**PAPER, "statistics_frequency": 2}
    with pytest.raises(SystemExit):
        main([*ESTIMATE, "--framework", "zero3", "--option", "preset=pape"])
    assert "'preset' = 'pape' is not allowed: null or one of paper, pretrain" in capsys.readouterr().err


def test_the_page_on_options_shows_what_each_preset_sets() -> None:
    text = (Path(__file__).parents[2] / "docs" / "options.md").read_text(encoding="utf-8")
    for name, options in PRESETS.items():
        table = text.split(f'| option | `"{name}"` |\n|---|---|\n')[1].split("\n\n")[0]
        assert table.splitlines() == [f"| `{option}` | `{json.dumps(value)}` |" for option, value in options.items()]


class Model(nn.Module):
    """Parameters of several shapes, with more and less than a block along each dim."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        shapes = {
            "square": (8, 8),
            "odd": (5, 7),
            "wide": (12, 20),
            "joined": (6, 2, 3),
            "third": (4, 3, 5),
            "bias": (7,),
        }
        for number, (name, shape) in enumerate(shapes.items()):
            self.register_parameter(name, parameter(*shape, seed=number))


# The paper's algorithm in the words of the reference, independent of the package's own list.
SPELLED_OUT: dict[str, Any] = {
    "preconditioner": "shampoo",
    "exponent_override": [2.0, 4.0, 6.0],  # p = 2k for k dims
    "epsilon": 1e-12,
    "relative_epsilon": 0.0,
    "early_relative_epsilon": 0.0,
    "damping": "shift",
    "shrinkage": 0.0,
    "betas": (0.9, 0.999),
    "factor_beta": 0.999,
    "beta3": 0.9,
    "use_bias_correction": True,
    "statistics_frequency": 1,
    "refresh": "sync",
    "refresh_growth": 0.0,
    "refresh_tolerance": None,
    "start_preconditioning_step": 3,  # the frequency
    "grafting": "adam",
    "grafting_beta2": 0.999,
    "elementwise": "adam",
    "elementwise_lr": 1.0,
    "tied_embedding_lr": None,
    "normalize_gradients": False,
    "decoupled_weight_decay": True,
    "weight_decay_type": "decoupled",
}


@pytest.mark.parametrize(("level", "scale"), [("optimizer", 1.0), ("optimizer", 1e-5), ("group", 1e-5), ("rule", 1e-5)])
def test_a_run_with_the_paper_s_preset_is_that_of_the_reference_with_its_options(level: str, scale: float) -> None:
    """With small gradients, the absolute epsilon matters next to the factors' eigenvalues.

    The first refresh comes when all factors have full rank: before that, large roots amplify rounding.
    """
    common: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "precondition_frequency": 3, "max_preconditioner_dim": 8}
    model = Model().double()
    params = dict(model.named_parameters())
    reference = Reference(params, exclude=("embed.weight",), **common, **SPELLED_OUT)
    given: dict[str, Any] = {"factor_dtype": "float64", "root_dtype": "float64", **common}
    named: Any = params.items()
    if level == "group":
        named, given = [{"params": list(named), "preset": "paper"}], {**given, "preconditioner": "soap", "beta3": 0.5}
    elif level == "rule":
        given["rules"] = [{"match": "*", "preset": "paper"}]
    else:
        given["preset"] = "paper"
    optimizer = Shampoo(named, model=model, **given)
    for step in range(12):
        for number, p in enumerate(params.values()):
            p.grad = scale * made_up(p, step, number)
        reference.step({name: p.grad for name, p in params.items()})
        optimizer.step()
    deviations = {n: relative_error(params[n].detach(), value) for n, value in reference.values().items()}
    assert max(deviations.values()) <= 1e-9, deviations


# The other presets in the words of the reference. Refreshes of all blocks together are given next to them.
FEWER_CHANGES: dict[str, Any] = {
    "betas": (0.9, 0.999),
    "factor_beta": 0.95,
    "relative_epsilon": 1e-4,
    "early_relative_epsilon": 0.0,
    "statistics_frequency": 1,
    "refresh_growth": 0.0,
    "start_preconditioning_step": 3,
    "elementwise": "adam",
    "elementwise_lr": 1.0,
    "tied_embedding_lr": None,
    "normalize_gradients": False,
    "decoupled_weight_decay": True,
}
IN_WORDS: dict[str, dict[str, Any]] = {
    "finetune": {"preconditioner": "soap", "grafting": "none", **FEWER_CHANGES},
    "lora": {"preconditioner": "shampoo", "exponent_override": 2.0, "grafting": "adam", **FEWER_CHANGES},
    "pretrain": {
        "preconditioner": "kl_shampoo",
        "exponent_override": 2.0,
        "betas": (0.9, 0.999),
        "factor_beta": 0.95,
        "relative_epsilon": 1e-4,
        "early_relative_epsilon": 0.01,
        "statistics_frequency": 2,
        "refresh_growth": 0.25,
        "start_preconditioning_step": 2,
        "grafting": "rms",
        "elementwise": "adam",
        "elementwise_lr": 3.0,
        "tied_embedding_lr": 9.0,
        "normalize_gradients": True,
        "decoupled_weight_decay": True,
    },
}


@pytest.mark.parametrize("name", IN_WORDS)
def test_a_run_with_a_preset_for_a_kind_of_training_is_that_of_the_reference(name: str) -> None:
    """Embeddings are left out: the model of the other test has neither a head nor tokens of its own rate."""
    common: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "precondition_frequency": 3, "max_preconditioner_dim": 8}
    common["refresh"] = "sync"
    params = {n: p for n, p in Model().double().named_parameters() if n != "embed.weight"}
    reference = Reference(params, **common, **IN_WORDS[name])
    chosen: dict[str, Any] = {"preset": name}
    optimizer = Shampoo(params.items(), **chosen, factor_dtype="float64", root_dtype="float64", **common)
    for step in range(12):
        for number, p in enumerate(params.values()):
            p.grad = made_up(p, step, number)
        reference.step({n: p.grad for n, p in params.items()})
        optimizer.step()
    deviations = {n: relative_error(params[n].detach(), value) for n, value in reference.values().items()}
    assert max(deviations.values()) <= 1e-9, deviations


def test_the_preset_for_new_weights_is_the_default() -> None:
    assert ShampooConfig(**PRESETS["pretrain"]) == ShampooConfig()
    assert all(PRESETS["pretrain"].keys() <= preset.keys() for preset in PRESETS.values())


@pytest.mark.parametrize("name", ["finetune", "lora"])
def test_presets_for_pretrained_models_keep_the_rate_of_embeddings_and_norms(name: str) -> None:
    """What factor matrices remember does not follow a Trainer's ``"auto"`` betas."""
    config = ShampooConfig.from_options({"preset": name, "betas": (0.9, 0.999)})
    assert (config.elementwise_lr, config.embedding_lr, config.tied_embedding_lr) == (1.0, None, None)
    assert config.factors_decay == 0.95 and not config.normalize_gradients and config.growth == 0.0


FEW: dict[str, Any] = {"max_preconditioner_dim": 8, "precondition_frequency": 3}


def made(**options: Any) -> tuple[list[nn.Parameter], Shampoo]:
    params = [parameter(12, 10), parameter(6, 7, seed=1)]
    return params, Shampoo(zip("vw", params, strict=True), **FEW, **options)


@pytest.mark.parametrize("way", ["files", "state_dict"])
@pytest.mark.parametrize(
    "again", [{"preset": "paper", "factor_beta": 0.9}, {**PAPER, "factor_beta": 0.9}, {"preset": "paper"}]
)
def test_a_run_goes_on_with_the_options_of_its_preset(tmp_path: Path, way: str, again: dict[str, Any]) -> None:
    """Whether the preset or its options are given again; what was given next to it is restored."""
    params, optimizer = made(preset="paper", factor_beta=0.9)
    drive(optimizer, params, range(5))
    own, resumed = made(**again)
    for p, q in zip(own, params, strict=True):
        p.data.copy_(q.data)
    if way == "files":
        save_shampoo(optimizer, tmp_path)
        (record,) = Manifest.read(tmp_path).groups.values()
        assert record == options_record(ShampooConfig(**{**PAPER, **FEW, "factor_beta": 0.9}), 1e-3)
        load_shampoo(resumed, tmp_path)
    else:
        resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    assert of(resumed.param_groups[0]) == {**PAPER, "factor_beta": 0.9} and PRESET not in resumed.param_groups[0]
    for one, of_it in ((optimizer, params), (resumed, own)):
        drive(one, of_it, range(5, 9))
    assert same_bits(snapshot(params), snapshot(own)) and same_bits(state_of(optimizer), state_of(resumed))


def test_a_checkpoint_of_a_preset_does_not_go_on_under_another_algorithm(tmp_path: Path) -> None:
    params, optimizer = made(preset="paper")
    drive(optimizer, params, range(2))
    save_shampoo(optimizer, tmp_path)
    with pytest.raises(CheckpointError, match="saved with preconditioner = 'shampoo', but here it is 'kl_shampoo'"):
        load_shampoo(made()[1], tmp_path)


def test_a_group_s_shown_form_has_the_options_and_not_the_preset() -> None:
    shown = repr(Shampoo([parameter(3)], preset="paper"))
    assert "preconditioner: 'shampoo'" in shown and PRESET not in shown
