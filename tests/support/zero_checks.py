"""The runs under DeepSpeed that start from the same weights at every stage and in every layout."""

from __future__ import annotations

from dataclasses import replace

from tests.support.covering import fewest
from tests.support.launch import Check
from tests.support.scenarios import Scenario

SMALL_PIECES = {"sub_group_size": 50, "stage3_param_persistence_threshold": 0}
OFFLOADED = {"offload_optimizer": {"device": "cpu"}}
OFFLOADED_ALL = {**OFFLOADED, "offload_param": {"device": "cpu"}}
NORMALIZED = {"grafting": "normalized_adam", "lr": 1e-3}
EVERYTHING = {"momentum": 0.8, "nesterov": True, "betas": [0.8, 0.99], "start_preconditioning_step": 4, "eps": 1e-4}


def final(scenario: Scenario, name: str) -> Check:
    return Check(
        f"{name}_zero{scenario.stage}_{scenario.ranks}ranks", scenario.ranks, "zero:final_parameters", scenario
    )


def matrix() -> list[Check]:
    """Return the runs that every stage must pass, on 2 and on 4 ranks."""
    checks = []
    for ranks in (2, 4):
        for stage in range(4):
            base = Scenario(ranks=ranks, stage=stage)
            checks += [
                # If a layer has no gradient, ZeRO-3 gives it that of the step before.
                final(replace(base, unused=2 if stage < 3 else None), "odd"),
                final(replace(base, settings="default"), "defaults"),
                final(replace(base, model="wide", settings="default"), "wide_defaults"),
                final(replace(base, model="wide", accumulate=4, clip=0.5, groups=True), "accumulate_clip_groups"),
            ]
    return checks


def sharding() -> list[Check]:
    """Return runs with DeepSpeed's own ways to lay out and move the same numbers."""
    checks = []
    for stage in (1, 2, 3):
        plain = {"contiguous_gradients": False, "overlap_comm": False}
        overlap = {"contiguous_gradients": True, "overlap_comm": True}
        offload = OFFLOADED_ALL if stage == 3 else OFFLOADED
        checks += [
            final(Scenario(stage=stage, zero=plain, accumulate=2), "plain_gradients"),
            final(Scenario(stage=stage, zero=overlap, groups=True), "overlap"),
            final(Scenario(stage=stage, zero={"reduce_scatter": False}), "no_reduce_scatter"),
            final(Scenario(stage=stage, zero=offload, clip=0.5), "offload"),
        ]
    for ranks in (2, 4):
        base = Scenario(ranks=ranks)
        checks += [
            final(replace(base, stage=1, zero={"round_robin_gradients": True}, groups=True), "round_robin"),
            final(replace(base, stage=2, zero={"round_robin_gradients": True}, groups=True), "round_robin"),
            final(replace(base, stage=3, zero=SMALL_PIECES), "sub_groups"),
            final(replace(base, stage=3, zero=SMALL_PIECES, model="wide", groups=True), "wide_sub_groups"),
            final(replace(base, stage=3, zero_init=True), "zero_init"),
            final(replace(base, stage=3, zero={**SMALL_PIECES, **OFFLOADED_ALL}, zero_init=True), "zero_init_offload"),
        ]
    return checks


def features(check: Check) -> set[object]:
    """Return a run's features: way and stage, way and number of ranks, stage and number of ranks."""
    scenario: Scenario = check.argument
    way = check.name.partition("_zero")[0]
    stage, ranks = f"stage {scenario.stage}", f"{check.ranks} ranks"
    return {(way, stage), (way, ranks), (stage, ranks)}


def covering() -> list[Check]:
    """Return few runs that cover every pair of way, stage and number of ranks."""
    return fewest([*matrix(), *sharding()], features)
