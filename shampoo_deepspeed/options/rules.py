"""Rules: options of single parameters by name, kind or shape. Each rule's options get a number like a group's own.

Parameter groups belong to the framework, which maps them to flat tensors and reads their learning rates. So parameters
under a rule stay in their group; only the options of blocks and element-wise parts are found by the rule's number.
"""

from __future__ import annotations

from collections.abc import Mapping

from shampoo_deepspeed.options.config import ShampooConfig
from shampoo_deepspeed.options.parameter_names import matching

# Rule r of group g has the number g + (r + 1) * STRIDE.
STRIDE = 1 << 20


def rule_of(name: str | None, kinds: frozenset[str], shape: tuple[int, ...], config: ShampooConfig) -> int | None:
    """The first rule of a group's options that a parameter matches, or None."""
    numbered = enumerate(config.rules)
    return next((n for n, rule in numbered if matching(rule["match"], name, kinds, shape) is not None), None)


def number_under(group: int, rule: int | None) -> int:
    """The options number of a group's parameters that are under a rule (None: under no rule)."""
    return group if rule is None else group + (rule + 1) * STRIDE


def expanded(configs: Mapping[int, ShampooConfig]) -> dict[int, ShampooConfig]:
    """Options by group number, with those of all rules added by their own numbers."""
    out = dict(configs)
    for group, config in configs.items():
        out.update((number_under(group, rule), under) for rule, under in enumerate(config.by_rule))
    return out
