"""ms-swift: importing this module adds ``--optimizer shampoo``, with options in ``--optim_args``. Written for 4.6.

ms-swift imports the files that ``--external_plugins`` names; one that imports this module is enough.
"""

from __future__ import annotations

from swift.optimizers import OptimizerCallback, optimizers_map
from torch import nn

from shampoo_deepspeed import Shampoo

from .trainer import Deferred, build
from .transformers_names import NAME, options_from_text


class ShampooOptimizerCallback(OptimizerCallback):
    """Builds Shampoo with the Trainer's decay rule; rates, betas and decay come from the training arguments."""

    def create_optimizer(self, model: nn.Module | None = None) -> Shampoo:
        """Return Shampoo for the trainable parameters of a model, by default the trainer's.

        Raises:
            OptionError: for an option in ``optim_args`` that is unknown or has a value that is not allowed.
        """
        given = options_from_text(self.args.optim_args or "")
        options = Deferred(dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto") | given).filled(self.args)
        return build(self.trainer.model if model is None else model, options, self.trainer.get_decay_parameter_names)


optimizers_map[NAME] = ShampooOptimizerCallback
