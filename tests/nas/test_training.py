"""The training loop on a toy task."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nas.errors import TrialFailure, UserMistake
from nas.tasks.base import Batch, Objective, Split, Task
from nas.training import Progress, TrainConfig, TrainResult, _NanGuard, _rate_factor, train
from spaces.signature import ImageSignature


class Toy(Task):
    """Recover a linear map from noisy inputs; ``poison`` makes the loss of that (epoch, step) what it says."""

    name = "toy"
    signature = ImageSignature(1, 1, 8, 3)
    objective = Objective("error", "minimize")
    default_epochs, default_batch_size, default_learning_rate = 3, 16, 0.05

    def __init__(self, samples: int = 64, poison: dict[tuple[int, int], float] | None = None):
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(samples, 8, generator=generator)
        self.targets = self.inputs @ torch.randn(8, 3, generator=generator)
        self.poison = poison or {}
        self.place = (0, 0)
        self.quick: list[bool] = []
        self.broken_metric: float | None = None
        self.modes: set[tuple[bool, bool]] = set()

    def train_batches(
        self, *, epoch: int, batch_size: int, seed: int, device: torch.device, train_fraction: float = 1.0
    ) -> Iterator[Batch]:
        count = int(len(self.inputs) * train_fraction)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1000 + epoch))
        for step, rows in enumerate(torch.split(order, batch_size)):
            self.place = (epoch + 1, step + 1)
            yield self.inputs[rows].to(device), self.targets[rows].to(device)

    def batches_per_epoch(self, batch_size: int, train_fraction: float = 1.0) -> int:
        return math.ceil(int(len(self.inputs) * train_fraction) / batch_size)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        self.modes.add((model.training, torch.is_grad_enabled()))
        x, y = batch
        return nn.functional.mse_loss(model(x).float(), y) + self.poison.get(self.place, 0.0)

    def evaluate(
        self, model: nn.Module, split: Split, device: torch.device, *, quick: bool = False
    ) -> dict[str, float]:
        assert split == "validation"
        assert not model.training
        assert not torch.is_grad_enabled()
        self.quick.append(quick)
        loss = nn.functional.mse_loss(model(self.inputs.to(device)), self.targets.to(device)).item()
        metrics = {"loss": self.broken_metric if self.broken_metric is not None else loss}
        return metrics if quick else {**metrics, "error": math.sqrt(loss)}

    def example_inputs(self, batch_size: int, device: torch.device) -> tuple[Tensor, ...]:
        return (torch.randn(batch_size, 8, device=device),)

    def describe(self) -> dict[str, Any]:
        return {"source": "random"}


class Net(nn.Module):
    """Has everything that makes resuming hard: dropout, running statistics, a norm, and an unused parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.LayerNorm(16))
        self.head = nn.Linear(16, 3)
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x))
        return out


CONFIG = TrainConfig(epochs=4, batch_size=16, learning_rate=0.05, amp="off", seed=7)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def net() -> Net:
    torch.manual_seed(3)
    return Net()


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(**{**asdict(CONFIG), **changes})


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def without_time(result: TrainResult) -> list[dict[str, Any]]:
    return [{name: value for name, value in entry.items() if name != "seconds"} for entry in result.history]


class Killed(BaseException):
    """Stands for the death of the process."""


# -- what it does ------------------------------------------------------------------------------------------------------


def test_the_loss_falls_and_the_history_tells_it() -> None:
    task, model = Toy(), net()
    seen: list[Progress] = []
    breaths: list[int] = []

    def report(progress: Progress) -> bool:
        seen.append(progress)
        return False

    result = train(model, task, config(epochs=12), "cpu", report=report, breathe=lambda: breaths.append(1))
    losses = [entry["train_loss"] for entry in result.history]
    assert losses[-1] < 0.5 * losses[0]
    assert [p.epoch for p in seen] == list(range(1, 13))
    assert json.loads(json.dumps(result.history)) == [asdict(p) for p in seen]
    assert result.metrics == result.history[-1]["metrics"]
    assert task.quick == [True] * 11 + [False]
    assert result.metrics.keys() == {"loss", "error"}
    assert len(breaths) == 12 * 4
    assert task.modes == {(True, True)}
    assert not result.stopped_early
    assert not model.training
    assert 0 < result.history[0]["seconds"] <= result.history[-1]["seconds"] <= result.seconds


def test_the_train_loss_is_the_mean_over_the_steps_of_the_epoch() -> None:
    plain = train(net(), Toy(), config(epochs=1), "cpu").history[0]["train_loss"]
    raised = train(net(), Toy(poison={(1, 2): 8.0}), config(epochs=1), "cpu").history[0]["train_loss"]
    assert raised == pytest.approx(plain + 8.0 / 4)


def test_one_seed_gives_the_same_weights_and_another_others() -> None:
    models = [net() for _ in range(3)]
    results = [
        train(model, Toy(), config(seed=seed), "cpu") for model, seed in zip(models, (7, 7, 8), strict=True)
    ]
    assert same(models[0], models[1])
    assert without_time(results[0]) == without_time(results[1])
    assert not same(models[0], models[2])


