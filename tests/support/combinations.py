"""Values of all options of the rule, and a covering array: few runs that contain every allowed pair of values."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, TypeAlias

# Options in one value can only be used together. Coupled Newton has the reference's ridge only if it is absolute.
# The first value is the default, if the option has one; the schedule's and the factors' are those of the whole recipe.
PRECONDITIONERS = ("kl_shampoo", "shampoo", "soap", "kl_soap", "soap_muon", "muon")
IN_BASIS = ("soap", "kl_soap", "soap_muon")
VALUES: dict[str, list[dict[str, Any]]] = {
    "preconditioner": [{"preconditioner": name} for name in PRECONDITIONERS],
    "first_moment": [{"betas0": 0.9}, {"betas0": 0.0}, {"betas0": 0.9, "beta3": 0.4}],
    "factors": [
        {"betas1": 0.99},
        {"betas1": 0.95, "factor_beta": None},
        {"betas1": 1.0, "factor_beta": None},
        {"betas1": 0.99, "factor_beta": 0.8},
    ],
    "statistics": [{}, {"statistics_frequency": 1}, {"statistics_frequency": 2}],
    "grafting": [
        {},
        *({"grafting": g} for g in ("rms", "adam", "none", "sgd", "adagrad", "rmsprop", "normalized_adam")),
    ],
    "grafting_beta2": [{}, {"grafting_beta2": 0.8}],
    "elementwise": [
        {},
        {"elementwise": "sgd", "elementwise_lr": 0.5},
        {"elementwise": "rmsprop", "elementwise_betas": (0.0, 0.9)},
        {"elementwise_lr": 1.0, "elementwise_betas": (0.8, 0.9)},
    ],
    "decay": [{"weight_decay_type": kind} for kind in ("decoupled", "l2", "corrected", "independent")],
    "momentum": [{}, {"momentum": 0.8, "dampening": 0.3}, {"momentum": 0.9, "nesterov": True}],
    "bias": [{}, {"use_bias_correction": False}],
    "root": [{}, {"exponent_override": 2.0}, {"exponent_override": [2.0, None, 8.0]}],
    "regularisation": [
        {},
        {"damping": "cutoff"},
        {"solver": "coupled_newton", "epsilon": 1e-3, "relative_epsilon": 0.0, "early_relative_epsilon": 0.0},
        {"epsilon": 1e-3, "relative_epsilon": 0.0, "early_relative_epsilon": 0.0},
        {"early_relative_epsilon": 0.3, "relative_epsilon": 0.02},
        {"damping": "saturate", "relative_epsilon": 0.02},
    ],
    "bases": [
        {},
        {"refresh_tolerance": 0.2},
        {"solver": "qr"},
        {"solver": "eigh"},
        {"solver": "qr", "refresh_tolerance": 0.2},
    ],
    "normalization": [{}, {"normalize_gradients": False}],
    "precision": [{}, {"matmul_precision": "high"}, {"matmul_precision": "medium"}],
    "shrinkage": [{}, {"shrinkage": 2.0}],
    "one_sided": [{}, {"one_sided": "left"}, {"one_sided": "right"}, {"one_sided": "smaller"}],
    "large_dim": [{"large_dim": kind} for kind in ("block", "diagonal", "identity", "adagrad")],
    "split": [{}, {"rules": [{"match": "matrix", "split": [1, 3]}]}],
    "formats": [
        {},
        {"factor_format": "packed", "root_format": "packed"},
        {"factor_format": "bfloat16", "root_format": "bfloat16", "moment_format": "bfloat16"},
        {"factor_format": "int8", "root_format": "int8", "moment_format": "int8", "elementwise_format": "bfloat16"},
    ],
    "merging": [{}, {"merge_small_dims": False}],
    "batch_dims": [{}, {"batch_dims": 1}],
    "block": [{"max_preconditioner_dim": n} for n in (4, 6, 1024)],
    "refresh": [{"refresh": kind} for kind in ("staggered", "sync", "background")],
    "schedule": [
        {"precondition_frequency": 3},
        {"precondition_frequency": 3, "start_preconditioning_step": 10, "refresh_growth": 0.0},
        {"precondition_frequency": 1, "start_preconditioning_step": 10},
        {"precondition_frequency": 1, "refresh_growth": 0.0},
        {"precondition_frequency": 4, "start_preconditioning_step": 10, "refresh_growth": 0.2},
        {"precondition_frequency": 4, "refresh_growth": 0.4},
    ],
}
OPTIONS = list(VALUES)
SIZES = [len(values) for values in VALUES.values()]
Row: TypeAlias = tuple[int, ...]
Value: TypeAlias = tuple[int, int]  # index of an option and of one of its values


def options_of(row: Row) -> dict[str, Any]:
    """Return the optimizer's options: the row's own, and common ones that give every part of the rule an effect."""
    options: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-6}
    for values, number in zip(VALUES.values(), row, strict=True):
        options.update(values[number])
    return options | {"betas": (options.pop("betas0"), options.pop("betas1"))}


def row_of(*values: Value) -> Row:
    """Return the row with these values, and the first value of every other option that combines with them."""
    chosen = dict(values)
    for option in set(range(len(SIZES))) - set(chosen):
        chosen[option] = next(n for n in range(SIZES[option]) if all(combines((option, n), other) for other in values))
    return tuple(chosen[option] for option in range(len(SIZES)))


# Pairs that the package refuses, by the indices of values: with a value of one option, these of others are not allowed.
SIDES: dict[str, tuple[int, ...]] = {"one_sided": (1, 2, 3), "large_dim": (1, 2)}
WITHOUT_ROOTS: dict[str, tuple[int, ...]] = {"regularisation": (1, 2, 5), "shrinkage": (1,), **SIDES}
REFUSED: dict[tuple[str, int], dict[str, tuple[int, ...]]] = {
    **{("preconditioner", PRECONDITIONERS.index(name)): {"root": (2,), **WITHOUT_ROOTS} for name in IN_BASIS},
    ("preconditioner", 5): {"root": (1, 2), "bases": (1, 2, 3, 4), **WITHOUT_ROOTS},
    ("preconditioner", 0): {"root": (1, 2), "regularisation": (1,), **SIDES},
    ("bases", 1): {"regularisation": (2,)},
    ("split", 1): {"one_sided": (3,), "large_dim": (1, 2)},
}
# SOAP's basis of a factor matrix with several null directions is not unique, so there would be no unique trajectory to
# compare with. So SOAP starts only when there are none. A tracked basis from the first gradients, or without a relative
# ridge, is not unique either: KL-Shampoo's first refresh sees two, which leave 12 x 12 factors singular, and then both
# the off-diagonal part that a tolerance judges and the next step depend on the choice of null directions.
LEFT_OUT: dict[tuple[str, int], dict[str, tuple[int, ...]]] = {
    **{
        ("preconditioner", PRECONDITIONERS.index(name)): {"regularisation": (3,), "schedule": (0, 3, 5)}
        for name in IN_BASIS
    },
    ("preconditioner", 5): {"regularisation": (3,)},  # Muon has no ridge
    ("bases", 1): {"regularisation": (3,), "schedule": (0, 3, 5)},
    ("bases", 2): {"regularisation": (2, 3), "schedule": (0, 3, 5)},
    ("bases", 4): {"regularisation": (2, 3), "schedule": (0, 3, 5)},
    # Where rounded operands end in the middle of two stored numbers, the last bit decides: `BOTH_ROUND` holds these.
    **{("precision", n): {"formats": (2, 3)} for n in (1, 2)},
}
# Values that round, by the indices of values: only up to that can runs agree whose last bits differ.
ROUNDS: dict[str, tuple[int, ...]] = {"precision": (1, 2), "formats": (2, 3)}


def _pairs_in(table: dict[tuple[str, int], dict[str, tuple[int, ...]]]) -> set[tuple[Value, Value]]:
    found = set()
    for (option, number), others in table.items():
        for other, numbers in others.items():
            sides = [[(OPTIONS.index(option), number), (OPTIONS.index(other), n)] for n in numbers]
            found |= {(min(pair), max(pair)) for pair in sides}
    return found


REFUSED_PAIRS = _pairs_in(REFUSED)
NO_PAIRS = REFUSED_PAIRS | _pairs_in(LEFT_OUT)


def combines(left: Value, right: Value) -> bool:
    return (min(left, right), max(left, right)) not in NO_PAIRS


def value_pairs() -> Iterator[tuple[Value, Value]]:
    """Yield all pairs of values of two options, the earlier option's value first."""
    for a, b in itertools.combinations(range(len(SIZES)), 2):
        for i, j in itertools.product(range(SIZES[a]), range(SIZES[b])):
            yield (a, i), (b, j)


