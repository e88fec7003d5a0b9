"""Time of one optimizer step on a small Llama, as a ratio to torch's AdamW in the same run.

CPU time on CPU (machines are shared), time between device synchronisations on an accelerator; medians. Steps with
and without a refresh of the inverse roots are told apart.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from shampoo_deepspeed import Shampoo


def shapes_of_llama(layers: int, hidden: int, vocab: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama-style decoder with an untied head."""
    inner = 4 * hidden
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "lm_head.weight": (vocab, hidden),
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for name in "qkvo":
            shapes[f"{prefix}.self_attn.{name}_proj.weight"] = (hidden, hidden)
        shapes[f"{prefix}.mlp.gate_proj.weight"] = (inner, hidden)
        shapes[f"{prefix}.mlp.up_proj.weight"] = (inner, hidden)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (hidden, inner)
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
    return shapes


def clock(device: torch.device) -> float:
    """Seconds: of this process's CPU, or of the wall after the device has finished."""
    if device.type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize()
    return time.perf_counter()


def time_steps(
    make: Callable[[list[tuple[str, nn.Parameter]]], torch.optim.Optimizer],
    shapes: dict[str, tuple[int, ...]],
    device: torch.device,
    warm: int,
    steps: int,
) -> list[float]:
    """Seconds of each counted step; gradients are random and new at each."""
    generator = torch.Generator(device).manual_seed(0)

    def random(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    named = [(name, nn.Parameter(random(shape) * 0.02)) for name, shape in shapes.items()]
    optimizer = make(named)
    times = []
    for step in range(warm + steps):
        for _, parameter in named:
            parameter.grad = random(tuple(parameter.shape)) * 1e-3
        begin = clock(device)
        optimizer.step()
        if step >= warm:
            times.append(clock(device) - begin)
    return times


def main() -> None:
    """Print a table of milliseconds and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--blocks", type=int, nargs="+", default=[128, 256, 1024])
    parser.add_argument("--frequency", type=int, default=10)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device, shapes = torch.device(args.device), shapes_of_llama(args.layers, args.hidden, args.vocab)
    base = time_steps(
        lambda named: torch.optim.AdamW([p for _, p in named], foreach=True), shapes, device, 3, args.steps
    )
    adamw = statistics.median(base)
    print(
        f"{device}, {torch.get_num_threads()} threads, layers {args.layers}, hidden {args.hidden}, milliseconds a step"
    )
    print(f"{'optimizer':<22}{'plain':>9}{'refresh':>9}{'mean':>9}{'plain/AdamW':>13}{'mean/AdamW':>12}")
    print(
        f"{'AdamW (foreach)':<22}{1e3 * adamw:>9.1f}{'':>9}{1e3 * statistics.fmean(base):>9.1f}{1.0:>13.2f}{1.0:>12.2f}"
    )
    for block in args.blocks:
        times = time_steps(
            lambda named, block=block: Shampoo(
                named, max_preconditioner_dim=block, precondition_frequency=args.frequency
            ),
            shapes,
            device,
            args.frequency,
            args.steps,
        )
        refreshed = [t for n, t in enumerate(times) if (args.frequency + n + 1) % args.frequency == 0]
        plain = statistics.median(t for n, t in enumerate(times) if (args.frequency + n + 1) % args.frequency)
        refresh = statistics.median(refreshed)
        mean = (refresh + (args.frequency - 1) * plain) / args.frequency
        row = f"{'Shampoo, block ' + str(block):<22}{1e3 * plain:>9.1f}{1e3 * refresh:>9.1f}{1e3 * mean:>9.1f}"
        print(f"{row}{plain / adamw:>13.2f}{mean / adamw:>12.2f}")


if __name__ == "__main__":
    main()
