"""What stands between two layers and their merging: activation_pruning proves or refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from compress.passes.activation_pruning import ActivationPruning, find_pairs
from compress.structure import StructureError
from tests.compress._activation_models import context, conv_net, settled


class TestProof:
    @pytest.mark.parametrize(
        ("case", "text"),
        [
            ("skip", r"what first \(Linear\) gives is read elsewhere too"),
            ("read", r"what act \(ReLU\) gives is read elsewhere too"),
            ("function", r"relu is a function in forward; make it a module"),
            ("twice", r"runs 2 times in one call"),
            ("tied", r"shares its weights with another layer"),
            ("weight", r"second\.weight is read in forward"),
            ("norm", r"last_norm \(LayerNorm\) follows it"),
            ("branch", r"in a part of the model that torch\.fx cannot follow"),
            ("hook", r"first has hooks"),
            ("wide", r"the merged layer would cost more than the two"),
        ],
    )
    def test_refusals(self, case: str, text: str) -> None:
        model = Tricky(case).eval()
        if case == "hook":
            model.first.register_forward_hook(lambda *_: None)
        with pytest.raises(StructureError, match=f"Tricky has no activation between two layers .*{text}"):
            ActivationPruning(epochs=0).apply(model, context(example=(torch.zeros(2, 6),)))

    def test_what_is_right_is_taken(self) -> None:
        model = Tricky("right").eval()
        assert [pair.act for pair in find_pairs(model, (torch.zeros(2, 6),)).pairs] == ["act"]

    def test_parts_are_traced_where_the_whole_cannot_be(self) -> None:
        model = Untraceable()
        assert [pair.act for pair in find_pairs(model, (torch.zeros(2, 6),)).pairs] == ["inner.act"]

    @pytest.mark.parametrize(
        ("model", "shape", "text"),
        [
            (
                nn.Sequential(
                    nn.Conv2d(3, 8, 1, bias=False),
                    nn.BatchNorm2d(8),
                    nn.ReLU(),
                    nn.Conv2d(8, 3, 3, padding=1),
                ),
                (1, 3, 5, 5),
                "2: zeros at the border of the second convolution do not pass the bias",
            ),
            (
                nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(8, 3)),
                (1, 4, 6),
                "2: 1 does not normalise the features of 0",
            ),
            (
                nn.Sequential(
                    nn.Linear(6, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.ReLU(), nn.Linear(8, 3)
                ),
                (3, 6),
                "2: its batch norm keeps no running statistics",
            ),
            (
                nn.Sequential(nn.Linear(6, 8), nn.Softmax(-1), nn.Linear(8, 3)),
                (1, 6),
                "two layers that merge$",
            ),
        ],
    )
    def test_more_refusals(self, model: nn.Module, shape: tuple[int, ...], text: str) -> None:
        with pytest.raises(StructureError, match=text):
            ActivationPruning(epochs=0).apply(model, context(example=(torch.zeros(shape),)))

    def test_one_block_under_two_names(self) -> None:
        model = Untraceable()
        model.again = model.inner
        with pytest.raises(StructureError, match="shares its weights with another layer"):
            ActivationPruning(epochs=0).apply(model, context(example=(torch.zeros(2, 6),)))

    def test_named_layers(self) -> None:
        model = settled(conv_net())
        result = ActivationPruning(epochs=0, layers=["11"]).apply(model, context())
        kept = [name for name, one in result.named_children() if isinstance(one, nn.ReLU)]
        assert kept == ["2", "6"]
        with pytest.raises(StructureError, match=r"layers='6': 7 \(AdaptiveAvgPool2d\) follows it"):
            ActivationPruning(epochs=0, layers=["6"]).apply(model, context())
        with pytest.raises(StructureError, match=r"layers='13': no such activation.*; known: 2, 11, 6"):
            ActivationPruning(epochs=0, layers=["13"]).apply(model, context())

    def test_a_model_that_does_not_run(self) -> None:
        with pytest.raises(StructureError, match="Sequential does not run on the example"):
            ActivationPruning(epochs=0).apply(conv_net(), context(example=(torch.zeros(1, 5),)))


class Tricky(nn.Module):
    """first - act - second, with one thing in the way of merging."""

    def __init__(self, case: str):
        super().__init__()
        self.case = case
        hidden = 2 if case == "wide" else 8
        self.first, self.act, self.second = nn.Linear(6, hidden), nn.ReLU(), nn.Linear(hidden, 6)
        self.last_norm = nn.LayerNorm(8)
        self.other = nn.Linear(8, 6)
        if case == "tied":
            self.other.weight = self.second.weight

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        if self.case == "branch":
            return self.second(self.act(first)) if x.sum() > -1e9 else x
        if self.case == "function":
            return self.second(torch.relu(first))  # type: ignore[no-any-return]
        act = self.act(first)
        if self.case == "norm":
            act = self.last_norm(act)
        y = self.second(act)
        if self.case == "skip":
            y = y + self.other(first)
        elif self.case == "read":
            y = y + self.other(act)
        elif self.case == "twice":
            y = self.second(self.act(self.first(y)))
        elif self.case == "tied":
            y = y + self.other(torch.sin(torch.nn.functional.pad(x, (0, 2))))
        elif self.case == "weight":
            y = y + self.second.weight.sum()
        return y  # type: ignore[no-any-return]


class Untraceable(nn.Module):
    """Branches on a number in a tensor; what is inside of ``inner`` can be followed."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Tricky("right")
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.sum() > -1e9 else x
