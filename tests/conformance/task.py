"""What every task must do."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Hashable, Mapping
from itertools import combinations
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from nas.tasks.base import Batch, Task
from spaces.signature import ClickThroughRateSignature, ImageSignature, Signature, TranslationSignature

__all__ = ["TaskConformance", "tiny_model"]

CPU = torch.device("cpu")


class TaskConformance:
    """Inherit, and override the fixture ``task`` and the method ``split_keys``::

    class TestDigits(TaskConformance):
        @pytest.fixture(scope="class")
        def task(self):
            return make_task("image_classification")
    """

    batch_size = 16

    @pytest.fixture
    def task(self) -> Task:
        raise NotImplementedError("override the fixture 'task'")

    @pytest.fixture
    def model(self, task: Task) -> nn.Module:
        """Override it for a signature that ``tiny_model`` does not know."""
        return tiny_model(task.signature)

    def split_keys(self, task: Task) -> Mapping[str, Collection[Hashable]]:
        """For train, validation and test the identity of every sample (row of the source, text, ...)."""
        raise NotImplementedError("override split_keys")

    def batches(self, task: Task, *, epoch: int = 0, seed: int = 0, fraction: float = 1.0) -> list[Batch]:
        found = task.train_batches(
            epoch=epoch, batch_size=self.batch_size, seed=seed, device=CPU, train_fraction=fraction
        )
        return list(found)

    def test_same_arguments_give_same_batches(self, task: Task) -> None:
        assert _equal(self.batches(task, epoch=1, seed=3), self.batches(task, epoch=1, seed=3))

    def test_global_random_state_does_not_matter(self, task: Task) -> None:
        torch.manual_seed(1)
        first = self.batches(task)
        torch.manual_seed(2)
        assert _equal(first, self.batches(task))

    def test_epochs_differ(self, task: Task) -> None:
        assert not _equal(self.batches(task, epoch=0), self.batches(task, epoch=1))

    def test_seeds_differ(self, task: Task) -> None:
        assert not _equal(self.batches(task, seed=0), self.batches(task, seed=1))

    @pytest.mark.parametrize("fraction", [1.0, 0.5])
    def test_number_of_batches(self, task: Task, fraction: float) -> None:
        found = self.batches(task, fraction=fraction)
        assert len(found) == task.batches_per_epoch(self.batch_size, fraction)
        assert all(0 < len(tensor) <= self.batch_size for batch in found for tensor in batch)

    def test_fraction_is_smaller(self, task: Task) -> None:
        assert task.batches_per_epoch(1, 0.25) < task.batches_per_epoch(1)

    def test_splits_share_no_sample(self, task: Task) -> None:
        keys = self.split_keys(task)
        assert set(keys) == {"train", "validation", "test"}
        for one, other in combinations(keys, 2):
            assert len(keys[one]) == len(set(keys[one])) > 0
            assert not set(keys[one]) & set(keys[other]), f"{one} and {other} share samples"

    @pytest.mark.parametrize("split", ["validation", "test"])
    def test_evaluate(self, task: Task, model: nn.Module, split: Literal["validation", "test"]) -> None:
        metrics = task.evaluate(model, split, CPU)
        assert {"loss", task.objective.name} <= metrics.keys()
        assert all(type(value) is float and math.isfinite(value) for value in metrics.values())
        assert metrics == task.evaluate(model, split, CPU)

    @pytest.mark.parametrize("training", [True, False])
    def test_evaluate_restores_the_mode(self, task: Task, model: nn.Module, training: bool) -> None:
        model.train(training)
        assert "loss" in task.evaluate(model, "validation", CPU, quick=True)
        assert model.training is training

    def test_evaluate_does_not_train(self, task: Task, model: nn.Module) -> None:
        before = {name: value.clone() for name, value in model.state_dict().items()}
        task.evaluate(model, "validation", CPU, quick=True)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_loss_is_a_scalar_with_a_gradient(self, task: Task, model: nn.Module) -> None:
        loss = task.loss(model, self.batches(task)[0])
        loss.backward()
        assert loss.shape == ()
        assert torch.isfinite(loss)
        assert any(p.grad is not None and bool(p.grad.any()) for p in model.parameters())

    @pytest.mark.parametrize("batch_size", [1, 3])
    def test_example_inputs_fit_the_signature(self, task: Task, model: nn.Module, batch_size: int) -> None:
        inputs = task.example_inputs(batch_size, CPU)
        _check_inputs(task.signature, inputs, batch_size)
        _check_outputs(task.signature, model(*inputs), inputs)
        assert _equal([inputs], [task.example_inputs(batch_size, CPU)])

    def test_batches_fit_the_signature(self, task: Task) -> None:
        batch = self.batches(task)[0]
        if isinstance(task.signature, ImageSignature):
            _check_inputs(task.signature, batch[:1], len(batch[0]))
            assert batch[1].dtype == torch.int64
            assert int(batch[1].max()) < task.signature.classes
        elif isinstance(task.signature, ClickThroughRateSignature):
            _check_inputs(task.signature, batch[:2], len(batch[0]))
            assert set(batch[2].tolist()) <= {0.0, 1.0}
        else:
            _check_inputs(task.signature, batch[:2], len(batch[0]))

    def test_describe_is_json(self, task: Task) -> None:
        facts = task.describe()
        assert json.loads(json.dumps(facts, allow_nan=False)) == facts
        assert set(facts["splits"]) == {"train", "validation", "test"}
        assert all(size > 0 for size in facts["splits"].values())

    def test_defaults_are_usable(self, task: Task) -> None:
        assert task.name
        assert task.default_epochs >= 1
        assert task.default_batch_size >= 1
        assert 0 < task.default_learning_rate < 1
        assert task.objective.direction in ("maximize", "minimize")


def tiny_model(signature: Signature) -> nn.Module:
    """The smallest model that answers to ``signature``; the same weights at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if isinstance(signature, ImageSignature):
            values = signature.channels * signature.height * signature.width
            return nn.Sequential(nn.Flatten(), nn.Linear(values, signature.classes))
        if isinstance(signature, ClickThroughRateSignature):
            return _TinyRanker(signature)
        return _TinyTranslator(signature)


