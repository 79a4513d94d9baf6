"""``nas compress`` is thin: what it says comes from the library."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from timm.layers.mlp import Mlp
from torch import nn

from compress import load
from nas.cli.main import main
from nas.weights import save_weights
from tests.compress.models import small_vit
from tests.nas._images import corpus, write_folder


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


class Mine(nn.Module):
    """Of a package that no saved model may use unasked."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Mlp(8, 32), Mlp(8, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.blocks(x)
        return made


def mine() -> tuple[nn.Module, torch.Tensor]:
    return Mine(), torch.zeros(1, 3, 8)


def colour() -> tuple[nn.Module, torch.Tensor]:
    model: nn.Module = small_vit(img_size=16, patch_size=4, num_classes=10)
    return model, torch.zeros(1, 3, 16, 16)


def wide() -> tuple[nn.Module, torch.Tensor]:
    model: nn.Module = small_vit(img_size=(8, 16), patch_size=4, num_classes=10, in_chans=1)
    return model, torch.zeros(1, 1, 8, 16)


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


def test_digits_for_a_model_of_larger_pictures_in_colour(capsys: pytest.CaptureFixture[str]) -> None:
    code = run("--model", "tests.compress.test_cli:colour", "--data", "digits", "--pass", "token_merging:r=2")
    text = capsys.readouterr()
    assert code == 0, text.err
    assert "--data: images resized to 16x16" in text.out
    assert "--data: grey images given as 3 equal channels" in text.out
    assert "accuracy" in text.out


def test_pictures_as_wide_and_as_high_as_the_model_takes_them(capsys: pytest.CaptureFixture[str]) -> None:
    code = run("--model", "tests.compress.test_cli:wide", "--data", "digits", "--pass", "token_merging:r=1")
    text = capsys.readouterr()
    assert code == 0, text.err
    assert "--data: images resized to 8x16" in text.out


def test_colour_for_a_model_of_grey_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data = write_folder(tmp_path / "data", corpus({"": 5}))
    assert run(*MODEL, "--data", str(data), "--pass", "structured") == 2
    error = capsys.readouterr().err
    assert "channels=1: the images of 'data' have 3" in error
    assert "give a model that takes 3" in error
    assert len(error.strip().splitlines()) == 1


def test_names_and_figures_are_whole_in_a_pipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert run(*MODEL, "--pass", "structured:ratio=0.4") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "structured:ratio=0.4" in lines
    assert "…" not in "".join(lines)


def test_what_was_written_is_compressed_further(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert run(*MODEL, "--pass", "structured:ratio=0.4", "--out", str(first), "--no-onnx") == 0
    words = ("--model", str(first), "--pass", "token_merging:r=2")
    assert run(*words, "--out", str(second), "--no-onnx") == 0, capsys.readouterr().err
    start, end = load(first), load(second)
    assert end.original.params == start.final.params
    assert end.final.macs < start.final.macs
    assert run("--model", str(first), "--size", "16", "--pass", "structured") == 2
    assert "compressed for its own size; leave --size out" in capsys.readouterr().err


def test_what_was_written_of_a_foreign_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--model", "tests.compress.test_cli:mine", "--pass", "emoe:layers=[0],keep=anyway,epochs=0")
    assert run(*words, "--out", str(tmp_path / "out"), "--no-onnx") == 0, capsys.readouterr().err
    assert run("--model", str(tmp_path / "out"), "--pass", "emoe:layers=[1],keep=anyway") == 2
    error = capsys.readouterr().err
    assert "the saved model uses 'tests.compress.test_cli:Mine'" in error
    assert "a module:function can: it returns (compress.load(...).model, inputs)" in error
    assert len(error.strip().splitlines()) == 1


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
            (*MODEL, "--pass", "structured", "--data", "generated-clicks"),
            "--data generated-clicks: belongs to --task click_through_rate; give that too",
        ),
        (
            (*MODEL, "--pass", "structured", "--data", "generated-grammar"),
            "--data generated-grammar: belongs to --task translation; give that too",
        ),
    ],
)
def test_mistakes_are_one_line(words: tuple[str, ...], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*words) == 2
    error = capsys.readouterr().err
    assert why in error
    assert len(error.strip().splitlines()) == 1
