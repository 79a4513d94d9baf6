"""Three counters on calls that one of them sees otherwise: transformed, split up, compiled, packed, or not at all."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.cli.main import main
from nas.errors import UserMistake
from nas.profile import compare, profile
from nas.profile.skeleton import packed_modules
from tests.nas._counting import Function, agreed

# -- counters that are not installed -----------------------------------------------------------------------------------


def without(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    for name in packages:
        monkeypatch.setitem(sys.modules, {"fvcore": "fvcore.nn", "thop": "thop.profile"}[name], None)


def linear() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """For the command line."""
    return nn.Linear(3, 5), (torch.randn(7, 3),)


@pytest.mark.parametrize("missing", [("fvcore",), ("thop",), ("fvcore", "thop")])
def test_the_others_count_without_a_counter_that_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], missing: tuple[str, ...]
) -> None:
    without(monkeypatch, *missing)
    found = compare(*linear())
    assert {each.macs for each in found.counts.values()} == {105}
    assert set(found.counts) == {"fvcore", "thop", "torch"} - set(missing)
    assert set(found.failures) == set(missing)
    with pytest.raises(SystemExit) as ended:
        main(["profile", f"{__file__}:linear"])
    assert ended.value.code == 1
    told = capsys.readouterr().out
    for name in missing:
        assert f"warning: {name} cannot count this model: the counter {name} cannot be imported (" in told
        assert f"; pip install {name}" in told
    assert any(line.split() == ["torch", "20", "15", "5"] for line in told.splitlines())


def test_without_any_counter_nothing_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "thop")
    with pytest.raises(UserMistake, match=r"the counter thop cannot be imported .*; pip install thop"):
        compare(*linear(), ["thop"])


# -- inside of vmap ----------------------------------------------------------------------------------------------------


def test_products_of_one_sample_of_many_are_named() -> None:
    layer = nn.Linear(8, 8)
    models: list[tuple[nn.Module, tuple[Tensor, ...], int]] = [
        (Function(torch.vmap(torch.mm)), (torch.randn(5, 2, 4), torch.randn(5, 4, 3)), 120),
        (Function(lambda x: torch.vmap(torch.vmap(torch.dot))(x, x)), (torch.randn(5, 2, 4),), 40),
        (Function(lambda x: torch.vmap(layer)(x)), (torch.randn(2, 8),), 128),
    ]
    for model, inputs, macs in models:
        found = compare(model, inputs)
        assert found.counts["torch"].macs == macs
        assert found.counts["thop"].uncounted == found.counts["fvcore"].uncounted == ("vmap",)
        assert found.counts["thop"].macs == 0


def test_what_is_no_product_inside_of_vmap_is_not_named() -> None:
    assert compare(Function(torch.vmap(torch.exp)), (torch.randn(5, 2),)).uncounted == ()


# -- complex numbers ---------------------------------------------------------------------------------------------------


def both(x: Tensor) -> Tensor:
    return torch.complex(x, x)


@pytest.mark.parametrize(
    ("function", "shapes", "work"),
    [
        (lambda x, w: F.conv1d(both(x), both(w)).abs(), ((2, 3, 7), (4, 3, 3)), (360, 40)),
        (
            lambda x, w: F.conv_transpose2d(both(x), both(w), stride=2).abs(),
            ((1, 3, 4, 4), (3, 2, 3, 3)),
            (864, 162),
        ),
        (
            lambda x, w: F.conv2d(both(x), both(w), both(w[:, 0, 0, 0]), padding="same").abs(),
            ((1, 3, 4, 4), (2, 3, 3, 3)),
            (864, 32),
        ),
        (
            lambda x, w: F.conv1d(input=both(x), weight=both(w), groups=3).abs(),
            ((2, 3, 7), (6, 1, 3)),
            (180, 60),
        ),
    ],
)
def test_a_complex_convolution_counts_once(
    function: Callable[..., Tensor], shapes: tuple[tuple[int, ...], ...], work: tuple[int, int]
) -> None:
    inputs = [torch.randn(shape) for shape in shapes]
    assert agreed(Function(function), *inputs) == (0, *work)


def test_a_complex_convolution_belongs_to_its_module() -> None:
    model = nn.Sequential(nn.Conv1d(3, 4, 3, dtype=torch.complex64), nn.Flatten())
    found = compare(model, (torch.randn(2, 3, 7, dtype=torch.complex64),))
    assert found.disagreements == ()
    assert {tuple(each.modules) for each in found.counts.values()} == {("0",)}
    assert profile(model, (torch.randn(2, 3, 7, dtype=torch.complex64),)).macs == 360


# -- functions that become others --------------------------------------------------------------------------------------


@torch.jit.script
def scripted(x: Tensor, y: Tensor) -> Tensor:
    return torch.matmul(x, y).relu()


def test_a_scripted_function_is_counted_or_named() -> None:
    found = compare(Function(lambda x: scripted(x, x.t())), (torch.randn(2, 8),))
    assert found.counts["thop"].macs == found.counts["torch"].macs == 32
    assert found.counts["thop"].uncounted == found.counts["torch"].uncounted == ()
    assert found.counts["fvcore"].uncounted == ("prim::CallFunction",)


WINDOW = torch.hann_window(16)


def spectrum(x: Tensor, **options: Any) -> Tensor:
    return torch.stft(x, 16, hop_length=4, window=WINDOW.to(x.device), return_complex=True, **options)


@pytest.mark.parametrize(
    ("function", "shape", "work"),
    [
        (lambda x: torch._addmm_activation(x[0, :2], x, x[:, :2]), (4, 4), (32, 8)),
        (torch.cov, (4, 6), (96, 16)),
        (torch.cov, (6,), (6, 1)),
        (torch.corrcoef, (4, 6), (96, 16)),
        (lambda x: x.cov(correction=0), (4, 6), (96, 16)),
        (lambda x: spectrum(x).abs(), (2, 64), (34 * 80, 34 * 9)),
        (lambda x: spectrum(x, onesided=False).abs(), (64,), (17 * 80, 17 * 16)),
        (lambda x: spectrum(both(x)).abs(), (64,), (17 * 160, 17 * 16)),
        (
            lambda x: torch.istft(spectrum(x), 16, hop_length=4, window=WINDOW.to(x.device)),
            (2, 64),
            (2 * 34 * 80, 34 * (9 + 16)),
        ),
    ],
)
def test_functions_that_become_others_on_the_way_to_a_device(
    function: Callable[[Tensor], Tensor], shape: tuple[int, ...], work: tuple[int, int]
) -> None:
    assert agreed(Function(function), torch.randn(shape)) == (0, *work)
    assert compare(Function(function), (torch.randn(shape),)).uncounted == ()


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda x: torch.linalg.matrix_norm(x, 2), "_linalg_svd"),
        (lambda x: torch.linalg.norm(x, "nuc"), "_linalg_svd"),
        (torch.fft.hfft2, "fft_hfft2"),
        (torch.fft.ihfft2, "fft_ihfft2"),
        (torch.fft.hfftn, "fft_hfftn"),
        (torch.fft.ihfftn, "fft_ihfftn"),
    ],
)
def test_what_they_hide_is_named_by_every_counter(function: Callable[[Tensor], Tensor], name: str) -> None:
    found = compare(Function(function), (torch.randn(8, 8),))
    assert {each.uncounted for each in found.counts.values()} == {(name,)}
    assert {each.macs for each in found.counts.values()} == {0}


def test_a_norm_that_needs_no_decomposition_is_not_named() -> None:
    assert compare(Function(torch.linalg.matrix_norm), (torch.randn(8, 8),)).uncounted == ()


# -- modules in other forms --------------------------------------------------------------------------------------------


class OptimizedModule(nn.Module):
    """The shape of what torch.compile returns, without the seconds that it takes to load."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self._orig_mod = module

    def forward(self, x: Tensor) -> Any:
        if torch._C._get_tracing_state() is not None:
            raise RuntimeError("not supported at the moment")
        return self._orig_mod(x)


