"""axolotl: a plugin with which ``optimizer: shampoo`` works, with options in ``optim_args``. Written for axolotl 0.19.

Under DeepSpeed no plugin is needed: the JSON that ``deepspeed:`` names may have ``"optimizer": {"type": "Shampoo"}``.
"""

from __future__ import annotations

from collections.abc import Mapping

from axolotl.integrations.base import BasePlugin

from .trainer import register_with_transformers
from .transformers_names import NAME

# With these axolotl makes param groups of its own, and builds only optimizers that take them.
OWN_GROUPS = ("loraplus_lr_ratio", "embedding_lr", "embedding_lr_scale", "lr_groups")


class ShampooPlugin(BasePlugin):
    """For a configuration's ``plugins: [shampoo_deepspeed.integrations.axolotl.ShampooPlugin]``."""

    def register(self, cfg: Mapping[str, object]) -> None:
        """Make the name known before axolotl reads its configuration.

        Raises:
            ValueError: if the configuration names another optimizer, or would give Shampoo axolotl's own param groups.
        """
        register_with_transformers()
        if cfg.get("optimizer") != NAME:
            raise ValueError(
                f"axolotl would train with optimizer: {cfg.get('optimizer')}, though ShampooPlugin is among its "
                f"plugins; write optimizer: {NAME}, or leave out the plugin"
            )
        groups = [key for key in OWN_GROUPS if cfg.get(key)]
        if groups:
            raise ValueError(
                f"optimizer: {NAME} does not work together with axolotl's {', '.join(groups)}; Shampoo's own options "
                'embedding_lr, elementwise_lr and no_decay do, for example optim_args: "embedding_lr=4"'
            )
