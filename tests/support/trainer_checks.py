"""Trainer runs in which DeepSpeed's JSON names the optimizer, at every stage."""

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
    "elementwise_lr": 0.5,
}


def run(name: str, training: Training) -> Check:
    return Check(f"trainer_{name}_zero{training.stage}", 2, "trainer:train", training)


def stages(name: str, training: Training, *numbers: int) -> list[Check]:
    return [run(name, replace(training, stage=stage)) for stage in numbers]


LLAMA = stages("llama", Training(), 0, 1, 2, 3)
TIED_LLAMA, GPT = stages("tied_llama", TIED, 0, 3), stages("gpt2", GPT2, 0, 2)  # GPT's gradients accumulate
ASKED = [
    run("literal_numbers", Training(literal=True)),
    run("lower_case_in_a_file", Training(type="shampoo", file=True)),
    run("own_options", Training(options=OTHER)),
]
DECAY_ALL = [run("decay_everything", replace(GPT2, stage=3, options={"no_decay": []}))]
EXACT = [
    *LLAMA, *TIED_LLAMA, *GPT, *ASKED, *DECAY_ALL,
    run("no_clipping", Training(clip=0.0)),
    run("from_pretrained", Training(stage=3, loaded=True)),
]  # fmt: skip
MEASURED = [*EXACT, *stages("tied_llama", TIED, 1, 2), *stages("gpt2", GPT2, 1, 3)]  # for benchmarks/exactness.py
