"""OFB: states of the original's networks at sizes and settings that the reference vectors do not have.

Expected values are plain models whose weights are multiplied by the bi-mask in its closed form.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from compress.passes._ofb_cost import OfficialMacs, expected_widths
from compress.passes.ofb import Dimensions, Supernet, load_searched, load_searching
from nas.errors import UserMistake
from tests.compress.ofb_models import vit
from tests.compress.test_ofb_official_options import CHANNELS, CLOSE, HEADS, HIDDEN, LAM, bimask, wave
from tests.golden_vectors import golden

# States of a whole network

OFF: dict[str, dict[str, Any]] = {
    "embedding": {"embedding": False},
    "attention": {"heads": False, "channels": False},
    "mlp": {"mlp": False},
}


def original_state(model: VisionTransformer, off: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """A state in its search as the original names it, the dummies of what is not searched within."""
    width, patch = model.embed_dim, model.patch_embed.patch_size[0]
    block: Any = model.blocks[0]
    attention, mlp = block.attn, block.mlp
    hidden = mlp.fc1.out_features
    counts = {
        "attn": (len(HEADS[attention.num_heads]), len(CHANNELS[attention.head_dim])),
        "mlp": (1, len(HIDDEN[hidden])),
    }
    scores = {"attn": (attention.num_heads, attention.head_dim), "mlp": (1, hidden)}
    shapes: dict[str, tuple[int, ...]] = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    shapes |= {"mask_token": (1, 1, width), "alpha_patch": (1, 5)}
    shapes |= {"decoder.0.weight": (3 * patch**2, width, 1, 1), "decoder.0.bias": (3 * patch**2,)}
    for index in range(len(model.blocks)):
        for name, kind in (("attn", "attention"), ("mlp", "mlp")):
            searched = kind not in off
            shapes[f"blocks.{index}.{name}.alpha"] = counts[name] if searched else (1, 1)
            shapes |= {f"blocks.{index}.{name}.score": scores[name]} if searched else {}
    searched = "embedding" not in off
    step = min(width // 32, 12)
    shapes["patch_embed.alpha"] = (1, len(range(width // 2, width + 1, step))) if searched else (1,)
    shapes |= {"patch_embed.score": (1, width)} if searched else {}
    return {name: 0.3 * wave(size, i % 17) for i, (name, size) in enumerate(shapes.items())}


def masks(model: VisionTransformer, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The bi-mask of everything that has a score, by the name of its module."""
    block: Any = model.blocks[0]
    width = model.embed_dim
    grids: dict[str, tuple[int, tuple[list[int], list[int]]]] = {
        "attn": (block.attn.num_heads, (HEADS[block.attn.num_heads], CHANNELS[block.attn.head_dim])),
        "mlp": (1, ([1], HIDDEN[block.mlp.fc1.out_features])),
        "patch_embed": (1, ([1], list(range(width // 2, width + 1, min(width // 32, 12))))),
    }
    found = {}
    for name, score in state.items():
        owner, _, last = name.rpartition(".")
        if last == "score":
            heads, options = grids[owner.rpartition(".")[2]]
            found[owner] = bimask(state[f"{owner}.alpha"], score, heads, options)
    return found


FIRST = {"attn": "qkv", "mlp": "fc1", "patch_embed": "proj"}


def folded(model: Any, state: dict[str, Tensor], factors: dict[str, Tensor]) -> Any:
    """A copy of the plain ``model`` with the weights of ``state``, multiplied by ``factors``."""
    plain = copy.deepcopy(model)
    plain.load_state_dict({name: x for name, x in state.items() if name in plain.state_dict()})
    with torch.no_grad():
        for name, factor in factors.items():
            kind = name.rpartition(".")[2]
            first = plain.get_submodule(f"{name}.{FIRST[kind]}")
            units = factor.reshape(-1).repeat(3 if kind == "attn" else 1)
            first.weight *= units.reshape(-1, *[1] * (first.weight.ndim - 1))
            first.bias *= units
        for tokens in (plain.cls_token, plain.pos_embed):
            tokens *= factors.get("patch_embed", torch.ones(1))
    return plain


SIZES: dict[str, dict[str, Any]] = {
    "two heads": {"embed_dim": 40, "num_heads": 2, "mlp_ratio": 1.5},
    "three heads": {"embed_dim": 60, "num_heads": 3, "mlp_ratio": 1.4},
    "five heads": {"embed_dim": 40, "num_heads": 5, "mlp_ratio": 2.5},
    "wide": {"embed_dim": 160, "num_heads": 20, "mlp_ratio": 0.625},
    "one colour": {"in_chans": 1, "mlp_ratio": 2},
}


def size_of(name: str) -> VisionTransformer:
    return vit(depth=1, **SIZES[name])  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", SIZES)
def test_a_network_of_any_size(name: str) -> None:
    model = size_of(name)
    state = original_state(model)
    supernet = Supernet(model, Dimensions(calibrated=False)).eval()
    load_searching(supernet, state)
    supernet.schedule(LAM, 1.0)
    images = wave((2, model.patch_embed.proj.in_channels, 16, 16), 5)
    torch.testing.assert_close(supernet(images), folded(model, state, masks(model, state))(images), **CLOSE)


@pytest.mark.parametrize(
    "off", [("embedding",), ("attention",), ("mlp",), ("attention", "mlp"), ("embedding", "mlp")]
)
def test_a_network_that_does_not_search_everything(off: tuple[str, ...]) -> None:
    model = vit(depth=1, mlp_ratio=2)
    state = original_state(model, off)
    dimensions: dict[str, Any] = {name: value for kind in off for name, value in OFF[kind].items()}
    supernet = Supernet(model, Dimensions(calibrated=False, **dimensions)).eval()
    load_searching(supernet, state)
    supernet.schedule(LAM, 1.0)
    images = wave((2, 3, 16, 16), 5)
    torch.testing.assert_close(supernet(images), folded(model, state, masks(model, state))(images), **CLOSE)
    with pytest.raises(UserMistake, match="does not search all that the supernet does"):
        load_searching(Supernet(model), state)
    example = (images[:1],)
    everything = OfficialMacs(model, Supernet(model).sites, example).dense
    cost = OfficialMacs(model, supernet.sites, example)
    assert cost.dense == everything
    supernet.compress(0.2, force=True)
    assert float(cost(expected_widths(supernet))) < everything


def test_a_state_is_refused_without_changing_the_supernet() -> None:
    supernet = Supernet(size_of("three heads"))
    state = original_state(size_of("three heads"))
    before = {name: x.clone() for name, x in supernet.state_dict().items()}
    with pytest.raises(UserMistake, match=r"missing \['host.norm.bias'\]"):
        load_searching(supernet, {name: x for name, x in state.items() if name != "norm.bias"})
    after = supernet.state_dict()
    assert all(torch.equal(after[name], x) for name, x in before.items())
    supernet.compress(0.2, force=True)
    with pytest.raises(UserMistake, match="the supernet is cut already"):
        load_searching(supernet, state)


def test_attentions_of_the_original_have_biases() -> None:
    state = original_state(vit(depth=1, mlp_ratio=2))
    with pytest.raises(UserMistake, match="always have a bias: build the model with qkv_bias=True"):
        load_searching(Supernet(vit(depth=1, mlp_ratio=2, qkv_bias=False)), state)


def test_a_supernet_without_masked_images_leaves_the_decoder_out() -> None:
    model = vit(depth=1, mlp_ratio=2)
    supernet = Supernet(model, Dimensions(calibrated=False, masked_images=False)).eval()
    load_searching(supernet, original_state(model))
    assert supernet.decoder is None


def test_a_network_without_a_head() -> None:
    model = vit(depth=1, mlp_ratio=2, num_classes=0)
    state = original_state(model)
    with pytest.raises(UserMistake, match="the supernet leaves out: embedding: it has no head"):
        load_searching(Supernet(model), state)
    supernet = Supernet(model, Dimensions(calibrated=False, official_options=True)).eval()
    load_searching(supernet, state)
    supernet.schedule(LAM, 1.0)
    images = wave((2, 3, 16, 16), 5)
    torch.testing.assert_close(supernet(images), folded(model, state, masks(model, state))(images), **CLOSE)


def test_the_decoder_of_the_original_has_three_colours() -> None:
    for colours, official, width in ((1, True, 3), (1, False, 1), (2, True, 3)):
        model = vit(depth=1, mlp_ratio=2, in_chans=colours)
        supernet = Supernet(model, Dimensions(official_options=official)).train()
        decoder: Any = supernet.decoder
        assert decoder[0].out_channels == width * 16
        nn.init.zeros_(decoder[0].weight)
        nn.init.zeros_(decoder[0].bias)
        supernet.schedule(0.5, 0.5)
        images = wave((2, colours, 16, 16), 5)
        supernet(images)
        if colours == 2:
            with pytest.raises(UserMistake, match="gives 3 channels, the images have 2"):
                supernet.reconstruction(images)
            continue
        assert supernet.embedder is not None
        assert supernet.embedder.hidden is not None
        rebuilt = supernet.reconstruction(images)
        mean, std = images.mean((2, 3), keepdim=True), images.std((2, 3), keepdim=True)
        error = ((images - mean) / (std**2 + 1e-6).sqrt()).abs()  # the window of 47 sees all of 16 x 16
        hidden = supernet.embedder.hidden.reshape(2, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
        expected = width * (error * hidden).sum() / (hidden.sum() + 1e-5)
        assert rebuilt is not None
        torch.testing.assert_close(rebuilt, expected, atol=1e-4, rtol=1e-4)


def test_the_cost_counts_three_colours() -> None:
    costs = []
    for colours in (1, 3):
        model = vit(in_chans=colours)
        costs.append(OfficialMacs(model, Supernet(model).sites, (torch.zeros(1, colours, 16, 16),)).dense)
    assert costs[0] == costs[1]


# Decided states


def test_a_decided_state_that_is_not_fused() -> None:
    vectors = golden("ofb-e2e-pruned")
    names = ("img_size", "patch_size", "num_classes", "embed_dim", "depth", "num_heads", "mlp_ratio")
    model = VisionTransformer(**{name: vectors.facts["args"][name] for name in names}).eval()
    state = {n.removeprefix("pruned."): x for n, x in vectors.state.items() if n.startswith("pruned.")}
    images = vectors.inputs["x"]
    out = load_searched(model, state, fused=False)
    torch.testing.assert_close(out(images), vectors.outputs["pruned.logits"], **CLOSE)
    searching = {n.removeprefix("search."): x for n, x in vectors.state.items() if n.startswith("search.")}
    with pytest.raises(
        UserMistake, match="widths to choose from; its search is not over, see load_searching"
    ):
        load_searched(model, searching)


def decided_state(off: tuple[str, ...] = ()) -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
    """A dense model, a narrower state of it, and its scores, of everything that is not ``off``."""
    dense = vit(depth=1, mlp_ratio=2)
    width = 32 if "embedding" in off else 24
    heads = 4 if "attention" in off else 2
    hidden = 64 if "mlp" in off else 24
    narrow = {32: width, 64: hidden, 96: 24 * heads}
    shapes = {name: tuple(narrow.get(n, n) for n in x.shape) for name, x in dense.state_dict().items()}
    shapes["blocks.0.attn.proj.weight"] = (width, 8 * heads)
    state = {name: 0.3 * wave(size, i) for i, (name, size) in enumerate(shapes.items())}
    sizes = {"patch_embed": (1, width), "blocks.0.attn": (heads, 8), "blocks.0.mlp": (1, hidden)}
    searched = {name: size for (name, size), kind in zip(sizes.items(), OFF, strict=True) if kind not in off}
    scores = {name: 0.7 + 0.2 * wave(size, 7) for name, size in searched.items()}
    state |= {f"{name}.score": score for name, score in scores.items()}
    return dense, {**state, **{f"{name}.alpha": torch.ones(1, 1) for name in sizes}}, scores


@pytest.mark.parametrize("off", [(), ("embedding",), ("attention",), ("mlp",)])
def test_scores_are_folded_or_left_as_asked(off: tuple[str, ...]) -> None:
    dense, state, scores = decided_state(off)
    images = wave((2, 3, 16, 16), 5)
    fused = load_searched(dense, state)
    assert fused.state_dict().keys() == dense.state_dict().keys()
    expected = folded(fused, state, scores)
    torch.testing.assert_close(load_searched(dense, state, fused=False)(images), expected(images), **CLOSE)
    torch.testing.assert_close(fused(images), folded(fused, state, {})(images), **CLOSE)


def test_decided_states_that_do_not_fit_are_refused() -> None:
    dense, state, _ = decided_state()
    cases: dict[str, dict[str, Any]] = {
        "it has no blocks.0.mlp.fc1.weight": {"blocks.0.mlp.fc1.weight": None},
        "16 channels in the state, which 3 heads cannot share": {"blocks.0.attn.score": torch.ones(3, 8)},
        "blocks.0.attn has 8 x 2 units there, 4 x 8 here": {"blocks.0.attn.score": torch.ones(8, 2)},
        "an embedding of 40 there, 32 here": {"patch_embed.proj.weight": torch.ones(40, 3, 4, 4)},
    }
    for message, change in cases.items():
        changed = {name: x for name, x in {**state, **change}.items() if x is not None}
        with pytest.raises(UserMistake, match=message):
            load_searched(dense, changed)
    with pytest.raises(UserMistake, match=r"heads=\[2, 2\]: the model has 1 attentions"):
        load_searched(dense, state, heads=[2, 2])