def pairs_of(row: Row) -> set[tuple[Value, Value]]:
    return set(itertools.combinations(enumerate(row), 2))


def rows_of_pairs() -> list[Row]:
    """Return rows that together contain every allowed pair; greedily, each takes as many missing pairs as it can."""
    missing = {pair for pair in value_pairs() if combines(*pair)}
    rows = []
    while missing:
        rows.append(_extended(dict(min(missing)), missing))
        missing -= pairs_of(rows[-1])
    return rows


def _extended(chosen: dict[int, int], missing: set[tuple[Value, Value]]) -> Row:
    for option in sorted(set(range(len(SIZES))) - set(chosen), key=lambda n: -SIZES[n]):
        able = [n for n in range(SIZES[option]) if all(combines((option, n), other) for other in chosen.items())]

        def gain(number: int, option: int = option) -> int:
            return sum(tuple(sorted([(option, number), other])) in missing for other in chosen.items())

        chosen[option] = max(able, key=lambda number: (gain(number), -number))
    return tuple(chosen[n] for n in range(len(SIZES)))


def rows_of_single_values() -> list[Row]:
    """Return a row for every single value of every option, with each preconditioner that allows it."""
    rows = {row_of((0, p)) for p in range(SIZES[0])}
    for p, (option, size) in itertools.product(range(SIZES[0]), list(enumerate(SIZES))[1:]):
        rows |= {row_of((0, p), (option, n)) for n in range(1, size) if combines((0, p), (option, n))}
    return sorted(rows | rows_with_bases_from_the_first_gradients())


