"""Three counters of parameters, MACs and activations: on whole models, where they fail, from the command line."""

from __future__ import annotations

import importlib
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.cli.main import main
from nas.errors import UserMistake
from nas.profile import Comparison, compare, count, formulas, inclusive, profile, register_formula
from spaces import SearchSpace, get_space, list_spaces
from spaces.sequence.efficient_transformer import (
    count_macs,
    count_translation_macs,
    image_plan,
    translation_plan,
)
from spaces.sequence.hiformer import count_macs as hiformer_macs
from spaces.sequence.hiformer import hiformer_plan
from spaces.signature import ClickThroughRateSignature, ImageSignature, TranslationSignature
from tests.nas._counting import Function, agreed

# -- models ------------------------------------------------------------------------------------------------------------


def vit(width: int, depth: int = 12, classes: int = 1000, extra: int = 1) -> int:
    tokens = 196 + extra
    block = tokens * 12 * width * width + 2 * tokens * tokens * width
    return 196 * width * 768 + depth * block + extra * width * classes


def stages(widths: Sequence[int], depths: Sequence[int], per_token: Callable[[int], int]) -> int:
    """Pyramids of 4x4 patches that halve each side between stages through 2x2 patches."""
    macs = 56 * 56 * 48 * widths[0] + 1000 * widths[-1]
    for index, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        tokens = (56 >> index) ** 2
        macs += depth * tokens * per_token(width)
        if index:
            macs += tokens * 4 * widths[index - 1] * width
    return macs


def swin(width: int) -> int:
    return 12 * width * width + 2 * 49 * width


def convnext(width: int) -> int:
    return 49 * width + 8 * width * width


WIDTHS = (96, 192, 384, 768)


