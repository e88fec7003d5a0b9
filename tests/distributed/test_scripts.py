"""Whole scripts, written like Transformers' own, train under ZeRO and FSDP2 and continue from their checkpoints."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.launch import ROOT, Ask, Check, named
from tests.support.script_runs import FRAMEWORKS, HALF, RATE, STANDIN, STEPS, ScriptRun


def run_clm(framework: str) -> Check:
    written = ("trainer_state.json", "eval_results.json")
    run = ScriptRun(STANDIN + "run_clm.py", framework, written, f"checkpoint-{STEPS}", framework == "fsdp2")
    return Check(f"script_run_clm_{framework}", 2, "scripts:run", run, 180.0)


def no_trainer(framework: str) -> Check:
    run = ScriptRun(STANDIN + "run_clm_no_trainer.py", framework, ("all_results.json",), f"step_{STEPS}")
    return Check(f"script_no_trainer_{framework}", 2, "scripts:run", run, 180.0)


OF_TRAINER = [run_clm(framework) for framework in FRAMEWORKS]
OF_ACCELERATE = [no_trainer(framework) for framework in FRAMEWORKS]


ALL = OF_TRAINER + OF_ACCELERATE


def losses(check: Check, seen: dict[str, Any]) -> list[float]:
    if check.argument.of_trainer:
        return logged(seen, "loss")
    found: list[float] = seen["all_results.json"]["losses"]
    return found


def rates(check: Check, seen: dict[str, Any]) -> list[float]:
    if check.argument.of_trainer:
        return logged(seen, "learning_rate")
    found: list[float] = seen["all_results.json"]["rates"]
    return found


def logged(seen: dict[str, Any], key: str) -> list[float]:
    return [entry[key] for entry in seen["trainer_state.json"]["log_history"] if key in entry]


@pytest.mark.parametrize("check", ALL, ids=named)
def test_the_loss_falls_and_the_schedule_applies(check: Check, ask: Ask) -> None:
    whole = ask(check)[0]["whole"]
    found = losses(check, whole)
    assert len(found) == STEPS and found[-1] < 0.6 * found[0], found
    applied = rates(check, whole)
    assert len(applied) == STEPS and max(applied) == pytest.approx(RATE)
    peak = applied.index(max(applied))
    assert applied[: peak + 1] == sorted(applied[: peak + 1]) and peak <= 2
    assert applied[peak:] == sorted(applied[peak:], reverse=True) and applied[-1] < 0.1 * RATE


@pytest.mark.parametrize("check", ALL, ids=named)
def test_a_second_run_continues_the_curve(check: Check, ask: Ask) -> None:
    """It begins at the checkpoint in the middle, between two refreshes where the frequency is 3."""
    for seen in ask(check):
        after, whole = losses(check, seen["resumed"]), losses(check, seen["whole"])
        assert after[-(STEPS - HALF) :] == whole[HALF:]
        assert rates(check, seen["resumed"])[-(STEPS - HALF) :] == rates(check, seen["whole"])[HALF:]


@pytest.mark.parametrize("check", ALL, ids=named)
def test_the_table_leaves_out_embeddings_and_head_though_no_name_is_given(check: Check, ask: Ask) -> None:
    (table,) = [text for text in ask(check)[0]["messages"] if text.startswith("Shampoo preconditions:\n")]
    lines = {line.split()[0]: line for line in table.splitlines()[2:]}
    for name, kind in (("model.embed_tokens.weight", "embedding"), ("lm_head.weight", "lm_head")):
        assert "element-wise" in lines[name] and f"'kind:{kind}'" in lines[name]
    assert "block of" in lines["model.layers.*.mlp.up_proj.weight"]
    assert not any(text.startswith("Shampoo preconditions:\n") for text in ask(check)[1]["messages"])


@pytest.mark.parametrize("check", OF_TRAINER, ids=named)
def test_the_best_model_is_loaded_at_the_end(check: Check, ask: Ask) -> None:
    """The second evaluation is worse than the first, whose model the script evaluates at its end."""
    for run in ("whole", "resumed"):
        seen = ask(check)[0][run]
        first, second = logged(seen, "eval_loss")
        assert second > first + 0.05
        assert seen["eval_results.json"]["eval_loss"] == pytest.approx(first, rel=1e-6)


def test_one_line_of_the_script_with_a_loop_of_its_own_names_shampoo() -> None:
    lines = (ROOT / OF_ACCELERATE[0].argument.script).read_text(encoding="utf-8").splitlines()
    (line,) = [line.strip() for line in lines if "shampoo" in line.lower()]
    assert line.startswith("optimizer = torch.optim.Shampoo(optimizer_grouped_parameters, lr=args.learning_rate)")
