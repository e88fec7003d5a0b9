"""A mixture of experts as in Transformers: stacked experts, and a router that is a plain matrix."""

from __future__ import annotations

import torch
from torch import nn


class MixtralExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.ones(3, 8, 4))
        self.down_proj_bias = nn.Parameter(torch.ones(3, 4))


class TopKRouter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 4))


class MixtureLayer(nn.Module):
    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.gate = gate
        self.experts = MixtralExperts()
