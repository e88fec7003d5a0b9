"""Finds the parameters of any Transformers model from its configuration: built on the meta device, without weights."""

from __future__ import annotations

import logging

import torch

from shampoo_deepspeed.distributed.frameworks import Parameter
from shampoo_deepspeed.options.parameter_names import names_and_kinds

logger = logging.getLogger(__name__)


def transformers_parameters(model: str) -> list[Parameter] | None:
    """Return the parameters of the causal language model of a Hugging Face id, a folder or a config.json.

    Returns None if Transformers is not installed, or if it finds no such configuration; its reason is then logged.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        return None
    try:
        config = AutoConfig.from_pretrained(model)
        with torch.device("meta"):
            built = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # whatever a model's own code raises for values that it does not expect
        logger.warning("Transformers has no causal language model for %r: %s: %s", model, type(error).__name__, error)
        return None
    known = names_and_kinds(built)
    found = [(*known[id(p)], tuple(p.shape)) for p in built.parameters() if p.requires_grad]
    return [Parameter(name, shape, 0, name, kinds) for name, kinds, shape in found]
