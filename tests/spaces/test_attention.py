"""The palette of attention mechanisms: what all have to do, and each against its formula written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from spaces.attention import Attention, list_attention, make_attention, register_attention
from spaces.attention.cosformer import (
    CosformerAttention,
    convert_official_state,
    cosformer,
    cosformer_macs,
    cosformer_reference,
)
from spaces.attention.relative import relative_attend, relative_macs, relative_reference
from spaces.attention.softmax import attend, softmax_macs, softmax_reference
from spaces.errors import SpaceError, UnknownNameError, UserMistake
from tests.golden_vectors import golden

LONGEST = 40
SIZES = [(1, 1), (7, 7), (63, 63), (130, 130), (7, 13), (13, 7), (130, 63), (63, 130)]


def build(name: str, dim: int = 24, heads: int = 3, **options: Any) -> Attention:
    torch.manual_seed(1)
    return make_attention(name, dim, heads, **options).double().eval()


@pytest.fixture(params=list_attention())
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class TestEveryMechanism:
    def test_shapes_and_a_gradient_for_every_parameter(self, name: str) -> None:
        for options in ({}, {"causal": True}, {"head_dim": 16}, {"bias": False}):
            attention = make_attention(name, 24, 3, **options).train()
            out = attention(torch.randn(2, 17, 24))
            assert out.shape == (2, 17, 24)
            out.square().sum().backward()
            assert [key for key, p in attention.named_parameters() if p.grad is None] == []

    def test_cross_attention_between_widths(self, name: str) -> None:
        attention = build(name, kdim=10)
        query, memory = torch.randn(2, 7, 24).double(), torch.randn(2, 13, 10).double()
        out = attention(query, memory)
        assert out.shape == (2, 7, 24)
        assert torch.equal(out, attention(query, memory, memory))

    def test_self_attention_is_cross_attention_with_itself(self, name: str) -> None:
        attention = build(name)
        x = torch.randn(2, 9, 24).double()
        torch.testing.assert_close(attention(x), attention(x, x.clone(), x.clone()))

    def test_the_future_changes_nothing(self, name: str) -> None:
        attention = build(name, causal=True, max_length=200)
        x = torch.randn(2, 150, 24).double()
        changed = x.clone()
        changed[:, 140:] = torch.randn(2, 10, 24).double()
        torch.testing.assert_close(attention(x)[:, :140], attention(changed)[:, :140])
        assert not torch.allclose(attention(x)[:, 140:], attention(changed)[:, 140:])

    def test_a_prefix_gives_the_same_with_fixed_max_length(self, name: str) -> None:
        attention = build(name, causal=True, max_length=200)
        x = torch.randn(2, 150, 24).double()
        for length in (1, 20, 149):
            torch.testing.assert_close(attention(x[:, :length]), attention(x)[:, :length])

    @pytest.mark.parametrize("causal", [False, True])
    def test_padding_changes_nothing(self, name: str, causal: bool) -> None:
        attention = build(name, causal=causal, max_length=LONGEST)
        x = torch.randn(2, 20, 24).double()
        mask = torch.zeros(2, 20, dtype=torch.bool)
        mask[:, 12:] = True
        changed = x.clone()
        changed[:, 12:] = 100 * torch.randn(2, 8, 24).double()
        out = attention(x, key_padding_mask=mask)[:, :12]
        torch.testing.assert_close(out, attention(changed, key_padding_mask=mask)[:, :12])
        torch.testing.assert_close(out, attention(x[:, :12]))

    @pytest.mark.parametrize("causal", [False, True])
    def test_a_query_without_keys_gets_the_output_of_zeros(self, name: str, causal: bool) -> None:
        attention = build(name, causal=causal)
        x = torch.randn(3, 6, 24).double().requires_grad_()
        mask = torch.zeros(3, 6, dtype=torch.bool)
        mask[1] = True
        mask[2, :2] = True  # with a causal mask the first two queries see nothing
        out = attention(x, key_padding_mask=mask)
        bias = attention.get_submodule("out_proj").get_parameter("bias")
        torch.testing.assert_close(out[1], bias.expand(6, -1))
        if causal:
            torch.testing.assert_close(out[2, :2], bias.expand(2, -1))
        (gradient,) = torch.autograd.grad(out.square().sum(), x)
        assert out.isfinite().all()
        assert gradient.isfinite().all()

    def test_bfloat16_is_close_to_float64(self, name: str) -> None:
        for causal in (False, True):
            exact = build(name, dim=64, heads=4, causal=causal)
            x = torch.randn(2, 200, 64).bfloat16()
            rounded = build(name, dim=64, heads=4, causal=causal).bfloat16()
            exact.load_state_dict({key: value.double() for key, value in rounded.state_dict().items()})
            out = rounded(x)
            assert out.dtype == torch.bfloat16
            torch.testing.assert_close(out.double(), exact(x.double()), atol=0.03, rtol=0.03)

    def test_autocast_runs_backward_too(self, name: str) -> None:
        attention = make_attention(name, 32, 4, causal=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = attention(torch.randn(2, 9, 32), key_padding_mask=torch.zeros(2, 9, dtype=torch.bool))
        out.float().square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in attention.parameters())

    def test_state_dict_holds_parameters_alone(self, name: str) -> None:
        attention = build(name)
        assert set(attention.state_dict()) == {key for key, _ in attention.named_parameters()}
        other = build(name)
        other.load_state_dict(attention.state_dict())
        x = torch.randn(1, 5, 24).double()
        assert torch.equal(other(x), attention(x))

    def test_runs_on_meta_and_without_contiguous_inputs(self, name: str) -> None:
        with torch.device("meta"):
            assert make_attention(name, 24, 3)(torch.empty(2, 5, 24)).shape == (2, 5, 24)
        attention = build(name)
        x = torch.randn(24, 5, 2).double().transpose(0, 2)
        torch.testing.assert_close(attention(x), attention(x.contiguous()))

    def test_inference_mode_then_training(self, name: str) -> None:
        attention = make_attention(name, 24, 3)
        x = torch.randn(1, 6, 24)
        with torch.inference_mode():
            attention(x)
        attention(x).sum().backward()


class TestRegistry:
    def test_built_ins(self) -> None:
        assert {"softmax", "cosformer", "relative"} <= set(list_attention())

    def test_unknown_name_gives_the_nearest(self) -> None:
        with pytest.raises(
            UnknownNameError, match=r"attention mechanism 'cosfomer' \(did you mean 'cosformer'\?\)"
        ):
            make_attention("cosfomer", 8, 2)

    def test_only_mechanisms_can_be_registered(self) -> None:
        with pytest.raises(SpaceError, match=r"must be a class derived from spaces\.attention\.Attention"):
            register_attention("linear")(torch.nn.Linear)  # type: ignore[type-var]

    def test_a_name_is_taken_once(self) -> None:
        class Other(CosformerAttention):
            pass

        with pytest.raises(ValueError, match="'cosformer' is registered twice"):
            register_attention("cosformer")(Other)


def heads(queries: int, keys: int, width: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(queries * 1000 + keys)
    shapes = ((2, 3, queries, width), (2, 3, keys, width), (2, 3, keys, width))
    q, k, v = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    return q, k, v


def same_outputs_and_gradients(
    fast: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: tuple[Tensor, ...]
) -> None:
    out, expected = fast(*inputs), reference(*inputs)
    torch.testing.assert_close(out, expected)
    weights = torch.randn_like(out)
    for mine, theirs in zip(
        torch.autograd.grad((out * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


def padding(keys: int) -> Tensor:
    mask = torch.zeros(2, keys, dtype=torch.bool)
    mask[0, keys // 2 :] = True
    return mask


@pytest.mark.parametrize(("queries", "keys"), SIZES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
class TestAgainstTheFormula:
    def test_softmax(self, queries: int, keys: int, causal: bool, padded: bool) -> None:
        options: dict[str, Any] = {"causal": causal, "key_padding_mask": padding(keys) if padded else None}
        same_outputs_and_gradients(
            lambda q, k, v: attend(q, k, v, **options),
            lambda q, k, v: softmax_reference(q, k, v, **options),
            heads(queries, keys),
        )

    @pytest.mark.parametrize(
        "positions", [{}, {"max_length": 150}, {"own_lengths": True}], ids=["longest", "fixed", "own"]
    )
    @pytest.mark.parametrize("chunk", [16, 128])
    def test_cosformer(
        self, queries: int, keys: int, causal: bool, padded: bool, positions: dict[str, Any], chunk: int
    ) -> None:
        mask = padding(keys) if padded else None
        options: dict[str, Any] = {"causal": causal, "key_padding_mask": mask, **positions}
        same_outputs_and_gradients(
            lambda q, k, v: cosformer(q, k, v, chunk=chunk, **options),
            lambda q, k, v: cosformer_reference(q, k, v, **options),
            heads(queries, keys),
        )

    def test_relative(self, queries: int, keys: int, causal: bool, padded: bool) -> None:
        options: dict[str, Any] = {"causal": causal, "key_padding_mask": padding(keys) if padded else None}
        table = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
        same_outputs_and_gradients(
            lambda q, k, v, t: relative_attend(q, k, v, t, **options),
            lambda q, k, v, t: relative_reference(q, k, v, t, **options),
            (*heads(queries, keys), table),
        )


class TestCosformer:
    def test_the_denominator_is_clamped_not_shifted(self) -> None:
        q = torch.full((1, 1, 2, 1), 1e-2, dtype=torch.float64)
        v = torch.tensor([[[[1.0], [3.0]]]], dtype=torch.float64)
        plain = cosformer(q, q, v, eps=1e-9)
        torch.testing.assert_close(plain, cosformer(q, q, v, eps=1e-5))
        clamped = cosformer(q, q, v, eps=1e-2)  # the true denominators are below 2e-4
        assert (clamped < plain / 50).all()

    def test_positions_start_at_one(self) -> None:
        """With L = N the last key is at pi/2, so its weight for a query near 0 is what the formula says."""
        q = k = torch.ones(1, 1, 4, 1, dtype=torch.float64)
        v = torch.eye(4, dtype=torch.float64).view(1, 1, 4, 4)
        weights = torch.tensor([[(i - j) * torch.pi / 8 for j in range(4)] for i in range(4)]).double().cos()
        torch.testing.assert_close(
            cosformer(q, k, v)[0, 0], weights / weights.sum(-1, keepdim=True), atol=1e-6, rtol=0
        )

    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_sums_are_float32_whatever_the_input(self, causal: bool, dtype: torch.dtype) -> None:
        q, k, v = (torch.rand(1, 1, 4096, 16).to(dtype) for _ in range(3))
        exact = cosformer(q.double(), k.double(), v.double(), causal=causal)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = cosformer(q, k, v, causal=causal)
        assert out.dtype == dtype
        one_rounding = 0.51 * torch.finfo(dtype).eps * exact.abs().max().item()
        assert (out.double() - exact).abs().max().item() < one_rounding

    @pytest.mark.parametrize("causal", [False, True])
    def test_work_and_saved_memory_are_linear_in_the_length(self, causal: bool) -> None:
        def linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return cosformer(q, k, v, causal=causal)

        def quadratic(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return cosformer_reference(q, k, v, causal=causal)

        for measure in (_saved_bytes, _flops):
            assert measure(linear, 2048) / measure(linear, 1024) == pytest.approx(2.0, rel=0.1)
            assert measure(quadratic, 2048) / measure(quadratic, 1024) > 3.5

    def test_longer_than_max_length_is_refused(self) -> None:
        attention = make_attention("cosformer", 8, 2, max_length=10)
        with pytest.raises(UserMistake, match="max_length=10 must be at least the sequence length 11"):
            attention(torch.randn(1, 11, 8))

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ({"eps": 0.0}, "eps=0.0 must be above 0"),
            ({"chunk": 0}, "chunk=0 must be at least 1"),
            ({"has_out_proj": False, "head_dim": 16}, "has_out_proj=False needs heads x head_dim = dim"),
        ],
    )
    def test_wrong_options(self, options: dict[str, Any], text: str) -> None:
        with pytest.raises(UserMistake, match=text):
            make_attention("cosformer", 8, 2, **options)

    def test_wrong_distance_of_relative(self) -> None:
        with pytest.raises(UserMistake, match="distance=0 must be at least 1"):
            make_attention("relative", 8, 2, distance=0)


def _flops(function: Callable[..., Tensor], length: int) -> int:
    """Floating-point operations of forward and backward."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        inputs = [torch.randn(1, 2, length, 8, requires_grad=True) for _ in range(3)]
        torch.autograd.backward(function(*inputs).sum())
    return int(counter.get_total_flops())


