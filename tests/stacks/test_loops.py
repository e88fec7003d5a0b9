"""Stacks that build the optimizer themselves, by the function or class of theirs that does so, and then a loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import nn

from shampoo_deepspeed import OptionError, Shampoo
from tests.support.snippets import run_stack_block, stack_block
from tests.support.stack_runs import assert_learned, assert_recognised, batches, trained
from tests.support.trainings import make_model

TOKENS, HEAD = "embed_tokens.weight", "lm_head.weight"


def configured(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(stack_block(name))
    return found


def test_verl_builds_it_from_its_configuration() -> None:
    from omegaconf import OmegaConf
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.config.optimizer import FSDPOptimizerConfig, build_optimizer

    given = OmegaConf.create(stack_block("verl")).optim
    model = make_model("llama")
    optimizer = build_optimizer(model.parameters(), omega_conf_to_dataclass(given, FSDPOptimizerConfig))
    assert_recognised(optimizer, TOKENS, HEAD)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95) and optimizer.param_groups[0]["lr"] == 3e-3
    assert_learned(trained(model, optimizer, batches()))


def test_nemo_automodel_builds_it_from_its_configuration(tmp_path: Path) -> None:
    from nemo_automodel.components.config.loader import load_yaml_config
    from nemo_automodel.components.optim.optimizer import build_optimizer, build_optimizer_config

    (tmp_path / "train.yaml").write_text(stack_block("nemo-automodel"))
    node = load_yaml_config(tmp_path / "train.yaml").optimizer
    model = make_model("llama")
    assert_recognised(node.instantiate(params=model.parameters()), TOKENS, HEAD)
    options = {key: value for key, value in configured("nemo-automodel")["optimizer"].items() if key != "_target_"}
    (optimizer,) = build_optimizer(model, build_optimizer_config("shampoo_deepspeed.Shampoo", options))
    assert_recognised(optimizer, TOKENS, HEAD)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)
    assert_learned(trained(model, optimizer, batches()))


def test_torchtitan_s_container_trains_and_continues(tmp_path: Path) -> None:
    """Its checkpoint is saved by torch's distributed checkpoint, as torchtitan does."""
    import torch.distributed.checkpoint as dcp
    from torchtitan.components.optimizer import OptimizersContainer

    config = run_stack_block("torchtitan")["optimizer"]
    models = [make_model("llama"), make_model("llama")]
    containers = [config.build(model_parts=[model]) for model in models]
    assert isinstance(containers[0], OptimizersContainer) and len(containers[0]) == 1
    assert_recognised(containers[0].optimizers[0], TOKENS, HEAD)
    losses = trained(models[0], containers[0], batches(6))
    dcp.save({"optimizer": containers[0], "model": models[0].state_dict()}, checkpoint_id=tmp_path)
    template: dict[str, Any] = {"optimizer": containers[1], "model": models[1].state_dict()}
    dcp.load(template, checkpoint_id=tmp_path)
    models[1].load_state_dict(template["model"])
    losses += trained(models[0], containers[0], batches(6))
    assert_learned(losses)
    assert trained(models[1], containers[1], batches(6)) == losses[6:]


def test_torchtitan_s_pipeline_stages_have_optimizers_of_their_own() -> None:
    config = run_stack_block("torchtitan")["optimizer"]
    whole: Any = make_model("llama")
    first, second = nn.ModuleDict({"embed_tokens": whole.model.embed_tokens}), whole.model.layers
    container = config.build(model_parts=[first, second])
    assert [set(optimizer.policies) >= {name} for optimizer, name in zip(
        container, ["embed_tokens.weight", "0.mlp.up_proj.weight"], strict=True
    )] == [True, True]  # fmt: skip
    assert not any(o.policies[n].preconditioned for o in container for n in o.policies if "embed" in n)


def test_torchtitan_s_own_optimizers_may_stand_next_to_it() -> None:
    from torchtitan.components.optimizer import ParamGroupConfig

    from shampoo_deepspeed.integrations.torchtitan import ShampooContainer

    groups = [
        ParamGroupConfig(pattern="embed|head|norm", optimizer_name="AdamW", optimizer_kwargs={"lr": 1e-3}),
        ParamGroupConfig(pattern=".*", optimizer_name="Shampoo", optimizer_kwargs={"lr": 3e-3}),
    ]
    model = make_model("llama")
    container = ShampooContainer.Config(param_groups=groups, implementation="foreach").build(model_parts=[model])
    assert [type(optimizer).__name__ for optimizer in container] == ["AdamW", "Shampoo"]
    assert_learned(trained(model, container, batches()))
    state = container.state_dict()
    assert "state.model.embed_tokens.weight.exp_avg" in state
    again = ShampooContainer.Config(param_groups=groups, implementation="foreach").build(model_parts=[model])
    again.load_state_dict(state)
    assert again.optimizers[1].has_state
    with pytest.raises(NotImplementedError, match="Shampo not added"):
        ShampooContainer._resolve_optimizer_factory("Shampo")


def test_ms_swift_s_callback_builds_it(tmp_path: Path) -> None:
    from swift.optimizers import optimizers_map
    from transformers import Trainer, TrainingArguments

    run_stack_block("ms-swift")
    args = TrainingArguments(
        str(tmp_path), use_cpu=True, learning_rate=3e-3, weight_decay=0.1, optim_args="precondition_frequency=3"
    )
    model = make_model("llama")
    trainer = Trainer(model, args)
    callback = optimizers_map["shampoo"](args, trainer)
    for optimizer in (callback.create_optimizer(), callback.create_optimizer(model=model)):
        assert_recognised(optimizer, TOKENS, HEAD)
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
        assert optimizer.param_groups[0]["precondition_frequency"] == 3 and optimizer.param_groups[0]["lr"] == 3e-3
    callback.create_optimizer_and_scheduler(num_training_steps=20)
    assert isinstance(trainer.optimizer, Shampoo)
    assert_learned(trained(model, trainer.optimizer, batches()))


def test_llama_factory_v1_s_plugin_builds_it() -> None:
    from llamafactory.v1.config.arg_utils import get_plugin_config
    from llamafactory.v1.plugins.trainer_plugins.optimizer import OptimizerPlugin

    import shampoo_deepspeed.integrations.llamafactory  # noqa: F401

    config = get_plugin_config(configured("llamafactory-v1")["optim_config"])
    model = make_model("llama")
    optimizer = OptimizerPlugin(config.name)(model, config)
    assert_recognised(optimizer, TOKENS, HEAD)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert_learned(trained(model, optimizer, batches()))
    with pytest.raises(OptionError, match="optim_config of LLaMA-Factory has no 'lr'"):
        OptimizerPlugin("shampoo")(model, get_plugin_config({"name": "shampoo"}))
