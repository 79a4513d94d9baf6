"""Every pass on every model that the toolkit names: it works, exactly where it promises that, or refuses in a line."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from compress import compress, list_passes, load
from compress.passes import parse_pass
from compress.passes.base import Context
from compress.result import CompressionResult
from compress.structure import StructureError
from nas.errors import UserMistake
from spaces.layers.int8_linear import DynamicInt8Linear
from tests.compress.models import batches, small_vit, steepened

torch.set_num_threads(1)

VIT: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 3,
    "num_heads": 3,
    "num_classes": 5,
}
SWIN: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 2,
    "window_size": 4,
    "embed_dim": 24,
    "depths": (1, 2),
    "num_heads": (2, 3),
    "num_classes": 5,
}
CONVNEXT: dict[str, Any] = {"depths": (1, 1, 2, 1), "dims": (16, 24, 32, 48), "num_classes": 5}
TINY: dict[str, dict[str, Any]] = {
    "deit_tiny_patch16_224": VIT,
    "deit3_small_patch16_224": VIT,
    "deit_tiny_distilled_patch16_224": VIT,
    "swin_tiny_patch4_window7_224": SWIN,
    "convnext_tiny": CONVNEXT,
}
SAME_CLASS_AS_DEIT_TINY = ("deit_small_patch16_224", "deit_base_patch16_224", "vit_base_patch16_224")
PLAIN = ("deit_tiny_patch16_224", "deit3_small_patch16_224", "deit_tiny_distilled_patch16_224")
REAL: dict[str, dict[str, Any]] = {
    "deit_tiny_patch16_224": {"img_size": 64},
    "swin_tiny_patch4_window7_224": {"img_size": 64},
    "convnext_tiny": {},
}

TEXTS = {
    "dynamic_quantization": "dynamic_quantization:keep_anyway=true",
    "low_rank": "low_rank:keep=anyway,least=8,batches=1",
    "token_merging": "token_merging:r=2",
}
"""Where the defaults would measure, or are for larger models."""

EXACT = ("class_token_last_block", "reparameterize")
"""Their outputs are the original's."""

ONLY_PLAIN = ("class_token_last_block", "sit", "structured", "token_merging")
"""Passes that name what a model that is no plain vision transformer lacks."""


def passes() -> list[str]:
    return [TEXTS.get(name, name) for name in list_passes()] + ["structured:units=mlp"]


def made(name: str, shape: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    return steepened(timm.create_model(name, **shape))


def images(size: int) -> Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(7))


def squeezed(name: str, shape: dict[str, Any], text: str, size: int) -> CompressionResult | str:
    """The result, or the one sentence of the refusal."""
    try:
        return compress(
            made(name, shape),
            text,
            train=batches(1, 4, image=size),
            epochs=1,
            measure_seconds=0,
            origin={"kind": "timm", "name": name, "kwargs": shape},
            savable=True,
        )
    except UserMistake as refusal:
        return str(refusal)


