"""The bundle: an ONNX file that computes the same at any batch, and a latency card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compress import compress, load
from compress.bundle import check_onnx, in_float32, write_onnx
from compress.passes import make_pass
from nas.errors import RunStopped
from nas.files import sha256_file
from tests.compress.models import small_vit

pytest.importorskip("onnxruntime")
EXAMPLE = (torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)),)

PASSES: dict[str, list[Any]] = {
    "widths": [make_pass("structured", units="heads+channels+mlp", bottleneck=False)],
    "last block": [make_pass("class_token_last_block")],
    "merging": [make_pass("token_merging", r=3)],
    "int8": [make_pass("dynamic_quantization", keep_anyway=True)],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", PASSES)
def test_onnx_at_batch_1_and_7(kind: str, tmp_path: Path) -> None:
    model = compress(small_vit(), PASSES[kind], measure_seconds=0).model
    gaps = check_onnx(write_onnx(model, EXAMPLE, tmp_path), model, EXAMPLE)
    assert gaps.keys() == {1, 7}
    assert max(gaps.values()) < 1e-4


@pytest.mark.slow
def test_bundle(tmp_path: Path) -> None:
    result = compress(small_vit(), "structured", measure_seconds=3)
    out = result.export(tmp_path / "bundle")
    card = json.loads((out / "latency.json").read_text())
    assert (card["device"], card["runtime"], card["dtype"], card["batch"], card["threads"]) == (
        "cpu",
        "eager",
        "fp32",
        1,
        1,
    )
    assert card["low_ms"] <= card["median_ms"] <= card["high_ms"]
    assert card["onnx"]["sha256"] == sha256_file(out / "model.onnx")
    assert card["of_original"]["second"] == "original"
    again = load(out)
    with torch.no_grad():
        torch.testing.assert_close(again.model(*EXAMPLE), result.model(*EXAMPLE))


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


@pytest.mark.slow
def test_the_card_of_a_bundle_tells_which_numbers(tmp_path: Path) -> None:
    example = (torch.randn(1, 3, 32, 32, dtype=torch.bfloat16),)
    result = compress(small_vit().bfloat16(), "class_token_last_block", example=example, measure_seconds=0)
    card = json.loads((result.export(tmp_path / "bundle") / "latency.json").read_text())["onnx"]
    assert (card["dtype"], card["model_dtypes"]) == ("float32", ["bfloat16"])
    assert max(card["largest_difference"].values()) < 1e-4
