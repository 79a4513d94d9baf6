"""The bundle: an ONNX file that computes the same at any batch, and a latency card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compress import compress, load
from compress.bundle import check_onnx, write_onnx
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
