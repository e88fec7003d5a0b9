"""The one table that the first step logs: what is preconditioned, what is not, and why."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

from shampoo_deepspeed.blocks import cut_into_blocks
from shampoo_deepspeed.config import ShampooConfig
from shampoo_deepspeed.hosts import Parameter
from shampoo_deepspeed.treatment import Treatment, treat


def treatment_table(parameters: Iterable[Parameter], configs: Mapping[int, ShampooConfig]) -> str:
    """A table with one line for all layers' parameters of the same name and shape; layer numbers become ``*``."""
    lines: dict[tuple[str, str, str, str], int] = {}
    elements = {True: 0, False: 0}
    for parameter in parameters:
        config = configs[parameter.group]
        treatment = treat(parameter, config)
        elements[treatment.preconditioned] += math.prod(parameter.shape)
        what = _blocks(treatment) if treatment.preconditioned else "element-wise"
        why = treatment.reason or f"{len(treatment.merged)} dims"
        if treatment.rule:
            why += f", under the rule for {treatment.rule!r}"
        if not treatment.decays and config.weight_decay:
            why += ", no weight decay"
        key = (re.sub(r"(?<=\.)\d+(?=\.|$)", "*", parameter.key), "x".join(map(str, parameter.shape)), what, why)
        lines[key] = lines.get(key, 0) + 1
    rows = [("parameter", "shape", "count", "treatment", "why")]
    rows += [(name, shape, str(count), what, why) for (name, shape, what, why), count in lines.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    table = "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
    total = max(1, sum(elements.values()))
    return f"{table}\n{elements[True]:,} of {total:,} elements ({elements[True] / total:.1%}) are preconditioned"


def _blocks(treatment: Treatment) -> str:
    boxes = cut_into_blocks(treatment.merged, treatment.cuts)
    largest = "x".join(map(str, max(boxes, key=lambda box: box.numel).lengths))
    what = f"{len(boxes)} block{'s' if len(boxes) > 1 else ''} of {'at most ' if len(boxes) > 1 else ''}{largest}"
    if set(treatment.sides) != {"matrix"}:
        what += f" ({', '.join('-' if side == 'none' else side for side in treatment.sides)})"
    return what
