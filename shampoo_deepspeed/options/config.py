"""The one list of options: name, default, check and meaning of everything that a user can set."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from enum import Flag, auto
from functools import cache, cached_property
from typing import Any

from torch import Tensor

from shampoo_deepspeed.options.checks import (
    Check,
    OptionError,
    bad,
    beta_pair,
    device_name,
    dtype_name,
    exactly,
    flag,
    fraction,
    growth,
    key_of,
    learning_rate,
    lengths,
    non_negative,
    nullable,
    one_of,
    optional_beta2,
    optional_factor_beta,
    optional_root,
    patterns_with,
    positive_int,
    positive_rate,
    rate,
    short,
    small_int,
    start_step,
)
from shampoo_deepspeed.options.choices import (
    DAMPINGS,
    DECAYS,
    DEFAULT_EXCLUDE,
    DEFAULT_RULES,
    DTYPES,
    ELEMENTWISE_FORMATS,
    ELEMENTWISE_METHODS,
    FORMATS,
    GRAFTING_METHODS,
    KINDS,
    LARGE_DIMS,
    MATMUL_PRECISIONS,
    MOMENT_FORMATS,
    REFRESHES,
    SIDES,
    SOLVERS,
    WIDE_DTYPES,
)
from shampoo_deepspeed.options.combinations import check_together
from shampoo_deepspeed.options.derived import DerivedValues
from shampoo_deepspeed.options.family import FAMILY
from shampoo_deepspeed.options.names import renamed
from shampoo_deepspeed.options.presets import MEMORY, PRESET, without_preset

_patterns = patterns_with(KINDS)
_optional_dtype = nullable(dtype_name(*DTYPES))
_optional_grafting = nullable(one_of(*GRAFTING_METHODS))
_optional_elementwise = nullable(one_of(*ELEMENTWISE_METHODS))


def _rules(key: str, value: object) -> tuple[dict[str, Any], ...]:
    allowed = 'a list of rules such as {"match": "*q_proj*", "max_preconditioner_dim": 512}'
    if not isinstance(value, (tuple, list)):
        raise bad(key, value, allowed)
    checks = {option.name: option.metadata["check"] for option in fields(ShampooConfig)}
    rules = []
    for rule in value:
        if not isinstance(rule, Mapping):
            raise bad(key, value, allowed)
        options = _of_rule(key, value, rule) if "match" in rule else {}
        if not options:
            lacking = "options other than 'match'" if "match" in rule else "'match'"
            raise bad(key, value, f"{short(rule)} lacks {lacking}; {allowed}")
        match = rule["match"]
        patterns = _patterns(f"{key}: match", [match] if isinstance(match, str) else match)
        try:
            rules.append({"match": patterns, **{name: checks[name](name, v) for name, v in options.items()}})
        except OptionError as error:
            raise OptionError(f"in the rule for {list(patterns)}: {error}") from None
    return tuple(rules)


def _of_rule(key: str, value: object, rule: Mapping[str, Any]) -> dict[str, Any]:
    """A rule's options under our names, values unchecked. Of a preset these are the ones that a rule may set."""
    given = renamed({name: v for name, v in rule.items() if name != "match"}, GIVEN_NAMES)
    of_groups = options_with(GROUP_ONLY)
    misplaced = sorted(set(given) & set(of_groups))
    if misplaced:
        raise bad(key, value, f"{misplaced[0]!r} belongs to a parameter group and not to a rule")
    return {name: v for name, v in without_preset(given).items() if name not in of_groups}


class Property(Flag):
    """What an option may do, apart from being set when the optimizer is built."""

    FIXED = auto()  # it shapes blocks and state, so it may not change once there is state
    CONVERTED = auto()  # ...except by a load, which converts the loaded state
    GROUP_ONLY = auto()  # the step of a whole parameter group uses it, so rules for single parameters cannot change it
    SHARED = auto()  # it shapes what ranks exchange, so all groups of an optimizer have one value
    NOT_STORED = auto()  # it does not shape the state; it says how ranks work or which parameters are meant
    SCHEDULED = auto()  # schedules change it, so it usually differs when a run resumes


