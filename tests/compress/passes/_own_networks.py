"""Networks whose attentions are mechanisms of ``spaces.attention``, and what is left of them at zero."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from compress.passes.base import Context
from compress.structure import find_heads, find_mlps
from spaces.attention import Attention, make_attention
from spaces.attention.softmax import SoftmaxAttention
from spaces.layers.projection import HeadProjection
from spaces.sequence.efficient_transformer import ImageTransformer, LayerSpec
from spaces.signature import ImageSignature
from tests.compress.models import batches, steepened
from tests.compress.passes._padding_free_models import sentences, translator

__all__ = [
    "CONTEXT",
    "IMAGES",
    "KINDS",
    "PLAN",
    "SENTENCE",
    "Fixed",
    "Forgetful",
    "Mixture",
    "OnGrid",
    "PerHead",
    "Talking",
    "TalkingMaps",
    "X",
    "assert_exact",
    "classifier",
    "heads_of",
    "speaker",
    "zeroed",
]

KINDS = ("softmax", "relative", "cosformer", "cosformer_causal")
PLAN: dict[str, Any] = {"patch": (4, 4), "dim": 24, "head_dim": 6, "relative_length": 4}
IMAGES = ImageSignature(3, 16, 16, 5)
X = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)).double()
CONTEXT = Context(example=(X[:1],), train=[(x.double(), y) for x, y in batches(2, image=16)], epochs=0)
SENTENCE = (sentences([5, 1, 12]), sentences([4, 2, 3], seed=1))


def classifier(heads: tuple[int, ...] = (4, 3, 5, 4), kinds: tuple[str, ...] = KINDS) -> ImageTransformer:
    torch.manual_seed(3)
    layers = [LayerSpec(number, 40, kind) for number, kind in zip(heads, kinds, strict=True)]
    model: Any = steepened(ImageTransformer(IMAGES, layers=layers, **PLAN))
    return model.double().eval()  # type: ignore[no-any-return]


def speaker(**options: Any) -> Any:
    return steepened(translator(*KINDS, span=1, **options)).double()


def kept_of(rows: Tensor, left: Tensor) -> list[int]:
    """Where in ``rows`` each of those that are left lies."""
    known = [row.tolist() for row in rows]
    return [known.index(row.tolist()) for row in left]


def zeroed(model: nn.Module, made: nn.Module) -> Any:
    """``model`` with everything at zero that ``made`` has no more, found by the values that are left."""
    hard = copy.deepcopy(model)
    with torch.no_grad():
        for old, new in zip(find_heads(hard), find_heads(made), strict=True):
            reader: Any = old.attention.out_proj
            columns = kept_of(reader.weight.T, new.attention.out_proj.weight.T)  # type: ignore[union-attr, arg-type]
            reader.weight[:, [i for i in range(reader.in_features) if i not in columns]] = 0
        for mlp, left in zip(find_mlps(hard), find_mlps(made), strict=True):
            units = kept_of(mlp.fc2.weight.T, left.fc2.weight.T)
            mlp.fc2.weight[:, [i for i in range(mlp.hidden) if i not in units]] = 0
    return hard


def assert_exact(made: nn.Module, model: nn.Module, *inputs: Tensor) -> None:
    """In float64 and in float32."""
    hard = zeroed(model, made)
    with torch.no_grad():
        wanted, plain = hard(*inputs), model(*inputs)
        torch.testing.assert_close(made(*inputs), wanted, rtol=0, atol=1e-10 * float(wanted.abs().max()))
        assert float((wanted - plain).abs().max()) > 1e-3 * float(plain.abs().max())
        low = [x.float() if x.is_floating_point() else x for x in inputs]
        thin, wanted = copy.deepcopy(made).float()(*low), hard.float()(*low)
        torch.testing.assert_close(thin, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def heads_of(model: nn.Module) -> list[int]:
    return [one.num_heads for one in find_heads(model)]


class Mixture(Attention):
    """Two mechanisms in one."""

    def __init__(self) -> None:
        super().__init__(24, 4)
        self.one, self.other = make_attention("softmax", 24, 4), make_attention("relative", 24, 4)

    def forward(self, query: Tensor, *others: Any, **options: Any) -> Tensor:
        return self.one(query) + self.other(query)  # type: ignore[no-any-return]


class PerHead(SoftmaxAttention):
    """Somebody's own: one number by head, which it also takes out."""

    def __init__(self, dim: int, num_heads: int, **options: Any):
        super().__init__(dim, num_heads, **options)
        self.amounts = nn.Parameter(torch.ones(num_heads))

    def mixed(self, query: Tensor) -> Tensor:
        q, k, v = self.in_proj(query)
        result: Tensor = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return result

    def forward(self, query: Tensor, *others: Any, **options: Any) -> Tensor:
        torch.rand(1)  # as some draw, whatever for
        mixed = self.mixed(query) * self.amounts[: self.num_heads, None, None]
        return self.out_proj(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def keep_heads(self, index: Any) -> None:
        super().keep_heads(index)
        self.amounts = nn.Parameter(self.amounts.detach()[index])


class Forgetful(PerHead):
    """The wrong numbers stay, which even weights of one hide."""

    def keep_heads(self, index: Any) -> None:
        SoftmaxAttention.keep_heads(self, index)


class Talking(PerHead):
    """Heads that read each other."""

    def mixed(self, query: Tensor) -> Tensor:
        mixed = super().mixed(query)
        return mixed + mixed.roll(1, dims=1)


class Fixed(PerHead):
    """A number of heads that does not change."""

    def mixed(self, query: Tensor) -> Tensor:
        return super().mixed(query) * torch.arange(1, 5)[:, None, None]


class OnGrid(PerHead):
    """Needs to be called as the network does."""

    def forward(self, query: Tensor, *others: Any, **options: Any) -> Tensor:
        assert options["grid"] == (4, 4)
        return super().forward(query)


class TalkingMaps(HeadProjection):
    """Queries that are made of all heads."""

    def forward(self, query: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().forward(query, *others)
        return q + q.roll(1, dims=1), k, v
