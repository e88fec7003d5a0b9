"""Prints how far runs under each framework end from the dense single-process reference, as a Markdown table.

    python -m benchmarks.exactness [--ranks 1 2 4]

The checks are those of tests/distributed (8 or 9 steps with several refreshes, odd shapes included). A number is the
largest |W - W_ref| / |W_ref| of any parameter in any of a row's runs. W_ref is the float64 run of
tests/support/reference.py, which shares no code with the package. In the Trainer's rows W_ref is from the package's own
Shampoo in one process: a plain loop with float64 weights and the Trainer's own param groups.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from tests.support import fsdp_checks, fsdp_runs, scenarios, trainer_checks, trainer_routes, trainings, zero_checks
from tests.support.launch import Check, CheckResult, run_checks
from tests.support.zoo import relative_error

SETTINGS = ("strict float32", "default float32", "default float64")
FSDP_LAYOUTS = {
    "replicas": "DDP",
    "rows": "FSDP2",
    "nested": "FSDP2",
    "columns": "FSDP2",
    "hsdp": "HSDP (FSDP2)",
    "offload": "FSDP2, CPU offload",
    "meshes": "FSDP2, three meshes",
    "tensor_parallel": "FSDP2 x tensor parallel",
    "uneven_tensor_parallel": "FSDP2 x tensor parallel, uneven rows",
}
TRAINER_FRAMEWORKS = {"ddp": "DDP", "fsdp1": "FSDP1", "fsdp2": "FSDP2"}
Key = tuple[str, int]  # framework and ranks


def checks() -> list[Check]:
    """Return all runs that start from the same weights under every framework, except those with their own options."""
    alone = [fsdp_checks.final("alone", replace(run, layout="replicas"), 1) for run in fsdp_checks.SETTINGS]
    plain = [c for c in fsdp_checks.checks() if not c.argument.extra]
    trainer = [c for c in trainer_checks.MEASURED if not c.argument.options]
    return [*alone, *plain, *zero_checks.matrix(), *zero_checks.sharding(), *trainer, *trainer_routes.ROUTES]


def framework(check: Check) -> str:
    argument = check.argument
    if isinstance(argument, scenarios.Scenario):
        return f"DeepSpeed ZeRO-{argument.stage}"
    if isinstance(argument, trainings.Training):
        return f"Trainer, JSON, ZeRO-{argument.stage}"
    if isinstance(argument, tuple):
        name = argument[1]
        return f"Trainer, `optimizers=` or factory, {TRAINER_FRAMEWORKS.get(name) or name.replace('zero', 'ZeRO-')}"
    if check.ranks == 1:
        return "one process"
    if argument.fsdp1:
        form, _, strategy = argument.layout.partition("_")
        return f"FSDP1 {strategy.upper()}{', flat parameters' if form != 'fsdp1' else ''}"
    return FSDP_LAYOUTS[argument.layout]


def settings(check: Check) -> str:
    argument = check.argument[2] if isinstance(check.argument, tuple) else check.argument
    return f"{argument.settings} {getattr(argument, 'dtype', 'float32')}".replace("torch.", "")


def wanted(check: Check) -> Mapping[str, Tensor]:
    argument: Any = check.argument[2] if isinstance(check.argument, tuple) else check.argument
    if isinstance(argument, scenarios.Scenario):
        return scenarios.expected(argument)
    if isinstance(argument, trainings.Training):
        return trainings.expected(argument).parameters
    return fsdp_runs.expected(argument)


def deviation(check: Check, result: CheckResult) -> float:
    """Return the largest deviation of all parameters on all ranks; a run that failed ends the benchmark."""
    if result.failure is not None:
        raise RuntimeError(f"{check.name}: {result.failure}")
    expected = wanted(check)
    final = [value.get("parameters", value) for value in result.values]
    return max(relative_error(found[name], expected[name]) for found in final for name in expected)


def measured(found: Iterable[tuple[Check, float]]) -> dict[Key, dict[str, list[float]]]:
    table: dict[Key, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for check, value in found:
        table[framework(check), check.ranks][settings(check)].append(value)
    return table


def markdown(table: Mapping[Key, Mapping[str, list[float]]]) -> str:
    """Return the table, with a row for each framework and number of ranks; a dash means that there is no such run."""
    lines = [f"| framework | ranks | runs | {' | '.join(SETTINGS)} |", "|---|---|---|---|---|---|"]
    frameworks = list(dict.fromkeys(name for name, _ in table))
    for (name, ranks), row in sorted(table.items(), key=lambda item: (frameworks.index(item[0][0]), item[0][1])):
        numbers = [f"{max(row[s]):.1e}" if s in row else "-" for s in SETTINGS]
        lines.append(f"| {name} | {ranks} | {sum(map(len, row.values()))} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="which rank counts to run")
    ranks_wanted = parser.parse_args().ranks
    selected = [c for c in checks() if c.ranks in ranks_wanted]
    results: dict[str, CheckResult] = {}
    with tempfile.TemporaryDirectory() as folder:
        for ranks in sorted(set(ranks_wanted)):
            same = [c for c in selected if c.ranks == ranks]
            results |= run_checks(same, Path(folder) / f"ranks{ranks}")
    found = [(check, deviation(check, results[check.name])) for check in selected]
    strays = {s for c, _ in found if (s := settings(c)) not in SETTINGS}
    assert not strays, f"no column for {strays}"
    print(f"CPU, gloo, {os.cpu_count()} cores\n\n{markdown(measured(found))}")


if __name__ == "__main__":
    main()
