"""Models of several inputs, and tasks as data: the click task on a Hiformer, and a toy of two inputs."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from compress import compress, load
from compress.data import TaskLoss, answer, as_batches
from compress.finetune import distillation_loss, epochs_of, finetune
from compress.passes import make_pass
from compress.passes.base import Context, classification_loss
from compress.structure import StructureError
from nas.cli.main import main
from nas.errors import UserMistake
from nas.tasks import make_task
from nas.tasks.base import Task
from spaces import ClickThroughRateSignature, get_space

QUICK: dict[str, Any] = {"measure_seconds": 0}
CPU = torch.device("cpu")


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))  # type: ignore[no-any-return]


class TwoTowers(nn.Module):
    """(B, 6), (B, 4) -> (B, outputs); with a feed-forward network that passes find."""

    def __init__(self, outputs: int = 3):
        super().__init__()
        self.left, self.right = nn.Linear(6, 32), nn.Linear(4, 32)
        self.mlp = FeedForward()
        self.last = nn.Linear(32, outputs)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        x = self.left(a) + self.right(b)
        return self.last(x + self.mlp(x))  # type: ignore[no-any-return]


class Chain(nn.Module):
    """Two inputs in front of layers that merge."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.net(torch.cat((a, b), 1))  # type: ignore[no-any-return]


class Pairs(Dataset[Any]):
    """((a, b), y): the class whose numbers are largest."""

    def __init__(self, classes: int):
        generator = torch.Generator().manual_seed(0)
        self.a, self.b = torch.randn(64, 6, generator=generator), torch.randn(64, 4, generator=generator)
        self.y = (self.a[:, :classes] + self.b[:, :classes]).argmax(1)

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, row: int) -> Any:
        return (self.a[row], self.b[row]), self.y[row]


def towers(outputs: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return TwoTowers(outputs).eval()


def loader(classes: int = 3) -> DataLoader[Any]:
    return DataLoader(Pairs(classes), batch_size=16)


@pytest.fixture(scope="module")
def clicks() -> Task:
    return make_task("click_through_rate", limit=1024)


def hiformer(task: Task, name: str = "hiformer_1layer") -> nn.Module:
    space = get_space("hiformer")
    torch.manual_seed(0)
    return space.build(space.published[name], task.signature).eval()


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# -- tasks -------------------------------------------------------------------------------------------------------------


def test_a_hiformer_learns_from_the_click_task_and_is_judged_by_its_auc(clicks: Task) -> None:
    model, told = hiformer(clicks), list[str]()
    result = compress(
        model,
        "low_rank:keep=anyway,calibrate=false,epochs=2,learning_rate=0.005,distillation=0",
        train=clicks,
        validation=clicks,
        report=told.append,
        **QUICK,
    )
    assert result.final.macs < result.original.macs
    assert set(result.original.metrics) == {"auc", "loss"}
    assert result.final.metrics == clicks.evaluate(result.model, "validation", CPU)
    assert result.final.metrics["auc"] > result.original.metrics["auc"] + 0.03
    assert result.facts["metric"] == "auc"
    table = str(result).splitlines()
    assert table[0].endswith("auc     agreement")
    assert f"{result.final.metrics['auc']:.4f}" in table[2]
    assert f"original: auc {result.original.metrics['auc']:.4f}" in told
    assert [x.shape for x in result.example] == [(1, 11), (1, 4)]
    # Were the class taken to be the largest of one logit, all models would agree.
    assert 0 < (result.final.agreement or 0) < 1


@pytest.mark.slow
def test_translation_is_inputs_and_labels_too() -> None:
    task = make_task("translation", limit=64, bleu_sentences=2)
    space = get_space("efficient_transformer", task="translation")
    torch.manual_seed(0)
    model = space.build(space.sample(random.Random(0)), task.signature).eval()
    (source, target_in), expected = next(iter(as_batches(task, "train")))
    found = answer(model, ((source, target_in), expected), Context(example=(), loss=TaskLoss(task)))
    assert torch.equal(found.loss, task.loss(model, (source, target_in, expected)))
    result = compress(model, "low_rank:keep=anyway,epochs=1", train=task, validation=task, **QUICK)
    assert result.facts["metric"] == "bleu"
    assert result.final.metrics["loss"] < result.original.metrics["loss"]


# -- loaders -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "low_rank:keep=anyway,least=8,epochs=1",
        "structured:units=mlp,criterion=taylor,epochs=1",
        "emoe:keep=anyway,layers=all,experts=4,k=2,epochs=1",
    ],
)
def test_two_inputs_go_through_a_pass_that_trains(text: str) -> None:
    model, data = towers(), loader()
    rows: Any = data.dataset
    before = copy.deepcopy(model.state_dict())
    result = compress(model, text, train=data, validation=data, **QUICK)
    untrained = compress(model, text.replace("epochs=1", "epochs=0"), train=data, **QUICK).model
    assert not torch.equal(weights(result.model), weights(untrained))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        found, own = result.model(rows.a, rows.b).argmax(1), model(rows.a, rows.b).argmax(1)
    assert result.final.metrics["accuracy"] == pytest.approx(float((found == rows.y).float().mean()))
    assert result.final.agreement == pytest.approx(float((found == own).float().mean()))


