"""Step time, whole training and peak memory on a GPU: Llama-like models of 350 M and 1 B parameters.

    python -m benchmarks.accelerator [--size 350m 1b] [--block 1024 2048] [--solver eigh coupled_newton]

Contestants are built, timed and freed one after the other, because two of them may not fit into memory together. Each
starts from the same seeds, and all learning rates are 0. So all get the same gradients: those of random tokens in the
freshly initialised model. The forward pass runs under autocast to bfloat16; weights and states are in float32. Times
are taken between two synchronisations, and windows are defined in benchmarks.step_time. All rows use the pass that was
timed in fused AdamW's run. With --profile DIR, torch's profiler writes two tables for each of ours: the times of a step
with a refresh, and of one without.
"""

from __future__ import annotations

import argparse
import gc
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import end_to_end, step_time
from benchmarks.contestants import Contestant, adamw, ours
from benchmarks.plain_loop import PlainLoop
from benchmarks.report import machine, table
from benchmarks.step_time import clock
from shampoo_deepspeed.options.choices import SOLVERS

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 88, "layers": 2, "heads": 2},
    "350m": {"vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816, "layers": 24, "heads": 16},
    "1b": {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "layers": 18, "heads": 16},
}
NEVER = 10**9  # a step number that no run reaches


@dataclass(frozen=True)
class Setting:
    """Settings that all contestants share; ``profile`` is the folder for the profiler's tables."""

    size: str
    tokens: int
    length: int
    frequency: int
    rounds: int
    device: torch.device
    recompute: bool = False
    profile: Path | None = None


@dataclass
class Measured:
    """Seconds of the counted passes and steps, and the peak in bytes if the device reports one."""

    passes: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    peak: int | None = None


def config(size: str, length: int) -> LlamaConfig:
    """Return the configuration of a Llama of one of ``SIZES``, for sequences of ``length`` tokens."""
    known: dict[str, Any] = dict(SIZES[size])
    layers, heads = known.pop("layers"), known.pop("heads")
    known["attn_implementation"] = "sdpa"
    return LlamaConfig(
        **known,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=length,
        tie_word_embeddings=False,
        use_cache=False,
    )


def build(setting: Setting) -> LlamaForCausalLM:
    """Build the model in float32 with seeded weights, on its device."""
    torch.manual_seed(0)
    with setting.device:
        model = LlamaForCausalLM(config(setting.size, setting.length)).train()
    if setting.recompute:  # the second name is for older versions of Transformers
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model


def batch(setting: Setting, number: int) -> Tensor:
    """Return random tokens [tokens / length, length]."""
    generator = torch.Generator().manual_seed(number)
    shape = (setting.tokens // setting.length, setting.length)
    return torch.randint(SIZES[setting.size]["vocab_size"], shape, generator=generator).to(setting.device)


def one_pass(model: nn.Module, tokens: Tensor) -> None:
    """Run forward and backward; autocast ends before the backward pass, and long before the optimizer's step."""
    with torch.autocast(tokens.device.type, dtype=torch.bfloat16):
        loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return two groups: the matrices that Shampoo preconditions by default, and norms, embedding and head."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and "embed_tokens" not in name and "lm_head" not in name]
    known = {id(p) for p in matrices}
    return [{"params": matrices}, {"params": [p for _, p in named if id(p) not in known], "elementwise": True}]


def plain_loop(block: int, frequency: int) -> Contestant:
    def build(model: nn.Module) -> list[torch.optim.Optimizer]:
        return [PlainLoop(parameter_groups(model), block=block, frequency=frequency)]

    return Contestant(f"plain loop over blocks, eigh, block {block}", build)


def contestants(blocks: Sequence[int], solvers: Sequence[str], frequency: int) -> tuple[list[Contestant], set[str]]:
    """Return all contestants, the baseline first, and the names of ours."""
    mine = [
        replace(ours("shampoo", "staggered", b, frequency, solver=s), name=f"shampoo, {s}, block {b}")
        for b in blocks
        for s in solvers
    ]
    mine.append(replace(ours("soap", "staggered", blocks[0], frequency), name=f"soap, block {blocks[0]}"))
    return [adamw(fused=True), *mine, plain_loop(blocks[0], frequency)], {c.name for c in mine}


def measure(contestant: Contestant, setting: Setting, profiled: bool = False) -> Measured:
    """Build a model and its optimizers and time them; they are released when this returns."""
    model, found = build(setting), Measured()
    memory = torch.get_device_module(setting.device)
    reports_peak = hasattr(memory, "max_memory_allocated")  # the CPU does not
    if reports_peak:  # only after `build`, which initialises the device
        memory.reset_peak_memory_stats(setting.device)
    optimizers = contestant.build(model)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = 0.0
    for step in range((2 + setting.rounds) * setting.frequency):
        tokens = batch(setting, step)
        begin = clock(setting.device)
        one_pass(model, tokens)
        middle = clock(setting.device)
        for optimizer in optimizers:
            optimizer.step()
        end = clock(setting.device)
        if step >= 2 * setting.frequency:  # by then every block has been refreshed once
            found.passes.append(middle - begin)
            found.steps.append(end - middle)
        model.zero_grad()
    if reports_peak:
        found.peak = memory.max_memory_allocated(setting.device)
    if profiled and setting.profile is not None:
        write_profiles(contestant.name, model, optimizers, setting)
    return found


def write_profiles(name: str, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], setting: Setting) -> None:
    """Write the profiler's tables of a step in which some blocks refresh, and of one in which none does.

    With staggered refreshes every step has one. So for the second table the start step is postponed; existing roots
    stay in use.
    """
    assert setting.profile is not None
    setting.profile.mkdir(parents=True, exist_ok=True)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    one_pass(model, batch(setting, 0))
    for kind in ("with", "without"):
        if kind == "without":
            for group in groups:
                group["start_preconditioning_step"] = NEVER
        text = profiled_step(optimizers, setting.device)
        slug = re.sub(r"\W+", "_", f"{setting.size} {name}")
        (setting.profile / f"{slug}_{kind}_refresh.txt").write_text(text, encoding="utf-8")


