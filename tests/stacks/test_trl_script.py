"""TRL's own script for supervised fine-tuning, by its command line, under ZeRO and FSDP2 on two ranks."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.launch import Check, run_checks
from tests.support.script_runs import FRAMEWORKS, HALF, STEPS, ScriptRun
from tests.support.stack_runs import assert_learned

STATE = f"checkpoint-{STEPS}/trainer_state.json"
Results = dict[str, list[Any]]


def sft(framework: str) -> Check:
    run = ScriptRun("trl.scripts.sft", framework, (STATE,), f"checkpoint-{STEPS}", framework == "fsdp2")
    return Check(framework, 2, "scripts:run", run, 300.0)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    done = run_checks(list(map(sft, FRAMEWORKS)), tmp_path_factory.mktemp("sft"))
    assert not [result.failure for result in done.values() if result.failure], done
    return {name: result.values for name, result in done.items()}


def logged(seen: dict[str, Any], key: str) -> list[float]:
    return [entry[key] for entry in seen[STATE]["log_history"] if key in entry]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_it_trains_and_continues(framework: str, results: Results) -> None:
    for seen in results[framework]:
        whole, resumed = seen["whole"], seen["resumed"]
        assert_learned(logged(whole, "loss"), 0.5)
        rates = logged(whole, "learning_rate")
        assert len(rates) == STEPS and rates[2:] == sorted(rates[2:], reverse=True) and rates[-1] < 0.1 * max(rates)
        for key in ("loss", "learning_rate", "eval_loss"):
            assert logged(resumed, key) == logged(whole, key), key
        assert whole[STATE]["best_global_step"] == HALF


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_table_leaves_out_embedding_and_head(framework: str, results: Results) -> None:
    (table,) = [text for text in results[framework][0]["messages"] if text.startswith("Shampoo preconditions:\n")]
    lines = {line.split()[0]: line for line in table.splitlines()[2:]}
    assert all("element-wise" in lines[name] for name in ("model.embed_tokens.weight", "lm_head.weight"))
    assert "block of" in lines["model.layers.*.mlp.up_proj.weight"]