def test_activations_are_ranked_by_batches_of_two_inputs() -> None:
    torch.manual_seed(0)
    model = Chain().eval()
    result = compress(model, "activation_pruning:share=0.5,epochs=2", train=loader(), **QUICK)
    assert sum(isinstance(one, nn.ReLU) for one in result.model.modules()) == 1


def test_one_logit_is_learned_and_judged() -> None:
    model, data = towers(1), loader(2)
    rows: Any = data.dataset
    result = compress(
        model,
        "low_rank:keep=anyway,least=8,epochs=12,learning_rate=0.01,distillation=0",
        train=data,
        validation=data,
        **QUICK,
    )
    with torch.no_grad():
        found, own = result.model(rows.a, rows.b)[:, 0] > 0, model(rows.a, rows.b)[:, 0] > 0
    assert result.final.metrics["accuracy"] == pytest.approx(float((found == rows.y).float().mean()))
    assert result.final.agreement == pytest.approx(float((found == own).float().mean()))
    assert result.final.metrics["accuracy"] > max(0.8, result.original.metrics["accuracy"])


def test_a_search_of_widths_refuses_two_inputs_at_once() -> None:
    why = r"pass 'ofb': TwoTowers has 2 inputs; widths are searched in models of one"
    with pytest.raises(StructureError, match=why):
        compress(towers(), "ofb:epochs=1", train=loader(), **QUICK)


# -- the command -------------------------------------------------------------------------------------------------------


def command(*words: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["compress", "--measure-seconds", "0", *words])
    return int(caught.value.code or 0)


def described(path: Path, task: Task | None = None) -> str:
    """An architecture.json of a Hiformer, for the features of ``task`` or others."""
    signature = task.signature if task is not None else ClickThroughRateSignature((5, 7), (1, 1), 4)
    facts = {
        "space": "hiformer",
        "scale_task": None,
        "architecture": get_space("hiformer").published["hiformer_1layer"],
        "signature": {"task": "click_through_rate", **asdict(signature)},
    }
    path.write_text(json.dumps(facts))
    return str(path)


