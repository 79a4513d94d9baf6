"""Wrong arguments of ``compress`` are told in one line and at once; global generators stay as they were."""

from __future__ import annotations

import random
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from compress import compress
from nas.errors import UserMistake
from tests.compress.models import CLASSES, small_vit


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"budget": 0.5}, r"budget=0\.5: write latency=0\.6"),
        ({"budget": ["macs=0.5"]}, r"budget=\['macs=0\.5'\]: write"),
        ({"target": 5}, "target=5: give a text such as 'cpu:1'"),
        ({"passes": [3]}, "passes: 3 is none; each is a text"),
        ({"passes": 3}, "passes=3: give a pass or a list"),
        ({"passes": {"sit": 1}}, r"passes=\{'sit': 1\}: give a pass or a list"),
        ({"seed": "a"}, r"seed='a': must be a whole number in \[0, 2\*\*32\)"),
        ({"seed": -1}, "seed=-1: must be"),
        ({"seed": 2**32}, "seed=4294967296: must be"),
        ({"seed": True}, "seed=True: must be"),
        ({"epochs": 1.5}, r"epochs=1\.5: must be a whole number of at least 0, or None"),
        ({"epochs": -1}, "epochs=-1: must be"),
        ({"device": "foo"}, "device='foo': is nothing to train on; give cpu, cuda"),
        ({"device": 3}, "device='3': is nothing to train on"),
        ({"device": "meta"}, "device='meta': is nothing to train on"),
        ({"device": "cuda:99"}, r"device='cuda:99': is not to be had here \(.*\); give cpu"),
        ({"measure_seconds": -3}, "measure_seconds=-3: must be a number of at least 0"),
        ({"measure_seconds": float("nan")}, "measure_seconds=nan: must be"),
        ({"measure_seconds": 0, "budget": "latency=0.5"}, "measure_seconds=0: a latency budget"),
        ({"loss": "mse"}, "loss='mse': must be a function"),
        ({"report": 1}, "report=1: must be a function"),
        ({"origin": "timm"}, "origin='timm': must be a mapping"),
        ({"example": 224}, "example: must be a tensor"),
        ({"example": ()}, "example: must be a tensor"),
        ({"model": "vit"}, "model: str is no torch"),
    ],
)
def test_in_one_line_and_before_anything_is_done(given: dict[str, Any], why: str) -> None:
    said: list[str] = []
    whole: dict[str, Any] = {"model": small_vit(), "passes": "structured", "report": said.append, **given}
    with pytest.raises(UserMistake, match=why) as caught:
        compress(whole.pop("model"), whole.pop("passes"), **whole)
    assert len(str(caught.value).splitlines()) == 1
    assert not said


TINY: dict[str, Any] = {"example": torch.zeros(1, 3, 8, 8), "measure_seconds": 0.1}


def states() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state())


def loader(**options: Any) -> Any:
    data = TensorDataset(torch.randn(12, 3, 32, 32), torch.arange(12) % CLASSES)
    return DataLoader(data, 4, shuffle=True, **options)


def test_the_callers_generators_stay_as_they_were() -> None:
    model, data = small_vit(), loader()
    before = states()
    compress(model, "class_token_last_block", train=data, validation=data, measure_seconds=0)
    with pytest.raises(UserMistake):
        compress(model, "reparameterize", train=data, measure_seconds=0)
    assert states() == before


def test_measuring_leaves_them_too() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    before = states()
    compress(model, "reparameterize", **TINY)
    assert states() == before


def test_the_order_of_a_loader_comes_from_the_seed_or_from_its_own_generator() -> None:
    model, data = small_vit(), loader()
    weights = []
    for number in (1, 2):
        torch.manual_seed(number)
        made = compress(model, "structured:epochs=1", train=data, measure_seconds=0, seed=5).model
        weights.append(torch.cat([p.detach().flatten() for p in made.parameters()]))
    assert torch.equal(*weights)
    own = torch.Generator().manual_seed(0)
    compress(model, "structured:epochs=1", train=loader(generator=own), measure_seconds=0)
    assert not torch.equal(own.get_state(), torch.Generator().manual_seed(0).get_state())