def rows_with_bases_from_the_first_gradients() -> set[Row]:
    """Return rows with early schedules, which ``LEFT_OUT`` parts from kept bases: small blocks are not singular."""
    bases, schedule = OPTIONS.index("bases"), OPTIONS.index("schedule")
    plain = [{0: p, bases: n, schedule: early} for p in (0, 1) for n in (1, 2, 4) for early in (0, 5)]
    return {tuple(values.get(option, 0) for option in range(len(SIZES))) for values in plain}


def exact_part(row: Row) -> Row:
    """Return the row without values that round."""
    return tuple(0 if n in ROUNDS.get(option, ()) else n for option, n in zip(OPTIONS, row, strict=True))


def with_rounding(rows: list[Row]) -> list[Row]:
    """Return rows with each value that rounds, in turn on these."""
    values = [(OPTIONS.index(option), n) for option, numbers in ROUNDS.items() for n in numbers]
    return [_with(rows[k], {option: n}) for k, (option, n) in enumerate(values)]


def _with(row: Row, values: dict[int, int]) -> Row:
    return tuple(values.get(option, n) for option, n in enumerate(row))


def rows_of_all_values() -> list[Row]:
    """Return few rows that together contain every value that does not round, and each preconditioner once at least.

    Options of large dims have an effect only if there are large dims, which needs the smallest block size.
    """
    large, block = OPTIONS.index("large_dim"), OPTIONS.index("block")
    values = {(option, n) for option, size in enumerate(SIZES) for n in range(size)}
    missing = {(option, n) for option, n in values if n not in ROUNDS.get(OPTIONS[option], ())}
    found: list[Row] = []
    for preconditioner in (1, 2, 0, 1, 5, 3, 4, 0, 1, 2, 1):
        chosen = {0: preconditioner}
        for option in sorted(range(1, len(SIZES)), key=lambda n: -SIZES[n]):
            able = [n for n in range(SIZES[option]) if all(combines((option, n), other) for other in chosen.items())]
            able = [n for n in able if n not in ROUNDS.get(OPTIONS[option], ())]
            if (option == block and chosen[large]) or (option == large and preconditioner != 1):
                able = [0]
            new = [n for n in able if (option, n) in missing]
            chosen[option] = new[-1] if new else able[(len(found) + option) % len(able)]
        found.append(tuple(chosen[n] for n in range(len(SIZES))))
        missing -= set(enumerate(found[-1]))
    return found


PAIRS = rows_of_pairs()
ALONE = rows_of_single_values()
FEW = rows_of_all_values()
FEW_ROUNDED = with_rounding(FEW)
# Each of two rules with both kinds of rounding.
BOTH_ROUND = [
    _with(row_of((0, p)), {OPTIONS.index("precision"): precision, OPTIONS.index("formats"): form})
    for p, precision, form in ((1, 1, 2), (2, 2, 3))
]


def label(row: Row) -> str:
    """Return the row's values that are not the first ones, as text."""
    changed = [f"{option}{n}" for option, n in zip(OPTIONS, row, strict=True) if n]
    return "-".join(changed) if len(changed) < 3 else "".join(map(str, row))
