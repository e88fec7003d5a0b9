"""LLaMA-Factory v1: importing this module adds the optimizer plugin ``shampoo``; running it does so for its launcher.

``python -m shampoo_deepspeed.integrations.llamafactory -m llamafactory.v1.launcher sft train.yaml``, where the YAML has
``optim_config: {name: shampoo, lr: 1.0e-4, weight_decay: 0.1}``. LLaMA-Factory's older trainer, which is that of
Transformers, needs only ``optim_shampoo``. Written for LLaMA-Factory 0.9.5.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from llamafactory.v1.plugins.trainer_plugins.optimizer import OptimizerPlugin
from torch import nn

from shampoo_deepspeed import OptionError, Shampoo

from .optim_shampoo import main
from .trainer import ShampooFactory
from .transformers_names import NAME


@OptimizerPlugin(NAME).register()
def build_shampoo(model: nn.Module, config: Mapping[str, Any]) -> Shampoo:
    """Return Shampoo for a model's trainable parameters, with the Trainer's decay rule.

    Args:
        config: the ``optim_config`` of the YAML: the plugin's name and Shampoo's options.

    Raises:
        OptionError: if the learning rate is missing, which this plugin does not see otherwise; or for a wrong option.
    """
    options = {key: value for key, value in config.items() if key != "name"}
    if "lr" not in options:
        raise OptionError("optim_config of LLaMA-Factory has no 'lr': its learning_rate is not passed to plugins")
    return ShampooFactory()(model, **options)


if __name__ == "__main__":
    main(sys.argv[1:])
