"""Training loss of a small Llama on real text: Shampoo's family against AdamW, each over several learning rates.

All runs have the same tokens, the same warm-up and cosine schedule, and one seed for data order and weights. AdamW's
rate is tuned over at least four values, ours over no more. The benchmark prints steps and CPU seconds to AdamW's best
final loss, and writes a plot and a JSON. Finished runs are read from the output folder.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.report import figure
from shampoo_deepspeed import Shampoo

WINDOW = 25  # of the mean losses that are compared
WARM_UP = 0.1


@dataclass(frozen=True)
class Setting:
    """Settings that all runs share."""

    steps: int = 600
    batch: int = 8
    length: int = 64
    hidden: int = 256
    layers: int = 4
    vocab: int = 2048
    block: int = 256
    frequency: int = 10
    held_out: int = 128
    seed: int = 0


@dataclass(frozen=True)
class Job:
    """One training run."""

    optimizer: str
    lr: float
    setting: Setting
    folder: str

    @property
    def file(self) -> Path:
        return Path(self.folder) / f"{self.optimizer}_{self.lr:g}.json"


RATES: dict[str, tuple[float, ...]] = {
    "adamw": (1e-3, 1.4e-3, 2e-3, 4e-3, 8e-3),
    "shampoo": (2e-3, 4e-3, 8e-3),
    "shampoo_root2": (2e-3, 4e-3, 8e-3),
    "soap": (2e-3, 4e-3, 8e-3),
    "kl_shampoo": (2e-3, 4e-3, 8e-3),
}


def load_rows(setting: Setting) -> Tensor:
    """Token rows of the Python library's sources, training rows first: int64 [rows, length]."""
    from examples.text_data import find_text_files, first_characters, read_documents, token_rows, train_tokenizer

    files = find_text_files(None)
    tokenizer = train_tokenizer(first_characters(read_documents(files, setting.seed), 2_000_000), setting.vocab)
    rows = setting.steps * setting.batch + setting.held_out
    sequences = token_rows(read_documents(files, setting.seed), tokenizer, rows, setting.length)
    # Documents are in random order, so the last rows are from documents never trained on; the others are shuffled.
    order = torch.randperm(rows - setting.held_out, generator=torch.Generator().manual_seed(setting.seed))
    return torch.cat([sequences[order], sequences[rows - setting.held_out :]])


def build_model(setting: Setting) -> nn.Module:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(setting.seed)
    config = LlamaConfig(
        vocab_size=setting.vocab,
        hidden_size=setting.hidden,
        intermediate_size=setting.hidden * 8 // 3 // 16 * 16,
        num_hidden_layers=setting.layers,
        num_attention_heads=setting.hidden // 32,
        max_position_embeddings=setting.length,
        tie_word_embeddings=False,
    )
    model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model


