"""What a model has learned and forgotten: loss and accuracy of a task, loss and divergence on general text."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.finetuning.tasks import IGNORED, KNOWN, Known, Task

TOKENS = 512  # of a batch


def logits_of(model: nn.Module, rows: Tensor) -> Tensor:
    """Float32 [rows, length, vocabulary], computed in bfloat16 as in training."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found: Tensor = model(input_ids=rows).logits
    return found.float()


@torch.no_grad()
def figures(model: nn.Module, task: Task, known: Known) -> dict[str, float]:
    """Task: loss, accuracy of tokens, share of rows without a wrong one. General text: loss and drift from before."""
    training = model.training
    model.eval()
    loss, right, exact = on_task(model, *task.held_out)
    general, drift = on_general(model, known)
    model.train(training)
    values = {"loss": loss, "accuracy": right, "exact": exact, "general": general, "drift": drift}
    return {name: round(value, 5) for name, value in values.items()}


def on_task(model: nn.Module, ids: Tensor, labels: Tensor) -> tuple[float, float, float]:
    """Mean loss and share of right tokens over all labels, and share of rows where each is right.

    A row without a wrong token is what greedy decoding would write.
    """
    losses, right, exact = [], [], []
    batch = max(1, TOKENS // ids.shape[1])
    for part, wanted in zip(ids.split(batch), labels.split(batch), strict=True):
        logits, targets = logits_of(model, part)[:, :-1], wanted[:, 1:]
        counts = targets != IGNORED
        losses.append(cross_entropy(logits[counts], targets[counts], reduction="none"))
        good = logits.argmax(-1) == targets
        right.append(good[counts])
        exact.append((good | ~counts).all(dim=1))
    return tuple(float(torch.cat(x).double().mean()) for x in (losses, right, exact))  # type: ignore[return-value]


def on_general(model: nn.Module, known: Known) -> tuple[float, float]:
    """Mean loss, and mean Kullback-Leibler divergence of the predictions from those before, in nats a token.

    It is taken over the tokens that were most probable, and one event for all others: a lower bound, never negative.
    """
    losses, drifts = [], []
    batch = max(1, TOKENS // known.rows.shape[1])
    parts = zip(known.rows.split(batch), known.tokens.split(batch), known.log_probabilities.split(batch), strict=True)
    for rows, tokens, before in parts:
        now = logits_of(model, rows)[:, :-1].log_softmax(-1)
        losses.append(-now.gather(-1, rows[:, 1:, None]).flatten())
        drifts.append(divergence(before, now.gather(-1, tokens)).flatten())
    return float(torch.cat(losses).double().mean()), float(torch.cat(drifts).double().mean())


def divergence(before: Tensor, now: Tensor) -> Tensor:
    """KL divergence [...] of distributions with log-probabilities [..., k] of some tokens; the rest is one event."""
    rest = (1.0 - before.exp().sum(-1)).clamp(min=1e-9)
    rest_now = (1.0 - now.exp().sum(-1)).clamp(min=1e-9)
    return (before.exp() * (before - now)).sum(-1) + rest * (rest.log() - rest_now.log())


@torch.no_grad()
def predictions(model: nn.Module, rows: Tensor) -> Known:
    """General text with the model's most probable tokens at each position."""
    found = []
    for part in rows.split(max(1, TOKENS // rows.shape[1])):
        found.append(logits_of(model, part)[:, :-1].log_softmax(-1).topk(KNOWN))
    return Known(rows, torch.cat([f.indices for f in found]), torch.cat([f.values for f in found]))
