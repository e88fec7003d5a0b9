"""The runs under DDP, FSDP1, FSDP2, HSDP and tensor parallelism that start from the same weights in every layout."""

from __future__ import annotations

from dataclasses import replace

from tests.support.covering import fewest
from tests.support.fsdp_runs import Run
from tests.support.launch import Check

BOUND = {("strict", "float32"): 1e-5, ("default", "float32"): 2e-3, ("default", "float64"): 1e-10}
SETTINGS = [Run(settings=settings, dtype=dtype) for settings, dtype in BOUND]


def final(name: str, run: Run, ranks: int) -> Check:
    return Check(f"{name}_{run.settings}_{run.dtype}_{ranks}ranks", ranks, "fsdp:final_parameters", run)


def checks() -> list[Check]:
    found = []
    for ranks in (2, 4):
        for base in SETTINGS:
            wide = replace(base, model="wide")
            found += [
                final("fsdp2_odd", replace(base, unused=2), ranks),
                final("fsdp2_nested", replace(wide, layout="nested"), ranks),
                final("fsdp2_columns", replace(wide, layout="columns"), ranks),
                final("replicas_odd", replace(base, unused=2, layout="replicas"), ranks),
                *(
                    final(f"fsdp1_{strategy}", replace(base, unused=2, layout=f"fsdp1_{strategy}"), ranks)
                    for strategy in ("full_shard", "shard_grad_op", "no_shard")
                ),
                final("fsdp2_built_before", replace(base, built_before=True), ranks),
            ]
    for base in SETTINGS:
        often = replace(base, unused=2)
        found += [
            *(final(f"flat_{way}", replace(often, layout=f"flat_{way}"), 2) for way in ("shard_grad_op", "no_shard")),
            *(final(f"flat_{way}", replace(often, layout=f"flat_{way}"), 4) for way in ("full_shard", "hybrid_shard")),
            final("units_full_shard", replace(often, layout="units_full_shard"), 2),
            final("tiny_fsdp1", replace(base, model="tiny", layout="fsdp1_full_shard"), 4),
            final("offload", replace(often, layout="offload"), 2),
            final("hsdp", replace(base, layout="hsdp"), 4),
            final("fsdp1_hybrid_shard", replace(often, layout="fsdp1_hybrid_shard"), 4),
            final("tensor_parallel", replace(base, model="wide", layout="tensor_parallel"), 4),
            final("uneven_tensor_parallel", replace(base, model="narrow", layout="uneven_tensor_parallel"), 4),
            final("meshes", replace(base, model="wide", layout="meshes"), 4),
        ]
    return found


def features(check: Check) -> set[object]:
    """Return a run's features: in float64 the run itself; in float32 its setting and its kind of shards.

    Any mistake shows in float64. A layout decides which rank computes what; float32 rounding is the same in all layouts
    of a kind.
    """
    run: Run = check.argument
    if run.dtype == "float64":
        return {check.name}
    kind = run.layout.partition("_")[0].replace("units", "flat").replace("uneven", "tensor")
    return {(kind, run.settings), (check.ranks, run.settings), (run.model, run.settings)}


def covering() -> list[Check]:
    return fewest(checks(), features)
