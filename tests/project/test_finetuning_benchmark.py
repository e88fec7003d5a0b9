"""The fine-tuning benchmark: its texts, what it counts, what it resumes, its tables; and tiny runs of a tiny model."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.convergence.experiments import read_queue
from benchmarks.convergence.loop import next_run
from benchmarks.convergence.results import Result, append, read
from benchmarks.finetuning import command, sources
from benchmarks.finetuning.analysis import cell_table, draw, rates_table, reached, report
from benchmarks.finetuning.evaluation import divergence, figures, on_task, predictions
from benchmarks.finetuning.experiments import Experiment
from benchmarks.finetuning.recipes import RECIPES, all_options
from benchmarks.finetuning.tasks import IGNORED, Known, Task, Tasks, answered, dictionary, evenly, is_held_out, packed
from benchmarks.finetuning.training import METHODS, Displacement, Run, train

# --- texts ---

DICTIONARY = """00databaseshort
branch /bɹˈantʃ/
Ast <masc>, Zweig <masc> [bot.]
   Synonym: {bough}

to branch off /tʊ bɹˈantʃ ˈɒf/ <v>
abzweigen [electr.]; abgehen
a headword that is far too long for the benchmark /x/
kurz
9th /nˈaɪnθ/
neunte
"""

PAGE = """<html><head><title>Not this</title></head><body><p id="title">nor this</p>
<ul class="docnav top"><li>Next</li></ul><div class="section"><h2>6.3. The <code>apt</code>
Command</h2><div class="para">It is &lt;small&gt;.<br />Second line.</div></div></body></html>"""


def test_pairs_of_the_dictionary_have_no_remarks() -> None:
    assert list(sources.pairs_of(DICTIONARY)) == [("branch", "Ast"), ("to branch off", "abzweigen")]


def test_pages_have_no_navigation() -> None:
    assert sources.text_of(PAGE) == "6.3. The apt Command\n\nIt is <small>.Second line."


def test_packages_that_a_folder_lacks_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="dict-freedict-eng-deu, debian-handbook, dict-jargon: `dpkg -x`"):
        sources.unpacked(tmp_path, tmp_path)
    for path in sources.PACKAGES.values():
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(gzip.compress(DICTIONARY.encode()))
    assert sources.unpacked(tmp_path, tmp_path / "cache") == tmp_path
    assert sources.translations(tmp_path) == [("branch", "Ast"), ("to branch off", "abzweigen")]


# --- tokens ---


class Letters:
    """A tokenizer of one token for each letter."""

    eos_token_id = 1

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [2 + ord(letter) % 60 for letter in text]}


def test_only_answers_count() -> None:
    ids, labels = answered(Letters(), [("ab", "xyz"), ("long" * 9, "xyz"), ("c", "x")], 32, 2)
    assert ids.shape == labels.shape == (2, 32)
    question = len("English: ab\nGerman:")
    assert (labels[0, :question] == IGNORED).all() and (labels[0] != IGNORED).sum() == len(" xyz") + 1
    assert (ids[0] == labels[0])[labels[0] != IGNORED].all()
    assert ids[0, question + 4] == labels[0, question + 4] == Letters.eos_token_id


def test_all_pairs_of_a_translation_are_on_one_side() -> None:
    pairs = [(f"w{n}", f"t{n // 2}") for n in range(400)]
    task = dictionary(Letters(), pairs)
    sides = [{bytes(row[row != IGNORED].numpy()) for row in labels} for _, labels in (task.train, task.held_out)]
    held = {pair for pair in pairs if is_held_out(pair[1])}
    assert not sides[0] & sides[1] and len(task.held_out[0]) == len(held) and len(task.train[0]) == 400 - len(held)


def test_batches_are_in_the_seeds_order_and_come_again() -> None:
    rows = packed(Letters(), ["x" * 30], 3)
    assert rows[0].shape == (10, 3)
    ids = torch.arange(10)[:, None].expand(10, 3)
    task = Task((ids, ids), rows)
    seen = torch.cat([task.batch(5, step, 4)[0][:, 0] for step in range(5)])
    assert sorted(seen[:10].tolist()) == list(range(10)) and torch.equal(seen[:10], seen[10:])
    assert not torch.equal(task.batch(6, 0, 4)[0], task.batch(5, 0, 4)[0])
    assert evenly((ids, ids), 4)[0][:, 0].tolist() == [0, 3, 6, 9]


# --- what is counted ---


class Certain(nn.Module):
    """A model that is almost sure of the next token being the present one plus 1."""

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        return type("Output", (), {"logits": 20.0 * nn.functional.one_hot((input_ids + 1) % 8, 8).float()})


def test_accuracy_and_exact_answers_count_labels_only() -> None:
    ids = torch.tensor([[0, 1, 2, 3], [0, 1, 5, 6], [4, 5, 6, 7]])
    labels = torch.tensor([[IGNORED, IGNORED, 2, 3], [IGNORED, IGNORED, 5, 6], [IGNORED, IGNORED, IGNORED, 7]])
    loss, accuracy, exact = on_task(Certain(), ids, labels)
    assert accuracy == pytest.approx(4 / 5) and exact == pytest.approx(2 / 3)
    assert loss == pytest.approx(20 / 5, rel=1e-3)  # one wrong token of five


def test_drift_is_the_divergence_and_zero_without_change() -> None:
    before, now = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.4, 0.5, 0.1]])
    whole = (before * (before / now).log()).sum()
    assert divergence(before.log(), now.log()).item() == pytest.approx(whole.item(), rel=1e-5)
    part = divergence(before.log()[:, :1], now.log()[:, :1]).item()  # the others as one event
    assert part == pytest.approx(0.5 * math.log(0.5 / 0.4) + 0.5 * math.log(0.5 / 0.6), rel=1e-5) and part < whole
    assert divergence(before.log()[:, :2], before.log()[:, :2]).item() == pytest.approx(0.0, abs=1e-7)


# --- runs of a tiny model ---


def tiny_model() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, tie_word_embeddings=True))


@pytest.fixture(scope="module")
def tasks() -> Tasks:
    text = "".join(chr(97 + n * n % 7) for n in range(1500))  # one pattern on both sides
    task = Task(packed(Letters(), [text[:1400]], 32), packed(Letters(), [text[1400:]], 32))
    model = tiny_model().eval()
    known = predictions(model, packed(Letters(), ["hello world " * 20], 32)[0][:4])
    return Tasks({"dictionary": task}, known, {"dictionary": figures(model, task, known)}, "digest")


def run_of(name: str, method: str = "full", **changes: Any) -> Run:
    recipe = RECIPES[name]
    options = all_options(recipe.kind, recipe.options)
    values: dict[str, Any] = {"lr": 3e-3, "seed": 0, "steps": 8, "tokens": 64, "text": "digest"} | changes
    return Run("dictionary", method, recipe.kind, options, **values)


@pytest.mark.parametrize("name", RECIPES)
def test_every_contestant_learns_and_drifts(name: str, tasks: Tasks) -> None:
    record = train(run_of(name), tasks, tiny_model().train())
    assert record["held_out"] < tasks.start["dictionary"]["loss"] - 0.05
    assert [point["step"] for point in record["curve"]] == [2, 4, 6, 8] and len(record["losses"]) == 8
    assert tasks.start["dictionary"]["drift"] < 1e-4 < record["curve"][-1]["drift"]
    assert record["displacement"] > 0 and record["state_mb"] > 0
    json.dumps(record, allow_nan=False)


@pytest.mark.parametrize("name", ["adamw", "shampoo"])
def test_adapters_alone_are_trained(name: str, tasks: Tasks) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    record = train(run_of(name, "lora8"), tasks, model.train())
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if "lora_" in n}
    assert 0 < record["displacement"] < 1


def test_a_displacement_is_relative_to_all_matrices() -> None:
    layers = [nn.Linear(2, 2), nn.Linear(2, 2)]
    start = Displacement(nn.Sequential(*layers))
    norms = sum(float(layer.weight.detach().square().sum()) for layer in layers)
    with torch.no_grad():
        layers[0].weight.add_(1.0)
        layers[0].bias.add_(9.0)
    assert start.read() == pytest.approx(math.sqrt(4.0 / norms), rel=1e-5)


def test_a_diverged_run_is_recorded_as_such(tasks: Tasks) -> None:
    record = train(run_of("adamw", lr=1e30), tasks, tiny_model().train())
    assert record["held_out"] is None and record["displacement"] is None
    json.dumps(record, allow_nan=False)


def test_a_run_of_another_text_is_refused(tasks: Tasks) -> None:
    with pytest.raises(ValueError, match="the run is for text other, and the tokens are of digest"):
        train(run_of("adamw", text="other"), tasks, tiny_model())


# --- queue and tables ---


def result(name: str, lr: float, losses: list[float], seed: int = 0, **more: Any) -> Result:
    experiment = Experiment(name, **more)
    run = experiment.run("handbook", "full", seed, lr, "text")
    shared = {"accuracy": 0.5, "exact": 0.0, "general": 3.0}
    curve = [{"step": 10 * (n + 1), "loss": x, "drift": 0.1 * (n + 1), **shared} for n, x in enumerate(losses)]
    record: dict[str, Any] = {
        "held_out": losses[-1] if losses else None,
        "start": {"loss": 4.0, "drift": 0.0, **shared},
        "curve": curve,
        "losses": [3.0] * 40,
        "displacement": 0.01,
        "model_seconds": 80.0,
        "optimizer_seconds": 0.0 if name == "adamw" else 40.0,
        "state_mb": 1.0,
        "peak_mb": 2.0,
    }
    return Result(run, experiment.title, record)


RESULTS = [
    result("adamw", 1e-4, [3.8, 3.7, 3.6, 3.55]),
    result("adamw", 2e-4, [3.7, 3.6, 3.5, 3.5]),
    result("shampoo", 1e-4, [3.9, 3.8, 3.7, 3.6]),
    result("shampoo", 2e-4, [3.6, 3.4, 3.3, 3.2]),
]


def test_a_loss_is_reached_between_two_evaluations() -> None:
    found = reached(RESULTS[3], 3.5)
    assert found is not None and found.step == pytest.approx(15.0) and found.drift == pytest.approx(0.15)
    assert reached(RESULTS[2], 3.5) is None
    first = reached(RESULTS[3], 3.8)
    assert first is not None and first.step == pytest.approx(5.0)


def test_contestants_are_compared_with_adamws_best() -> None:
    rows = {
        line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:]]
        for line in cell_table(RESULTS).splitlines()
    }
    heads = rows["contestant"]
    assert rows["shampoo"][heads.index("best lr")] == "0.0002"
    assert rows["shampoo"][heads.index("share of AdamW's steps")] == "0.38"  # 15 of 40
    assert rows["shampoo"][heads.index("drift there - AdamW's")] == "-0.250"
    assert rows["shampoo"][heads.index("of AdamW's")] == "1.50"
    never = cell_table([*RESULTS[:2], RESULTS[2]]).splitlines()[-1]
    assert "shampoo" in never and "never" in never
    assert "3.200 · 0.400" in rates_table(RESULTS)


def test_the_report_names_what_failed_and_what_diverged(tmp_path: Path) -> None:
    failed = result("soap", 1e-4, [])
    failed.record["error"] = "boom"
    text = report([*RESULTS, failed, result("muon", 1e-4, [])])
    assert "1 runs failed: soap 0.0001" in text and "1 runs diverged: muon 0.0001" in text
    draw([*RESULTS, failed], tmp_path / "drift.png")
    assert (tmp_path / "drift.png").stat().st_size > 10_000


def test_finished_runs_are_never_repeated(tmp_path: Path) -> None:
    experiment = Experiment("adamw", methods=("full", "lora8"), rates=(1e-4,))
    file = tmp_path / "results.jsonl"
    for seen in (0, 1):
        found = next_run([experiment], read(file, Run), "text", set())
        assert found is not None and found[1].method == METHODS[seen]
        append(file, Result(found[1], "adamw", {"held_out": 3.0}))
    assert next_run([experiment], read(file, Run), "text", set()) is None
    assert next_run([experiment], read(file, Run), "another text", set()) is not None


@pytest.mark.parametrize("field, value", [("contestant", "adamm"), ("tasks", ["poem"]), ("methods", ["lora9"])])
def test_a_line_with_an_unknown_name_says_what_there_is(field: str, value: Any, tmp_path: Path) -> None:
    queue = tmp_path / "queue.jsonl"
    queue.write_text(json.dumps({"contestant": "adamw", field: value}))
    found, wrong = read_queue(Experiment, queue)
    name = value if isinstance(value, str) else value[0]
    assert not found and len(wrong) == 1 and f"{field}: there is no {name!r}; there are" in wrong[0]


@pytest.mark.slow
def test_the_command_does_what_is_missing(
    tasks: Tasks, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers read the model from the folder of the tokens, as they do with the real one."""
    from examples.pretrained import NAME

    tiny_model().save_pretrained(tmp_path / NAME)  # type: ignore[operator]
    known: Known = tasks.known
    stored = {
        "tasks": {name: [*t.train, *t.held_out] for name, t in tasks.tasks.items()},
        "known": [known.rows, known.tokens, known.log_probabilities],
        "start": tasks.start,
        "digest": tasks.digest,
    }
    torch.save(stored, tmp_path / "tasks.pt")
    monkeypatch.setattr(command, "_tasks", lambda args: tmp_path / "tasks.pt")
    queue = tmp_path / "queue.jsonl"
    line = {"tasks": ["dictionary"], "steps": 4, "tokens": 64, "rates": [1e-3]}
    failing = line | {"contestant": "shampoo", "options": {"no_such_option": 1}, "name": "broken"}
    queue.write_text("\n".join(json.dumps(x) for x in (line | {"contestant": "adamw"}, failing)))
    arguments = ["--queue", str(queue), "--output", str(tmp_path / "results.jsonl"), "--jobs", "2"]
    assert command.main(arguments) == 0
    text = capsys.readouterr().out
    assert "dictionary full, adamw, lr 0.001, 4 steps, seed 0: held-out loss" in text
    assert "1 runs failed: broken 0.001" in text
    assert command.main(arguments) == 0
    assert "0 runs are known to be missing" in capsys.readouterr().out
