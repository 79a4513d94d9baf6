"""Token slimming against the original's vectors, and what it promises by construction."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nas.profile import profile
from spaces import UserMistake
from spaces.layers.token_slimming import (
    ReverseTokenSlimming,
    TokenSlimming,
    kept_tokens,
    scaled,
    slimming_macs,
)
from spaces.vision.lv_vit import load_reverse_module, load_token_slimming
from tests.golden_vectors import golden


@pytest.fixture
def slimming() -> TokenSlimming:
    module = TokenSlimming(12, 5, prefix=2)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


class TestGolden:
    def test_slimming(self) -> None:
        vectors = golden("sit-tsm")
        module, x = load_token_slimming(vectors.state), vectors.inputs["x"]
        torch.testing.assert_close(module.weights(x), vectors.mid["weight"], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(module(x), vectors.outputs["y"], atol=2e-6, rtol=1e-5)

    def test_reverse(self) -> None:
        vectors = golden("sit-rtsm")
        module, x = load_reverse_module(vectors.state), vectors.inputs["x"]
        torch.testing.assert_close(module.expand(x), vectors.mid["after_token_mlp"], atol=5e-6, rtol=1e-5)
        torch.testing.assert_close(module(x), vectors.outputs["y"], atol=5e-6, rtol=1e-5)

    def test_a_foreign_state(self) -> None:
        with pytest.raises(UserMistake, match=r"state lacks 'weight\.1\.weight'"):
            load_token_slimming({"scale": torch.ones(1)})
        with pytest.raises(UserMistake, match=r"state lacks 'mlp1\.fc1\.weight'"):
            load_reverse_module({"scale": torch.ones(1)})


class TestSlimming:
    def test_weights_are_shares(self, slimming: TokenSlimming) -> None:
        weights = slimming.double().weights(torch.randn(3, 20, 12, dtype=torch.float64))
        assert weights.shape == (3, 5, 20)
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, 5, dtype=torch.float64))
        assert (weights > 0).all()

    def test_tokens_stay_within_their_range(self, slimming: TokenSlimming) -> None:
        x = torch.randn(3, 22, 12)
        out, patches = slimming(x)[:, 2:], x[:, 2:]
        assert (out <= patches.amax(1, keepdim=True) + 1e-5).all()
        assert (out >= patches.amin(1, keepdim=True) - 1e-5).all()

    def test_order_does_not_matter(self, slimming: TokenSlimming) -> None:
        x = torch.randn(3, 20, 12)
        slimming.prefix = 0
        torch.testing.assert_close(slimming(x[:, torch.randperm(20)]), slimming(x), atol=1e-5, rtol=1e-5)

    def test_constant_tokens_stay(self, slimming: TokenSlimming) -> None:
        x = torch.randn(3, 1, 12)
        torch.testing.assert_close(slimming(x.expand(3, 9, 12))[:, 2:], x.expand(3, 5, 12))

    def test_prefix_passes_and_is_not_read(self, slimming: TokenSlimming) -> None:
        x = torch.randn(3, 22, 12)
        changed = torch.cat((torch.randn(3, 2, 12), x[:, 2:]), dim=1)
        assert torch.equal(slimming(x)[:, :2], x[:, :2])
        assert torch.equal(slimming(x)[:, 2:], slimming(changed)[:, 2:])

    def test_what_is_mixed_is_not_normalised(self, slimming: TokenSlimming) -> None:
        x = torch.randn(3, 22, 12)
        # the norm takes scale and offset away from the weights, but not from what they mix
        torch.testing.assert_close(
            slimming(3 * x + 1)[:, 2:], 3 * slimming(x)[:, 2:] + 1, atol=1e-3, rtol=1e-3
        )

    def test_config_makes_the_same_shape(self) -> None:
        first = TokenSlimming(20, 3, ratio=0.25, prefix=1)
        again = TokenSlimming(**first.config())
        again.load_state_dict(first.state_dict())
        x = torch.randn(2, 9, 20)
        assert torch.equal(again(x), first(x))
        assert first.config() == {"dim": 20, "tokens": 3, "hidden": 5, "prefix": 1}

    def test_parameters_and_macs(self) -> None:
        module = TokenSlimming(40, 7, ratio=0.5)
        assert sum(p.numel() for p in module.parameters()) == 2 * 40 + 40 * 20 + 20 + 20 * 7 + 7 + 1
        assert profile(module, (torch.empty(1, 30, 40),)).macs == slimming_macs(30, 7, 40, 20)

    def test_gradients_reach_everything(self, slimming: TokenSlimming) -> None:
        slimming(torch.randn(2, 9, 12)).square().mean().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in slimming.parameters())

    def test_masks_are_refused(self, slimming: TokenSlimming) -> None:
        x = torch.randn(2, 9, 12)
        assert torch.equal(slimming(x, attn_mask=None, is_causal=False), slimming(x))
        with pytest.raises(ValueError, match="takes no attention mask"):
            slimming(x, attn_mask=torch.ones(9, 9))

    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            ({"tokens": 0}, "tokens 0 must be at least 1"),
            ({"tokens": 1, "ratio": 0.01}, "hidden width 0 must be at least 1"),
            ({"tokens": 1, "prefix": -1}, "prefix -1 must be at least 0"),
        ],
    )
    def test_impossible_sizes(self, arguments: dict[str, int], text: str) -> None:
        with pytest.raises(UserMistake, match=text):
            TokenSlimming(8, **arguments)


def test_kept_tokens() -> None:
    assert kept_tokens(196, 0.5, 3) == (98, 49, 24)
    assert kept_tokens(324, 0.5, 3) == (162, 81, 40)
    assert kept_tokens(196, 0.7, 3) == (137, 96, 67)
    assert kept_tokens(9, 0.25, 3) == (2, 1, 1)
    assert kept_tokens(9, 0.25, 0) == ()


def test_scaled_takes_a_quotient_back() -> None:
    assert all(scaled(width, part / width) == part for width in range(1, 200) for part in range(1, 3 * width))
    assert scaled(7, 0.5) == 3


def test_reverse_sizes() -> None:
    module = ReverseTokenSlimming(8, 3, 10, ratio=2)
    assert module(torch.randn(2, 3, 8)).shape == (2, 10, 8)
    assert (module.mlp1.fc1.out_features, module.mlp2.fc1.out_features) == (20, 16)
