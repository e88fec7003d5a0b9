"""What the first step logs: a table of what is preconditioned, what is not and why, and likely mistakes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence

import torch

from shampoo_deepspeed.distributed.frameworks import Parameter
from shampoo_deepspeed.engine.policy import Policy
from shampoo_deepspeed.geometry.blocks import cut_into_blocks
from shampoo_deepspeed.options.choices import DEFAULT_EXCLUDE, DEFAULT_RULES, TRAINER_NO_DECAY
from shampoo_deepspeed.options.config import ShampooConfig
from shampoo_deepspeed.options.parameter_names import matching

LONGEST_NAME = 60


def policy_table(
    parameters: Iterable[Parameter], policies: Mapping[str, Policy], configs: Mapping[int, ShampooConfig]
) -> str:
    """A table with one line for all layers' parameters of the same name and shape; layer numbers become ``*``."""
    lines: dict[tuple[str, str, str, str], int] = {}
    elements = {True: 0, False: 0}
    for parameter in parameters:
        config = configs[parameter.group]
        policy = policies[parameter.key]
        elements[policy.preconditioned] += math.prod(parameter.shape)
        what = _blocks(policy) if policy.preconditioned else "element-wise"
        why = policy.reason or f"{len(policy.merged)} dims"
        if policy.rule:
            why += f", under the rule for {policy.rule!r}"
        if not policy.decays and config.weight_decay:
            why += ", no weight decay"
        key = (re.sub(r"(?<=\.)\d+(?=\.|$)", "*", parameter.key), "x".join(map(str, parameter.shape)), what, why)
        lines[key] = lines.get(key, 0) + 1
    rows = [("parameter", "shape", "count", "policy", "why")]
    rows += [(_shortened(name), shape, str(count), what, why) for (name, shape, what, why), count in lines.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    pads = [str.ljust, str.rjust, str.rjust, str.ljust, str.ljust]
    table = ["  ".join(pad(cell, w) for pad, cell, w in zip(pads, row, widths, strict=True)).rstrip() for row in rows]
    table.insert(1, "  ".join("-" * width for width in widths))
    total = max(1, sum(elements.values()))
    share = f"{elements[True]:,} of {total:,} elements ({elements[True] / total:.1%}) are preconditioned"
    return "\n".join([*table, share])


def places_of_work(units: Iterable[tuple[torch.device, torch.device, float]]) -> list[str]:
    """Messages about where this rank computes its blocks, and how much that is.

    Args:
        units: of each step unit the device of its shards, that of its blocks, and its FLOPs in a step, with the
            refreshes' share.
    """
    found: dict[tuple[torch.device, torch.device], float] = {}
    for shards, blocks, flops in units:
        found[shards, blocks] = found.get((shards, blocks), 0.0) + flops
    return [_place_of_work(*places, flops) for places, flops in found.items() if flops]


def _place_of_work(shards: torch.device, blocks: torch.device, flops: float) -> str:
    work = f"about {flops / 1e9:.3g} GFLOP a step on this rank"
    if blocks.type == "cpu":
        threads = torch.get_num_threads()
        return f"blocks are computed on the CPU by {threads} thread{'s' if threads > 1 else ''}, {work}"
    if shards != blocks:
        return f"blocks are kept and computed on {blocks}, and their shards lie on {shards}; {work} (compute_device)"
    return f"blocks are computed on {blocks}, {work}"


def _shortened(name: str) -> str:
    """A name that leaves room for the other columns, with its two ends."""
    half = (LONGEST_NAME - 3) // 2
    return name if len(name) <= LONGEST_NAME else f"{name[:half]}...{name[-half:]}"


def unmatched_patterns(parameters: Sequence[Parameter], configs: Iterable[ShampooConfig]) -> list[str]:
    """Messages about a user's patterns that match nothing.

    Args:
        parameters: all that the optimizer was given, the frozen ones too.
    """
    return [
        f"{option}: no parameter of the optimizer matches {pattern!r}"
        for option, pattern in _own_patterns(configs)
        if not any(matching([pattern], p.name, p.kinds, p.shape) for p in parameters)
    ]


def nameless_matrices(
    parameters: Sequence[Parameter], policies: Mapping[str, Policy], configs: Mapping[int, ShampooConfig]
) -> str | None:
    """A message about preconditioned parameters that have no names, or None if there are none."""
    excluded = [p for p in parameters if configs[p.group].exclude]
    nameless = [p for p in excluded if p.name is None and not p.kinds and policies[p.key].preconditioned]
    known_by_shape = any(p.name is None and p.kinds for p in parameters)
    if not nameless or known_by_shape:
        return None
    return (
        f"of the preconditioned parameters {len(nameless)} have no names, and no module holds them, so that none is "
        "known as an embedding or an output head, which are best left out: give model.named_parameters(), or model= "
        "the module that has them"
    )


def _own_patterns(configs: Iterable[ShampooConfig]) -> Iterable[tuple[str, str]]:
    """(option, pattern) of all patterns that are not defaults."""
    usual = {*DEFAULT_EXCLUDE, *TRAINER_NO_DECAY, *(pattern for rule in DEFAULT_RULES for pattern in rule["match"])}
    found: dict[tuple[str, str], None] = {}
    for config in configs:
        rules = [("rules", pattern) for rule in config.rules for pattern in rule["match"]]
        patterns = [*(("exclude", p) for p in config.exclude), *(("no_decay", p) for p in config.no_decay), *rules]
        found |= dict.fromkeys((option, pattern) for option, pattern in patterns if pattern not in usual)
    return found


def _blocks(policy: Policy) -> str:
    boxes = cut_into_blocks(policy.merged, policy.cuts)
    largest = "x".join(map(str, max(boxes, key=lambda box: box.numel).lengths))
    what = f"{len(boxes)} block{'s' if len(boxes) > 1 else ''} of {'at most ' if len(boxes) > 1 else ''}{largest}"
    if set(policy.sides) != {"matrix"}:
        what += f" ({', '.join('-' if side == 'none' else side for side in policy.sides)})"
    return what