FIXED, CONVERTED, GROUP_ONLY, SHARED, NOT_STORED, SCHEDULED = Property
_PLAIN = Property(0)

# What runs did before there were these options. State without a value of theirs comes from such a run.
BEFORE: dict[str, Any] = {
    "preconditioner": "shampoo",
    "factor_beta": None,
    "normalize_gradients": False,
    "early_relative_epsilon": 0.0,
    "statistics_frequency": 1,
    "refresh_growth": 0.0,
    "elementwise_lr": 1.0,
    "embedding_lr": None,
    "tied_embedding_lr": None,
}


def _option(default: Any, validator: Check, doc: str, properties: Property = _PLAIN) -> Any:
    return field(default=default, metadata={"check": validator, "doc": doc, "properties": properties})


@dataclass(frozen=True)
class ShampooConfig(DerivedValues):
    """The options of one parameter group; names follow the Distributed Shampoo README (arXiv 2309.06497).

    ``eps``, ``epsilon`` and ``relative_epsilon`` are three different things. ``eps`` is AdamW's: it is added to
    the square root in the grafting (and element-wise) update. ``epsilon`` and ``relative_epsilon`` regularise
    factor matrices, by the same formula in all solvers: with eigenvalues l, the root is taken of
    ``l - min(l_min, 0) + max(epsilon, relative_epsilon * l_max)``, unless ``damping`` says otherwise. The relative part
    guards float32:
    a float32 factor matrix represents eigenvalues down to about 1e-7 of its largest; anything below is rounding noise.
    Gradients have no fixed scale that an absolute number could fit.

    Raises:
        OptionError: an unknown option, a wrong type, or a value out of range.
    """

    lr: float | Tensor = _option(
        1e-3, learning_rate, "learning rate, read every step; AdamW's scale when grafted", GROUP_ONLY | SCHEDULED
    )
    betas: tuple[float, float] = _option(
        (0.9, 0.999), beta_pair, "decay of the first moment, and of second moments", SCHEDULED
    )
    factor_beta: float | None = _option(
        0.95, optional_factor_beta, "decay of the factor matrices; null: betas[1]", SCHEDULED
    )
    beta3: float | None = _option(
        None,
        nullable(fraction),
        "weight of the old first moment in M; null: betas[0], squared for (soap_)muon",
    )
    eps: float = _option(1e-8, non_negative, "added to the square root of second moments, as in AdamW")
    normalize_gradients: bool = _option(
        True, flag, "first divide each block's (or element-wise parameter's) gradient by its root mean square"
    )
    weight_decay: float = _option(0.0, rate, "weight decay", GROUP_ONLY)
    decoupled_weight_decay: bool = _option(True, flag, "AdamW's decay; false: L2, added to the gradient", GROUP_ONLY)
    weight_decay_type: str | None = _option(
        None,
        nullable(one_of(*DECAYS)),
        "l2, decoupled, corrected or independent; null: by decoupled_weight_decay",
        GROUP_ONLY,
    )
    peak_lr: float | None = _option(
        None,
        nullable(positive_rate),
        "learning rate that scales corrected and independent decay; null: lr at the start",
        GROUP_ONLY | SCHEDULED,
    )
    no_decay: tuple[str, ...] = _option(
        (), _patterns, "patterns of parameters without weight decay", FIXED | GROUP_ONLY | NOT_STORED
    )
    epsilon: float = _option(1e-12, non_negative, "absolute floor of the factor matrices' regularisation")
    relative_epsilon: float = _option(1e-4, fraction, "regularisation relative to the largest eigenvalue")
    early_relative_epsilon: float = _option(
        0.01,
        fraction,
        "in early steps t, relative_epsilon is raised to at least this divided by t; 0: off",
    )
    preconditioner: str = _option(
        "kl_shampoo", key_of(FAMILY), "kl_shampoo, shampoo, soap, kl_soap, soap_muon or muon", FIXED
    )
    max_preconditioner_dim: int | None = _option(
        None,
        nullable(positive_int),
        "block size: larger dims are cut, small ones merged; null: 1024, or no limit for muon",
        FIXED,
    )
    merge_small_dims: bool = _option(
        True, flag, "merge small neighbouring dims; false: only drop dims of size 1", FIXED
    )
    large_dim: str = _option(
        "block",
        one_of(*LARGE_DIMS),
        "dims above the block size: cut into blocks, a diagonal, nothing, or AdaGrad for the whole parameter",
        FIXED,
    )
    one_sided: str | None = _option(None, nullable(one_of(*SIDES)), "the only dim with a factor; null: all dims", FIXED)
    batch_dims: int = _option(0, small_int, "1: the first dim counts separate matrices, such as stacked experts", FIXED)
    split: tuple[int, ...] = _option(
        (), lengths, "lengths of the parts of a fused matrix, each with its own blocks", FIXED
    )
    statistics_frequency: int | None = _option(
        None,
        nullable(positive_int),
        "after the early refreshes, one gradient in n goes into a factor matrix; null: 2 for kl_*, else 1",
    )
    precondition_frequency: int = _option(
        10, positive_int, "steps between two refreshes of roots or eigenbases", NOT_STORED
    )
    refresh_growth: float | None = _option(
        None,
        nullable(growth),
        "early refreshes: the next after this share of the steps so far; 0: none; null: 0.25 for kl_shampoo, else 0",
        NOT_STORED,
    )
    refresh_tolerance: float | None = _option(
        None, nullable(fraction), "relative off-diagonal norm up to which a refresh keeps a basis; null: keep none"
    )
    refresh: str = _option(
        "staggered",
        exactly(*REFRESHES),
        "staggered: spread over the frequency; background: also on a thread; sync: all blocks at once",
        FIXED | NOT_STORED,
    )
    start_preconditioning_step: int = _option(
        -1, start_step, "first preconditioned step; -1: the frequency, or 2 with refresh_growth"
    )
    grafting: str | None = _option(
        None,
        _optional_grafting,
        "method that gives updates of blocks their length; rms: a root mean square of 0.4; null: rms, or none in bases",
    )
    grafting_beta2: float | None = _option(
        None, optional_beta2, "decay of second moments; null: betas[1], or 0.999 if that is 1"
    )
    elementwise: str | None = _option(
        None,
        _optional_elementwise,
        "method of element-wise parameters; null: as grafting, or adam if that is none or rms",
    )
    elementwise_lr: float = _option(3.0, rate, "factor on the updates of element-wise parameters")
    embedding_lr: float | None = _option(
        32.0,
        nullable(rate),
        "the same for token embeddings that are not the output head too; null: as elementwise_lr",
    )
    tied_embedding_lr: float | None = _option(
        9.0, nullable(rate), "the same for token embeddings that are the output head too; null: as elementwise_lr"
    )
    elementwise_betas: tuple[float, float] | None = _option(
        None, nullable(beta_pair), "betas of element-wise parameters; null: betas and grafting_beta2", SCHEDULED
    )
    momentum: float = _option(0.0, fraction, "momentum on the finished update", GROUP_ONLY | SCHEDULED)
    dampening: float = _option(0.0, fraction, "dampening of momentum", GROUP_ONLY)
    nesterov: bool = _option(False, flag, "Nesterov momentum", GROUP_ONLY)
    ema_decay: float = _option(
        0.0, fraction, "decay of a moving average of the weights, see use_averages(); 0: none", GROUP_ONLY
    )
    use_bias_correction: bool = _option(True, flag, "correct first moment and factor matrices for their zero start")
    exponent_override: float | tuple[float | None, ...] | None = _option(
        None,
        optional_root,
        "the p of A^(-1/p), or a list by number of preconditioned dims; null: twice that number for shampoo, else 2",
    )
    damping: str = _option(
        "shift",
        one_of(*DAMPINGS),
        "of small eigenvalues; shift: add to all; saturate: raise the small ones; cutoff: their root is 0",
    )
    shrinkage: float = _option(
        0.0,
        non_negative,
        "a refresh mixes this share of the identity, divided by the number of gradients, into factor matrices; 0: off",
    )
    solver: str = _option(
        "auto", one_of(*SOLVERS), "how roots or eigenbases are computed; auto: by device and root, or qr in bases"
    )
    exclude: tuple[str, ...] = _option(
        DEFAULT_EXCLUDE, _patterns, "patterns of parameters that stay element-wise", FIXED | GROUP_ONLY | NOT_STORED
    )
    rules: tuple[dict[str, Any], ...] = _option(
        DEFAULT_RULES,
        _rules,
        "options of the parameters that match a pattern; the first rule that matches applies",
        FIXED | GROUP_ONLY,
    )
    factor_dtype: str = _option("float32", dtype_name(*WIDE_DTYPES), "dtype of factor matrices", FIXED)
    root_dtype: str = _option("float32", dtype_name(*DTYPES), "dtype of inverse roots and eigenbases", FIXED)
    factor_format: str = _option(
        "float32",
        one_of(*FORMATS),
        "how factor matrices are stored: float32 (in factor_dtype), packed (a triangle), bfloat16 or int8",
        FIXED | CONVERTED,
    )
    root_format: str = _option(
        "float32", one_of(*FORMATS), "how inverse roots and eigenbases are stored, likewise", FIXED | CONVERTED
    )
    moment_format: str = _option(
        "float32",
        one_of(*MOMENT_FORMATS),
        "how moments of blocks are stored: float32, bfloat16 or int8",
        FIXED | CONVERTED,
    )
    elementwise_format: str = _option(
        "float32",
        one_of(*ELEMENTWISE_FORMATS),
        "how moments of element-wise parameters are stored: float32 or bfloat16",
        FIXED | CONVERTED,
    )
    master_weights: bool = _option(
        True, flag, "keep a float32 copy of 16-bit parameters if the framework keeps none", GROUP_ONLY
    )
    stochastic_rounding: bool = _option(
        False, flag, "without master_weights: round bfloat16 parameters at random", GROUP_ONLY
    )
    apply_dtype: str | None = _option(
        None,
        _optional_dtype,
        "dtype of products with roots or bases; null: the wider of root_dtype and the moments'",
        NOT_STORED,
    )
    matmul_precision: str = _option(
        "highest",
        exactly(*MATMUL_PRECISIONS),
        "operands of statistics and of products with roots or bases; highest: unrounded; high: TF32; medium: bfloat16",
        NOT_STORED,
    )
    communication_dtype: str | None = _option(
        None,
        _optional_dtype,
        "dtype between ranks; null: that of the moments",
        FIXED | GROUP_ONLY | SHARED | NOT_STORED,
    )
    compute_device: str = _option(
        "auto",
        device_name,
        "where blocks are kept and computed; auto: the accelerator, if there is one; shard: where their shards lie",
        FIXED | GROUP_ONLY | SHARED | NOT_STORED,
    )
    bucket_mb: float | None = _option(
        None,
        nullable(non_negative),
        "megabytes in a bucket, eight in flight; null: an eighth of a rank's blocks, 2 to 16, on accelerators to 128",
        FIXED | GROUP_ONLY | SHARED | NOT_STORED,
    )
    overlap: bool = _option(
        True,
        flag,
        "exchange while blocks are computed; false: wait for each transfer, to debug",
        GROUP_ONLY | SHARED | NOT_STORED,
    )
    failure_limit: int = _option(
        10, positive_int, "rejected steps or failed roots in a row before an error", GROUP_ONLY | SHARED
    )
    strict_names: bool = _option(
        False,
        flag,
        "true: an error at the first step if nothing tells which matrices are embeddings; false: a warning",
        GROUP_ONLY | SHARED | NOT_STORED,
    )

    def __post_init__(self) -> None:
        for option in fields(self):
            checked = option.metadata["check"](option.name, getattr(self, option.name))
            object.__setattr__(self, option.name, checked)
        check_together(self)
        for number, rule in enumerate(self.rules):
            try:
                self.under_rule(number)
            except OptionError as error:
                raise OptionError(f"in the rule for {list(rule['match'])}: {error}") from None

    def under_rule(self, number: int) -> ShampooConfig:
        """The options of parameters that match a rule."""
        changed = {name: value for name, value in self.rules[number].items() if name != "match"}
        return dataclasses.replace(self, rules=(), **changed)

    @cached_property
    def by_rule(self) -> tuple[ShampooConfig, ...]:
        """``under_rule`` of all rules."""
        return tuple(self.under_rule(number) for number in range(len(self.rules)))

    def shape_of_state(self) -> dict[str, Any]:
        """The values that may not change once there is state, by option."""
        plain = ("none", "sgd")  # no second moment
        fixed = {name: self.in_force(name) for name in options_with(FIXED)}
        if self.staggers:  # phases depend on this frequency
            fixed["precondition_frequency"] = self.precondition_frequency
        # Ungrafted SOAP has one second moment after the other in the same tensor, and ungrafted Muon has none.
        none = self.grafting_method == "rms" or not (self.parts.takes_roots or self.grafts)
        kinds = {"grafting": none or self.warm_method in plain, "elementwise": self.elementwise_method in plain}
        kinds["refresh_tolerance"] = kinds["solver"] = self.keeps_basis
        kinds["elementwise_betas"] = self.for_elementwise.betas[0] == 0.0
        return {**fixed, "betas": self.betas[0] == 0.0, **kinds}

    def reshaped_by(self, other: ShampooConfig) -> list[str]:
        """The options whose values under ``other`` would need another state, those that differ first."""
        before, after = self.shape_of_state(), other.shape_of_state()
        found = [name for name, value in after.items() if name in before and value != before[name]]
        return sorted(found, key=lambda name: bool(self.in_force(name) == other.in_force(name)))

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> ShampooConfig:
        """Build from keyword or JSON options, among them ``preset`` and ``memory``.

        Raises:
            OptionError: naming the first wrong key, its value and what is allowed.
        """
        return cls(**canonical(options))

    @classmethod
    def from_saved(cls, options: Mapping[str, Any]) -> ShampooConfig:
        """The options of saved state, which may be older than some of them.

        Raises:
            OptionError: as ``from_options``.
        """
        return cls.from_options({**BEFORE, **options})

    def to_json(self) -> dict[str, Any]:
        """All options as JSON types; ``from_options`` reads them back."""
        out = dataclasses.asdict(self)
        out["lr"] = float(self.lr)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in out.items()}


OPTION_NAMES = tuple(f.name for f in fields(ShampooConfig))
GIVEN_NAMES = (*OPTION_NAMES, PRESET, MEMORY)  # what a user may give


@cache
def options_with(wanted: Property) -> tuple[str, ...]:
    """Names of the options that have a property."""
    return tuple(option.name for option in fields(ShampooConfig) if wanted in option.metadata["properties"])


def canonical(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options under our names, values unchecked; aliases and presets are replaced.

    Raises:
        OptionError: a name that is unknown or given twice, or an unknown preset.
    """
    return without_preset(renamed(options, GIVEN_NAMES))


def replaced_options(given: ShampooConfig, loaded: ShampooConfig, names: Iterable[str] = OPTION_NAMES) -> str:
    """For a warning: which of these options have other values now, except those that schedules change."""
    scheduled = options_with(SCHEDULED)
    pairs = ((n, getattr(given, n), getattr(loaded, n)) for n in names if n not in scheduled)
    return ", ".join(f"{n} = {short(new)} (given here: {short(old)})" for n, old, new in pairs if old != new)