class _TinyTranslator(nn.Module):
    """Next token from the mean of the source and the last token; no ``encode`` and ``decode``."""

    def __init__(self, signature: TranslationSignature):
        super().__init__()
        self.embedding = nn.Embedding(signature.source_vocabulary, 8)
        self.head = nn.Linear(8, signature.target_vocabulary)

    def forward(self, source: Tensor, target_in: Tensor) -> Tensor:
        """(B, S), (B, T) -> (B, T, V)."""
        logits: Tensor = self.head(self.embedding(source).mean(1, keepdim=True) + self.embedding(target_in))
        return logits


class _TinyRanker(nn.Module):
    """Adds up a number for every id and the dense numbers."""

    def __init__(self, signature: ClickThroughRateSignature):
        super().__init__()
        self.table = nn.Embedding(max(signature.vocabularies), signature.outputs)
        self.dense = nn.Linear(signature.dense, signature.outputs)

    def forward(self, ids: Tensor, dense: Tensor) -> Tensor:
        """(B, I), (B, D) -> (B, outputs)."""
        logits: Tensor = self.table(ids).sum(1) + self.dense(dense)
        return logits


def _equal(left: list[Batch], right: list[Batch]) -> bool:
    return len(left) == len(right) and all(
        a.shape == b.shape and torch.equal(a, b)
        for one, other in zip(left, right, strict=True)
        for a, b in zip(one, other, strict=True)
    )


def _check_inputs(signature: Signature, inputs: tuple[Tensor, ...], batch_size: int) -> None:
    if isinstance(signature, ImageSignature):
        (images,) = inputs
        assert images.shape == (batch_size, signature.channels, signature.height, signature.width)
        assert images.dtype == torch.float32
        return
    if isinstance(signature, ClickThroughRateSignature):
        ids, dense = inputs
        assert (ids.dtype, dense.dtype) == (torch.int64, torch.float32)
        assert ids.shape == (batch_size, sum(signature.widths))
        assert dense.shape == (batch_size, signature.dense)
        assert bool(torch.isfinite(dense).all())
        for columns, vocabulary in zip(
            ids.split(list(signature.widths), 1), signature.vocabularies, strict=True
        ):
            assert 0 <= int(columns.min()) <= int(columns.max()) < vocabulary
        return
    source, target = inputs
    for tokens, vocabulary in (
        (source, signature.source_vocabulary),
        (target, signature.target_vocabulary),
    ):
        assert tokens.dtype == torch.int64
        assert tokens.shape[0] == batch_size
        assert tokens.shape[1] <= signature.max_length
        assert 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary
    assert bool((target[:, 0] == signature.begin).all())


def _check_outputs(signature: Signature, outputs: Tensor, inputs: tuple[Tensor, ...]) -> None:
    if isinstance(signature, ImageSignature):
        assert outputs.shape == (len(inputs[0]), signature.classes)
    elif isinstance(signature, ClickThroughRateSignature):
        assert outputs.shape == (len(inputs[0]), signature.outputs)
    else:
        assert outputs.shape == (*inputs[1].shape, signature.target_vocabulary)
