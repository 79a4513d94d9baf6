"""Merged models give what the unmerged gave, are plain, and nothing is merged that is not proven to be linear."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from compress import compress, load
from compress.passes import make_pass
from compress.passes._reparameterize_algebra import fold_norm, in_sequence, parallel
from compress.passes.base import Context, PassFailed
from compress.structure import StructureError
from nas.errors import UserMistake
from tests.compress.models import small_vit, steepened
from tests.golden_vectors import golden

torch.set_num_threads(1)
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def lively(model: Any, seed: int = 0) -> Any:
    """Batch norms as after training, so that a mistake shows."""
    generator = torch.Generator().manual_seed(seed)
    steepened(model, seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator) * 0.3)
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
    return model.eval()


def merged(model: nn.Module, x: Tensor, told: list[str] | None = None, **options: Any) -> Any:
    report = (told if told is not None else []).append
    return make_pass("reparameterize", **options).apply(model, Context(example=(x[:1],), report=report))


def kinds(model: nn.Module) -> list[str]:
    return [type(module).__name__ for module in model.modules() if not list(module.children())]


class RepBlock(nn.Module):
    """RepVGG's block, of any channels, kernels and groups; ``functional_relu`` as many write it."""

    def __init__(self, channels: int, kernels: tuple[int, ...], groups: int = 1, identity: bool = True):
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, channels, k, padding=k // 2, groups=groups, bias=False),
                nn.BatchNorm2d(channels),
            )
            for k in kernels
        )
        self.identity = nn.BatchNorm2d(channels) if identity else None

    def forward(self, x: Tensor) -> Tensor:
        y = sum(conv(x) for conv in self.convs)
        if self.identity is not None:
            y = y + self.identity(x)
        return functional.relu(y)  # type: ignore[arg-type]


@torch.no_grad()
@pytest.mark.parametrize(
    ("kernels", "groups", "identity"),
    [((3, 1), 1, True), ((3, 3, 3, 1), 8, True), ((5, 3, 1), 2, True), ((3, 3), 1, False)],
)
def test_branches_become_one_convolution(kernels: tuple[int, ...], groups: int, identity: bool) -> None:
    model = lively(
        nn.Sequential(RepBlock(8, kernels, groups, identity), RepBlock(8, kernels, groups, identity))
    ).double()
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(3, 8, 7, 6, dtype=torch.float64)
    made = merged(model, x)
    torch.testing.assert_close(made(x), model(x), **EXACT)
    assert kinds(made) == ["Conv2d", "ReLU"] * 2
    assert made[0][0].groups == groups
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(StructureError, match="Sequential: nothing to merge"):
        merged(made, x)  # nothing is left: it is idempotent
    single = merged(model.float(), x.float())
    torch.testing.assert_close(single(x.float()), model.float()(x.float()), rtol=1e-4, atol=1e-4)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.shared, self.after = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x)).relu()
        z = self.shared(y)
        return self.after(z) + z


@torch.no_grad()
def test_a_norm_is_folded_only_where_nobody_else_reads_its_input() -> None:
    model, x = lively(nn.Sequential(Residual())).double(), torch.randn(2, 4, 5, 5, dtype=torch.float64)
    made = merged(model, x, norms=True, branches=False)
    torch.testing.assert_close(made(x), model(x), **EXACT)
    assert isinstance(made[0].bn, nn.Identity)
    assert isinstance(made[0].after, nn.BatchNorm2d)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(self.act(self.conv(x))))