def judge(name: str, shape: dict[str, Any], text: str, size: int, place: Path) -> bool:
    """Whether the pass works; fails where the outcome is neither that nor a clear refusal."""
    kind, found = text.partition(":")[0], squeezed(name, shape, text, size)
    if isinstance(found, str):
        assert "\n" not in found
        assert kind in found
        assert 30 < len(found) < 400
        return False
    x, model = images(size), found.model
    with torch.no_grad():
        three, one, wanted = model(x), model(x[:1]), made(name, shape)(x)
    assert three.shape == wanted.shape
    assert bool(three.isfinite().all())
    quantised = any(isinstance(module, DynamicInt8Linear) for module in model.modules())
    scale = float(three.abs().max())
    if not quantised:  # which takes its range from all samples of the call
        torch.testing.assert_close(one, three[:1], rtol=0, atol=1e-5 * scale)
    if kind in EXACT:
        torch.testing.assert_close(three, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    cheaper = found.final.params < found.original.params or found.final.macs < found.original.macs
    told = " ".join(found.final.notes)
    assert cheaper or quantised or "stays as it was" in told, f"nothing is saved, and nothing said: {told}"
    again = load(found.save(place)).model
    with torch.no_grad():
        torch.testing.assert_close(again(x), three, rtol=0, atol=0)
    return True


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("text", passes())
def test_works_or_refuses(name: str, text: str, tmp_path: Path) -> None:
    works = judge(name, TINY[name], text, 32, tmp_path / "saved")
    if text == "reparameterize":  # nothing in these models is linear twice in a row
        assert not works
    elif text in passes_of(ONLY_PLAIN):
        assert works == (name in PLAIN)
    elif text.partition(":")[0] in KNOWN and (text, name) != ("ofb", "convnext_tiny"):
        assert works


KNOWN = ("activation_pruning", "dynamic_quantization", "low_rank", "ofb", "structured", *ONLY_PLAIN)


def passes_of(names: tuple[str, ...]) -> list[str]:
    return [TEXTS.get(name, name) for name in names]


@pytest.mark.slow
@pytest.mark.parametrize("name", SAME_CLASS_AS_DEIT_TINY)
def test_the_other_plain_ones(name: str, tmp_path: Path) -> None:
    working = [
        text for number, text in enumerate(passes()) if judge(name, VIT, text, 32, tmp_path / str(number))
    ]
    assert set(passes_of(KNOWN)) <= {*working}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_at_their_real_widths_and_depths(name: str, tmp_path: Path) -> None:
    working = [
        text
        for number, text in enumerate(passes())
        if judge(name, REAL[name], text, 64, tmp_path / str(number))
    ]
    assert {TEXTS["low_rank"], TEXTS["dynamic_quantization"], "structured:units=mlp"} <= {*working}


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that a pass might touch, by module."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        plain = {key: value for key, value in vars(module).items() if not key.startswith("_")}
        hooks = {key: len(value) for key, value in vars(module).items() if key.endswith("_hooks")}
        found[name] = (type(module), module.training, sorted(vars(module)), hooks, [*module._modules])
        found[f"{name} "] = {
            key: value for key, value in plain.items() if isinstance(value, (int, float, str, tuple))
        }
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found[f"{name}:"] = (id(tensor), tensor.requires_grad, tensor.grad, tensor._version)
    return found


@pytest.mark.parametrize(
    "name", ["deit_tiny_distilled_patch16_224", "swin_tiny_patch4_window7_224", "convnext_tiny"]
)
@pytest.mark.parametrize("text", passes())
def test_the_given_model_is_left_as_it_was(name: str, text: str) -> None:
    model = made(name, TINY[name]).train()
    next(model.children()).eval()  # a frozen part must stay frozen
    next(model.parameters()).requires_grad_(False)
    weights, before = copy.deepcopy(model.state_dict()), state_of(model)
    data = batches(1, 4)
    context = Context(
        example=(data[0][0][:1],), train=data, teacher=copy.deepcopy(model).eval(), epochs=1, seed=1
    )
    with contextlib.suppress(UserMistake):  # what it does when it refuses counts as well
        parse_pass(text).apply(model, context)
    assert state_of(model) == before
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_a_model_that_cannot_be_saved_is_told_or_refused_before_the_passes_start() -> None:
    class Own(nn.Sequential):
        """Needs an argument that only its maker knows."""

        def __init__(self, width: int):
            super().__init__(nn.Flatten(), nn.Linear(3 * 64, width), nn.GELU(), nn.Linear(width, 5))

    x, told = torch.randn(1, 3, 8, 8), list[str]()
    with pytest.raises(StructureError, match=r"the result could not be saved: .*needs arguments .width."):
        compress(Own(32), "low_rank:keep=anyway", example=x, measure_seconds=0, savable=True)
    compress(Own(32), "low_rank:keep=anyway", example=x, measure_seconds=0, report=told.append)
    assert told[0].startswith("the result cannot be saved: ")
    assert told[1].startswith("pass 1/1")


@pytest.mark.parametrize("training_first", [True, False])
def test_a_model_that_keeps_tensors_from_call_to_call_can_be_saved(
    training_first: bool, tmp_path: Path
) -> None:
    shape: dict[str, Any] = {"embed_dim": (32, 48, 64), "depth": (1, 1, 1), "num_classes": 5, "img_size": 64}
    model = steepened(timm.create_model("levit_128s", **shape))
    x = images(64)
    with torch.no_grad():
        model(x)  # LeViT keeps its attention biases from here on, for as long as it is not trained
    result = compress(
        model.train(training_first),
        "reparameterize",
        example=x[:1],
        measure_seconds=0,
        savable=True,
        origin={"kind": "timm", "name": "levit_128s", "kwargs": shape},
    )
    again = load(result.save(tmp_path / "saved")).model
    with torch.no_grad():
        assert torch.equal(again(x), result.model(x))


def test_the_benchmark_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between saving a result and noting it, too."""
    from recipes.benchmarks import compression_timm

    def original(name: str) -> nn.Module:
        model: Any = small_vit()
        model.default_cfg = {"input_size": (3, 32, 32)}
        return model

    monkeypatch.setattr(compression_timm, "original", original)
    for _ in range(2):
        row = compression_timm.outcome("any", "class_token_last_block", tmp_path / "result")
        assert row["outcome"] == "works"
        assert row["change_by_saving"] == 0
