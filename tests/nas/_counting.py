"""What all counters must agree on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from nas.profile import COUNTERS, compare

__all__ = ["Function", "agreed"]


class Function(nn.Module):
    def __init__(self, function: Callable[..., Any]):
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


def agreed(model: nn.Module, *inputs: Tensor) -> tuple[int, int, int]:
    """Parameters, MACs and activations that all three counters found, module by module."""
    found = compare(model, inputs)
    assert found.failures == {}
    assert [str(line) for line in found.disagreements] == []
    assert list(found.counts) == ["fvcore", "thop", "torch"] == list(COUNTERS)
    figures = {(each.params, each.macs, each.activations) for each in found.counts.values()}
    assert len(figures) == 1
    return figures.pop()
