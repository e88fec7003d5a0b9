"""The Trainer's runs in which DeepSpeed's JSON names the optimizer, at every stage."""

from __future__ import annotations

from dataclasses import replace

from tests.support.launch import Check
from tests.support.trainings import Training

TIED = Training(model="tied_llama", settings="default", schedule="linear", warmup=3)
GPT2 = Training(model="gpt2", schedule="linear", warmup=0, accumulate=4, clip=0.3)
OTHER = {
    "momentum": 0.5,
    "grafting": "rmsprop",
    "exclude": ["*embed*"],
    "start_preconditioning_step": 4,
    "epsilon": 1e-10,
}


def run(name: str, training: Training) -> Check:
    return Check(f"trainer_{name}_zero{training.stage}", 2, "trainer:train", training)


def every_stage(name: str, training: Training) -> list[Check]:
    return [run(name, replace(training, stage=stage)) for stage in range(4)]


LLAMA, TIED_LLAMA, GPT = every_stage("llama", Training()), every_stage("tied_llama", TIED), every_stage("gpt2", GPT2)
ASKED = [
    run("literal_numbers", Training(literal=True)),
    run("lower_case_in_a_file", Training(type="shampoo", file=True)),
    run("own_options", Training(options=OTHER)),
]
DECAY_ALL = [run("decay_everything", replace(GPT2, stage=stage, options={"no_decay": []})) for stage in (0, 3)]
EXACT = [
    *LLAMA, *TIED_LLAMA, *GPT, *ASKED, *DECAY_ALL,
    run("accumulation", Training(stage=0, accumulate=4)),
    run("accumulation", Training(stage=3, accumulate=4)),
    run("no_clipping", Training(clip=0.0)),
    run("from_pretrained", Training(stage=3, loaded=True)),
]  # fmt: skip
