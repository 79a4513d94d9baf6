"""Against vectors of the official reference, against the padded models in float64, and by counting."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nas.profile import profile
from nas.tasks.beam_search import beam_search
from spaces.attention import make_attention
from spaces.attention.softmax import softmax_reference
from spaces.layers import padding_free
from spaces.layers.bert_encoder import BertEncoder
from spaces.layers.padding_free import Packing, packed_attention
from spaces.sequence.efficient_transformer import EncoderDecoder
from tests.compress.passes._padding_free_models import bert, mask, packed, sentences, translator
from tests.golden_vectors import golden, golden_json

GOLDEN = ("bytetransformer-bert-1layer", "bytetransformer-bert-2layer", "bytetransformer-bert-short")
KINDS = ("softmax", "relative", "cosformer", "cosformer_causal")
LENGTHS = {
    "mixed": [5, 1, 12, 5, 0, 7],
    "all ones": [1, 1, 1],
    "equal": [6, 6, 6, 6],
    "one sentence": [9],
    "nothing": [0, 0],
    "forty": [1 + (7 * number) % 11 for number in range(40)],
}


def from_official(state: dict[str, Tensor], heads: int, **options: Any) -> BertEncoder:
    """Official weights are (in, out), one set a layer, the queries', keys' and values' side by side."""
    width, depth = state["qkv_kernel.0"].shape[0], sum(name.startswith("qkv_kernel") for name in state)
    names = {
        "attention.in_proj.fused.weight": "qkv_kernel",
        "attention.in_proj.fused.bias": "qkv_bias",
        "attention.out_proj.weight": "attr_output_kernel",
        "attention.out_proj.bias": "attr_output_bias",
        "norm1.weight": "attr_output_layernorm_gamma",
        "norm1.bias": "attr_output_layernorm_beta",
        "fc1.weight": "inter_kernel",
        "fc1.bias": "inter_bias",
        "fc2.weight": "output_kernel",
        "fc2.bias": "output_bias",
        "norm2.weight": "output_layernorm_gamma",
        "norm2.bias": "output_layernorm_beta",
    }
    encoder = BertEncoder(width, heads, depth, **options).eval()
    encoder.load_state_dict(
        {
            f"layers.{layer}.{ours}": state[f"{theirs}.{layer}"].t()
            for layer in range(depth)
            for ours, theirs in names.items()
        }
    )
    return encoder


@pytest.mark.parametrize("name", GOLDEN)
def test_packing_is_the_official_one(name: str) -> None:
    vectors = golden(name)
    padded, lengths = vectors.inputs["from_tensor"], vectors.inputs["lengths"].tolist()
    packing = Packing.of(mask(lengths, padded.shape[1]), keep_order=True)
    assert list(packing.offsets) == vectors.mid["batch_idx"].tolist()
    assert torch.equal(packing.rows, vectors.mid["word_idx"])
    assert torch.equal(packing.pack(padded), vectors.mid["packed_input"])
    assert torch.equal(packing.unpack(vectors.outputs["packed"]), vectors.outputs["padded"])


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize(
    ("output", "options"),
    [("padded", {}), ("padded_kernel_semantics", {"eps": 1e-6, "tanh_gelu": True})],
)
@torch.no_grad()
def test_the_encoder_is_the_official_one(name: str, output: str, options: dict[str, Any]) -> None:
    vectors = golden(name)
    x, lengths = vectors.inputs["from_tensor"], vectors.inputs["lengths"].tolist()
    padding = mask(lengths, x.shape[1])
    encoder = from_official(vectors.state, vectors.facts["constructor"]["head_num"], **options)
    for one in (encoder, packed(encoder, x, padding)):
        torch.testing.assert_close(one(x, padding), vectors.outputs[output], rtol=0, atol=2e-6)
    assert not packed(encoder, x, padding)(x, padding)[padding].any()