def profiled_step(optimizers: Sequence[torch.optim.Optimizer], device: torch.device) -> str:
    """Return the profiler's table of one step, sorted by time on the device."""
    kinds = ProfilerActivity.__members__
    activities = [kinds[name] for name in {"CPU", device.type.upper()} if name in kinds]
    clock(device)
    with profile(activities=activities) as profiler:
        for optimizer in optimizers:
            optimizer.step()
        clock(device)
    by = "self_cpu_time_total" if device.type == "cpu" else "self_device_time_total"
    return str(profiler.key_averages().table(sort_by=by, row_limit=40))


def free(device: torch.device) -> None:
    """Free what the last contestant used, so that the next one starts with an empty device."""
    gc.collect()
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()


def run(blocks: Sequence[int], solvers: Sequence[str], setting: Setting) -> dict[str, Measured]:
    """Return measurements by contestant; one that does not fit into the device's memory is named and left out.

    Raises:
        torch.OutOfMemoryError: if the baseline itself does not fit.
    """
    everyone, mine = contestants(blocks, solvers, setting.frequency)
    found: dict[str, Measured] = {}
    for contestant in everyone:
        try:
            found[contestant.name] = measure(contestant, setting, profiled=contestant.name in mine)
        except torch.OutOfMemoryError:
            if contestant is everyone[0]:
                raise
            print(f"{contestant.name}: does not fit into the device's memory, left out")
        free(setting.device)
    return found


def rows(found: dict[str, Measured], setting: Setting) -> list[list[object]]:
    """Return the rows of step_time, with the total over the baseline's, and the peak if it is known."""
    seconds, base = {name: m.steps for name, m in found.items()}, next(iter(found))
    whole = end_to_end.rows(setting.tokens, statistics.median(found[base].passes), seconds, setting.frequency)
    more = {base: "+0.0%"} | {str(line[0]): line[-1] for line in whole}
    out = step_time.rows(seconds, base, setting.frequency)
    for line in out:
        name = str(line[0])
        peak = found[name].peak
        line += [more[name], *([] if peak is None else [peak / 2**30])]
    return out


def show(found: dict[str, Measured], setting: Setting) -> None:
    parameters = sum(p.numel() for p in on_meta(setting).parameters())
    base = next(iter(found.values()))
    print(f"\n{setting.size}: {parameters / 1e6:.0f} M parameters, {setting.tokens} tokens a step; {machine()}")
    print(f"forward + backward {1e3 * statistics.median(base.passes):.1f} ms; frequency {setting.frequency}\n")
    heads = ["optimizer", "mean ms", "median ms", "slowest ms", "mean / AdamW's", "slowest / median"]
    heads += ["whole over AdamW's", *([] if base.peak is None else ["peak GiB"])]
    print(table(heads, rows(found, setting)), flush=True)


def on_meta(setting: Setting) -> LlamaForCausalLM:
    """Build the model on the meta device, for its shapes."""
    return build(replace(setting, device=torch.device("meta"), recompute=False))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--size", nargs="+", default=["350m", "1b"], choices=SIZES)
    made.add_argument("--block", type=int, nargs="+", default=[1024, 2048], help="SOAP and the loop use the first")
    made.add_argument("--solver", nargs="+", default=["eigh", "coupled_newton"], choices=SOLVERS)
    made.add_argument("--tokens", type=int, default=16384, help="per step; a multiple of --sequence-length")
    made.add_argument("--sequence-length", type=int, default=1024)
    made.add_argument("--recompute", action="store_true", help="activation checkpointing, if memory is short")
    made.add_argument("--frequency", type=int, default=10)
    made.add_argument("--rounds", type=int, default=2, help="number of windows to measure")
    made.add_argument("--profile", type=Path, help="folder for the profiler's tables")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table for each size."""
    made = parser()
    args = made.parse_args(arguments)
    if args.tokens < 1 or args.tokens % args.sequence_length:
        made.error(f"--tokens {args.tokens} is not a multiple of --sequence-length {args.sequence_length}")
    device = torch.device(args.device)
    if device.type != "cpu" and device.index is not None:
        torch.accelerator.set_device_index(device.index)  # clock() waits for the current device
    numbers = (args.tokens, args.sequence_length, args.frequency, args.rounds)
    for size in args.size:
        setting = Setting(size, *numbers, device, args.recompute, args.profile)
        show(run(args.block, args.solver, setting), setting)


if __name__ == "__main__":
    main()
