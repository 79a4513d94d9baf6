"""``nas compress`` is thin: what it says comes from the library."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from compress import load
from nas.cli.main import main
from nas.weights import save_weights
from tests.compress.models import small_vit


def small() -> nn.Module:
    """For ``module:function``: pictures of digits, 8 x 8."""
    model: nn.Module = small_vit(img_size=8, patch_size=2, in_chans=1, num_classes=10)
    return model


def with_inputs() -> tuple[nn.Module, torch.Tensor]:
    return small(), torch.zeros(1, 1, 8, 8)


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["compress", "--measure-seconds", "0", *words])
    return int(caught.value.code or 0)


MODEL = ("--model", "tests.compress.test_cli:with_inputs")


def test_the_whole_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_weights(
        small_vit(7, img_size=8, patch_size=2, in_chans=1, num_classes=10), tmp_path / "w.safetensors"
    )
    words = (*MODEL, "--data", "digits", "--pass", "structured:epochs=1", "--pass", "token_merging:r=2")
    code = run(
        *words, "--weights", str(tmp_path / "w.safetensors"), "--out", str(tmp_path / "out"), "--no-onnx"
    )
    text = capsys.readouterr()
    assert code == 0, text.err
    assert "pass 2/2: token_merging:r=2" in text.out
    assert "accuracy" in text.out
    result = load(tmp_path / "out")
    assert [step.name for step in result.steps] == ["original", "structured:epochs=1", "token_merging:r=2"]
    assert result.model(torch.zeros(3, 1, 8, 8)).shape == (3, 10)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ((*MODEL,), "--pass: give at least one of"),
        ((*MODEL, "--pass", "oofb"), "unknown pass 'oofb' (did you mean 'ofb'?)"),
        ((*MODEL, "--pass", "structured", "--budget", "speed=2"), "budget: kind 'speed'"),
        ((*MODEL, "--pass", "structured", "--target", "cpuu"), "unknown device 'cpuu'"),
        (
            (*MODEL, "--pass", "structured", "--weights", "nowhere.safetensors"),
            "nowhere.safetensors: no such file",
        ),
        (
            ("--model", "timm:deit_tinny_patch16_224", "--pass", "structured"),
            "did you mean 'deit_tiny_patch16_224'?",
        ),
        (
            (
                "--model",
                "timm:vit_tiny_patch16_224",
                "--size",
                "32",
                "--data",
                "digits",
                "--pass",
                "structured",
            ),
            "its pictures have 1 channel(s), the model takes 3",
        ),
    ],
)
def test_mistakes_are_one_line(words: tuple[str, ...], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*words) == 2
    error = capsys.readouterr().err
    assert why in error
    assert len(error.strip().splitlines()) == 1
