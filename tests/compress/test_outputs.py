"""Differences of outputs, by closed forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress.outputs import difference, relative_gap, require_same, size_of
from compress.structure import StructureError

INF, NAN = float("inf"), float("nan")


def tensor(*values: complex) -> Tensor:
    return torch.tensor(values)


@pytest.mark.parametrize(
    ("one", "other", "gap"),
    [
        (tensor(1.0, 2.0), tensor(1.5, 2.0), 0.5),
        (tensor(1.0), tensor(1.0, 1.0), INF),
        (tensor(NAN), tensor(NAN), INF),
        (tensor(1.0, -INF), tensor(1.5, -INF), 0.5),
        (tensor(-INF), tensor(INF), INF),
        (tensor(1 + 1j), tensor(1 + 5j), 4.0),
        (tensor(True, False), tensor(True, True), 1.0),
        ((tensor(1.0), None), (tensor(3.0), None), 2.0),
        ((tensor(1.0), None), (tensor(1.0), tensor(1.0)), INF),
        ((tensor(1.0),), (tensor(1.0), tensor(1.0)), INF),
        ({"a": tensor(0.0), "b": tensor(1.0)}, {"b": tensor(1.0), "a": tensor(0.25)}, 0.25),
        ({"a": tensor(0.0)}, {"b": tensor(0.0)}, INF),
        ({"a": tensor(0.0)}, [tensor(0.0)], INF),
        (torch.zeros(0), torch.zeros(0), 0.0),
    ],
)
def test_difference(one: Any, other: Any, gap: float) -> None:
    assert difference(one, other) == difference(other, one) == gap


def test_size_is_that_of_finite_values() -> None:
    """Else nothing would count as a difference beside a masked value."""
    assert size_of({"a": (tensor(-3.0, -INF, NAN), None), "b": tensor(True)}) == 3.0
    assert size_of(torch.zeros(0)) == 0.0
    assert relative_gap(tensor(1.0, -INF), tensor(2.0, -INF)) == 0.5
    assert relative_gap(tensor(0.0), tensor(0.0)) == 0.0
    assert relative_gap(tensor(NAN), tensor(NAN)) == INF


def test_require_same_names_what_is_wrong() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)).train()
    x = torch.randn(2, 4)
    assert require_same(model, model, [x], "why") == 0.0
    assert model.training
    other = nn.Linear(4, 3)
    with pytest.raises(StructureError, match=r"why \(the outputs change by .* of their size\)"):
        require_same(other, model, [x], "why")
    with pytest.raises(StructureError, match=r"why \(RuntimeError: "):
        require_same(nn.Linear(5, 3), model, [x], "why")