def test_random_numbers_outside_are_left_as_they_were() -> None:
    model = net()
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    train(model, Toy(), CONFIG, "cpu")
    assert torch.equal(torch.rand(3), expected)


def test_report_stops_it_after_that_epoch() -> None:
    task = Toy()
    result = train(net(), task, CONFIG, "cpu", report=lambda progress: progress.epoch == 2)
    assert result.stopped_early
    assert len(result.history) == 2
    assert "error" not in result.metrics
    assert task.quick == [True, True]


def test_the_share_of_the_data_is_passed_on() -> None:
    breaths: list[int] = []
    train(net(), Toy(), config(train_fraction=0.5), "cpu", breathe=lambda: breaths.append(1))
    assert len(breaths) == 4 * 2


def test_the_rate_rises_to_its_peak_and_falls_to_nothing() -> None:
    factors = [_rate_factor(step, 100, 0.1) for step in range(100)]
    peak = factors.index(max(factors))
    assert peak == 10
    assert factors[peak] == 1.0
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    assert 0 < factors[0] < 0.11
    assert 0 < factors[-1] < 0.001
    assert _rate_factor(0, 100, 0.0) == 1.0
    assert _rate_factor(0, 1, 0.5) > 0
    assert _rate_factor(130, 100, 0.1) == pytest.approx(0.0)


def test_norms_and_biases_do_not_decay() -> None:
    model = net()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)

    class Flat(Toy):
        def loss(self, model: nn.Module, batch: Batch) -> Tensor:
            return sum(p.sum() * 0.0 for p in model.parameters())  # type: ignore[return-value]

    train(model, Flat(), config(weight_decay=0.5), "cpu")
    decayed = {name for name, parameter in model.named_parameters() if (parameter < 1.0).all()}
    assert decayed == {"body.0.weight", "head.weight"}


def test_clipping_bounds_the_step() -> None:
    def moved(clip_norm: float | None) -> float:
        model = net()
        before = model.head.weight.detach().clone()
        one_step = config(optimizer="sgd", epochs=1, batch_size=64, clip_norm=clip_norm, weight_decay=0.0)
        train(model, Toy(), one_step, "cpu")
        return float(torch.linalg.vector_norm(model.head.weight.detach() - before))

    nesterov = 1.9
    assert 0 < moved(1e-3) <= CONFIG.learning_rate * 1e-3 * nesterov
    assert moved(None) > 10 * moved(1e-3)


def test_bf16_on_a_cpu_trains_the_full_precision_weights() -> None:
    seen: set[torch.dtype] = set()

    class Spying(Toy):
        def loss(self, model: nn.Module, batch: Batch) -> Tensor:
            seen.add(model(batch[0]).dtype)
            return super().loss(model, batch)

    model = net()
    result = train(model, Spying(), config(epochs=10, amp="bf16"), "cpu")
    assert seen == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"]


def test_auto_is_full_precision_on_a_cpu() -> None:
    models = [net(), net()]
    for model, amp in zip(models, ("auto", "off"), strict=True):
        train(model, Toy(), config(amp=amp), "cpu")
    assert same(*models)


# -- what goes wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "word"), [(math.nan, "nan"), (math.inf, "infinite")])
def test_a_loss_that_is_not_finite_fails_the_trial_and_says_where(value: float, word: str) -> None:
    with pytest.raises(TrialFailure, match=rf"^loss became {word} at epoch 2, step 3$") as caught:
        train(net(), Toy(poison={(2, 3): value}), CONFIG, "cpu")
    assert caught.value.kind == "nan"


@pytest.mark.parametrize("every", [2, 3, 20])
def test_the_guard_names_the_step_even_when_it_looks_seldom(every: int) -> None:
    guard = _NanGuard(epoch=1, every=every)
    with pytest.raises(TrialFailure, match="loss became nan at epoch 2, step 5"):
        for step in range(1, 8):
            guard.add(torch.tensor(math.nan if step >= 5 else 1.0))
        guard.mean()


def test_weights_that_became_nan_in_the_last_step_are_found_by_the_metrics() -> None:
    task = Toy()
    task.broken_metric = math.nan
    with pytest.raises(TrialFailure, match="validation loss became nan at epoch 1") as caught:
        train(net(), task, CONFIG, "cpu")
    assert caught.value.kind == "nan"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "training: epochs=0 must be at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"learning_rate": math.nan}, "learning_rate=nan must be above 0"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0 must be at least 0"),
        ({"warmup_fraction": 1.0}, re.escape("warmup_fraction=1.0 must be in [0, 1)")),
        ({"clip_norm": 0.0}, "clip_norm=0.0 must be above 0"),
        ({"amp": "fp16"}, "amp='fp16' must be one of auto, off, bf16"),
        ({"seed": -1}, "seed=-1 must be in"),
        ({"train_fraction": 0.0}, "train_fraction=0.0 must be in"),
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserMistake, match=message):
        config(**change)


def test_an_unknown_optimizer_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(
        UserMistake, match=r"unknown optimizer='adamv' \(did you mean '.*'\?\); known: .*adamw"
    ):
        train(net(), Toy(), config(optimizer="adamv"), "cpu")


