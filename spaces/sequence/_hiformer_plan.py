"""From an architecture of hiformer to the shapes of its network, and their costs in closed form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from spaces.layers.heterogeneous import Kind, break_even_rank
from spaces.signature import ClickThroughRateSignature

__all__ = ["InteractionSpec", "Norm", "count_interaction", "count_macs", "hiformer_plan"]

Norm = Literal["pre", "post", "none"]


@dataclass(frozen=True)
class InteractionSpec:
    """One layer.

    Args:
        kind: how keys and values are projected, see ``spaces.layers.heterogeneous``.
        ffn: width of the feed-forward part.
        shared_ffn: one feed-forward part for all tokens in place of one each.
        key_rank, value_rank: of a ``composite_low_rank`` layer.
        query_kind, query_rank: see ``HeterogeneousAttention``.
        project_out: see ``HeterogeneousAttention``.
    """

    kind: Kind
    ffn: int
    shared_ffn: bool = False
    key_rank: int | None = None
    value_rank: int | None = None
    query_kind: Kind | None = None
    query_rank: int | None = None
    project_out: bool = True


def hiformer_plan(architecture: Mapping[str, Any], signature: ClickThroughRateSignature) -> dict[str, Any]:
    """Arguments of ``Hiformer`` and of ``count_macs`` for an architecture of any scale.

    Ranks are whole numbers, or shares of the rank at which two factors cost as much as the full matrix.
    """
    dim, heads = int(architecture["embed"]), int(architecture["heads"])
    widths = {"key": int(architecture["key_dim"]), "value": int(architecture["value_dim"])}
    dense_tokens = int(architecture["dense_tokens"]) if signature.dense else 0
    tokens = len(signature.vocabularies) + dense_tokens + signature.outputs
    specs = []
    for index in range(1, int(architecture["depth"]) + 1):
        layer = f"layer{index}"
        ranks: dict[str, Any] = {
            f"{part}_rank": _rank(
                architecture.get(f"{layer}.{part}_rank"), tokens * dim, tokens * heads * width
            )
            for part, width in widths.items()
        }
        specs.append(
            InteractionSpec(
                kind=architecture[f"{layer}.kind"],
                ffn=dim * int(architecture[f"{layer}.ffn_ratio"]),
                shared_ffn=architecture.get(f"{layer}.ffn") == "shared",
                **ranks,
            )
        )
    return {
        "dim": dim,
        "heads": heads,
        "key_dim": widths["key"],
        "value_dim": widths["value"],
        "dense_tokens": dense_tokens,
        "layers": specs,
        "norm": str(architecture["norm"]),
        "prune_last": bool(architecture.get("prune_last", True)),
    }


def _rank(value: Any, inputs: int, outputs: int) -> int | None:
    if isinstance(value, float):
        return max(1, int(value * break_even_rank(inputs, outputs)))
    return None if value is None else int(value)


def count_interaction(
    tokens: int,
    outputs: int,
    *,
    dim: int,
    heads: int,
    key_dim: int,
    value_dim: int,
    layers: Sequence[InteractionSpec],
    prune_last: bool = True,
    **_: Any,
) -> tuple[int, int]:
    """Parameters of the layers without norms, and multiply-adds of one sample in them.

    Args:
        tokens: L, the task tokens included.
        outputs: number of task tokens.
        dim, heads, key_dim, value_dim, layers, prune_last: as of ``Hiformer``.
    """
    parameters = macs = 0
    for number, spec in enumerate(layers):
        asking = outputs if prune_last and number == len(layers) - 1 else tokens
        query_kind = spec.query_kind or ("shared" if spec.kind == "shared" else "heterogeneous")
        maps = [
            _map_cost(query_kind, tokens, asking, dim, heads * key_dim, spec.query_rank),
            _map_cost(spec.kind, tokens, tokens, dim, heads * key_dim, spec.key_rank),
            _map_cost(spec.kind, tokens, tokens, dim, heads * value_dim, spec.value_rank),
        ]
        if spec.project_out:
            out_kind = "shared" if query_kind == "shared" else "heterogeneous"
            maps.append(_map_cost(out_kind, asking, asking, heads * value_dim, dim, None))
        owners = 1 if spec.shared_ffn else asking
        parameters += sum(weights for weights, _ in maps) + owners * (2 * dim * spec.ffn + spec.ffn + dim)
        macs += sum(products for _, products in maps) + asking * 2 * dim * spec.ffn
        macs += heads * asking * tokens * (key_dim + value_dim)
    return parameters, macs


def _map_cost(
    kind: str, tokens: int, outputs: int, dim: int, width: int, rank: int | None
) -> tuple[int, int]:
    """Weights and multiply-adds of a projection."""
    if kind == "shared":
        return dim * width, outputs * dim * width
    if kind == "heterogeneous":
        return (outputs * dim * width,) * 2
    inputs, wide = tokens * dim, outputs * width
    return (inputs * wide if rank is None else rank * (inputs + wide),) * 2


def count_macs(signature: ClickThroughRateSignature, **plan: Any) -> int:
    """Multiply-adds of the products of one sample in closed form: dense part, layers and heads.

    Looking up embeddings costs none. ``plan`` is that of ``hiformer_plan``.
    """
    dim, dense_tokens = plan["dim"], plan["dense_tokens"]
    tokens = len(signature.vocabularies) + dense_tokens + signature.outputs
    _, macs = count_interaction(tokens, signature.outputs, **plan)
    if dense_tokens:
        macs += signature.dense * dim + dim * dense_tokens * dim
    return int(macs + signature.outputs * (dim * dim + dim))