def build_optimizer(job: Job, model: nn.Module) -> torch.optim.Optimizer:
    """Weight decay 0.1 on matrices only, betas (0.9, 0.99) for all."""
    decayed = [(n, p) for n, p in model.named_parameters() if p.ndim > 1]
    others = [(n, p) for n, p in model.named_parameters() if p.ndim <= 1]
    shared: dict[str, Any] = {"lr": job.lr, "betas": (0.9, 0.99), "weight_decay": 0.1}
    if job.optimizer == "adamw":
        plain = [p for _, p in others]
        groups: list[dict[str, Any]] = [{"params": [p for _, p in decayed]}, {"params": plain, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, **shared)
    # Shampoo's default is p = 4 for matrices; with p = 2 each side alone has AdaGrad's power, -1/2.
    root = 2.0 if job.optimizer == "shampoo_root2" else None
    return Shampoo(
        [{"params": decayed}, {"params": others, "weight_decay": 0.0}],
        model=model,
        preconditioner=job.optimizer.removesuffix("_root2"),
        exponent_override=root,
        refresh="staggered",
        max_preconditioner_dim=job.setting.block,
        precondition_frequency=job.setting.frequency,
        **shared,
    )


def schedule(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to a tenth."""
    warm = max(1, int(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.55 + 0.45 * math.cos(math.pi * (step - warm) / max(1, steps - warm))


def run(job: Job) -> None:
    """Train, and write the losses and CPU seconds of every step to the job's file."""
    if job.file.exists():
        return
    torch.set_num_threads(1)
    setting = job.setting
    rows = load_rows(setting)
    model = build_model(setting)
    optimizer = build_optimizer(job, model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, setting.steps))
    losses, seconds, spent = [], [], 0.0
    for step in range(setting.steps):
        begin = time.process_time()
        batch = rows[step * setting.batch : (step + 1) * setting.batch]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        spent += time.process_time() - begin
        losses.append(loss.item())
        seconds.append(spent)
    with torch.no_grad():
        held = [model(input_ids=b, labels=b).loss.item() for b in rows[-setting.held_out :].split(setting.batch)]
    record = {
        "optimizer": job.optimizer,
        "lr": job.lr,
        "setting": asdict(setting),
        "loss": losses,
        "cpu_seconds": seconds,
        "held_out": sum(held) / len(held),
    }
    aside = job.file.with_suffix(".part")
    aside.write_text(json.dumps(record))
    aside.rename(job.file)
    print(f"{job.optimizer} lr {job.lr:g}: held-out loss {record['held_out']:.3f}, {spent:.0f} CPU s", flush=True)


def trailing_mean(values: list[float]) -> list[float]:
    """Mean of the last WINDOW values, so that no step sees the future."""
    windows = [values[max(0, i + 1 - WINDOW) : i + 1] for i in range(len(values))]
    return [sum(w) / len(w) for w in windows]


def best_runs(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each optimizer's run with the lowest held-out loss; diverged runs are left out."""
    best: dict[str, dict[str, Any]] = {}
    for record in records:
        name = record["optimizer"]
        finite = math.isfinite(record["held_out"])
        if finite and (name not in best or record["held_out"] < best[name]["held_out"]):
            best[name] = record
    return best


def table(records: list[dict[str, Any]]) -> str:
    """One line per optimizer at its best rate; steps and seconds to AdamW's best final training loss."""
    best = best_runs(records)
    adamw = best["adamw"]
    target = trailing_mean(adamw["loss"])[-1]
    heads = ["optimizer", "rates tried", "best lr", "training loss", "held-out loss", "CPU s", "CPU ms a step"]
    heads += ["steps to AdamW's best", "CPU s to it"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in RATES:
        if name not in best:
            continue
        record = best[name]
        smooth = trailing_mean(record["loss"])
        hit = next((i for i, x in enumerate(smooth) if i + 1 >= WINDOW and x <= target), None)
        steps, seconds = len(record["loss"]), record["cpu_seconds"]
        when = ("never", "-")
        if hit is not None:
            share = seconds[hit] / adamw["cpu_seconds"][-1]
            when = (f"{hit + 1} ({(hit + 1) / steps:.0%})", f"{seconds[hit]:.0f} ({share:.0%})")
        tried = sum(r["optimizer"] == name for r in records)
        lines.append(
            f"| {name} | {tried} | {record['lr']:g} | {smooth[-1]:.3f} | {record['held_out']:.3f} | {seconds[-1]:.0f} "
            f"| {1e3 * seconds[-1] / steps:.0f} | {when[0]} | {when[1]} |"
        )
    return "\n".join(lines)


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """Draw smoothed losses of the best runs against steps and against CPU seconds."""
    best = best_runs(records)
    target = trailing_mean(best["adamw"]["loss"])[-1]
    made, panels = figure(path, 2, 4.4)
    for name, record in best.items():
        smooth = trailing_mean(record["loss"])
        steps = list(range(1, len(smooth) + 1))
        for panel, x in zip(panels, (steps, record["cpu_seconds"]), strict=True):
            panel.plot(x[WINDOW:], smooth[WINDOW:], linewidth=1.6, label=f"{name}, lr {record['lr']:g}")
    for panel, label in zip(panels, ("step", "CPU seconds"), strict=True):
        panel.axhline(target, color="grey", linewidth=0.8, linestyle="--")
        panel.set_xlabel(label)
    panels[0].set_ylabel(f"training loss (mean of {WINDOW} steps)")
    panels[0].legend(frameon=False)
    made.savefig(path, dpi=130)


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing, then print the table and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=Setting.steps)
    parser.add_argument("--hidden", type=int, default=Setting.hidden)
    parser.add_argument("--layers", type=int, default=Setting.layers)
    parser.add_argument("--optimizers", nargs="+", default=list(RATES), choices=list(RATES))
    parser.add_argument("--rates", type=float, nargs="+", help="instead of each optimizer's own")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="runs at a time")
    parser.add_argument("--output", default="bench_output/convergence")
    args = parser.parse_args(arguments)
    setting = Setting(steps=args.steps, hidden=args.hidden, layers=args.layers)
    folder = Path(args.output) / f"{setting.layers}x{setting.hidden}_{setting.steps}steps"
    folder.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(["adamw", *args.optimizers]))
    jobs = [Job(name, lr, setting, str(folder)) for name in names for lr in args.rates or RATES[name]]
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(args.jobs, len(jobs)), maxtasksperchild=1) as pool:
        pool.map(run, jobs, chunksize=1)
    records = [json.loads(job.file.read_text()) for job in jobs]
    (folder / "results.json").write_text(json.dumps(records))
    draw(records, folder / "losses.png")
    print(table(records))
    print(f"plot and data: {folder}")


if __name__ == "__main__":
    main()