def test_no_batch_at_all_is_refused() -> None:
    with pytest.raises(UserMistake, match=r"train_fraction=0\.01 leave no batch of task 'toy'"):
        train(net(), Toy(), config(train_fraction=0.01), "cpu")


# -- checkpoints -------------------------------------------------------------------------------------------------------


def interrupted(directory: Path, after: int, **changes: Any) -> None:
    """A training whose process dies when it reports epoch ``after``."""

    def die(progress: Progress) -> bool:
        if progress.epoch == after:
            raise Killed
        return False

    with pytest.raises(Killed):
        train(net(), Toy(), config(**changes), "cpu", report=die, checkpoint=directory)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lamb"])
@pytest.mark.parametrize("after", [1, 3, 4])
def test_a_resumed_training_ends_like_an_uninterrupted_one(
    tmp_path: Path, after: int, optimizer: str
) -> None:
    straight, resumed = net(), Net()
    expected = train(straight, Toy(), config(optimizer=optimizer), "cpu")
    interrupted(tmp_path, after, optimizer=optimizer)
    reported: list[int] = []

    def report(progress: Progress) -> bool:
        reported.append(progress.epoch)
        return False

    result = train(resumed, Toy(), config(optimizer=optimizer), "cpu", report=report, checkpoint=tmp_path)
    assert same(straight, resumed)
    assert without_time(result) == without_time(expected)
    assert reported == [1, 2, 3, 4]
    assert result.seconds >= result.history[-1]["seconds"]


def test_it_really_goes_on_where_it_was(tmp_path: Path) -> None:
    interrupted(tmp_path, 3)
    breaths: list[int] = []
    train(Net(), Toy(), CONFIG, "cpu", checkpoint=tmp_path, breathe=lambda: breaths.append(1))
    assert len(breaths) == 4
    finished = train(Net(), Toy(), CONFIG, "cpu", checkpoint=tmp_path, breathe=lambda: breaths.append(1))
    assert len(breaths) == 4
    assert len(finished.history) == 4


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    train(net(), Toy(), CONFIG, "cpu", checkpoint=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "epoch-0003.json", "epoch-0003.safetensors", "epoch-0004.json", "epoch-0004.safetensors",
    ]  # fmt: skip


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_one_is_passed_over_for_the_one_before(
    tmp_path: Path, suffix: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    straight, resumed = net(), Net()
    train(straight, Toy(), CONFIG, "cpu")
    interrupted(tmp_path, 3)
    path = tmp_path / f"epoch-0003.{suffix}"
    data = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data if damage == "flip" else data[:-10])
    breaths: list[int] = []
    with caplog.at_level(logging.WARNING):
        train(resumed, Toy(), CONFIG, "cpu", checkpoint=tmp_path, breathe=lambda: breaths.append(1))
    assert len(breaths) == 2 * 4
    assert same(straight, resumed)
    if (suffix, damage) != ("json", "remove"):  # without its record it never was a checkpoint
        assert "the checkpoint after epoch 3 is discarded" in caplog.text


def test_without_any_whole_one_it_starts_anew(tmp_path: Path) -> None:
    straight, again = net(), net()
    train(straight, Toy(), CONFIG, "cpu")
    interrupted(tmp_path, 2)
    for path in tmp_path.glob("*.json"):
        path.write_text("{")
    train(again, Toy(), CONFIG, "cpu", checkpoint=tmp_path)
    assert same(straight, again)
    assert len(list(tmp_path.iterdir())) == 4


def test_another_training_is_not_taken_up_nor_overwritten(tmp_path: Path) -> None:
    interrupted(tmp_path, 2)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(
        UserMistake, match="is of a training with another learning_rate, seed; remove it or choose"
    ):
        train(net(), Toy(), config(seed=8, learning_rate=0.1), "cpu", checkpoint=tmp_path)
    model = net()
    model.head = nn.Linear(16, 3, bias=False)
    with pytest.raises(UserMistake, match=r"epoch-0002\.safetensors is of another model"):
        train(model, Toy(), CONFIG, "cpu", checkpoint=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_replayed_report_may_stop_it(tmp_path: Path) -> None:
    interrupted(tmp_path, 3)
    result = train(
        Net(), Toy(), CONFIG, "cpu", checkpoint=tmp_path, report=lambda progress: progress.epoch == 1
    )
    assert result.stopped_early
    assert len(result.history) == 3
    assert result.metrics == result.history[2]["metrics"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu(tmp_path: Path) -> None:
    model = net()
    result = train(model, Toy(), config(amp="auto", epochs=10), "cuda", checkpoint=tmp_path)
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"]
    assert model.head.weight.is_cuda
    with pytest.raises(TrialFailure, match="loss became nan at epoch 2, step 3"):
        train(net(), Toy(poison={(2, 3): math.nan}), CONFIG, "cuda")
    interrupted_again = train(Net(), Toy(), config(amp="auto", epochs=10), "cuda", checkpoint=tmp_path)
    assert len(interrupted_again.history) == 10