@given(st.lists(st.integers(0, 9), min_size=1, max_size=7), st.integers(0, 3))
def test_packing_and_back(lengths: list[int], more: int) -> None:
    padding = mask(lengths, max(lengths) + more)
    x = torch.randn(*padding.shape, 3).masked_fill(padding.unsqueeze(-1), 0.0)
    for keep_order in (True, False):
        packing = Packing.of(padding, keep_order=keep_order)
        assert packing.tokens == sum(lengths) == sum(run.tokens for run in packing.runs)
        assert sorted(packing.order) == list(range(len(lengths)))
        assert torch.equal(packing.unpack(packing.pack(x)), x)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("kinds", [(kind,) for kind in KINDS] + [KINDS], ids=lambda kinds: "+".join(kinds))
@torch.no_grad()
def test_translation_gives_the_same(kinds: tuple[str, ...], lengths: list[int]) -> None:
    model = translator(*kinds, pre_norm=len(kinds) > 1, span=2 if len(kinds) > 1 else -1)
    source, target = sentences(lengths, max(lengths) + 2), sentences([4] * len(lengths), 5, seed=1)
    result = packed(model, source, target)
    torch.testing.assert_close(result(source, target), model(source, target), rtol=0, atol=1e-10)
    states, padding = result.encode(source)
    wanted, expected = model.encode(source)
    assert torch.equal(padding, expected)
    hidden = padding[:, None, :, None]
    torch.testing.assert_close(states, wanted.masked_fill(hidden, 0.0), rtol=0, atol=1e-10)
    assert not states.masked_select(hidden).any()


@functools.cache
def pair(pre_norm: bool) -> tuple[EncoderDecoder, nn.Module]:
    model = translator("relative", "cosformer", "softmax", pre_norm=pre_norm, span=1)
    return model, packed(model, sentences([3]), sentences([3]))


@settings(max_examples=20)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=9), st.booleans(), st.integers(0, 2))
@torch.no_grad()
def test_any_lengths(lengths: list[int], pre_norm: bool, more: int) -> None:
    model, result = pair(pre_norm)
    source, target = sentences(lengths, max(1, *lengths) + more), sentences([3] * len(lengths), seed=1)
    torch.testing.assert_close(result(source, target), model(source, target), rtol=0, atol=1e-10)


@torch.no_grad()
def test_neighbours_in_the_batch_do_not_matter() -> None:
    encoder = bert()
    lengths = [7, 3, 9, 3]
    padding, x = mask(lengths), torch.randn(4, 9, 16, dtype=torch.float64)
    result = packed(encoder, x, padding)
    together = result(x, padding)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(result(x[order], padding[order]), together[order], rtol=0, atol=1e-12)
    for number, length in enumerate(lengths):
        alone = result(x[number : number + 1, :length], padding[number : number + 1, :length])
        torch.testing.assert_close(together[number, :length], alone[0], rtol=0, atol=1e-12)
    x[padding] = float("nan")  # what is written at padded places is never read
    torch.testing.assert_close(result(x, padding), together, rtol=0, atol=0)


@pytest.mark.parametrize("training", [False, True])
def test_gradients_are_those_of_the_padded_model(training: bool) -> None:
    model = translator(*KINDS, span=2, dropout=0.0)
    source, target = sentences([5, 1, 12, 5, 0, 7], 13), sentences([3, 4, 2, 6, 1, 6], seed=1)
    result = packed(model, source, target)
    weights = torch.randn(*target.shape, 31, dtype=torch.float64)
    for one in (model, result):
        one.train(training)
        (one(source, target) * weights).sum().backward()
    wanted = {name: parameter.grad for name, parameter in model.named_parameters()}
    found = {name: parameter.grad for name, parameter in result.named_parameters()}
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-10, msg=name)


def test_gradients_of_inputs_are_zero_at_padding() -> None:
    padding, x = mask([4, 2, 6]), torch.randn(3, 6, 16, dtype=torch.float64)
    encoder = bert()
    gradients = []
    for one in (encoder, packed(encoder, x, padding)):
        given_x = x.clone().requires_grad_()
        one(given_x, padding).square().sum().backward()
        assert given_x.grad is not None
        gradients.append(given_x.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-10)
    assert not gradients[1][padding].any()


