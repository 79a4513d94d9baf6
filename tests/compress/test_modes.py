"""``compress`` called in any mode of autograd, with tensors made in any, and of programs that are no modules."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from compress import compress, load
from nas.errors import UserMistake
from tests.compress.models import batches, small_vit

PASS = "structured:ratio=0.3,epochs=1"
Mode = Callable[[], AbstractContextManager[Any]]


def weights_of(model: nn.Module) -> Tensor:
    return torch.cat([x.detach().flatten() for x in model.parameters()])


@pytest.fixture(scope="module")
def wanted() -> Tensor:
    data = batches(2)
    made = compress(small_vit(), PASS, train=data, validation=data, measure_seconds=0)
    return weights_of(made.model)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("inside", [False, True])
def test_passes_train_in_every_mode(mode: Mode, inside: bool, wanted: Tensor, tmp_path: Path) -> None:
    """Also of a model and of data that were made within it."""
    model, data = small_vit(), batches(2)
    with mode():
        if inside:
            model, data = small_vit(), batches(2)
        made = compress(model, PASS, train=data, validation=data, measure_seconds=0)
        assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode)
        assert not torch.is_grad_enabled()
        made.save(tmp_path / "saved")
    assert torch.equal(weights_of(load(tmp_path / "saved").model), wanted)
    assert torch.equal(weights_of(made.model), wanted)
    assert not any(x.is_inference() for x in (*made.model.parameters(), *made.model.buffers(), *made.example))
    made.model(data[0][0].clone()).sum().backward()


def test_tied_and_frozen_parameters_of_inference_mode() -> None:
    with torch.inference_mode():
        model: Any = small_vit()
        model.blocks[1].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight
        model.pos_embed.requires_grad_(False)
        model.register_buffer("kept", torch.ones(3))
        model.cached = {"bias": torch.ones(2)}
        x = torch.zeros(1, 3, 32, 32)
        made: Any = compress(model, "token_merging:r=2", example=x, measure_seconds=0).model
    assert made.blocks[1].mlp.fc1.weight is made.blocks[0].mlp.fc1.weight
    assert not made.pos_embed.requires_grad
    assert made.head.weight.requires_grad
    assert not made.kept.is_inference()
    assert not made.cached["bias"].is_inference()


def test_a_loader_over_tensors_of_inference_mode() -> None:
    with torch.inference_mode():
        images, labels = batches(1)[0]
        data = DataLoader(TensorDataset(images, labels), 4)
    assert images.is_inference()
    compress(small_vit(), PASS, train=data, measure_seconds=0)


class Own:
    """A source of the user's that keeps tensors of inference mode."""

    def __init__(self) -> None:
        with torch.inference_mode():
            self.batches = batches(2)

    def __iter__(self) -> Any:
        return iter(self.batches)


def test_any_other_source_of_such_tensors() -> None:
    """Nothing can be learnt from them, but a model can be judged by them."""
    compress(small_vit(), PASS, train=batches(1), validation=Own(), measure_seconds=0)
    with pytest.raises(UserMistake, match=r"train: yields tensors made under torch\.inference_mode") as found:
        compress(small_vit(), PASS, train=Own(), measure_seconds=0)
    assert "\n" not in str(found.value)


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return out


def test_programs_of_torch_jit_are_refused() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 5)).eval()
    x = torch.zeros(1, 3, 2, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        programs = [torch.jit.trace(net, x), torch.jit.script(net)]
    for model, name in ((programs[0], "it"), (programs[1], "it"), (Wrapped(programs[0]), "inner")):
        with pytest.raises(UserMistake, match=rf"model: {name} is a torch\.jit program") as found:
            compress(model, "structured", example=x, measure_seconds=0)
        assert "\n" not in str(found.value)
