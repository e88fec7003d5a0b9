"""The options as types, so that editors complete their names and type checkers check their values.

``tests/options/test_typed.py`` compares them with ``ShampooConfig``, which alone says what is allowed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict


class _Options(TypedDict, total=False):
    """All options but those that `Options` and `DeferredOptions` add, and but for ``lr``."""

    preset: Literal["paper", "pretrain", "finetune", "lora"] | None
    memory: Literal["full", "adamw", "half"] | None
    factor_beta: float | None
    beta3: float | None
    normalize_gradients: bool
    decoupled_weight_decay: bool
    weight_decay_type: str | None
    peak_lr: float | None
    no_decay: Sequence[str]
    epsilon: float
    relative_epsilon: float
    early_relative_epsilon: float
    preconditioner: str
    max_preconditioner_dim: int | None
    merge_small_dims: bool
    large_dim: str
    one_sided: str | None
    batch_dims: int
    split: Sequence[int]
    statistics_frequency: int | None
    precondition_frequency: int
    refresh_growth: float | None
    refresh_tolerance: float | None
    refresh: str
    start_preconditioning_step: int
    grafting: str | None
    grafting_beta2: float | None
    elementwise: str | None
    elementwise_lr: float
    embedding_lr: float | None
    tied_embedding_lr: float | None
    elementwise_betas: Sequence[float] | None
    momentum: float
    ema_decay: float
    dampening: float
    nesterov: bool
    use_bias_correction: bool
    exponent_override: float | Sequence[float | None] | None
    damping: str
    shrinkage: float
    solver: str
    exclude: Sequence[str]
    rules: Sequence[Mapping[str, Any]]
    factor_dtype: str
    root_dtype: str
    factor_format: str
    root_format: str
    moment_format: str
    elementwise_format: str
    master_weights: bool
    stochastic_rounding: bool
    apply_dtype: str | None
    matmul_precision: str
    communication_dtype: str | None
    compute_device: str
    bucket_mb: float | None
    overlap: bool
    failure_limit: int
    strict_names: bool


class Options(_Options, total=False):
    """The keyword arguments of ``Shampoo``."""

    betas: Sequence[float]
    eps: float
    weight_decay: float


class DeferredOptions(_Options, total=False):
    """Those of ``deferred``, where ``"auto"`` takes the value of TrainingArguments."""

    betas: Sequence[float] | Literal["auto"]
    eps: float | Literal["auto"]
    weight_decay: float | Literal["auto"]