def test_the_command_takes_the_click_task(
    tmp_path: Path, clicks: Task, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--model", described(tmp_path / "model.json", clicks), "--task", "click_through_rate")
    code = command(
        *words,
        *("--data", "generated-clicks", "--pass", "low_rank:keep=anyway,calibrate=false", "--epochs", "0"),
        *("--out", str(tmp_path / "out"), "--no-onnx"),
    )
    text = capsys.readouterr()
    assert code == 0, text.err
    assert "original: auc 0." in text.out
    assert load(tmp_path / "out").facts["metric"] == "auc"


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--task", "click_through_rate"), "--task click_through_rate: is what --data is learned as"),
        (
            ("--task", "click_through_rate", "--data", "generated-clicks"),
            "--data: the model was made for other features or vocabularies than those of this click_through_rate",
        ),
        (("--data", "digits"), "needs a model of pictures, this one takes (1, 2), (1, 4); give --task"),
    ],
)
def test_the_command_refuses_what_does_not_fit(
    words: tuple[str, ...], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--model", described(tmp_path / "model.json"), "--pass", "low_rank", *words) == 2
    error = capsys.readouterr().err
    assert why in error
    assert len(error.strip().splitlines()) == 1


def test_a_model_of_pictures_refuses_clicks(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--model", "tests.compress.test_cli:with_inputs", "--pass", "low_rank")
    assert command(*words, "--task", "click_through_rate", "--data", "generated-clicks") == 2
    assert "does not run on the inputs (1, 11), (1, 4)" in capsys.readouterr().err


# -- the teacher of one logit, and how long a pass trains --------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 1), (7,)])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distillation_of_one_logit(shape: tuple[int, ...], temperature: float) -> None:
    """Kullback-Leibler divergence of two Bernoulli distributions, softened."""
    generator = torch.Generator().manual_seed(3)
    own, taught = (3 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    q, p = (own / temperature).sigmoid(), (taught / temperature).sigmoid()
    expected = temperature**2 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    found = float(distillation_loss(own, taught, temperature))
    assert found > 0.1
    assert found == pytest.approx(float(expected), rel=1e-5)
    assert float(distillation_loss(own, own, temperature)) == pytest.approx(0, abs=1e-6)
    # One logit is two of which one is always 0.
    two = [torch.stack((torch.zeros(7, dtype=torch.float64), x.reshape(7)), 1) for x in (own, taught)]
    assert found == pytest.approx(float(distillation_loss(two[0], two[1], temperature)), rel=1e-5)


def test_distillation_of_one_logit_has_a_gradient_where_it_is_sure() -> None:
    own = torch.tensor([[60.0]], requires_grad=True)
    distillation_loss(own, torch.tensor([[-60.0]]), 1.0).backward()
    assert own.grad is not None
    assert float(own.grad) == pytest.approx(1.0, rel=1e-4)


def test_distillation_counts_positions_like_samples() -> None:
    own, taught = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    flat = distillation_loss(own.flatten(0, 1), taught.flatten(0, 1))
    torch.testing.assert_close(distillation_loss(own, taught), flat)


class Ramp(nn.Module):
    """More for later positions, whatever the class: as a distribution over the classes it changes nothing."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) + torch.arange(4.0)  # type: ignore[no-any-return]


@pytest.mark.parametrize("loss", [classification_loss, nn.functional.cross_entropy, nn.CrossEntropyLoss()])
def test_the_teacher_teaches_the_classes_that_the_loss_counts(loss: Any) -> None:
    torch.manual_seed(0)
    model, batch = nn.Conv1d(2, 3, 1), (torch.randn(2, 2, 4), torch.ones(2, 4).long())
    context = Context(example=(batch[0][:1],), train=[batch], loss=loss, teacher=Ramp(model))
    result = finetune(model, context, epochs=1, learning_rate=1e-9, distillation=1.0)
    assert result is not None
    assert result.history[0]["train_loss"] == pytest.approx(0, abs=1e-6)


def test_no_distribution_lies_in_one_number_for_each_position() -> None:
    with pytest.raises(UserMistake, match=r"distillation: outputs \(2, 5, 1\) have one number"):
        distillation_loss(torch.randn(2, 5, 1), torch.randn(2, 5, 1))
    own, taught = torch.randn(2, 5, 1), torch.randn(2, 5, 1)
    flat = distillation_loss(own[..., 0], taught[..., 0])
    torch.testing.assert_close(distillation_loss(own, taught, axis=1), flat)


def test_the_teacher_teaches_one_logit() -> None:
    """With the teacher alone, a model comes near to it whatever the labels are."""
    data = loader(2)
    rows: Any = data.dataset
    teacher = towers(1)
    torch.manual_seed(1)
    model = TwoTowers(1)
    context = Context(example=(rows.a[:1], rows.b[:1]), train=data, teacher=teacher)

    def gap() -> float:
        with torch.no_grad():
            return float((model(rows.a, rows.b) - teacher(rows.a, rows.b)).square().mean())

    before = gap()
    finetune(model, context, epochs=10, learning_rate=0.01, distillation=1.0)
    assert gap() < 0.3 * before


@pytest.mark.parametrize(
    ("own", "given", "data", "epochs"),
    [
        (None, None, True, 3),
        (None, 5, True, 5),
        (2, 5, True, 2),
        (0, 5, True, 0),
        (None, 0, True, 0),
        (2, 5, False, 0),
        (None, None, False, 0),
    ],
)
def test_how_many_epochs_a_pass_gets(own: int | None, given: int | None, data: bool, epochs: int) -> None:
    context = Context(example=(), train=loader() if data else None, epochs=given)
    assert epochs_of(own, context, 3) == epochs


def test_a_pass_that_is_nothing_without_training_refuses_to_go_without_data() -> None:
    torch.manual_seed(0)
    context = Context(example=(torch.zeros(1, 6), torch.zeros(1, 4)))
    assert epochs_of(None, context, 3, must=True) == 3
    with pytest.raises(UserMistake, match="train: fine-tuning needs data"):
        make_pass("activation_pruning").apply(Chain().eval(), context)
