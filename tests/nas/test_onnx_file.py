"""An ONNX file says what its model says, at any batch, or is not written."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import nn

from nas.errors import RunStopped
from nas.export import write_checked_onnx
from nas.onnx_file import check_onnx, in_float32, write_onnx
from spaces import get_space, list_spaces
from spaces.signature import ClickThroughRateSignature, ImageSignature, TranslationSignature

pytest.importorskip("onnxruntime")


SIGNATURES = {
    "image_classification": ImageSignature(3, 32, 32, 10),
    "translation": TranslationSignature(60, 60, 16),
    "click_through_rate": ClickThroughRateSignature((10, 20, 7), (1, 3, 1), 4),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*list_spaces(), "efficient_transformer:small_translation"])
@pytest.mark.parametrize("seed", [0, 1])
def test_samples_of_every_space(name: str, seed: int, tmp_path: Path) -> None:
    space = get_space(name)
    if space.task not in SIGNATURES:
        pytest.skip("builds no model")
    signature = SIGNATURES[space.task]
    model = space.build(space.sample(random.Random(seed)), signature).eval()
    told = write_checked_onnx(model, signature, tmp_path)
    assert max(told["largest_difference"].values()) < 1e-4
    if isinstance(signature, TranslationSignature):
        assert told["inputs"] == {"input_0": ["batch", 16], "input_1": ["batch", 16]}


def test_a_file_that_computes_something_else_is_noticed(tmp_path: Path) -> None:
    class Double(nn.Module):
        def __init__(self, factor: float):
            super().__init__()
            self.factor = factor
            self.layer = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.factor * self.layer(x)
            return out

    example = (torch.randn(1, 4),)
    model = Double(1.0).eval()
    path = write_onnx(model, example, tmp_path)
    assert check_onnx(path, model, example)[7] < 1e-6
    model.factor = 1.5
    with pytest.raises(RunStopped, match="at batch 1 onnxruntime differs from the model by"):
        check_onnx(path, model, example)


class Mixed(nn.Module):
    """A layer in ``dtype``, and a table in float64."""

    table: torch.Tensor

    def __init__(self, dtype: torch.dtype, *, names_it: bool = False):
        super().__init__()
        self.dtype, self.names_it = dtype, names_it
        self.layer = nn.Linear(4, 3, dtype=dtype)
        self.register_buffer("table", torch.linspace(0, 1, 4, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.table.to(x.dtype)
        out: torch.Tensor = self.layer(x.to(self.dtype) if self.names_it else x)
        return out


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_models_of_other_numbers_are_written_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    model, example = Mixed(dtype).eval(), (torch.randn(1, 4, dtype=dtype),)
    gaps = check_onnx(write_onnx(model, example, tmp_path), model, example)
    assert max(gaps.values()) < 1e-5
    assert model.layer.weight.dtype == dtype
    assert model.table.dtype == torch.float64


def test_a_model_that_does_not_run_in_float32_is_refused_in_one_line() -> None:
    model = Mixed(torch.float64, names_it=True).eval()
    with pytest.raises(
        RunStopped, match="written in float32, and Mixed, of float64, does not run in it"
    ) as caught:
        in_float32(model, (torch.randn(1, 4, dtype=torch.float64),))
    assert len(str(caught.value).splitlines()) == 1
