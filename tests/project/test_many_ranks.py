"""First steps of all ranks of a small job on paper: together they hold, own and send each thing exactly once."""

from __future__ import annotations

from collections import Counter

import pytest

from benchmarks.many_ranks import FirstStep, Job, first_step, planned, rows_of
from shampoo_deepspeed.distributed.frameworks import Parameter
from shampoo_deepspeed.estimate.model_shapes import llama_shapes
from shampoo_deepspeed.geometry.boxes import tiling_error

RANKS = 4
SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 56}


def job(framework: str, layers: int = 1, ranks: int = RANKS) -> Job:
    sizes = {"model_type": "llama", "vocab_size": 97, "num_hidden_layers": layers, **SIZES}
    parameters = [Parameter(name, shape, 0, name) for name, shape in llama_shapes(sizes, "here").items()]
    return Job(framework, parameters, ranks, {"max_preconditioner_dim": 16, "bucket_mb": 0.002}, replicas=2)


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["fsdp2", "hsdp", "zero3"])
def test_all_ranks_together_are_the_whole_once_and_as_planned(framework: str) -> None:
    """No Python object is gathered over all ranks: `Wire` refuses that. What they gather are a few integers."""
    of = job(framework)
    rows, made = rows_of(of), of.estimate()
    steps = [first_step(of, rank, rows) for rank in range(RANKS)]
    assert [step.moved for step in steps] == [planned(made, rank) for rank in range(RANKS)]
    assert made.collectives > 2 and sum(made.sent) == sum(made.received) > 0
    owned = Counter(key for step in steps for key in step.keys)
    (plan,) = {id(unit): unit.plan for unit in steps[0].optimizer.units}.values()
    assert len(owned) == len(plan.blocks) == made.blocks and set(owned.values()) == {1}
    copies = 2 if framework == "hsdp" else 1
    for number, parameter in enumerate(of.parameters):
        held = Counter(s.box for step in steps for u in step.optimizer.units for s in u.layout.shards
                       if s.parameter == number)  # fmt: skip
        assert tiling_error(parameter.shape, held) is None and set(held.values()) == {copies}
    for sender in steps:
        for receiver in steps:
            assert sent(sender, receiver.rank) == received(receiver, sender.rank)


def sent(step: FirstStep, to: int) -> list[tuple[int, int]]:
    """Return the elements of gradients and updates that a rank sends to another, bucket by bucket."""
    (unit,) = step.optimizer.units
    return [(b.gradients.send_splits[to], b.updates.send_splits[to]) for b in unit.exchange.buckets]


def received(step: FirstStep, of: int) -> list[tuple[int, int]]:
    """Return the elements that a rank expects of another."""
    (unit,) = step.optimizer.units
    return [(b.gradients.receive_splits[of], b.updates.receive_splits[of]) for b in unit.exchange.buckets]


@pytest.mark.slow
def test_what_is_gathered_grows_with_ranks_but_not_with_layers() -> None:
    def gathered(layers: int, ranks: int) -> int:
        of = job("fsdp2", layers, ranks)
        return first_step(of, 0, rows_of(of)).wire.gathered

    assert gathered(2, 2) == gathered(6, 2) == gathered(2, 4) / 2
