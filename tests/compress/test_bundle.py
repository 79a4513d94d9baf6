"""The bundle: an ONNX file that computes the same at any batch, and a latency card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from compress import compress, load
from compress.passes import make_pass
from nas.files import sha256_file
from nas.onnx_file import check_onnx, write_onnx
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


@pytest.mark.slow
def test_the_card_of_a_bundle_tells_which_numbers(tmp_path: Path) -> None:
    example = (torch.randn(1, 3, 32, 32, dtype=torch.bfloat16),)
    result = compress(small_vit().bfloat16(), "class_token_last_block", example=example, measure_seconds=0)
    card = json.loads((result.export(tmp_path / "bundle") / "latency.json").read_text())["onnx"]
    assert (card["dtype"], card["model_dtypes"]) == ("float32", ["bfloat16"])
    assert max(card["largest_difference"].values()) < 1e-4
