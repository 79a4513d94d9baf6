"""OFB against vectors of the original implementation (HankYe/Once-for-Both at beb72b6)."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.layers import Mlp
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import Tensor, nn

from compress.passes._ofb_cost import OfficialMacs, cost_loss, expected_widths
from compress.passes._ofb_extract import plan_of
from compress.passes._ofb_gate import Gate
from compress.passes._ofb_losses import sparsity_losses
from compress.passes._ofb_search import SearchOptions, search_loss
from compress.passes.ofb import Dimensions, Supernet, expand, extract, load_searched, load_searching
from nas.errors import UserMistake
from tests.golden_vectors import Golden, golden, golden_json

CLOSE = {"atol": 2e-6, "rtol": 1e-5}
OFFICIAL = Dimensions(calibrated=False, normalised_residual=True)
VARIANTS = golden_json("ofb-variants")


def close(actual: Tensor, expected: Tensor, **tolerance: float) -> None:
    torch.testing.assert_close(actual.detach(), expected, **{**CLOSE, **tolerance})


def part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}."): x for name, x in state.items() if name.startswith(f"{prefix}.")}


def loaded(
    model: nn.Module, state: dict[str, Tensor], lam: float, **dimensions: Any
) -> tuple[Supernet, Gate]:
    supernet = Supernet(model, Dimensions(calibrated=False, **dimensions)).eval()
    load_searching(supernet, state)
    supernet.schedule(lam, 1.0)
    return supernet, next(iter(supernet.gates()))


def vit(facts: dict[str, Any]) -> VisionTransformer:
    names = ("img_size", "patch_size", "num_classes", "embed_dim", "depth", "num_heads", "mlp_ratio")
    return VisionTransformer(**{name: facts["args"][name] for name in names}).eval()


@pytest.mark.parametrize(
    ("name", "dimensions"),
    [("attn-search", {}), ("attn-search-heads", {"channels": False}), ("mlp-search", {})],
)
def test_bimask_of_a_module(name: str, dimensions: dict[str, Any]) -> None:
    vectors = golden(f"ofb-{name}")
    args = vectors.facts["args"]
    module: nn.Module
    if "num_heads" in args:
        module = Attention(args["dim"], args["num_heads"], qkv_bias=True)
    else:
        module = Mlp(args["in_features"], args["hidden_features"])
    supernet, gate = loaded(module, vectors.state, vectors.facts["w_p"], **dimensions)
    for options, key in ((gate.head_options, "head_options"), (gate.channel_options, "channel_options")):
        if vectors.facts.get(key):
            assert list(options) == vectors.facts[key]
    close(gate.sparsity_sorted(), vectors.mid["sparsity_sorted"])
    close(gate.sparsity(), vectors.mid["sparsity_per_unit"])
    close(gate.bimask(), vectors.mid["bimask"])
    close(supernet(vectors.inputs["x"]), vectors.outputs["y"])


def check_step(
    vectors: Golden, tag: str, supernet: Supernet, gate: Gate, names: tuple[str, str], **tolerance: float
) -> None:
    site = supernet.sites[0]
    state = part(vectors.state, tag)
    first, last = names
    close(supernet(vectors.inputs["x"]), vectors.outputs[f"{tag}.y"], **tolerance)
    close(site.first(supernet.host).weight, state[f"{first}.weight"])
    close(site.first(supernet.host).bias, state[f"{first}.bias"])
    close(site.last(supernet.host).weight, state[f"{last}.weight"])
    if not gate.fused:
        close(gate.score, state["score"])
    if not gate.decided:
        close(gate.alpha, state["alpha"])
        assert torch.equal(gate.alive.int(), vectors.mid[f"{tag}.switch_cell"])


@pytest.mark.parametrize("name", ["mlp", "attn"])
def test_compress_and_fuse_a_module(name: str) -> None:
    vectors = golden(f"ofb-{name}-compress")
    args = vectors.facts["args"]
    if name == "mlp":
        module, names = Mlp(args["in_features"], args["hidden_features"]), ("fc1", "fc2")
    else:
        module, names = Attention(args["dim"], args["num_heads"], qkv_bias=True), ("qkv", "proj")
    supernet, gate = loaded(module, part(vectors.state, "s0"), vectors.facts.get("w_p", 0.1))
    check_step(vectors, "s0", supernet, gate, names)
    for step in vectors.facts["steps"][1:]:
        tag = step["tag"]
        if f"{tag}.alpha_set" in vectors.mid:
            with torch.no_grad():
                gate.alpha.copy_(vectors.mid[f"{tag}.alpha_set"])
            supernet.compress(args["thresh"])
        else:
            supernet.fuse()
        assert gate.decided == step["finish"]
        assert int(gate.alive.sum()) == step["alive"] or gate.decided
        check_step(vectors, tag, supernet, gate, names)
    plain = extract(expand(module, supernet), supernet)
    close(plain(vectors.inputs["x"]), vectors.outputs[f"{tag}.y"])
    assert type(plain) is type(module)


def test_search_phase_end_to_end() -> None:
    vectors = golden("ofb-e2e-search")
    facts, out = vectors.facts, vectors.outputs
    model = vit(facts)
    supernet = Supernet(model, OFFICIAL)
    load_searching(supernet, vectors.state)
    supernet.schedule(facts["w_p"], facts["keep_ratio"])
    cost = OfficialMacs(model, supernet.sites, (torch.zeros(1, 3, 32, 32),))
    assert cost.dense / 1e9 == pytest.approx(facts["gflops_dense"], rel=1e-6)
    assert supernet.embedder is not None

    images = vectors.inputs["x"]
    close(supernet.eval()(images), out["logits"])
    supernet.train()
    supernet.embedder.noise = vectors.inputs["noise"]
    close(supernet(images), out["logits_train"])
    rebuilt = supernet.reconstruction(images)
    assert rebuilt is not None
    close(rebuilt.reshape(1), out["decoder_loss"])

    soft = cost(expected_widths(supernet))
    close(soft.reshape(1) / 1e9, out["gflops_soft"], atol=1e-12)
    close(cost_loss(soft, facts["target_gflops"] * 1e9, cost.dense).reshape(1), out["flops_loss"])
    kinds = sparsity_losses(supernet.gates(), clamp=0)
    for kind, key in (("attention", "attn"), ("mlp", "mlp"), ("embedding", "embed")):
        close(kinds[kind].reshape(1), out[f"onehot_{key}"])

    loss = search_loss(supernet, cost, facts["target_gflops"] * 1e9, SearchOptions(clamp=0))
    close(loss.reshape(1), out["arch_loss"])
    loss.backward()
    gates = dict(
        zip(
            ["patch_embed", *(site.name for site in supernet.sites)],
            supernet.gates(),
            strict=True,
        )
    )
    for name, gate in gates.items():
        assert gate.alpha.grad is not None
        assert gate.score.grad is not None
        expected = out[f"grad.{name}.alpha"]
        close(gate.alpha.grad, expected, atol=1e-5 * float(expected.abs().max()))
        close(gate.score.grad, out[f"grad.{name}.score"])


@pytest.fixture
def pruned() -> tuple[Golden, VisionTransformer, Supernet]:
    vectors = golden("ofb-e2e-pruned")
    model = vit(vectors.facts)
    supernet = Supernet(model, OFFICIAL).eval()
    load_searching(supernet, part(vectors.state, "search"))
    supernet.schedule(vectors.facts["w_p"], 1.0)
    return vectors, model, supernet


def test_pruned_fused_and_plain_end_to_end(pruned: tuple[Golden, VisionTransformer, Supernet]) -> None:
    vectors, model, supernet = pruned
    images, facts = vectors.inputs["x"], vectors.facts
    # output.search was made with alphas that the file no longer holds: its state has those of the next step already.
    for gate, chosen in zip(supernet.gates(), facts["choice_flat_index"].values(), strict=True):
        with torch.no_grad():
            gate.alpha.fill_(-9.0)
            gate.alpha.view(-1)[chosen] = 4.0
    supernet.compress(0.2)
    assert supernet.decided
    close(supernet(images), vectors.outputs["pruned.logits"])
    cost = OfficialMacs(model, supernet.sites, (images[:1],))
    assert float(cost(expected_widths(supernet))) / 1e9 == pytest.approx(
        facts["gflops_dense_and_searched"][1], rel=1e-6
    )
    supernet.fuse()
    close(supernet(images), vectors.outputs["fused.logits"])
    fused = part(vectors.state, "fused")
    close(supernet.host.pos_embed, fused["pos_embed"])
    close(supernet.host.blocks[1].mlp.fc1.linear.weight, fused["blocks.1.mlp.fc1.weight"])

    start = vit(facts)
    start.load_state_dict({k: v for k, v in part(vectors.state, "search").items() if k in start.state_dict()})
    plain: Any = extract(expand(start, supernet), supernet)
    close(plain(images), vectors.outputs["plain.logits"])
    assert sum(p.numel() for p in plain.parameters()) == facts["params_plain"]
    plan = plan_of(supernet)
    assert plan.embedding == facts["widths"]["embed"]
    for index, widths in enumerate(facts["widths"]["blocks"]):
        assert plan.sites[2 * index] == (widths["heads"], widths["head_dim"])
        assert plan.sites[2 * index + 1] == (1, widths["hidden"])


def test_a_searched_state_of_the_original_becomes_a_plain_model(
    pruned: tuple[Golden, VisionTransformer, Supernet],
) -> None:
    vectors, model, _ = pruned
    fused = part(vectors.state, "fused")
    plain = load_searched(model, fused)
    close(plain(vectors.inputs["x"]), vectors.outputs["plain.logits"])
    bare = {name: x for name, x in fused.items() if not name.endswith("score")}
    close(load_searched(model, bare, heads=[4, 4])(vectors.inputs["x"]), vectors.outputs["plain.logits"])
    with pytest.raises(UserMistake, match=r"number of heads of blocks\.0\.attn is not in the state"):
        load_searched(model, bare)


def test_a_state_of_another_size_is_refused(pruned: tuple[Golden, VisionTransformer, Supernet]) -> None:
    vectors, _, supernet = pruned
    with pytest.raises(UserMistake, match="does not fit the supernet"):
        load_searching(supernet, part(vectors.state, "pruned"))


@pytest.mark.parametrize(
    ("name", "timm_name"), [("small", "deit_small_patch16_224"), ("base", "deit_base_patch16_224")]
)
def test_counts_of_the_published_supernets(name: str, timm_name: str) -> None:
    expected = VARIANTS[f"deit_{name}_supernet"]
    with torch.device("meta"):
        model = timm.create_model(timm_name)
        supernet = Supernet(model)
    gates = list(supernet.gates())
    patch_numbers = 5  # the original's distribution over patch keep ratios, never trained, not built here
    alpha = sum(gate.alpha.numel() for gate in gates)
    assert alpha + patch_numbers == expected["params_alpha"]
    assert sum(gate.score.numel() for gate in gates) == expected["params_score"]
    assert sum(p.numel() for p in supernet.parameters()) + patch_numbers == expected["params"]
    plain = sum(p.numel() for p in model.parameters())
    assert plain == expected["params_plain"] == VARIANTS[f"deit_{name}_plain"]["params"]
    assert supernet.decoder is not None
    assert supernet.embedder is not None
    assert supernet.embedder.mask_token is not None
    decoder = sum(p.numel() for p in supernet.decoder.parameters())
    assert decoder + supernet.embedder.mask_token.numel() == expected["params_decoder_and_mask_token"]
    cost = OfficialMacs(model, supernet.sites, (torch.zeros(1, 3, 224, 224, device="meta"),))
    assert cost.dense == expected["macs"]
