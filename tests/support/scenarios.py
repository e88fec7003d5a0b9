"""The training runs of the DeepSpeed exactness tests, and the unsharded float64 run that each must equal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.bare import BARE
from tests.support.reference import Reference
from tests.support.zoo import GLOBAL_BATCH, gradients, make_batch, make_model, micro_batches

STRICT = {"relative_epsilon": 1e-3, "eps": 1e-4}
BOUND = {"strict": 1e-5, "default": 2e-3}
# An eigenbasis of a rank-deficient factor is not unique: start after as many steps as the largest block has rows.
FAMILY: dict[str, dict[str, Any]] = {
    "soap": {"preconditioner": "soap", "start_preconditioning_step": 9, "eps": 1e-3},
    "kl_shampoo": {"preconditioner": "kl_shampoo", "start_preconditioning_step": 9, "eps": 1e-3},
    "muon": {"preconditioner": "muon", "max_preconditioner_dim": None, "eps": 1e-3},
}
FROZEN_STEPS = 2  # number of steps for which a layer is frozen, in runs that freeze one
# Options of single parameters, which may be parts of one flat tensor and have no whole block on any rank.
RULES = [
    {"match": "up.weight", "max_preconditioner_dim": 5, "preconditioner": "shampoo", "one_sided": "smaller"},
    {"match": "conv.weight", "batch_dims": 1, "precondition_frequency": 2},
    {"match": "down.weight", "split": [4, 5], "beta3": 0.3, "betas": [0.8, 0.9]},
    {"match": "down.bias", "elementwise": "sgd"},
    {"match": "mix.weight", "large_dim": "adagrad"},
]
SECOND_GROUP = {"lr": 3e-3, "weight_decay": 0.05}


@dataclass(frozen=True)
class Scenario:
    """One run: what changes the trajectory (first fields) and how it is sharded (the others)."""

    model: str = "odd"
    settings: str = "strict"
    steps: int = 7
    clip: float = 0.0
    groups: bool = False  # two parameter groups, every other parameter in the second one
    unused: int | None = None  # in this step and every third one after it, one layer has no gradient
    late_first: bool = False  # that layer is the first param group, all others are the second one
    decay: float = 1.0  # the learning rates are multiplied by it after every step
    options: dict[str, Any] = field(default_factory=dict)
    optimizer: str = "Shampoo"
    half: str = ""  # "bf16" or "fp16": the model's dtype; masters stay float32

    ranks: int = 2
    stage: int = 0
    accumulate: int = 1
    zero: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    zero_init: bool = False

    def optimizer_options(self) -> dict[str, Any]:
        base: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "precondition_frequency": 3}
        base["max_preconditioner_dim"] = 8 if self.model == "odd" else 16
        return base | (STRICT if self.settings == "strict" else {}) | self.options

    def deepspeed_config(self) -> dict[str, Any]:
        micro = GLOBAL_BATCH // (self.ranks * self.accumulate)
        options = self.optimizer_options()
        if self.optimizer != "Shampoo":  # a control run with torch's own optimizer
            options = {k: options[k] for k in ("lr", "weight_decay", "eps")} | {"torch_adam": True}
        return {
            "train_micro_batch_size_per_gpu": micro,
            "gradient_accumulation_steps": self.accumulate,
            "gradient_clipping": self.clip,
            "steps_per_print": 10_000,
            "optimizer": {"type": self.optimizer, "params": options},
            "zero_optimization": {"stage": self.stage, **self.zero},
            **({self.half: {"enabled": True}} if self.half else {}),
            **self.config,
        }

    @property
    def dtype(self) -> torch.dtype:
        return {"": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.half]

    def second_group(self, names: list[str]) -> list[str]:
        if self.late_first:
            return [n for n in names if not n.startswith("sometimes")]
        return names[1::2] if self.groups else []


@dataclass(frozen=True)
class BadStep:
    """A step whose gradient is not finite: through the loss of one rank, or in one element on that rank.

    The element is one of a parameter, or of those that are stepped in turn as ``group``.
    """

    scenario: Scenario
    value: float
    parameter: str | None = None
    group: int | None = None

    @property
    def everywhere(self) -> bool:
        return self.parameter is None and self.group is None


_expected: dict[str, dict[str, Tensor]] = {}


def expected(scenario: Scenario) -> dict[str, Tensor]:
    """Return the final parameters of the unsharded float64 run; computed once for all ways of sharding it."""
    sharding = ("ranks", "stage", "accumulate", "zero", "config", "zero_init")
    key = json.dumps({k: v for k, v in asdict(scenario).items() if k not in sharding}, sort_keys=True)
    if key not in _expected:
        _expected[key] = reference_run(scenario)
    return _expected[key]


def reference_run(
    scenario: Scenario,
    without: Mapping[str, range] | None = None,
    weights: Sequence[Mapping[str, Tensor]] | None = None,
    averages: bool = False,
) -> dict[str, Tensor]:
    """Run the reference and return its final masters.

    Args:
        without: parameters that get zero gradients in some steps.
        weights: a run's 16-bit weights after each step. Gradients are computed at these instead of the rounded
            masters. A master may be so close to the middle of two 16-bit numbers that its eighth digit decides how it
            is rounded; gradients then differ in the third digit.
        averages: return the moving averages of the masters.
    """
    model = make_model(scenario.model, scenario.dtype if scenario.half else torch.float64)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    reference = make_reference(scenario, trained)
    clipped = 0
    for step in range(scenario.steps):
        batch = make_batch(scenario.model, step, scenario.unused)
        grads = rounded_mean(scenario, model, batch) if scenario.half else gradients(model, batch, zeros=True)
        for name, steps in (without or {}).items():
            grads[name] = torch.zeros_like(trained[name]) if step in steps else grads[name]
        clipped += clip(grads, scenario.clip)
        reference.step(grads)
        for name, p in reference.params.items():
            trained[name].data.copy_(p.value if weights is None else weights[step][name])
            p.options = replace(p.options, lr=p.options.lr * scenario.decay)
    assert clipped > 0 or scenario.clip == 0.0, "the clipping of this scenario never clips"
    masters = reference.averages() if averages else reference.values()
    return {n: masters.get(n, p.detach()) for n, p in model.named_parameters()}


def rounded_mean(scenario: Scenario, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor | None]:
    """Return the mean of the ranks' 16-bit gradients, rounded as in DeepSpeed: only the sums are in 16 bits.

    This works only for two ranks, and with accumulation only for stages 0 and 1; others sum in another order.
    """
    assert scenario.ranks == 2 and (scenario.accumulate == 1 or scenario.stage < 2)
    scale = scenario.config.get("fp16", {}).get("loss_scale", 1.0)  # it gives small gradients more digits
    total: dict[str, Tensor] = {}
    for rank in range(2):
        own: dict[str, Tensor] = {}
        for piece in micro_batches(batch, rank, 2, scenario.accumulate):
            for name, g in gradients(model, piece, True, scale / scenario.accumulate).items():
                assert g is not None
                own[name] = own[name] + g if name in own else g
        total = {name: total[name] + g / 2 if name in total else g / 2 for name, g in own.items()}
    return {name: g.double() / scale for name, g in total.items()}


def new_weights(scenario: Scenario) -> dict[str, Tensor]:
    """Return other weights than the model starts with, the same on all ranks.

    Those of an odd number of elements stay: DeepSpeed cannot set them at stage 3 on two ranks.
    """
    found = {n: p.detach() for n, p in make_model(scenario.model).named_parameters()}
    return {
        n: p if n == "frozen.weight" or p.numel() % 2 else p + 0.2 * torch.cos(torch.arange(p.numel())).view(p.shape)
        for n, p in found.items()
    }


def make_reference(scenario: Scenario, trained: Mapping[str, Tensor]) -> Reference:
    """Build the reference. Groups set their own decay; without groups, biases and norms do not decay."""
    options = scenario.optimizer_options()
    if scenario.optimizer != "Shampoo":
        # There is no model that would tell which parameters are embeddings.
        bare = {name: value for name, value in BARE.items() if name != "embedding_lr"}
        options = {**bare, **options, "start_preconditioning_step": 10_000}
    overrides: dict[str, dict[str, Any]] = {n: dict(SECOND_GROUP) for n in scenario.second_group(list(trained))}
    if not overrides and scenario.optimizer == "Shampoo":
        overrides = {n: {"weight_decay": 0.0} for n in trained if n.endswith("bias") or n.startswith("norm")}
    for rule in options.pop("rules", []):  # each rule of these tests names one parameter
        changed = {key: value for key, value in rule.items() if key != "match"}
        overrides[rule["match"]] = overrides.get(rule["match"], {}) | changed
    second = scenario.second_group(list(trained))  # its blocks get their phases after those of the first group
    trained = {n: trained[n] for n in [*(n for n in trained if n not in second), *second]}
    for name in ("bucket_mb", "communication_dtype"):  # the rule does not depend on these
        options.pop(name, None)
    exclude = ("embed.weight",) if options.pop("exclude", None) is None else ()
    return Reference(trained, overrides, exclude, **options)


def clip(grads: dict[str, Tensor | None], limit: float) -> bool:
    """Scale to a global norm of at most `limit`, with DeepSpeed's 1e-6; return whether gradients were clipped."""
    present = [g for g in grads.values() if g is not None]
    norm = torch.stack([g.norm() for g in present]).norm()
    if limit == 0.0 or norm <= limit:
        return False
    for g in present:
        g *= limit / (norm + 1e-6)
    return True