class Branching(nn.Module):
    """Cannot be traced, but its stem can."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.stem(x)
        return y if y.sum() > 0 else -y


@torch.no_grad()
def test_layers_used_twice_stay_and_parts_of_what_cannot_be_traced_are_found() -> None:
    x = torch.randn(2, 3, 6, 6)
    with pytest.raises(StructureError, match="Twice: nothing to merge"):
        merged(lively(Twice()), x)
    told: list[str] = []
    model = lively(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), Branching()))
    made = merged(model, x, told, sequences=False)
    torch.testing.assert_close(made(x), model(x), rtol=1e-4, atol=1e-4)
    assert told == ["merged: 2 norms"]


@torch.no_grad()
def test_linear_and_norm_only_over_channels() -> None:
    x = torch.randn(4, 6, dtype=torch.float64)
    model = lively(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU())).double()
    made = merged(model, x)
    torch.testing.assert_close(made(x), model(x), **EXACT)
    tokens = lively(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)))
    with pytest.raises(StructureError):  # here the norm is over the tokens
        merged(tokens, torch.randn(4, 5, 6))


def conv(inputs: int, outputs: int, kernel: int, **options: Any) -> nn.Conv2d:
    torch.manual_seed(inputs * 100 + outputs * 10 + kernel)
    return nn.Conv2d(inputs, outputs, kernel, **options).double()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (conv(6, 6, 1), conv(6, 8, 1)),
        (conv(3, 8, 4, stride=4), conv(8, 8, 1)),
        (conv(3, 8, 3, stride=2, padding=1, padding_mode="reflect"), conv(8, 4, 1, stride=2, bias=False)),
        (conv(6, 8, 1), conv(8, 4, 3)),
        (conv(6, 8, 1, bias=False), conv(8, 4, 3, padding=1)),
        (conv(8, 8, 1, groups=8), conv(8, 8, 3, padding=0, groups=8)),
        (conv(8, 8, 3, groups=8, padding=1), conv(8, 8, 1, groups=8)),
        (conv(8, 8, 1, groups=4), conv(8, 8, 3, groups=2)),
    ],
)
@torch.no_grad()
def test_convolutions_in_sequence(first: nn.Conv2d, second: nn.Conv2d) -> None:
    x = torch.randn(2, first.in_channels, 13, 12, dtype=torch.float64)
    made = in_sequence(first, second)
    assert made is not None
    torch.testing.assert_close(made(x), second(first(x)), **EXACT)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (conv(6, 8, 1), conv(8, 4, 3, padding=1)),  # the border would see the bias
        (conv(6, 6, 3), conv(6, 6, 3)),
        (conv(8, 8, 3, groups=8), conv(8, 16, 1)),  # a dense one costs more
        (conv(16, 2, 1), conv(2, 16, 1)),  # low rank, and cheaper as it is
        (nn.Linear(16, 2), nn.Linear(2, 16)),
        (nn.Linear(4, 4), nn.Conv1d(4, 4, 1)),
    ],
)
def test_what_is_no_cheaper_layer_stays(first: nn.Module, second: nn.Module) -> None:
    assert in_sequence(first, second) is None


@torch.no_grad()
def test_linear_layers_in_sequence_through_dropout() -> None:
    model = nn.Sequential(nn.Linear(6, 9), nn.Dropout(), nn.Linear(9, 4), nn.GELU(), nn.Linear(4, 2)).eval()
    x = torch.randn(3, 7, 6)
    made = merged(model, x)
    assert kinds(made) == ["Linear", "Dropout", "Identity", "GELU", "Linear"]
    torch.testing.assert_close(made(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["fmvit-gmlp-rule", "fmvit-gmlp-rule-identity", "fmvit-gmlp-rule-3x3"])
@torch.no_grad()
def test_golden_rule_of_groups(name: str) -> None:
    vectors = golden(name)
    args = vectors.facts["args"]
    channels, outputs = args["in_channels"], args["out_channels"]
    branches: list[nn.Module | None] = []
    for number, branch in enumerate(args["branches"]):
        kernel = branch["kernel"]
        one = nn.Conv2d(channels, outputs, kernel, padding=kernel // 2, groups=branch["groups"], bias=False)
        one.weight.copy_(vectors.state[f"convs.{number}.weight"])
        branches.append(fold_norm(one, loaded_norm(vectors.state, f"bns.{number}.", args["bn_eps"])))
    if args["identity_bn"]:
        branches.append(loaded_norm(vectors.state, "id_bn.", args["bn_eps"]))
    assert (parallel(branches) is None) == name.endswith("3x3")  # a dense 1x1 beside grouped 3x3 ones
    made: Any = parallel(branches, dearer=True)
    torch.testing.assert_close(made.weight, vectors.outputs["merged_weight"], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(made.bias, vectors.outputs["merged_bias"], rtol=1e-5, atol=2e-5)
    x = next(iter(vectors.inputs.values()))
    torch.testing.assert_close(made(x), vectors.outputs["train_form"], rtol=1e-5, atol=2e-5)


def loaded_norm(state: dict[str, Tensor], prefix: str, eps: float) -> nn.BatchNorm2d:
    values = {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}
    norm = nn.BatchNorm2d(len(values["weight"]), eps=eps)
    norm.load_state_dict(values)
    return norm.eval()


@torch.no_grad()
@pytest.mark.parametrize("more", [(), (3,)])
def test_one_branch_is_wider_and_another_higher(more: tuple[int, ...]) -> None:
    wide = nn.Conv2d(4, 6, (1, 5), padding=(0, 2), dilation=(2, 1))  # of a single row, dilation means nothing
    high = nn.Conv2d(4, 6, (3, 1), padding=(1, 0))
    branches = [one.double() for one in (wide, high, *(conv(4, 6, size, padding=1) for size in more))]
    made: Any = parallel(branches, dearer=True)
    assert made.kernel_size == (3, 5)
    assert made.padding == (1, 2)
    x = torch.randn(2, 4, 9, 7, dtype=torch.float64)
    torch.testing.assert_close(made(x), sum(one(x) for one in branches), rtol=0, atol=1e-13)
    # 15 numbers for each pair of channels instead of 5 + 3, or of 5 + 3 + 9.
    assert (parallel(branches) is None) == (not more)


def test_strided_branches_and_those_of_other_geometry() -> None:
    assert parallel([conv(4, 4, 3, padding=1, stride=2), conv(4, 4, 1, stride=2)]) is not None
    assert parallel([conv(4, 4, 3, padding=1), conv(4, 4, 1, stride=2)]) is None
    assert parallel([conv(4, 4, 3, padding=0), conv(4, 4, 1)]) is None
    assert parallel([conv(4, 4, 3, padding=1, stride=2), None]) is None
    assert parallel([conv(4, 8, 3, padding=1), None]) is None
    assert parallel([conv(8, 8, 3, padding=1, groups=8), conv(8, 8, 1)]) is None  # would cost more
    assert parallel([None, nn.BatchNorm2d(4).eval()]) is None
    assert parallel([conv(4, 4, 3, padding=1), nn.GELU()]) is None


TIMM: list[Any] = [
    ("resnet10t", 32, {}),
    pytest.param("repvgg_a0", 32, {}, marks=pytest.mark.slow),
    pytest.param("mobileone_s0", 32, {}, marks=pytest.mark.slow),
    pytest.param("fastvit_t8", 64, {}, marks=pytest.mark.slow),
    pytest.param("levit_128s", 224, {}, marks=pytest.mark.slow),
    pytest.param("repvit_m0_9", 64, {}, marks=pytest.mark.slow),
    pytest.param("mobilenetv3_small_050", 64, {}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "size", "options"), TIMM)
@torch.no_grad()
def test_timm_models_and_saving(name: str, size: int, options: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **options)
    x = torch.randn(2, 3, size, size)
    if name.startswith(
        "mobileone"
    ):  # sums of many branches, whose values grow without bounds where nothing is learned
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.mul_(0.3)
    model.eval()
    result = compress(model, "reparameterize", example=x[:1], measure_seconds=0)
    wanted = model(x)
    gap = (result.model(x) - wanted).abs().max() / wanted.abs().max()
    assert gap < 1e-4
    assert not any(isinstance(one, nn.modules.batchnorm._BatchNorm) for one in result.model.modules())
    assert result.final.params < result.steps[0].params
    if name.startswith("levit"):  # its attention keeps a table from the last call, which no file can hold
        return
    again = load(result.save(tmp_path / "saved"))
    # Not to the last bit: where weights lie in memory decides which kernel adds them up.
    torch.testing.assert_close(again.model(x), result.model(x), rtol=1e-4, atol=1e-6)


def test_a_plain_vit_is_refused() -> None:
    with pytest.raises(StructureError, match="VisionTransformer: nothing to merge: no batch norm"):
        compress(small_vit(), "reparameterize", example=torch.randn(1, 3, 32, 32), measure_seconds=0)


class Peeking(nn.Module):
    """Reads a weight behind the back of whoever looks at calls."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y * float(self.inner[0].weight.abs().sum()) if x.sum() > -1e9 else y  # type: ignore[operator]


def test_what_changes_the_outputs_is_refused() -> None:
    with pytest.raises(PassFailed, match="merged layers give other outputs than before"):
        merged(lively(Peeking()), torch.randn(1, 3, 4, 4))


def test_no_kind_at_all() -> None:
    with pytest.raises(UserMistake, match="all false; leave one true"):
        make_pass("reparameterize", own=False, norms=False, branches=False, sequences=False)
