"""Heads and hidden units taken out of networks whose attentions are mechanisms of ``spaces.attention``."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from compress import compress, load
from compress.measuring import count
from compress.passes import make_pass
from compress.passes._unit_scores import Scorer, taylor_gradients
from compress.passes.base import Context
from compress.structure import Heads, StructureError, find_heads, find_mlps
from compress.surgery import keep_heads
from nas.export import describe_signature
from nas.onnx_file import check_onnx, write_onnx
from nas.tasks import make_task
from nas.tasks.beam_search import beam_search
from spaces import get_space
from spaces.attention import Attention, make_attention
from spaces.layers.bert_encoder import BertEncoder
from spaces.sequence.efficient_transformer import ImageTransformer, LayerSpec, count_macs
from spaces.signature import ImageSignature, Signature
from tests.compress._fresh_process import assert_same_in_a_fresh_process
from tests.compress.models import batches, steepened
from tests.compress.passes._own_networks import (
    CONTEXT,
    IMAGES,
    KINDS,
    PLAN,
    SENTENCE,
    Fixed,
    Forgetful,
    Mixture,
    OnGrid,
    PerHead,
    Talking,
    TalkingMaps,
    X,
    assert_exact,
    classifier,
    heads_of,
    speaker,
    zeroed,
)
from tests.compress.passes._padding_free_models import SENTENCES


@pytest.mark.parametrize("units", ["heads", "mlp", "heads+mlp"])
@pytest.mark.parametrize("criterion", ["l1", "l2", "taylor"])
@pytest.mark.parametrize("scope", ["uniform", "global"])
def test_the_cut_classifier_is_the_zeroed_one(units: str, criterion: str, scope: str) -> None:
    model = classifier()
    before = copy.deepcopy(model.state_dict())
    made = make_pass("structured", units=units, criterion=criterion, scope=scope).apply(model, CONTEXT)
    assert_exact(made, model, X)
    if "heads" in units:
        assert sum(heads_of(made)) == 8
        assert scope == "global" or heads_of(made) == [2, 2, 2, 2]
    else:
        assert heads_of(made) == [4, 3, 5, 4]
    assert ("mlp" in units) == (sum(mlp.hidden for mlp in find_mlps(made)) < 160)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("scope", ["uniform", "global"])
def test_the_cut_translator_is_the_zeroed_one(pre_norm: bool, scope: str) -> None:
    model = speaker(pre_norm=pre_norm)
    context = Context(example=SENTENCE)
    made = make_pass("structured", units="heads+mlp", scope=scope, multiple=1).apply(model, context)
    assert_exact(made, model, *SENTENCE)
    assert sum(heads_of(made)) == 8
    assert sum(mlp.hidden for mlp in find_mlps(made)) == (4 * 20 + 2 * 16) // 2


@torch.no_grad()
def test_padding_prefixes_and_beam_search_go_on() -> None:
    model = speaker()
    made: Any = make_pass("structured", units="heads+mlp").apply(model, Context(example=SENTENCE))
    hard, (source, target) = zeroed(model, made), SENTENCE
    whole = made(source, target)
    wider = made(nn.functional.pad(source, (0, 4)), target)
    torch.testing.assert_close(wider, whole, rtol=0, atol=1e-9)
    short = made.decode(target[:, :2], made.encode(source))
    torch.testing.assert_close(short, whole[:, :2], rtol=0, atol=1e-9)
    options: Any = {"begin": 1, "end": 2, "padding": 0, "max_length": 8, "beam": 3}
    found = beam_search(made, source, **options)
    assert found == beam_search(hard, source, **options)
    assert any(found)


@torch.no_grad()
def test_padding_free_goes_before_and_behind() -> None:
    model, context = speaker(), Context(example=SENTENCE)
    cut, free = make_pass("structured", units="heads+mlp"), make_pass("padding_free")
    wanted = cut.apply(model, context)(*SENTENCE)
    for first, second in ((cut, free), (free, cut)):
        made = second.apply(first.apply(model, context), context)
        torch.testing.assert_close(made(*SENTENCE), wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("criterion", "order"), [("l1", 1), ("l2", 2)])
def test_the_heads_with_the_smallest_weights_go(criterion: str, order: int) -> None:
    """By the norm over all weights of queries, keys and values, their biases, and what reads the head."""
    for model, context in ((classifier(), CONTEXT), (speaker(), Context(example=SENTENCE))):
        made = make_pass("structured", units="heads", criterion=criterion).apply(model, context)
        for old, new in zip(find_heads(model), find_heads(made), strict=True):
            attention: Any = old.attention
            maps = 3 if attention.in_proj.is_fused else 1
            parts = [x.detach() for p in attention.in_proj.parameters() for x in p.chunk(maps)]
            by_head = [x.reshape(old.num_heads, -1) for x in (*parts, attention.out_proj.weight.T)]
            best = torch.cat(by_head, dim=1).norm(p=order, dim=1).topk(new.num_heads).indices.sort().values
            columns = attention.out_proj.weight.unflatten(1, (old.num_heads, -1))[:, best].flatten(1)
            assert torch.equal(new.attention.out_proj.weight, columns)  # type: ignore[union-attr, arg-type]


def test_taylor_scores_of_heads_are_the_first_order_change_of_the_loss() -> None:
    model: Any = classifier()
    context = CONTEXT.with_changes(loss=nn.functional.cross_entropy)  # in float64
    [(images, labels), *_] = CONTEXT.train  # type: ignore[misc]
    scorer = Scorer("taylor", taylor_gradients(model, context, 1))
    for one in find_heads(model):
        weight: Any = one.attention.out_proj.weight  # type: ignore[union-attr]
        score, kept, losses = float(scorer.heads(one)[1]), weight.data.clone(), []
        for sign in (1, -1):
            weight.data[:, 6:12] *= 1 + sign * 1e-5
            with torch.no_grad():
                losses.append(float(context.loss(model(images), labels)))
            weight.data.copy_(kept)
        assert score == pytest.approx(((losses[0] - losses[1]) / 2e-5) ** 2, rel=1e-3, abs=1e-12)


def test_the_only_head_of_a_layer_stays() -> None:
    model: Any = classifier((1, 2, 1, 4))
    model.layers[0].attention = make_attention("cosformer", 24, 1, has_out_proj=False).double().eval()
    for scope in ("uniform", "global"):
        made = make_pass("structured", units="heads", ratio=0.9, scope=scope).apply(model, CONTEXT)
        assert heads_of(made) == [1, 1, 1, 1]


@settings(max_examples=12, deadline=None)
@given(
    layers=st.lists(
        st.tuples(st.integers(1, 4), st.sampled_from(KINDS), st.integers(3, 12)), min_size=1, max_size=3
    ),
    ratio=st.floats(0, 0.97),
    scope=st.sampled_from(["uniform", "global"]),
    units=st.sampled_from(["heads", "heads+mlp"]),
)
def test_any_classifier(layers: list[tuple[int, str, int]], ratio: float, scope: str, units: str) -> None:
    torch.manual_seed(0)
    specs = [LayerSpec(heads, ffn, kind) for heads, kind, ffn in layers]
    model = steepened(ImageTransformer(IMAGES, layers=specs, **PLAN)).double().eval()
    made = make_pass("structured", ratio=ratio, scope=scope, units=units, multiple=1).apply(model, CONTEXT)
    with torch.no_grad():
        torch.testing.assert_close(made(X), zeroed(model, made)(X), rtol=0, atol=1e-8)
    left = [
        LayerSpec(heads, mlp.hidden, spec.attention)
        for heads, mlp, spec in zip(heads_of(made), find_mlps(made), specs, strict=True)
    ]
    wanted = ImageTransformer(IMAGES, layers=left, **PLAN)
    assert {n: p.shape for n, p in made.named_parameters()} == {
        n: p.shape for n, p in wanted.named_parameters()
    }
    assert count(made, (X[:1],))["macs"] == count_macs(IMAGES, layers=left, **PLAN)


def test_what_is_frozen_stays_frozen_and_the_rest_learns() -> None:
    model = classifier().float()
    model.layers[1].attention.in_proj.requires_grad_(False)  # type: ignore[union-attr]
    data = batches(6, image=16)
    context = Context(example=(X[:1].float(),), train=data)
    plain = make_pass("structured", units="heads+mlp", epochs=0).apply(model, context)
    tuned: Any = make_pass("structured", units="heads+mlp", epochs=4, learning_rate=2e-3).apply(
        model, context
    )
    name = "layers.1.attention.in_proj.fused.weight"
    assert torch.equal(tuned.get_parameter(name), plain.get_parameter(name))
    frozen = {name for name, p in tuned.named_parameters() if not p.requires_grad}
    assert frozen == {f"layers.1.attention.in_proj.fused.{kind}" for kind in ("weight", "bias")}
    images, labels = data[0]
    with torch.no_grad():
        assert context.loss(tuned(images), labels) < 0.8 * context.loss(plain(images), labels)


@pytest.mark.slow
def test_a_translator_is_scored_and_tuned_on_its_task() -> None:
    task = make_task("translation", limit=256, max_length=24, bleu_sentences=8)
    space = get_space("efficient_transformer:small_translation")
    torch.manual_seed(0)
    model = space.build(space.published["softmax_baseline"], task.signature).eval()
    losses = [
        compress(
            model,
            f"structured:units=heads+mlp,criterion=taylor,batches=2,epochs={epochs}",
            train=task,
            validation=task,
            measure_seconds=0,
        )
        .steps[-1]
        .metrics["loss"]
        for epochs in (0, 3)
    ]
    assert losses[1] < 0.9 * losses[0]


def small_result(task: str) -> tuple[Any, tuple[Tensor, ...]]:
    """The baseline of a space with several mechanisms, cut and ready to be saved; and inputs."""
    inputs: tuple[Tensor, ...] = SENTENCE
    name, signature = "efficient_transformer:small_translation", cast("Signature", SENTENCES)
    kinds: Any = {"encoder.layer1.attention": "cosformer", "decoder.layer1.self_attention": "relative"}
    if task == "images":
        inputs = (torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(2)),)
        name, signature = "efficient_transformer:small", ImageSignature(1, 8, 8, 10)
        kinds = {"layer1.attention": "cosformer", "layer2.attention": "relative", "layer3.heads": 1}
    space = get_space(name)
    architecture = {**space.published["softmax_baseline"], **kinds}
    facts = {"architecture": architecture, "signature": describe_signature(signature)}
    result = compress(
        space.build(architecture, signature).eval(),
        "structured:units=heads+mlp",
        example=inputs,
        origin={"kind": "space", "space": name, **facts},
        measure_seconds=0,
    )
    return result, inputs


TASKS = pytest.mark.parametrize("task", ["images", "translation"])


@TASKS
@torch.no_grad()
def test_saved_and_loaded(task: str, tmp_path: Path) -> None:
    result, inputs = small_result(task)
    again = load(result.save(tmp_path / "saved")).model
    assert set(heads_of(again)) == ({1, 2} if task == "images" else {2})
    for one in find_heads(again):
        assert one.attention.inner_dim == one.num_heads * one.attention.head_dim
    torch.testing.assert_close(again(*inputs), result.model(*inputs), rtol=0, atol=0)
    goes_on = make_pass("structured", units="heads").apply(again, Context(example=inputs))
    assert set(heads_of(goes_on)) == {1}


@pytest.mark.slow
@TASKS
def test_a_fresh_process_imports_no_pass(task: str, tmp_path: Path) -> None:
    result, inputs = small_result(task)
    assert_same_in_a_fresh_process(result, tmp_path / "saved", *inputs)


@pytest.mark.slow
@TASKS
def test_onnxruntime_computes_the_same_at_batch_1_and_7(task: str, tmp_path: Path) -> None:
    result, inputs = small_result(task)
    example = tuple(x[:1] for x in inputs)  # of the sentences one with padding
    gaps = check_onnx(write_onnx(result.model, example, tmp_path), result.model, example)
    assert set(gaps) == {1, 7}
    assert max(gaps.values()) < 1e-5


def test_a_budget_is_met() -> None:
    result = compress(
        classifier((4, 4), ("softmax", "relative")).float(),
        "structured:units=heads+mlp,multiple=1",
        budget="macs=0.6",
        example=(X[:1].float(),),
        measure_seconds=0,
    )
    first, last = (step.macs for step in (result.steps[0], result.steps[-1]))
    assert 0.45 * first < last <= 0.6 * first


@torch.no_grad()
def test_heads_of_any_network_with_such_attentions() -> None:
    torch.manual_seed(0)
    model = steepened(BertEncoder(16, 4, 2)).double().eval()
    x, padding = torch.randn(2, 5, 16).double(), torch.arange(5) >= torch.tensor([[5], [3]])
    made = make_pass("structured", units="heads+mlp").apply(model, Context(example=(x, padding)))
    assert heads_of(made) == [2, 2]
    assert_exact(made, model, x, padding)


def with_own(kind: type[Attention]) -> Any:
    model: Any = classifier((4, 4), ("softmax", "softmax"))
    torch.manual_seed(2)
    model.layers[1].attention = kind(24, 4, head_dim=6).double().eval()
    return model


@pytest.mark.parametrize("kind", [PerHead, OnGrid])
def test_a_mechanism_of_somebody_else_is_tried_and_cut(kind: type[Attention]) -> None:
    model, random = with_own(kind), torch.get_rng_state()
    made = make_pass("structured", units="heads+mlp").apply(model, CONTEXT)
    assert torch.equal(random, torch.get_rng_state())
    assert heads_of(made) == [2, 2]
    assert made.layers[1].attention.amounts.shape == (2,)  # type: ignore[union-attr, index]
    assert_exact(made, model, X)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (Forgetful, "gives something else with fewer heads than with these at zero"),
        (Talking, "gives something else with fewer heads than with these at zero"),
        (Fixed, "does not run with fewer heads"),
    ],
)
def test_one_that_would_be_cut_wrongly_is_refused_by_name(kind: type[Attention], text: str) -> None:
    model = with_own(kind)
    match = (
        rf"ImageTransformer: layers\.1\.attention \({kind.__name__}\) {text}.*units=mlp alone asks for less"
    )
    with pytest.raises(StructureError, match=match):
        make_pass("structured", units="heads+mlp").apply(model, CONTEXT)
    with pytest.raises(StructureError, match=rf"here \({kind.__name__}\) {text}"):
        keep_heads(Heads("here", model.layers[1].attention), [0])
    assert heads_of(make_pass("structured", units="mlp").apply(model, CONTEXT)) == [4, 4]


def test_a_part_of_somebody_else_is_tried_too() -> None:
    model: Any = classifier()
    model.layers[0].attention.in_proj = TalkingMaps(24, 4, 6).double()
    with pytest.raises(
        StructureError, match=r"layers\.0\.attention \(SoftmaxAttention\) gives something else"
    ):
        make_pass("structured", units="heads").apply(model, CONTEXT)


def test_a_mechanism_within_another_is_not_cut_behind_its_back() -> None:
    model: Any = classifier()
    model.layers[3].attention = Mixture().double().eval()
    assert [one.name for one in find_heads(model)] == [f"layers.{i}.attention" for i in range(4)]
    with pytest.raises(
        StructureError, match=r"layers\.3\.attention cannot lose heads: Mixture has no in_proj"
    ):
        make_pass("structured", units="heads").apply(model, CONTEXT)


def test_a_mechanism_that_cannot_lose_heads_is_refused_by_name() -> None:
    model: Any = classifier()
    model.layers[2].attention = make_attention("cosformer", 24, 4, has_out_proj=False).double()
    match = r"ImageTransformer: layers\.2\.attention cannot lose heads: CosformerAttention has no out_proj.*Identity"
    with pytest.raises(StructureError, match=match):
        make_pass("structured", units="heads").apply(model, CONTEXT)


@pytest.mark.parametrize("units", ["channels", "channels+mlp", "heads+embedding"])
def test_what_only_a_plain_vit_can_lose_is_refused_with_what_works(units: str) -> None:
    gone = units.replace("heads+", "").replace("+mlp", "")
    match = rf"no 'blocks'.* of its {gone} none can go; what works here is units=heads, units=mlp or units=heads\+mlp"
    for model, context in ((classifier(), CONTEXT), (speaker(), Context(example=SENTENCE))):
        with pytest.raises(StructureError, match=match):
            make_pass("structured", units=units).apply(model, context)


def test_models_that_are_neither_are_refused_as_before() -> None:
    with pytest.raises(StructureError, match=r"Linear: no 'blocks' \(nn\.Sequential[^;]*$"):
        make_pass("structured", units="heads").apply(nn.Linear(3, 3), Context(example=(torch.ones(1, 3),)))
