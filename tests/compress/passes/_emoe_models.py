"""Experts for the tests of EMoE."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from compress.passes.base import Context
from spaces.layers.expert_mlp import ExpertMlp, Experts

__all__ = ["ANYWAY", "CONTEXT", "FORMS", "X", "assert_same_state", "experts", "moes"]


CONTEXT = Context(example=(torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)),))
X = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(4))
FORMS = ("grouped", "masked")
ANYWAY = {"keep": "anyway", "experts": 8, "k": 2, "last": 1}


def experts(hidden: int = 24, count: int = 6, k: int = 2, seed: int = 0, **options: Any) -> ExpertMlp:
    torch.manual_seed(seed)
    labels = torch.randperm(hidden) % count
    return ExpertMlp.of(nn.Linear(10, hidden), nn.Linear(hidden, 7), nn.GELU(), labels, k, **options).eval()


def moes(model: nn.Module) -> list[Experts]:
    return [module for module in model.modules() if isinstance(module, Experts)]


def assert_same_state(one: nn.Module, other: nn.Module) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