def compiled() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """For the command line."""
    inner = OptimizedModule(nn.Sequential(OptimizedModule(nn.Linear(8, 4))))
    return OptimizedModule(nn.Sequential(nn.ReLU(), inner)), (torch.randn(2, 8),)


def test_a_compiled_module_is_counted_as_what_it_was_made_of(capsys: pytest.CaptureFixture[str]) -> None:
    model, inputs = compiled()
    assert agreed(model, *inputs) == (36, 64, 8)
    assert list(compare(model, inputs).counts["thop"].modules) == ["1.0"]
    assert isinstance(model, OptimizedModule)  # the model itself is left as it was
    with pytest.raises(SystemExit) as ended:
        main(["profile", f"{__file__}:compiled", "--per-module"])
    assert not ended.value.code
    assert ["1.0", "36", "32", "4"] in [line.split() for line in capsys.readouterr().out.splitlines()]


@pytest.mark.slow  # torch.compile loads its compiler
def test_what_torch_compile_made_is_counted_as_what_it_was_made_of() -> None:
    make: Callable[[nn.Module], Any] = torch.compile
    model = make(nn.Sequential(nn.ReLU(), make(nn.Linear(8, 4))))
    assert agreed(model, torch.randn(2, 8)) == (36, 64, 8)


def quantized() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """For the command line."""
    plain = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 4)))
    return torch.ao.quantization.quantize_dynamic(plain, {nn.Linear}), (torch.randn(2, 8),)


def test_packed_weights_are_told_of(capsys: pytest.CaptureFixture[str]) -> None:
    assert packed_modules(quantized()[0]) == ["0", "2.0"]
    assert packed_modules(nn.Sequential(nn.Linear(2, 2))) == []
    with pytest.raises(SystemExit):
        main(["profile", f"{__file__}:quantized"])
    told = capsys.readouterr().out
    assert "not among the parameters, because they are packed: the quantized weights of 0, 2.0" in told
