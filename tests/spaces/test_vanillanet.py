"""VanillaNet: official vectors, schedule and counts, merging, files of the original's layout, the search space."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from nas.profile import profile
from spaces import ImageSignature, SpaceError, TranslationSignature, UserMistake, get_space
from spaces.layers.series_activation import SeriesActivation
from spaces.vision._vanillanet_merging import fold_norm, merge_layers
from spaces.vision.vanillanet import (
    VanillaBlock,
    VanillaNet,
    convert_vanillanet_state,
    count_macs,
    identity_share,
    load_series_activation,
    load_vanilla_block,
    load_vanillanet,
    plan,
)
from tests.golden_vectors import GOLDEN, golden_json

PUBLISHED = golden_json("vanillanet-variants")
IMAGENET = ImageSignature(3, 224, 224, 1000)
SMALL: dict[str, Any] = {"classes": 5, "dims": (6, 8, 12), "strides": (1, 2), "terms": 1}


class Vectors:
    """The files of one run; ``part("state")`` is what is named ``state.*``."""

    def __init__(self, name: str):
        self.facts = golden_json(name)
        self.tensors = load_file(GOLDEN / f"{name}.safetensors")

    def part(self, part: str) -> dict[str, Tensor]:
        return {
            key.removeprefix(f"{part}."): value
            for key, value in self.tensors.items()
            if key.startswith(f"{part}.")
        }

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=1e-5)


def network(vectors: Vectors, part: str = "state") -> VanillaNet:
    args = vectors.facts["args"]
    adaptive: dict[str, Any] = {}
    if "ada_pool" in args:
        adaptive = {"pools": args["ada_pool"], "stem_stride": 3, "stem_padding": 1}
    dropout = args.get("drop_rate", 0.0)
    return load_vanillanet(vectors.part(part), strides=args["strides"], dropout=dropout, **adaptive)


def trained(model: nn.Module, seed: int = 0) -> Any:
    """Statistics and weights that are not those of a new model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                noise = torch.rand(value.shape, generator=generator).to(value)
                value.copy_(noise + 0.5 if "var" in name else noise - 0.4)
    return model.eval()


class TestGolden:
    @pytest.mark.parametrize("name", ["vanillanet-activation", "vanillanet-activation-n1"])
    def test_activation(self, name: str) -> None:
        vectors = Vectors(name)
        act = load_series_activation(vectors.part("state"))
        assert act.config() == {
            "dim": vectors.facts["args"]["dim"],
            "terms": vectors.facts["args"]["act_num"],
            "folded": False,
        }
        with torch.no_grad():
            close(act(vectors["input.x"]), vectors["output.train_form"])
            folded = act.fold()
            close(folded(vectors["input.x"]), vectors["output.deploy_form"])
            official = load_series_activation(vectors.part("deploy_state"))
            close(official(vectors["input.x"]), vectors["output.deploy_form"])
            bare = SeriesActivation(act.weight.shape[0], act.terms, folded=True)
            bare.weight.copy_(act.weight)
            close(bare(vectors["input.x"]), vectors["mid.relu_dwconv_before_bn"])
        for key, value in vectors.part("deploy_state").items():
            close(folded.state_dict()[key], value)

    @pytest.mark.parametrize("name", ["vanillanet-block", "vanillanet-block-s1", "vanillanet-block-adapool"])
    @torch.no_grad()
    def test_block(self, name: str) -> None:
        vectors = Vectors(name)
        args = vectors.facts["args"]
        pool = args.get("ada_pool")
        block = load_vanilla_block(vectors.part("state"), stride=args["stride"], pool=pool)
        for share in (0.0, 0.3, 1.0):
            block.set_identity(share)
            close(block(vectors["input.x"]), vectors[f"output.act_learn_{share}"])
        close(block.merge()(vectors["input.x"]), vectors["output.deploy"])
        official = load_vanilla_block(vectors.part("deploy_state"), stride=args["stride"], pool=pool)
        close(official(vectors["input.x"]), vectors["output.deploy"])
        assert official.config() == block.merge().config()
        for key, value in official.state_dict().items():
            close(block.merge().state_dict()[key], value)

    @pytest.mark.parametrize("name", ["vanillanet-e2e", "vanillanet-e2e-adapool"])
    @torch.no_grad()
    def test_network(self, name: str) -> None:
        vectors = Vectors(name)
        model, image = network(vectors), vectors["input.x"]
        for share in (0.0, 0.3, 1.0):
            model.set_identity(share)
            close(model(image), vectors[f"output.act_learn_{share}"])
        x = model.stem_act(model.stem(image))
        close(x, vectors["mid.stem_lambda1"])
        for number, block in enumerate(model.blocks):
            x = block(x)
            close(x, vectors[f"mid.stage{number}_lambda1"])
        merged, official = model.merge(), network(vectors, "deploy_state")
        for one in (merged, official):
            close(one(image), vectors["output.deploy"])
            assert sum(p.numel() for p in one.parameters()) == vectors.facts["params_deploy_form"]
            assert one.config() == {**model.config(), "form": "merged"}
        for key, value in official.state_dict().items():
            close(merged.state_dict()[key], value)
        assert sum(p.numel() for p in model.parameters()) == vectors.facts["params_train_form"]

    @torch.no_grad()
    def test_eps(self) -> None:
        vectors = Vectors("vanillanet-eps")
        model = network(vectors)
        for share in (0.5, 1.0):
            model.set_identity(share)
            close(model(vectors["input.x"]), vectors[f"output.act_learn_{share}"])
        close(model.merge()(vectors["input.x"]), vectors["output.deploy"])

    def test_training_step(self) -> None:
        vectors = Vectors("vanillanet-trainstep")
        model = network(vectors).train()
        model.set_identity(vectors.facts["act_learn"])
        logits = model(vectors["input.x"])
        wanted = 0.9 * nn.functional.one_hot(vectors["input.target"], 5) + 0.1 / 5
        loss = nn.functional.binary_cross_entropy_with_logits(logits, wanted)
        loss.backward()
        close(logits, vectors["output.logits"])
        close(loss, vectors["output.loss"])
        parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
        gradients = convert_vanillanet_state(vectors.part("grad"))
        assert gradients.keys() == parameters.keys()
        for key, value in gradients.items():
            gradient = parameters[key].grad
            assert gradient is not None
            close(gradient, value)
        for key, value in convert_vanillanet_state(vectors.part("after")).items():
            close(buffers[key], value)

    @pytest.mark.parametrize("schedule", ["linear", "cosine"])
    def test_schedule(self, schedule: str) -> None:
        wanted = Vectors("vanillanet-schedule")[f"output.{schedule}"]
        ours = [identity_share(epoch, 100, schedule) for epoch in range(101)]
        torch.testing.assert_close(torch.tensor(ours), wanted, atol=1e-6, rtol=0)
        assert identity_share(170, 100, schedule) == 1
        assert identity_share(0, 0, schedule) == 1

    @pytest.mark.parametrize("name", PUBLISHED)
    def test_counts(self, name: str) -> None:
        facts, space = PUBLISHED[name], get_space("vanillanet:imagenet")
        for form, suffix in (("merged", ""), ("deep", "_train_form")):
            wanted = plan(space.published[name], IMAGENET, form=form)
            with torch.device("meta"):
                model = VanillaNet(**wanted)
            assert sum(p.numel() for p in model.parameters()) == facts[f"params{suffix}"]
            assert count_macs((224, 224), **wanted) == facts[f"macs{suffix}"]


