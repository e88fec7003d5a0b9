"""Options that switch off what the default recipe adds to Shampoo of the papers."""

from __future__ import annotations

from typing import Any

BARE: dict[str, Any] = {
    "preconditioner": "shampoo",
    "factor_beta": None,
    "relative_epsilon": 1e-6,
    "early_relative_epsilon": 0.0,
    "grafting": "adam",
    "elementwise_lr": 1.0,
    "embedding_lr": None,
    "tied_embedding_lr": None,
    "normalize_gradients": False,
}
