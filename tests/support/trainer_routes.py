"""Trainer runs in which Shampoo does not come from the JSON: each way to pass it, under every framework."""

from __future__ import annotations

from tests.support.launch import Check
from tests.support.trainings import Training

TRAINING = Training(steps=7)
DEFAULT = Training(steps=7, settings="default")
FRAMEWORKS = ("ddp", "zero1", "zero3", "fsdp1", "fsdp2")
WRAPPERS = {"ddp": "DistributedDataParallel", "fsdp1": "FullyShardedDataParallel", "fsdp2": "FSDPLlamaForCausalLM"}
WRAPPERS["fsdp1_flat"] = WRAPPERS["fsdp1"]


def run(route: str, framework: str, training: Training = TRAINING, name: str = "optimizers") -> Check:
    return Check(f"{name}_{route}_{framework}", 2, "trainer_optimizers:train", (route, framework, training))


FIRST = run("prebuilt", "ddp")
# The Trainer calls the factory for a name too, so each of the two is seen under every kind of framework, not each one.
FACTORY = {"factory": ("ddp", "zero3", "fsdp2"), "name": ("zero1", "fsdp1", "fsdp2")}
ROUTES = [run(route, framework) for framework in FRAMEWORKS for route in ("prebuilt", "deferred")]
ROUTES += [run(route, framework) for route, frameworks in FACTORY.items() for framework in frameworks]