class TestNetwork:
    @pytest.mark.parametrize("form", ["deep", "plain", "merged"])
    @pytest.mark.parametrize("size", [(16, 16), (21, 34)])
    def test_macs_and_config(self, form: str, size: tuple[int, int]) -> None:
        arguments = SMALL | {"channels": 2, "form": form, "pools": [None, (2, 3)], "dropout": 0.2}
        model = trained(VanillaNet(**arguments))
        image = torch.randn(2, 2, *size)
        assert profile(model, (image[:1],)).macs == count_macs(size, **arguments)
        again = VanillaNet(**model.config())
        again.load_state_dict(model.state_dict())
        assert torch.equal(again.eval()(image), model(image))
        block = VanillaBlock(**model.blocks[1].config())
        assert block.state_dict().keys() == model.blocks[1].state_dict().keys()

    @pytest.mark.parametrize("form", ["deep", "plain", "merged"])
    @torch.no_grad()
    def test_merged_is_equal(self, form: str) -> None:
        model = trained(VanillaNet(**SMALL, form=form)).double()
        before = copy.deepcopy(model.state_dict())
        image = torch.randn(3, 3, 24, 24, dtype=torch.float64)
        merged = model.merge()
        torch.testing.assert_close(merged(image), model(image), atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(merged.float()(image.float()), model(image).float(), atol=1e-4, rtol=1e-5)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert merged.config()["form"] == "merged"
        assert all(p.is_contiguous() for p in merged.parameters())

    def test_merging_needs_the_identity(self) -> None:
        model = VanillaNet(**SMALL)
        model.set_identity(0.5)
        with pytest.raises(UserMistake, match=r"identity only to a share of 0\.5; merging needs 1"):
            model.merge()
        with pytest.raises(UserMistake, match=r"share=1\.5 must be in \[0, 1\]"):
            model.set_identity(1.5)

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            ({"form": "doubled"}, "form='doubled' must be one of deep, plain, merged"),
            ({"strides": (2,)}, r"dims=\[6, 8, 12\] must have one number more than strides=\[2\]"),
            ({"strides": (1, 3)}, "stride=3 must be 1, or 2"),
            ({"pools": [None]}, "must have 2 entries"),
            ({"terms": (1, 2)}, r"terms=\[1, 2\] must be one number, or 3"),
            ({"terms": -1}, "terms=-1 at least 0"),
        ],
    )
    def test_contradictions(self, change: dict[str, Any], text: str) -> None:
        with pytest.raises(UserMistake, match=text):
            VanillaNet(**(SMALL | change))

    def test_schedule_arguments(self) -> None:
        with pytest.raises(UserMistake, match="schedule='step' must be one of linear, cosine"):
            identity_share(1, 2, "step")
        with pytest.raises(UserMistake, match="epoch=-1 and decay_epochs=2 must be at least 0"):
            identity_share(-1, 2)

    def test_foreign_states(self) -> None:
        state = Vectors("vanillanet-e2e").part("state")
        with pytest.raises(
            UserMistake, match=r"state lacks 'stem1\.0\.weight'; expected .* official VanillaNet"
        ):
            load_vanillanet({"weight": torch.zeros(1)})
        with pytest.raises(UserMistake, match=r"is not of a VanillaNet: .*head\.2\.bias"):
            load_vanillanet({key: value for key, value in state.items() if key != "cls1.2.bias"})
        with pytest.raises(UserMistake, match=r"state lacks 'weight'"):
            load_series_activation({})


