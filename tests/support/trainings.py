"""The Trainer runs of the tests, and the single-process run with the Trainer's own groups that each must equal."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

BOUND = {"strict": 1e-5, "default": 2e-3}
GLOBAL_BATCH = 8
LENGTH = 12
VOCABULARY = 128
# At 1e-2, updates would be half as large as these models' weights (0.02 per element). Float32 rounding alone, in one
# process, would then make a difference of 2e-3 at the default settings.
RATE, DECAY, BETAS = 3e-3, 0.1, (0.85, 0.98)


@dataclass(frozen=True)
class Training:
    """One run: what changes the trajectory (first fields), and how it is requested and sharded (the others)."""

    model: str = "llama"
    settings: str = "strict"
    steps: int = 8
    schedule: str = "cosine"
    warmup: int = 2
    clip: float = 0.5
    options: dict[str, Any] = field(default_factory=dict)

    stage: int = 2
    accumulate: int = 1
    type: str = "Shampoo"
    literal: bool = False  # the JSON has numbers instead of "auto"
    file: bool = False  # the JSON is in a file
    loaded: bool = False  # the model comes from `from_pretrained`, under ZeRO-3 as zero.Init shards
    save_at: int = 0  # saves at this step, then a second Trainer resumes from there

    @property
    def eps(self) -> float:
        return 1e-4 if self.settings == "strict" else 1e-8

    def own_options(self) -> dict[str, Any]:
        """Return the options that the Trainer does not have."""
        strict = {"relative_epsilon": 1e-3} if self.settings == "strict" else {}
        return {"precondition_frequency": 3, "max_preconditioner_dim": 24} | strict | self.options

    def trainer_options(self) -> dict[str, Any]:
        """Return the options whose values must be those of TrainingArguments."""
        return {"lr": RATE, "betas": list(BETAS), "eps": self.eps, "weight_decay": DECAY}

    def optim_args(self) -> str:
        """Return the options as text; the Trainer's own options come from TrainingArguments."""
        return ",".join(f"{key}={value}" for key, value in self.own_options().items())

    def deepspeed_config(self) -> dict[str, Any]:
        values = self.trainer_options()
        filled = values if self.literal else dict.fromkeys(values, "auto")
        automatic = (
            "train_batch_size",
            "train_micro_batch_size_per_gpu",
            "gradient_accumulation_steps",
            "gradient_clipping",
        )
        persistent = {"stage3_param_persistence_threshold": "auto"} if self.stage == 3 else {}
        return {
            "optimizer": {"type": self.type, "params": filled | self.own_options()},
            "zero_optimization": {"stage": self.stage, **persistent},
            **dict.fromkeys(automatic, "auto"),
        }

    def arguments(self, ranks: int) -> dict[str, Any]:
        """Return the keyword arguments of TrainingArguments, except folders and the DeepSpeed configuration."""
        return {
            "learning_rate": RATE, "weight_decay": DECAY, "adam_beta1": BETAS[0], "adam_beta2": BETAS[1],
            "adam_epsilon": self.eps, "max_grad_norm": self.clip, "max_steps": self.steps,
            "lr_scheduler_type": self.schedule, "warmup_steps": self.warmup,
            "per_device_train_batch_size": GLOBAL_BATCH // (ranks * self.accumulate),
            "gradient_accumulation_steps": self.accumulate, "train_sampling_strategy": "sequential",
            "use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1,
            "save_strategy": "steps" if self.save_at else "no", "save_steps": self.save_at or 500,
        }  # fmt: skip


def make_model(kind: str) -> nn.Module:
    """Build a model, equal on every rank; biases and norms are not 0 or 1, so that relative deviations make sense."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(30)
        if kind == "gpt2":
            still: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
            shape: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16}
            model: nn.Module = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **shape, **still))
        else:
            config = LlamaConfig(
                vocab_size=VOCABULARY, hidden_size=32, intermediate_size=56, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16,
                attention_bias=True, mlp_bias=True, tie_word_embeddings=kind == "tied_llama",
            )  # fmt: skip
            model = LlamaForCausalLM(config)
        with torch.no_grad():
            for p in model.parameters():
                if p.ndim == 1:
                    p.add_(0.3 * torch.randn_like(p))
    return model


def make_data(steps: int) -> list[dict[str, Tensor]]:
    """Return sequences in the order in which they are trained on."""
    generator = torch.Generator().manual_seed(31)
    rows = torch.randint(VOCABULARY, (steps * GLOBAL_BATCH, LENGTH), generator=generator)
    # The first token is not a target: some Transformers models count it in the mean over tokens, others do not.
    labels = torch.cat([torch.full_like(rows[:, :1], -100), rows[:, 1:]], dim=1)
    return [{"input_ids": row, "labels": label} for row, label in zip(rows, labels, strict=True)]


@dataclass
class Expected:
    """The results of the single-process run."""

    losses: list[float]
    rates: list[float]
    norms: list[float]
    parameters: dict[str, Tensor]


_expected: dict[str, Expected] = {}


def expected(training: Training) -> Expected:
    """Return the single-process run; computed once for all ways of requesting and sharding it."""
    kept = ("model", "settings", "steps", "schedule", "warmup", "clip", "options")
    key = json.dumps({k: v for k, v in asdict(training).items() if k in kept}, sort_keys=True)
    if key not in _expected:
        _expected[key] = single_process_run(training)
    return _expected[key]


def single_process_run(training: Training) -> Expected:
    from transformers import get_scheduler

    from shampoo_deepspeed import Shampoo

    model = make_model(training.model).double()
    options = training.trainer_options() | training.own_options()
    groups = trainer_groups(model, everything=options.pop("no_decay", None) == [])
    optimizer = Shampoo(groups, model=model, **options)
    schedule = get_scheduler(training.schedule, optimizer, training.warmup, training.steps)
    result = Expected([], [], [], {})
    data = make_data(training.steps)
    for step in range(training.steps):
        rows = torch.stack([d["input_ids"] for d in data[step * GLOBAL_BATCH : (step + 1) * GLOBAL_BATCH]])
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        result.losses.append(loss.item())
        result.rates.append(optimizer.param_groups[0]["lr"])
        result.norms.append(nn.utils.clip_grad_norm_(model.parameters(), training.clip or float("inf")).item())
        optimizer.step()
        schedule.step()
        model.zero_grad()
    result.parameters = {n: p.detach() for n, p in model.named_parameters()}
    return result


def trainer_groups(model: nn.Module, everything: bool = False) -> list[dict[str, Any]]:
    """Return the two groups that Trainer.create_optimizer makes, as named parameters."""
    decayed = trainer_decayed(model)
    named = list(model.named_parameters())
    yes = [(n, p) for n, p in named if everything or n in decayed]
    no = [(n, p) for n, p in named if not (everything or n in decayed)]
    return [{"params": yes, "weight_decay": DECAY}] + ([{"params": no, "weight_decay": 0.0}] if no else [])


def trainer_decayed(model: nn.Module) -> set[str]:
    from transformers import Trainer

    names: list[str] = Trainer.get_decay_parameter_names(object.__new__(Trainer), model)
    return set(names)