def _saved_bytes(function: Callable[..., Tensor], length: int) -> int:
    """Bytes kept for the backward pass, each storage once."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    inputs = [torch.randn(1, 2, length, 8, requires_grad=True) for _ in range(3)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function(*inputs)
    torch.autograd.backward(out.sum())
    return sum(kept.values())


@pytest.mark.parametrize(("queries", "keys"), SIZES)
@pytest.mark.parametrize("causal", [False, True])
def test_closed_forms_of_multiply_adds(queries: int, keys: int, causal: bool) -> None:
    def counted(function: Callable[..., Tensor]) -> float:
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            function(*(torch.randn(1, 1, length, 6) for length in (queries, keys, keys)))
        return float(counter.get_total_flops()) / 2

    table = torch.randn(9, 6, device="meta")
    assert counted(lambda q, k, v: attend(q, k, v, causal=causal)) == softmax_macs(queries, keys, 6)
    assert counted(lambda q, k, v: cosformer(q, k, v, causal=causal)) == cosformer_macs(
        queries, keys, 6, causal=causal
    )
    assert counted(lambda q, k, v: relative_attend(q, k, v, table)) == relative_macs(
        queries, keys, 6, distance=4
    )


class TestGoldenCosformer:
    @pytest.mark.parametrize("case", ["causal", "noncausal", "cross"])
    def test_official_weights_give_official_outputs(self, case: str) -> None:
        vectors = golden(f"efficient_transformer-cosformer-{case}")
        built = vectors.facts["constructor"]
        attention = CosformerAttention(
            built["embed_dim"], built["num_heads"], causal=built.get("causal", False), eps=1e-6
        )
        attention.load_state_dict(convert_official_state(vectors.state))
        inputs = [
            vectors.inputs[key].transpose(0, 1) for key in ("query", "key", "value") if key in vectors.inputs
        ]
        out = attention(*inputs).transpose(0, 1)
        assert sum(p.numel() for p in attention.parameters()) == vectors.facts["params"]
        torch.testing.assert_close(out, vectors.outputs["y"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(out, vectors.mid["left"], atol=1e-5, rtol=1e-5)

    def test_other_widths_of_key_and_value(self) -> None:
        state = {
            f"{part}_proj.weight": torch.randn(8, width) for part, width in (("q", 8), ("k", 6), ("v", 4))
        }
        state |= {f"{part}_proj.bias": torch.randn(8) for part in "qkv"}
        attention = CosformerAttention(8, 2, kdim=6, vdim=4, has_out_proj=False)
        attention.load_state_dict(convert_official_state(state))
        query, key, value = torch.randn(1, 3, 8), torch.randn(1, 5, 6), torch.randn(1, 5, 4)
        q, k, v = (
            torch.nn.functional.linear(x, state[f"{part}_proj.weight"], state[f"{part}_proj.bias"])
            .view(1, -1, 2, 4)
            .transpose(1, 2)
            for part, x in (("q", query), ("k", key), ("v", value))
        )
        expected = cosformer_reference(q, k, v).transpose(1, 2).flatten(2)
        torch.testing.assert_close(attention(query, key, value), expected)

    def test_a_foreign_state_is_refused(self) -> None:
        with pytest.raises(UserMistake, match=r"state lacks k_proj.weight, v_proj.weight"):
            convert_official_state({"q_proj.weight": torch.zeros(2, 2)})