@pytest.mark.parametrize(
    ("name", "params", "macs"),
    [
        ("deit_tiny_patch16_224", 5_717_416, 1_253_683_200),
        ("deit_small_patch16_224", 22_050_664, 4_598_882_304),
        ("deit_base_patch16_224", 86_567_656, 17_563_828_224),
        ("deit_tiny_distilled_patch16_224", 5_910_800, 1_261_003_776),
        ("vit_base_patch16_224", 86_567_656, 17_563_828_224),
        ("deit3_small_patch16_224", 22_059_496, 4_598_882_304),
        ("swin_tiny_patch4_window7_224", 28_288_354, 4_490_566_656),
        ("convnext_tiny", 28_589_128, 4_455_531_264),
        ("resnet50", 25_557_032, 4_089_184_256),
        ("efficientnet_b0", 5_288_548, 385_814_752),
        ("mobilevit_xs", 2_317_848, 1_025_911_808),
        ("pvt_v2_b0", 3_666_760, 566_065_664),
        *(
            pytest.param(*row, marks=pytest.mark.slow)
            for row in (
                ("tnt_s_patch16_224", 23_768_584, 5_216_875_008),
                ("coat_tiny", 5_498_540, 4_316_447_208),  # shares modules between blocks
                ("xcit_nano_12_p16_224", 3_053_224, 550_952_448),
                ("cait_xxs24_224", 11_956_264, 2_523_475_200),  # modules that are called with parameters
                ("crossvit_tiny_240", 7_014_800, 1_562_734_080),
                ("levit_128s", 7_777_058, 304_660_832),
                ("lambda_resnet26t", 10_958_272, 3_003_465_728),
                ("halonet26t", 12_480_288, 3_172_810_752),
                ("hiera_tiny_224", 27_910_216, 4_900_830_720),
            )
        ),
    ],
)
def test_models_of_timm(name: str, params: int, macs: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    found = agreed(model, torch.empty(1, *model.default_cfg["input_size"], device="meta"))
    assert found[:2] == (params, macs)


def test_the_figures_of_timm_models_are_their_closed_forms() -> None:
    assert vit(192) == 1_253_683_200
    assert vit(384) == 4_598_882_304
    assert vit(768) == 17_563_828_224
    assert vit(192, extra=2) == 1_261_003_776
    assert stages(WIDTHS, (2, 2, 6, 2), swin) == 4_490_566_656
    assert stages(WIDTHS, (3, 3, 9, 3), convnext) == 4_455_531_264


def test_a_batch_costs_as_many_times_as_it_has_samples() -> None:
    with torch.device("meta"):
        model = timm.create_model("deit_tiny_patch16_224", depth=2)
    one, three = (agreed(model, torch.empty(batch, 3, 224, 224)) for batch in (1, 3))
    assert (three[0], three[1], three[2]) == (one[0], 3 * one[1], 3 * one[2])


def scales() -> Iterator[str]:
    for name, names in list_spaces().items():
        for scale in names:
            yield f"{name}:{scale}"


@pytest.mark.parametrize("scale", scales())
def test_architectures_of_the_spaces(scale: str) -> None:
    space = get_space(scale)
    assert space.baseline is not None
    _check(space, [space.published[space.baseline], space.sample(random.Random(0))])


@pytest.mark.slow
@pytest.mark.parametrize("scale", scales())
def test_every_published_architecture_of_the_spaces(scale: str) -> None:
    space = get_space(scale)
    rng = random.Random(1)
    _check(space, [*space.published.values(), *(space.sample(rng) for _ in range(3))])


def _check(space: SearchSpace, architectures: Sequence[Any]) -> None:
    for architecture in architectures:
        model, inputs, macs = built(space, architecture)
        counted = agreed(model, *inputs)[1]
        assert macs in (counted, None), space.key(architecture)


def built(space: SearchSpace, architecture: Any) -> tuple[nn.Module, tuple[Tensor, ...], int | None]:
    """A model, inputs, and its MACs in closed form; those of other spaces are in their own tests."""
    scale = space.name.partition(":")[2]
    signature: Any
    if space.task == "translation":
        signature = TranslationSignature(100, 100, 32)
        with torch.device("meta"):
            model = space.build(architecture, signature)
        plan = translation_plan(scale, architecture)
        inputs = torch.ones(1, 11, dtype=torch.long), torch.ones(1, 9, dtype=torch.long)
        return model, inputs, count_translation_macs(11, 9, **plan) + 9 * plan["dims"][1] * 100
    if space.task == "click_through_rate":
        signature = ClickThroughRateSignature((9, 8, 7, 6), (1, 1, 3, 1), 5, outputs=2)
        with torch.device("meta"):
            model = space.build(architecture, signature)
        features = torch.ones(1, 6, dtype=torch.long), torch.ones(1, 5)
        return model, features, hiformer_macs(signature, **hiformer_plan(architecture, signature))
    side = 32 if scale == "small" else 224
    signature = ImageSignature(3, side, side, 10)
    with torch.device("meta"):
        model = space.build(architecture, signature)
    ours = space.name.startswith("efficient_transformer")
    macs = count_macs(signature, **image_plan(architecture, signature)) if ours else None
    return model, (torch.empty(1, 3, side, side),), macs


def test_the_sheet_of_efficient_transformer() -> None:
    """Figures of the official modules for softmax attention, which ours does alike."""
    space = get_space("efficient_transformer:cifar10")
    model, inputs, _ = built(space, space.published["searched_87.4_softmax"])
    assert agreed(model, *inputs)[:2] == (24_357_386, 5_139_462_912)


# -- what goes wrong ---------------------------------------------------------------------------------------------------


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x @ x


class Hidden(nn.Module):
    """A product that a jit trace shows as one opaque node."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(nn.Linear(8, 8), Function(lambda x: Square.apply(x)))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.blocks(x)
        return y


def hidden() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """For the command line."""
    return Hidden(), (torch.randn(1, 8, 8),)


def test_a_disagreement_names_the_module() -> None:
    found = compare(*hidden())
    assert [(line.module, line.figure) for line in found.disagreements] == [
        ("blocks.1", "macs"),
        ("blocks.1", "activations"),
    ]
    assert found.disagreements[0].values == {"fvcore": 0, "thop": 512, "torch": 512}
    assert str(found.disagreements[0]) == "blocks.1: macs fvcore 0, thop 512, torch 512"
    assert found.uncounted == ("prim::PythonOp.Square",)
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["agree"] is False
    assert plain["counters"]["torch"]["modules"]["blocks"]["macs"] == 1024


def test_kernels_of_others_until_somebody_gives_a_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    product: Any = torch.library.custom_op("nas_counters::product", mutates_args=())(_product)
    product.register_fake(lambda a, b: a.new_empty(a.shape[0], b.shape[1]))
    model = Function(lambda a, b: product(b=b, a=a))
    inputs = torch.randn(3, 4), torch.randn(4, 5)
    before = compare(model, inputs)
    assert {each.uncounted for each in before.counts.values()} == {("nas_counters::product",)}
    assert before.counts["torch"].macs == 0
    monkeypatch.setattr(formulas, "_REGISTERED", {})
    register_formula("nas_counters::product", lambda given, made: (given[0][1] * 15, 15))
    assert agreed(model, *inputs) == (0, 60, 15)
    assert compare(model, inputs).uncounted == ()


def _product(a: Tensor, b: Tensor) -> Tensor:
    return a @ b


@pytest.mark.parametrize("name", ["product", "aten::mm", "nas_counters::", "::product"])
def test_formulas_are_for_operators_of_others(name: str) -> None:
    with pytest.raises(ValueError, match="must be 'library::name' of a library other than aten"):
        register_formula(name, lambda given, made: (0, 0))


class Unpadded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 5)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        tokens: Tensor = self.linear(x[keep])
        return F.scaled_dot_product_attention(tokens[None], tokens[None], tokens[None])


def test_control_flow_that_reads_values_is_counted_with_data() -> None:
    keep = torch.tensor([True, True, True, False])
    assert agreed(Unpadded(), torch.randn(4, 4), keep)[1] == 3 * 4 * 5 + 2 * 3 * 3 * 5
    found = compare(Unpadded(), (torch.randn(4, 4), keep))
    assert {each.method for each in found.counts.values()} == {"data"}


class Untraceable(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_tracing():
            raise RuntimeError("not for tracing")
        return x @ x


def test_a_counter_that_cannot_follow_is_told_of_and_the_others_go_on() -> None:
    found = compare(Untraceable(), (torch.randn(4, 4),))
    assert found.failures == {"fvcore": "not for tracing"}
    assert {each.macs for each in found.counts.values()} == {64}
    assert found.to_dict()["agree"] is False


def test_a_model_that_fails_fails_with_its_own_error() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        compare(nn.Linear(4, 4), (torch.randn(2, 5),))


def test_unknown_and_missing_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserMistake, match=r"counter 'thob' must be one of fvcore, thop, torch.*thop"):
        count("thob", nn.Linear(2, 2), (torch.randn(1, 2),))
    for name in ("fvcore.nn", "thop.profile"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("fvcore", "thop"):
        with pytest.raises(UserMistake, match=f"counter {name} cannot be imported .*pip install {name}"):
            count(name, nn.Linear(2, 2), (torch.randn(1, 2),))


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    compare(model, (torch.randn(2, 4),))
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_alone_they_miss_attention() -> None:
    """What our handlers are for; should a counter learn it, this says that the handler can go."""
    with torch.device("meta"):
        model = timm.create_model("deit_tiny_patch16_224").eval()
        image = torch.empty(1, 3, 224, 224)
    attention = 12 * 2 * 197 * 197 * 192
    thop = importlib.import_module("thop.profile")
    alone = thop.profile(model, (image,), verbose=False)[0]
    assert alone < 1_253_683_200 - 0.9 * attention  # it also counts norms, which the convention leaves out
    assert profile(model, (image,)).macs == 1_253_683_200


def test_inclusive_sums() -> None:
    own = {"a.b.c": formulas.Work(1, 10), "a": formulas.Work(2, 20), "": formulas.Work(4, 40)}
    assert inclusive(own) == {"": (7, 70), "a": (3, 30), "a.b": (1, 10), "a.b.c": (1, 10)}


# -- command line ------------------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main(["profile", *arguments])
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out + printed.err


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    code, text = run(
        capsys, "timm:deit_tiny_patch16_224", "--batch", "2", "--per-module", "--json", str(path)
    )
    assert code == 0
    assert "called with 2x3x224x224" in text
    assert text.count("2,507,366,400") == 4  # three counters and the model in the table of modules
    assert text.index("blocks.9.mlp.fc2") < text.index("blocks.10.mlp.fc2")
    assert text.splitlines()[-1] == "fvcore, thop, torch agree exactly, module by module"
    plain = json.loads(path.read_text())
    assert plain["agree"] is True
    assert plain["inputs"] == [[2, 3, 224, 224]]
    assert plain["counters"]["thop"]["modules"]["blocks.0.attn.qkv"]["macs"] == 2 * 197 * 192 * 576


def test_the_command_warns_of_a_disagreement(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run(capsys, f"{__file__}:hidden", "--per-module")
    assert code == 1
    assert "warning: the counters disagree on blocks.1: macs fvcore 0, thop 512, torch 512" in text
    assert "MACs fvcore" in text
    assert "not counted: prim::PythonOp.Square" in text
    assert "agree exactly" not in text


def test_the_command_with_a_model_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run(capsys, "timm:deit_tinny_patch16_224")
    assert code == 2
    assert text.startswith("error: ")


def test_a_comparison_of_one_counter_has_nothing_to_disagree_with() -> None:
    found: Comparison = compare(nn.Linear(2, 3), (torch.randn(1, 2),), ["thop"])
    assert (list(found.counts), found.disagreements) == (["thop"], ())
