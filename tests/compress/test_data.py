"""What batches may be, and what a task's loss and metrics become for a model that is compressed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from compress import compress
from compress.data import Judge, TaskBatches, TaskLoss, answer, as_batches, inputs_of, loss_of, move
from compress.passes.base import Context, classification_loss
from nas.errors import UserMistake
from nas.tasks import make_task
from nas.tasks.base import Objective, Task
from spaces import ImageSignature, get_space
from tests.compress.models import small_vit

QUICK: dict[str, Any] = {"measure_seconds": 0}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def clicks() -> Task:
    return make_task("click_through_rate", limit=1024)


def some(task: Task) -> tuple[Tensor, ...]:
    """A batch as the task gives it."""
    return next(task.train_batches(epoch=0, batch_size=8, seed=0, device=CPU))


def test_the_loss_of_a_task_is_its_own(clicks: Task) -> None:
    space = get_space("hiformer")
    model = space.build(space.published["hiformer_1layer"], clicks.signature).eval()
    *inputs, labels = some(clicks)
    wanted = clicks.loss(model, (*inputs, labels))
    loss = TaskLoss(clicks)
    context = Context(example=(), loss=loss)
    assert torch.equal(answer(model, (tuple(inputs), labels), context).loss, wanted)
    # A pass of somebody else has the outputs and the labels alone.
    assert torch.equal(loss(model(*inputs), labels), wanted)


def test_an_image_task_smooths_its_labels_and_several_heads_are_averaged() -> None:
    task = make_task("image_classification", data="digits", label_smoothing=0.2)
    logits, labels = torch.randn(2, 6, 10), torch.randint(10, (6,))
    wanted = [nn.functional.cross_entropy(one, labels, label_smoothing=0.2) for one in logits]
    loss = TaskLoss(task)
    torch.testing.assert_close(loss(logits[0], labels), wanted[0])
    torch.testing.assert_close(loss(tuple(logits), labels), (wanted[0] + wanted[1]) / 2)


class Odd(Task):
    """Not (inputs, labels): a step has two pictures and a number between them."""

    name = "odd"
    default_batch_size = 2

    def train_batches(self, **options: Any) -> Iterator[Any]:
        yield torch.zeros(2, 6), torch.zeros(2), torch.zeros(2, 6), torch.zeros(2)

    def batches_per_epoch(self, batch_size: int, train_fraction: float = 1.0) -> int:
        return 1

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0]).sum()  # type: ignore[no-any-return]

    def evaluate(self, model: nn.Module, split: Any, device: Any, *, quick: bool = False) -> dict[str, float]:
        return {"loss": 0.0}

    def example_inputs(self, batch_size: int, device: torch.device) -> tuple[Tensor, ...]:
        return (torch.zeros(batch_size, 6),)

    def describe(self) -> dict[str, Any]:
        return {}


class LabelsFirst(Odd):
    name = "labels_first"

    def train_batches(self, **options: Any) -> Iterator[Any]:
        yield torch.zeros(2), torch.zeros(2, 6)


class TwoCalls(Odd):
    """Its loss asks the model about something else than the inputs of the batch."""

    name = "two_calls"

    def train_batches(self, **options: Any) -> Iterator[Any]:
        yield torch.zeros(2, 6), torch.zeros(2)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return (model(batch[0]) - model(batch[0] + 1)).sum()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("task", "why"),
    [
        (
            Odd(),
            r"train: task 'odd' gives batches of 4 tensors, not the 1 input\(s\) of its model and labels",
        ),
        (LabelsFirst(), r"train: task 'labels_first' gives batches of 2 tensors, not the 1 input\(s\)"),
        (TwoCalls(), r"train: the loss of task 'two_calls' .* calls the model with something else"),
    ],
)
def test_tasks_that_are_no_pairs_are_refused_in_one_line(task: Task, why: str) -> None:
    model = nn.Sequential(nn.Linear(6, 32), nn.Linear(32, 32))
    with pytest.raises(UserMistake, match=why) as caught:
        compress(model, "low_rank:keep=anyway,epochs=1", train=task, **QUICK)
    assert len(str(caught.value).splitlines()) == 1


class Toy(Odd):
    """(B, 6) of five classes; it remembers which epochs were asked for."""

    name = "toy"
    objective = Objective("accuracy", "maximize")
    signature = ImageSignature(1, 2, 3, 5)

    def __init__(self) -> None:
        self.asked: list[int] = []

    def train_batches(self, **options: Any) -> Iterator[Any]:
        self.asked.append(options["epoch"])
        generator = torch.Generator().manual_seed(options["epoch"])
        yield torch.randn(4, 6, generator=generator), torch.tensor([0, 1, 0, 1])

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def evaluate(self, model: nn.Module, split: Any, device: Any, *, quick: bool = False) -> dict[str, float]:
        return {"accuracy": 0.5}


class WeightsToo(Toy):
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return super().loss(model, batch) + 1e-6 * sum(p.square().sum() for p in model.parameters())


class BuffersToo(Toy):
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return super().loss(model, batch) + len(list(model.modules()))


class Twice(Toy):
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        one, other = model(batch[0]), model(batch[0])
        return nn.functional.cross_entropy(one, batch[1]) + (one - other).square().mean()  # type: ignore[no-any-return]


class SmoothInTraining(Toy):
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        smoothing = 0.1 if model.training else 0.0
        return nn.functional.cross_entropy(model(batch[0]), batch[1], label_smoothing=smoothing)


LEARN = "low_rank:keep=anyway,least=8,calibrate=false,epochs=2"


def layers(classes: int = 5) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 32), nn.Linear(32, 32), nn.Dropout(), nn.Linear(32, classes))


@pytest.mark.parametrize(
    ("task", "why"),
    [
        (WeightsToo(), "looks at the weights of the model"),
        (BuffersToo(), "is not that of the outputs of one call of the model"),
        (Twice(), "calls the model more than once"),
    ],
)
def test_a_loss_of_more_than_outputs_is_refused(task: Task, why: str) -> None:
    with pytest.raises(UserMistake, match=rf"train: the loss of task 'toy' .*{why}.*give batches and loss="):
        compress(layers(), LEARN, train=task, **QUICK)


def test_looking_uses_up_no_epoch_and_a_loss_may_depend_on_training() -> None:
    task = SmoothInTraining()
    compress(layers(), LEARN, train=task, **QUICK)
    assert task.asked[-2:] == [0, 1]
    assert set(task.asked) == {0, 1}


def test_wrong_numbers_of_classes_are_found_whatever_the_first_labels_are() -> None:
    with pytest.raises(UserMistake, match="train: the model has 3 outputs, the data 5 classes"):
        compress(
            layers(3), LEARN, train=Toy(), validation=[(torch.zeros(1, 6), torch.zeros(1).long())], **QUICK
        )
    with pytest.raises(UserMistake, match="validation: the model has 7 outputs, the data 5 classes"):
        compress(layers(7), LEARN, train=Toy(), **QUICK)
    labels = torch.tensor([0, 1, -100, 5])
    with pytest.raises(
        UserMistake, match=r"train: the model has 5 outputs, the labels .* are 0 to 5; .*0 to 4"
    ):
        compress(layers(), LEARN, train=[(torch.zeros(4, 6), labels)], **QUICK)
    compress(layers(6), LEARN, train=[(torch.zeros(4, 6), labels)], **QUICK)


@pytest.mark.parametrize("name", ["train", "validation"])
def test_every_source_is_tried(name: str) -> None:
    data: dict[str, Any] = {
        one: [(torch.zeros(2, 6), torch.zeros(2).long())] for one in ("train", "validation")
    }
    data[name] = [(torch.zeros(2, 7), torch.zeros(2).long())]
    why = rf"^{name}: model Sequential does not run on the inputs \(1, 7\) of its first batch"
    with pytest.raises(UserMistake, match=why) as caught:
        compress(layers(), LEARN, example=torch.zeros(1, 6), **data, **QUICK)
    assert len(str(caught.value).splitlines()) == 1


class Counted(list[Any]):
    rounds = 0

    def __iter__(self) -> Iterator[Any]:
        self.rounds += 1
        return super().__iter__()


def test_no_source_is_looked_at_more_than_needed() -> None:
    """Once whether it gives pairs, once more what they are; and the judge goes through one of them."""
    train, validation = (Counted([(torch.zeros(2, 6), torch.zeros(2).long())]) for _ in range(2))
    compress(layers(), "low_rank:keep=anyway,least=8,calibrate=false,epochs=0", train=train, **QUICK)
    compress(
        layers(), "low_rank:keep=anyway,least=8,calibrate=false,epochs=0", validation=validation, **QUICK
    )
    assert train.rounds == 2
    assert validation.rounds == 4


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(0)
        for label in range(4):
            yield torch.randn(3, 32, 32, generator=generator), label


@pytest.mark.parametrize(
    "text",
    [
        "structured:units=mlp,criterion=taylor,epochs=1",
        "ofb:epochs=1",
        "sit:epochs=1",
        "low_rank:keep=anyway,least=8,epochs=1",
        "activation_pruning:epochs=1",
    ],
)
def test_a_stream_without_a_length_is_data(text: str) -> None:
    data = DataLoader(Stream(), batch_size=2)
    result = compress(small_vit(depth=2), text, train=data, **QUICK)
    assert result.model(torch.zeros(1, 3, 32, 32)).shape[0] == 1


def test_a_model_that_does_not_fit_the_task_is_refused_at_once(clicks: Task) -> None:
    with pytest.raises(
        UserMistake, match=r"model: Sequential does not run on the inputs \(1, 11\), \(1, 4\)"
    ):
        compress(nn.Sequential(nn.Linear(11, 32)), "low_rank", train=clicks, **QUICK)
    digits = make_task("image_classification", data="digits")
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Unflatten(1, (2, 4, 4)))
    with pytest.raises(UserMistake, match="the loss of task 'image_classification' cannot be taken"):
        compress(model, "low_rank:least=8", train=digits, **QUICK)


def test_task_batches_are_new_in_each_epoch(clicks: Task) -> None:
    data = TaskBatches(clicks, 64)
    assert len(data) == 16
    (first, _), labels = next(iter(data))
    (second, _), _ = next(iter(data))
    assert first.shape == (64, 11)
    assert labels.shape == (64,)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("shape", [(4, 1), (4,)])
def test_one_logit_is_judged_by_its_sign(shape: tuple[int, ...]) -> None:
    logits, labels = torch.tensor([2.0, -0.5, 0.3, -4.0]).reshape(shape), torch.tensor([1, 1, 1, 0])
    judged = Judge([(logits, labels)], CPU).judge(nn.Identity())
    assert judged.metrics == {"accuracy": 0.75}
    other = Judge([(-logits, labels.float())], CPU).judge(nn.Identity())
    assert other.metrics == {"accuracy": 0.25}
    assert judged.agreement(other) == 0.0
    wanted = nn.functional.binary_cross_entropy(logits.sigmoid().flatten(), labels.float())
    torch.testing.assert_close(classification_loss(logits, labels), wanted)
    torch.testing.assert_close(classification_loss(logits, labels[:, None].float()), wanted)


def test_one_output_that_is_no_chance_has_no_accuracy() -> None:
    labels = torch.tensor([0.5, 3.0, -2.0, 1.0])
    judged = Judge([((torch.randn(4, 6), torch.randn(4, 6)), labels)], CPU).judge(nn.Bilinear(6, 6, 1))
    assert judged.metrics == {}
    assert judged.predictions is None
    with pytest.raises(UserMistake, match=r"labels of one output must lie in \[0, 1\], not -2 to 3; give"):
        classification_loss(torch.zeros(4, 1), labels)


def test_classes_of_positions_are_the_second_dimension() -> None:
    outputs, labels = torch.randn(4, 5, 1), torch.tensor([[1], [0], [4], [2]])
    wanted = nn.functional.cross_entropy(outputs[..., 0], labels[:, 0])
    torch.testing.assert_close(classification_loss(outputs, labels), wanted)
    with pytest.raises(UserMistake, match=r"outputs \(4, 1, 5\) are logits of one class.*give loss="):
        classification_loss(torch.randn(4, 1, 5), torch.zeros(4, 5).long())
    with pytest.raises(UserMistake, match=r"labels \(4, 2\) do not fit outputs \(4, 1\).*give loss="):
        classification_loss(torch.randn(4, 1), torch.eye(2)[[0, 1, 1, 0]])


@pytest.mark.parametrize(
    ("batch", "why"),
    [
        ((torch.zeros(2, 6), torch.zeros(2, 4), torch.zeros(2)), r"not tuple of Tensor, Tensor, Tensor; sev"),
        (((torch.zeros(2, 6), torch.zeros(3, 4)), torch.zeros(2)), "Tensor with 2, 3 and 2 samples"),
        ((torch.zeros(2, 6), torch.tensor(1)), "Tensor with 2 and no samples"),
        (((), torch.zeros(2)), "not tuple of tuple, Tensor"),
        (((torch.zeros(2, 6), "b"), torch.zeros(2)), "not tuple of tuple, Tensor"),
        (({"a": torch.zeros(2, 6)}, torch.zeros(2)), "not tuple of dict, Tensor"),
    ],
)
def test_other_batches_are_refused(batch: Any, why: str) -> None:
    with pytest.raises(UserMistake, match=why):
        as_batches([batch], "train")


def test_how_a_batch_is_read() -> None:
    a, b, y = torch.zeros(2, 6), torch.ones(2, 4), torch.arange(2)
    assert inputs_of((a, y)) == (a,)
    several: Any = [((a, b), y), [[a, b], y]]
    for batch in several:
        assert [id(x) for x in inputs_of(batch)] == [id(a), id(b)]
        inputs, labels = move(batch, CPU)
        assert torch.equal(inputs[1], b)
        assert torch.equal(labels, y)
    context = Context(example=(), loss=lambda outputs, labels: outputs.sum() + labels.sum())
    assert float(loss_of(context, torch.ones(3), (a, b), y)) == 4.0
