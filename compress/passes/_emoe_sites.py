"""Dense feed-forward networks that can be split into experts, found by what they are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compress.structure import StructureError
from spaces.layers.expert_mlp import ExpertMlp, Experts
from spaces.layers.expert_swiglu import ExpertSwiGLU

__all__ = ["Site", "find_sites", "put", "split"]

_EXACT = 1e-4

Kind = Literal["plain", "gated", "packed", "experts"]


@dataclass(frozen=True)
class Site:
    """One feed-forward network.

    Attributes:
        name: of the module in the model.
        kind: ``plain`` (fc1, act, fc2), ``gated`` (fc1_g, fc1_x, act, fc2), ``packed`` (both halves in one fc1), or
            ``experts``: split already.
    """

    name: str
    module: Any
    kind: Kind

    @property
    def hidden(self) -> int:
        """Number of hidden units, h."""
        return int(self.module.hidden if self.kind == "experts" else self.module.fc2.in_features)

    @property
    def dim(self) -> int:
        """Width of the inputs, d."""
        return int(self.module.dim if self.kind == "experts" else self._layers()[0].in_features)

    @property
    def keys(self) -> Tensor:
        """Rows of the layer that the activation follows, (h, d)."""
        weight = self._layers()[0].weight
        return weight.detach()

    def _layers(self) -> list[nn.Linear]:
        """The layer of the keys, and that of the factors where there is one."""
        if self.kind == "plain":
            return [self.module.fc1]
        if self.kind == "gated":
            return [self.module.fc1_g, self.module.fc1_x]
        halves = [_half(self.module.fc1, part) for part in (0, 1)]
        return halves[::-1] if self.module.gate_last else halves


def find_sites(model: nn.Module) -> list[Site]:
    """Every feed-forward network within the model (not itself), in the order of its modules; split ones too."""
    return [
        Site(name, module, kind)
        for name, module in model.named_modules()
        if name and (kind := _kind(module)) is not None
    ]


def split(site: Site, labels: Tensor, k: int, **options: Any) -> Experts:
    """Experts in place of ``site``, after a look whether all of them together are the dense network.

    Args:
        labels: expert of every hidden unit, (h,).
        options: as of ``Experts``.

    Raises:
        StructureError: the module computes something else than its parts tell.
        UserMistake: see ``Experts``.
    """
    experts = _split(site, labels, k, **options)
    every = _split(site, labels, experts.experts, form="masked").eval()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 7, site.dim, generator=generator).to(site.keys)
    training = site.module.training
    try:
        with torch.no_grad():
            wanted = site.module.eval()(x)
    except Exception as error:  # a module of the user's may raise anything when it is called alone
        raise StructureError(f"{site.name}: cannot be called alone with tokens ({error})") from None
    finally:
        site.module.train(training)
    with torch.no_grad():
        gap = float((every(x) - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6))
    if not gap <= _EXACT:
        raise StructureError(
            f"{site.name} ({type(site.module).__name__}): does more than its two layers and its activation "
            f"(relative difference {gap:.2g}), so it cannot be split"
        )
    return experts


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` into ``model`` in place of the one called ``name``."""
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)


def _split(site: Site, labels: Tensor, k: int, **options: Any) -> Experts:
    layers, fc2, act = site._layers(), site.module.fc2, site.module.act
    if site.kind == "plain":
        return ExpertMlp.of(layers[0], fc2, act, labels, k, **options)
    if site.kind == "packed":
        options = {**options, "packed": True, "keys_last": bool(site.module.gate_last)}
    return ExpertSwiGLU.of(layers[0], layers[1], fc2, act, labels, k, **options)


def _kind(module: Any) -> Kind | None:
    if isinstance(module, Experts):
        return "experts"
    if type(module).__module__.startswith(
        "spaces.layers"
    ):  # token slimming has layers of these names as well
        return None
    fc2, act = getattr(module, "fc2", None), getattr(module, "act", None)
    normed = any(
        isinstance(found := getattr(module, name, None), nn.Module) and not isinstance(found, nn.Identity)
        for name in ("norm", "grn")
    )
    if type(fc2) is not nn.Linear or not isinstance(act, nn.Module) or normed:
        return None
    if all(type(getattr(module, name, None)) is nn.Linear for name in ("fc1_g", "fc1_x")):
        return "gated"
    fc1 = getattr(module, "fc1", None)
    if type(fc1) is not nn.Linear:
        return None
    if fc1.out_features == fc2.in_features:
        return "plain"
    packed = fc1.out_features == 2 * fc2.in_features and isinstance(getattr(module, "gate_last", None), bool)
    return "packed" if packed else None


def _half(layer: nn.Linear, part: int) -> nn.Linear:
    """The first or second half of the outputs, as a layer of its own that shares the weights."""
    size = layer.out_features // 2
    rows = slice(part * size, (part + 1) * size)
    made = nn.Linear(1, 1, bias=layer.bias is not None)
    made.in_features, made.out_features = layer.in_features, size
    made.weight = nn.Parameter(layer.weight.detach()[rows], requires_grad=layer.weight.requires_grad)
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.detach()[rows], requires_grad=layer.bias.requires_grad)
    return made.train(layer.training)
