"""State dicts of the original (HankYe/Once-for-Both) into ours.

The released checkpoints are whole pickled objects; a state dict exported from one is what is read here.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compress.passes._ofb_extract import keep_temperature
from compress.passes._ofb_gate import Keep
from compress.passes._ofb_sites import AttentionSite, embedding_axes, find_sites
from compress.passes._ofb_slicing import Slicer, sync_sizes
from compress.passes._ofb_supernet import Supernet, set_embedding_width
from nas.errors import UserMistake

__all__ = ["load_searched", "load_searching"]

_IGNORED = ("alpha_patch",)
_SEARCH_ONLY = ("alpha", "score", "alpha_patch", "mask_token")


def load_searching(supernet: Supernet, state: Mapping[str, Tensor]) -> None:
    """Load the state of an original network in its search, nothing of it cut yet; in place.

    Args:
        supernet: of the same sizes and options.
        state: its names are those of the original; ``alpha_patch`` (patch numbers, never trained there) is left out.

    Raises:
        UserMistake: a name or a size does not fit.
    """
    renamed = {_renamed(name, supernet): value for name, value in state.items() if name not in _IGNORED}
    own = supernet.state_dict()
    gates = {name for name in own if name.endswith(".alive")}
    missing = sorted(set(own) - set(renamed) - gates)
    unknown = sorted(set(renamed) - set(own))
    wrong = sorted(name for name in set(own) & set(renamed) if own[name].shape != renamed[name].shape)
    if missing or unknown or wrong:
        raise UserMistake(
            f"ofb: the state does not fit the supernet: missing {missing[:3]}, unknown {unknown[:3]}, "
            f"other sizes {wrong[:3]}"
        )
    supernet.load_state_dict(renamed, strict=False)


def _renamed(name: str, supernet: Supernet) -> str:
    if name.startswith("decoder."):
        return name
    if name == "mask_token":
        return "host.norm_pre.mask_token"
    if name in ("patch_embed.alpha", "patch_embed.score"):
        return f"host.norm_pre.gate.{name.rpartition('.')[2]}"
    for site in supernet.sites:
        prefix = f"{site.name}." if site.name else ""
        first = "qkv" if isinstance(site, AttentionSite) else "fc1"
        rest = name.removeprefix(prefix)
        if name.startswith(prefix) and rest in ("alpha", "score"):
            return f"host.{prefix}{first}.gate.{rest}"
        if name.startswith(f"{prefix}{first}."):
            return f"host.{prefix}{first}.linear.{name.removeprefix(f'{prefix}{first}.')}"
    return f"host.{name}"


@torch.no_grad()
def load_searched(
    model: nn.Module, state: Mapping[str, Tensor], heads: Sequence[int] | None = None
) -> nn.Module:
    """A plain model with the widths and weights of an original network that was searched and fused.

    Args:
        model: dense, of the size that the search began with; not changed.
        state: fused. Its search-only entries (scores, decoder ...) are not needed.
        heads: of every attention, in order; read off the scores where None.

    Raises:
        UserMistake: neither heads nor scores, or sizes that do not fit.
    """
    out: Any = copy.deepcopy(model)
    slicer = Slicer()
    sites, _ = find_sites(out)
    attentions = 0
    for site in sites:
        prefix = f"{site.name}." if site.name else ""
        if isinstance(site, AttentionSite):
            units = state[f"{prefix}proj.weight"].shape[1]
            count = _heads(state, prefix, attentions, heads)
            attentions += 1
            grid, size = (site.heads, site.head_dim), (count, units // count)
        else:
            hidden = site.first(out).out_features
            grid, size = (1, hidden), (1, state[f"{prefix}fc1.weight"].shape[0])
        keep = Keep(torch.arange(size[0]), torch.arange(size[1]).expand(size))
        site.cut(out, keep, grid, slicer)
    width = state["patch_embed.proj.weight"].shape[0]
    for owner, name, dim in embedding_axes(out):
        slicer.select(owner, name, torch.arange(width), dim)
        sync_sizes(owner)
    set_embedding_width(out, width)
    plain = {
        name: value
        for name, value in state.items()
        if name.rpartition(".")[2] not in _SEARCH_ONLY and not name.startswith("decoder.")
    }
    try:
        out.load_state_dict(plain)
    except RuntimeError as error:
        raise UserMistake(
            f"ofb: the state does not fit the model: {' '.join(str(error).split())[:300]}"
        ) from None
    for site in sites:
        if isinstance(site, AttentionSite):
            channels = site.last(out).in_features // site.holder(out).num_heads
            keep_temperature(site.first(out), (channels / site.head_dim) ** 0.5)
    return out.eval()  # type: ignore[no-any-return]


def _heads(state: Mapping[str, Tensor], prefix: str, index: int, heads: Sequence[int] | None) -> int:
    if heads is not None:
        return heads[index]
    score = state.get(f"{prefix}score")
    if score is None:
        raise UserMistake(
            f"ofb: the number of heads of {prefix.rstrip('.') or 'the attention'} is not in the state; give heads="
        )
    return score.shape[0]
