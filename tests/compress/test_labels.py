"""Labels that the model has no outputs for are told in one line, whichever batch they come in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from compress import compress
from compress.data import Judge
from compress.labels import as_targets, check_labels
from compress.passes.base import classification_loss
from nas.errors import UserMistake
from tests.compress.models import CLASSES, batches, small_vit

QUICK: dict[str, Any] = {"measure_seconds": 0, "epochs": 1}
CPU = torch.device("cpu")


def late(change: Any) -> list[tuple[Tensor, Tensor]]:
    """Batches of which the last one has other labels."""
    *first, (inputs, labels) = batches(3)
    return [*first, (inputs, change(labels))]


@pytest.mark.parametrize(
    "text",
    ["structured:epochs=1", "structured:criterion=taylor", "sit:slim_after=[1]", "ofb:target=0.7,epochs=1"],
)
def test_labels_out_of_range_in_a_later_training_batch(text: str) -> None:
    wrong = late(lambda labels: labels + 7)
    low, high = int(wrong[2][1].min()), int(wrong[2][1].max())
    with pytest.raises(
        UserMistake,
        match=rf"train: .* 5 outputs, the labels of a batch are {low} to {high}; they must be 0 to 4",
    ) as caught:
        compress(small_vit(), text, train=wrong, **QUICK)
    assert len(str(caught.value).splitlines()) == 1


def test_labels_out_of_range_in_a_later_validation_batch() -> None:
    with pytest.raises(
        UserMistake, match=r"validation: .* the labels of a batch are -9 to -\d; they must be"
    ):
        compress(
            small_vit(),
            "class_token_last_block",
            validation=late(lambda labels: labels * 0 - 9 + labels),
            **QUICK,
        )


@pytest.mark.parametrize("name", ["train", "validation"])
def test_numbers_for_labels_are_refused_at_the_start(name: str) -> None:
    data: dict[str, Any] = {name: [(inputs, labels.float()) for inputs, labels in batches(1)]}
    said: list[str] = []
    with pytest.raises(
        UserMistake,
        match=rf"{name}: the labels of the first batch are float32 \(8,\), .*whole numbers \(8,\)",
    ):
        compress(small_vit(), "structured", report=said.append, **data, **QUICK)
    assert not any(line.startswith("pass") for line in said)


@pytest.mark.parametrize(
    "form",
    [
        lambda labels: nn.functional.one_hot(labels, CLASSES),
        lambda labels: nn.functional.one_hot(labels, CLASSES).double(),
        lambda labels: torch.softmax(torch.randn(len(labels), CLASSES), -1),
        lambda labels: labels.to(torch.uint8),
        lambda labels: torch.cat([labels[:-1], torch.tensor([-100])]),
    ],
)
def test_forms_of_labels_that_are_right(form: Any) -> None:
    data = [(inputs, form(labels)) for inputs, labels in batches(2)]
    result = compress(small_vit(), "structured", train=data, validation=data, **QUICK)
    assert 0 <= result.final.metrics["accuracy"] <= 1


def test_positions_have_labels_each() -> None:
    outputs, labels = torch.randn(2, 4, 3), torch.tensor([[0, 1, 3], [2, 2, -100]])
    wanted = nn.functional.cross_entropy(outputs, labels)
    torch.testing.assert_close(classification_loss(outputs, labels), wanted)
    for wrong in (labels + 1, labels[:, :2], labels.float()):
        with pytest.raises(UserMistake, match="train: "):
            classification_loss(outputs, wrong)
    check_labels(torch.zeros(2, 4, 3, dtype=torch.int64), (2, 4, 3), "train")
    assert as_targets(labels, (2, 4, 3)).dtype == torch.int64
    assert as_targets(torch.zeros(2, 4, 3, dtype=torch.int64), (2, 4, 3)).dtype == torch.float32


def test_a_loss_of_the_callers_may_mean_something_else_by_them() -> None:
    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, labels - 7)

    data = [(inputs, labels + 7) for inputs, labels in batches(2)]
    compress(small_vit(), "structured", train=data, validation=data, loss=loss, **QUICK)


def test_ignored_labels_are_no_errors() -> None:
    logits = torch.eye(3)[[0, 1, 2, 0]]
    judged = Judge([(logits, torch.tensor([0, 1, -100, 2]))], CPU).judge(nn.Identity())
    assert judged.metrics == {"accuracy": pytest.approx(2 / 3)}


def test_a_shuffled_loader_gives_every_model_the_same_order() -> None:
    loader = DataLoader(TensorDataset(torch.randn(64, 4), torch.zeros(64).long()), 4, shuffle=True)
    judge = Judge(loader, CPU)
    assert judge.judge(nn.Identity()).agreement(judge.judge(nn.Identity())) == 1