class TestMerging:
    @pytest.mark.parametrize(
        ("first", "second"),
        [
            (nn.Linear(3, 7), nn.Linear(7, 2, bias=False)),
            (nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Conv2d(4, 5, 1, stride=2)),
            (nn.Conv2d(3, 4, 3, padding=2, dilation=2, padding_mode="reflect"), nn.Conv2d(4, 5, 1)),
            (nn.Conv2d(3, 4, (3, 5), padding="same", bias=False), nn.Conv2d(4, 5, 1, padding="same")),
            (nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 3, stride=2, dilation=2)),
            (nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 3, padding=1, padding_mode="circular")),
            (nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 5, 3, padding=1)),
            (nn.Conv1d(3, 4, 5, padding=2), nn.Conv1d(4, 5, 1)),
            (nn.Conv3d(3, 4, 1), nn.Conv3d(4, 5, 2)),
        ],
    )
    def test_is_exact(self, first: Any, second: Any) -> None:
        first, second = first.double(), second.double()
        shape = (2, 3) if isinstance(first, nn.Linear) else (2, 3, *[9] * (first.weight.dim() - 2))
        x = torch.randn(shape, dtype=torch.float64)
        merged = merge_layers(first, second)
        assert type(merged) is type(first)
        torch.testing.assert_close(merged(x), second(first(x)), atol=1e-12, rtol=1e-12)

    @pytest.mark.parametrize(
        ("first", "second", "text"),
        [
            (nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 3, padding=1), "do not pass the bias of the first"),
            (nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3), "none of the two convolutions is 1x1"),
            (nn.Conv2d(3, 4, 1, stride=2), nn.Conv2d(4, 5, 3), "none of the two convolutions is 1x1"),
            (nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 5, 1), "would become a dense one"),
            (nn.Conv2d(3, 4, 3, padding="same"), nn.Conv2d(4, 5, 1, stride=2), "no strided convolution"),
            (nn.Linear(3, 4), nn.Conv1d(4, 5, 1), "a Linear and a Conv1d do not merge"),
        ],
    )
    def test_is_refused(self, first: nn.Module, second: nn.Module, text: str) -> None:
        with pytest.raises(UserMistake, match=f"layers cannot be merged: .*{text}"):
            merge_layers(first, second)

    @pytest.mark.parametrize("affine", [True, False])
    def test_norms(self, affine: bool) -> None:
        for layer, norm, shape in (
            (nn.Linear(3, 4), nn.BatchNorm1d(4, affine=affine), (5, 3)),
            (nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, affine=affine), (5, 3, 6, 6)),
        ):
            both = trained(nn.Sequential(layer, norm)).double()
            x = torch.randn(shape, dtype=torch.float64)
            torch.testing.assert_close(fold_norm(both[0], both[1])(x), both(x), atol=1e-12, rtol=1e-12)
        with pytest.raises(UserMistake, match="keeps no running statistics"):
            fold_norm(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False))
        with pytest.raises(UserMistake, match="a LayerNorm is no batch norm"):
            fold_norm(nn.Linear(3, 4), nn.LayerNorm(4))


class TestSpace:
    def test_small_images(self) -> None:
        space = get_space("vanillanet")
        for side in (8, 28, 64):
            model = space.build(space.published["deep"], ImageSignature(1, side, side, 10))
            assert model(torch.randn(2, 1, side, side)).shape == (2, 10)
        with pytest.raises(SpaceError, match="3 poolings need images of at least 8 pixels per side, not 6x9"):
            space.build(space.published["plain"], ImageSignature(1, 6, 9, 10))

    def test_other_tasks_are_refused(self) -> None:
        space = get_space("vanillanet")
        with pytest.raises(SpaceError, match="vanillanet is for images, but the task is translation"):
            space.build(space.published["plain"], TranslationSignature(10, 10, 5))

    def test_published_adaptive_pooling(self) -> None:
        space = get_space("vanillanet:imagenet")
        sizes = plan(space.published["vanillanet_13_x1_5_ada_pool"], IMAGENET)["pools"]
        assert [one[0] if one else 0 for one in sizes] == [0, 38, 19, 0, 0, 0, 0, 0, 0, 10, 0]
