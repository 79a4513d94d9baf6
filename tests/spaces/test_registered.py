"""Every registered space, in every scale, is tested from the moment it is registered; no test file has to be added."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn

from spaces import (
    Architecture,
    ClickThroughRateSignature,
    ImageSignature,
    SearchSpace,
    Signature,
    TranslationSignature,
    get_space,
    list_spaces,
)
from tests.conformance.space import SpaceConformance

NAMES = [f"{name}:{scale}" for name, scales in list_spaces().items() for scale in scales]
SIGNATURES = {
    "image_classification": [ImageSignature(1, 8, 8, 10), ImageSignature(3, 32, 32, 5)],
    "click_through_rate": [
        ClickThroughRateSignature((9, 5), (1, 1), 2, outputs=2),
        ClickThroughRateSignature((9, 5, 7), (1, 3, 1), 4),
    ],
    "translation": [
        TranslationSignature(40, 40, 24),
        TranslationSignature(40, 30, 24, shared_vocabulary=False),
    ],
}
SMALL = 5_000_000
"""Parameters beyond which a model is only built on the meta device here; its own tests run it."""


@pytest.mark.parametrize("space", NAMES, indirect=True)
class TestRegistered(SpaceConformance):
    @pytest.fixture
    def space(self, request: pytest.FixtureRequest) -> SearchSpace:
        return get_space(request.param)

    def test_its_task_is_known_and_its_baseline_is_published(self, space: SearchSpace) -> None:
        assert space.task in SIGNATURES
        assert space.baseline in space.published

    def test_samples_and_published_variants_build_and_train(self, space: SearchSpace) -> None:
        rng = random.Random(7)
        architectures = [space.sample(rng) for _ in range(3)] + list(space.published.values())[:3]
        for signature in SIGNATURES[str(space.task)]:
            for architecture in architectures:
                with torch.device("meta"):
                    skeleton = space.build(architecture, signature)
                if sum(parameter.numel() for parameter in skeleton.parameters()) <= SMALL:
                    _trains(space, architecture, signature)

    def test_two_keys_are_two_models(self, space: SearchSpace) -> None:
        """Neighbours differ in what they compute, or they would be one architecture."""
        rng = random.Random(11)
        signature = SIGNATURES[str(space.task)][-1]
        architecture = space.sample(rng)
        with torch.device("meta"):
            prints = [
                _print(space.build(a, signature)) for a in [architecture, *space.neighbors(architecture)]
            ]
        assert len(set(prints)) == len(prints)


def _trains(space: SearchSpace, architecture: Architecture, signature: Signature) -> None:
    torch.manual_seed(0)
    model = space.build(architecture, signature)
    inputs: tuple[Tensor, ...]
    if isinstance(signature, ImageSignature):
        inputs = (torch.randn(2, signature.channels, signature.height, signature.width),)
        expected: tuple[int, ...] = (2, signature.classes)
    elif isinstance(signature, ClickThroughRateSignature):
        inputs = (torch.randint(0, 5, (2, sum(signature.widths))), torch.randn(2, signature.dense))
        expected = (2, signature.outputs)
    else:
        source = torch.randint(3, signature.source_vocabulary, (2, 9))
        source[0, 6:] = signature.padding
        inputs = (source, torch.randint(3, signature.target_vocabulary, (2, 7)))
        expected = (2, 7, signature.target_vocabulary)
    output = model(*inputs)
    assert output.shape == expected
    output.square().mean().backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing, f"{architecture}: no gradient for {missing}"
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)
    again = space.build(space.from_json(space.to_json(architecture)), signature)
    again.load_state_dict(model.state_dict())
    with torch.inference_mode():
        torch.testing.assert_close(again.eval()(*inputs), model.eval()(*inputs))


def _print(model: nn.Module) -> str:
    """Everything that decides what a model computes: its modules, its shapes, and what the modules were told."""
    told = [
        (name, key, value)
        for name, module in model.named_modules()
        for key, value in sorted(vars(module).items())
        if isinstance(value, (bool, int, float, str)) and key != "training"
    ]
    return f"{model}{[(name, tuple(value.shape)) for name, value in model.state_dict().items()]}{told}"