@pytest.mark.parametrize("lengths", [[5, 14, 13, 11, 10], [3, 3, 3], [1, 16, 0, 2]])
def test_work_is_that_of_the_true_tokens(lengths: list[int]) -> None:
    """12 D^2 a token and 2 D for each pair of tokens of a sequence, in each layer (the sheet's formula)."""
    padding, width, depth = mask(lengths, 16), 16, 2
    encoder = bert(depth)
    x = torch.randn(len(lengths), 16, width, dtype=torch.float64)
    found = profile(packed(encoder, x, padding), (x, padding))
    pairs = sum(length**2 for length in lengths)
    assert found.macs == depth * (12 * width**2 * sum(lengths) + 2 * width * pairs)
    assert found.uncounted == ()
    assert found.method == "data"
    full = profile(encoder, (x, padding)).macs
    assert full == depth * len(lengths) * 16 * (12 * width**2 + 2 * width * 16)


def test_bert_base_is_as_large_as_published() -> None:
    facts = golden_json("bytetransformer-variants")["forward batch 1, max length 64"]
    with torch.device("meta"):
        found = profile(BertEncoder(), (torch.empty(1, 64, 768),))
    assert (found.params, found.macs) == (facts["params"], facts["macs"])


class _Encode(nn.Module):
    def __init__(self, model: EncoderDecoder):
        super().__init__()
        self.model = model

    def forward(self, source: Tensor) -> Tensor:
        return self.model.encode(source)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_work_of_translation_is_that_of_each_sentence_alone(kind: str) -> None:
    model, lengths = translator(kind, kind), [5, 1, 12, 5, 7]
    source = sentences(lengths)
    found = profile(_Encode(packed(model, source, source[:, :3])), (source,)).macs
    each = [
        profile(_Encode(model), (source[number : number + 1, :length],)).macs
        for number, length in enumerate(lengths)
    ]
    assert found == sum(each) < 0.6 * profile(_Encode(model), (source,)).macs


def test_beam_search_translates_the_same() -> None:
    model = translator("softmax", "cosformer")
    source = sentences([5, 1, 12, 5, 7])
    result = packed(model, source, source[:, :3])
    assert _translations(result, source) == _translations(model, source)


def _translations(model: nn.Module, source: Tensor) -> Any:
    return beam_search(model, source, begin=1, end=2, padding=0, max_length=10, beam=3)


def test_the_original_stays_as_it_was() -> None:
    model = translator("softmax")
    before, source = copy.deepcopy(model.state_dict()), sentences([3, 5])
    result = packed(model, source, source)
    assert type(model) is EncoderDecoder
    assert {name: tuple(value.shape) for name, value in result.state_dict().items()} == {
        name: tuple(value.shape) for name, value in before.items()
    }
    with torch.no_grad():
        next(result.parameters()).add_(1.0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_flash_gets_what_its_kernel_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel itself runs on GPUs only; a stand-in with its arguments shows that they are the right ones."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")

    def varlen_attn(
        query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int
    ) -> Tensor:
        assert cu_q.dtype == cu_k.dtype == torch.int32
        assert max_q == max_k == 7
        parts = zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True)
        return torch.cat(
            [
                softmax_reference(*(x[start:stop].transpose(0, 1)[None] for x in (query, key, value)))[
                    0
                ].transpose(0, 1)
                for start, stop in parts
            ]
        )

    attention = make_attention("softmax", 16, 2).double()
    packing = Packing.of(mask([3, 7, 0, 3]))
    x = torch.randn(packing.tokens, 16, dtype=torch.float64)
    with torch.no_grad():
        wanted = packed_attention(attention, x, packing)
        monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
        monkeypatch.setattr(padding_free, "_flash_takes", lambda attention, q: True)
        torch.testing.assert_close(packed_attention(attention, x, packing), wanted, rtol=0, atol=1e-12)
