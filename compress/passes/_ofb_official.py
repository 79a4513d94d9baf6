"""State dicts of the original (HankYe/Once-for-Both) into ours.

The released checkpoints are whole pickled objects; a state dict exported from one is what is read here.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from compress.passes._ofb_extract import keep_temperature
from compress.passes._ofb_gate import Gate, Keep, official_options
from compress.passes._ofb_sites import AttentionSite, Site, embedding_axes, find_sites
from compress.passes._ofb_slicing import Slicer, sync_sizes
from compress.passes._ofb_supernet import OFFICIAL_COLOURS, Supernet, set_embedding_width
from nas.errors import UserMistake

__all__ = ["load_searched", "load_searching"]

_IGNORED = ("alpha_patch",)
_SEARCH_ONLY = ("alpha", "score", "alpha_patch", "mask_token")
_TOKENS = ("cls_token", "dist_token", "pos_embed")


def load_searching(supernet: Supernet, state: Mapping[str, Tensor]) -> None:
    """Load the state of an original network in its search, nothing of it cut yet; in place.

    The gates take the original's options (``Dimensions.official_options``), and so does the decoder. An option whose
    alpha is exactly 0 is one that the original deleted, if the others leave the module as wide as it is.

    Args:
        supernet: of the same sizes, searching the same dimensions; not cut yet.
        state: its names are those of the original. Left out are ``alpha_patch`` (patch numbers, never trained there),
            the alphas of modules that were not searched (they have no score), and the decoder and the mask token
            where the supernet has no masked images.

    Raises:
        UserMistake: a name or a size does not fit.
    """
    gates = {id(gate): gate for gate in supernet.gates()}
    names = {
        name: one for name, one in supernet.named_modules() if isinstance(one, Gate) and id(one) in gates
    }
    if any(gate.decided or (gate.heads, gate.channels) != gate.dense for gate in names.values()):
        raise UserMistake("ofb: the supernet is cut already; load into a new one")
    options = {name: official_options(gate) for name, gate in names.items()}
    renamed = {
        _renamed(name, supernet): value for name, value in state.items() if _is_needed(name, state, supernet)
    }
    _require_fit(supernet, renamed, _official_shapes(supernet, options))
    for name, gate in names.items():
        gate.offer(*options[name])
    if supernet.decoder is not None:
        supernet.add_decoder(OFFICIAL_COLOURS)
    supernet.dimensions = replace(supernet.dimensions, official_options=True)
    supernet.load_state_dict(renamed, strict=False)
    for gate in names.values():
        _mark(gate)


def _is_needed(name: str, state: Mapping[str, Tensor], supernet: Supernet) -> bool:
    owner, _, last = name.rpartition(".")
    if last == "alpha":
        return (f"{owner}.score" if owner else "score") in state
    if name == "mask_token":
        return supernet.embedder is None or supernet.embedder.mask_token is not None
    if name.startswith("decoder."):
        return supernet.decoder is not None
    return name not in _IGNORED


def _official_shapes(
    supernet: Supernet, options: Mapping[str, tuple[Sequence[int], Sequence[int]]]
) -> dict[str, tuple[int, ...]]:
    """Sizes of everything that the state has to have, by our names."""
    shapes = {
        name: tuple(value.shape)
        for name, value in supernet.state_dict().items()
        if not name.endswith(".alive")
        and (supernet.dimensions.embedding or not name.startswith("host.norm_pre.gate."))
    }
    for name, (heads, channels) in options.items():
        shapes[f"{name}.alpha"] = (len(heads), len(channels))
    if supernet.decoder is not None:
        stem = supernet.host.patch_embed.proj
        size = OFFICIAL_COLOURS * stem.kernel_size[0] ** 2
        shapes |= {"decoder.0.weight": (size, stem.out_channels, 1, 1), "decoder.0.bias": (size,)}
    return shapes


def _require_fit(
    supernet: Supernet, state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    missing, unknown = sorted(set(shapes) - set(state)), sorted(set(state) - set(shapes))
    wrong = sorted(name for name in set(shapes) & set(state) if shapes[name] != tuple(state[name].shape))
    if not (missing or unknown or wrong):
        return
    hint = ""
    if any(name.endswith(".gate.score") for name in missing):
        hint = "; it does not search all that the supernet does: build that with Dimensions(...) off alike"
    elif any(name.endswith("qkv.linear.bias") for name in unknown):
        hint = "; the original's attentions always have a bias: build the model with qkv_bias=True"
    elif unknown and supernet.left_out:
        hint = f"; the supernet leaves out: {'; '.join(supernet.left_out[:2])}"
    raise UserMistake(
        f"ofb: the state does not fit the supernet: missing {missing[:3]}, unknown {unknown[:3]}, "
        f"other sizes {wrong[:3]}{hint}"
    )


@torch.no_grad()
def _mark(gate: Gate) -> None:
    """Take the options of alpha 0 for deleted; with one left the gate is decided, and its score a multiplier.

    Only where the widest of the others is the widest of all: else the module would have been cut already.
    """
    alive = gate.alpha != 0
    if alive.all() or not (alive[-1].any() and alive[:, -1].any()):
        return
    everything = (gate.head_options[-1], gate.channel_options[-1]) == gate.dense
    if int(alive.sum()) == 1 and not everything:
        return
    gate.alive = alive
    if int(alive.sum()) == 1:
        Slicer().freeze(gate, "alpha")
        gate.decided = True


def _renamed(name: str, supernet: Supernet) -> str:
    if name.startswith("decoder."):
        return name
    if name == "mask_token":
        return "host.norm_pre.mask_token"
    if name in ("patch_embed.alpha", "patch_embed.score"):
        return f"host.norm_pre.gate.{name.rpartition('.')[2]}"
    for site in supernet.sites:
        prefix = _prefix(site)
        first = _first(site)
        rest = name.removeprefix(prefix)
        if name.startswith(prefix) and rest in ("alpha", "score"):
            return f"host.{prefix}{first}.gate.{rest}"
        if name.startswith(f"{prefix}{first}."):
            return f"host.{prefix}{first}.linear.{name.removeprefix(f'{prefix}{first}.')}"
    return f"host.{name}"


def _prefix(site: Site) -> str:
    return f"{site.name}." if site.name else ""


def _first(site: Site) -> str:
    return "qkv" if isinstance(site, AttentionSite) else "fc1"


@torch.no_grad()
def load_searched(
    model: nn.Module, state: Mapping[str, Tensor], heads: Sequence[int] | None = None, *, fused: bool = True
) -> nn.Module:
    """A plain model with the widths and weights of an original network whose widths are decided.

    Args:
        model: dense, of the size that the search began with; not changed.
        state: its search-only entries (alphas, decoder ...) are not needed, and neither are the scores if ``fused``.
        heads: of every attention, in order; where None, read off the scores, or those of ``model`` where the state
            tells by an alpha without a score that the attention was not searched.
        fused: whether the scores were multiplied into the weights already, by the original's ``fuse()``. It leaves them
            in the state unchanged, so that nothing in it tells. False multiplies them in here.

    Raises:
        UserMistake: neither heads nor scores, a width that is undecided, or sizes that do not fit.
    """
    _refuse_undecided(state)
    out: Any = copy.deepcopy(model)
    slicer = Slicer()
    sites, _ = find_sites(out)
    attentions = [site for site in sites if isinstance(site, AttentionSite)]
    if heads is not None and len(heads) != len(attentions):
        raise UserMistake(f"ofb: heads={list(heads)!r}: the model has {len(attentions)} attentions")
    counts = dict(zip((site.name for site in attentions), heads or (), strict=False))
    grids = {}
    for site in sites:
        grid = _dense_grid(site, out)
        size = _size(state, site, grid, counts.get(site.name))
        if size[0] < 1 or size[0] > grid[0] or size[1] < 1 or size[1] > grid[1]:
            raise UserMistake(
                f"ofb: the state does not fit the model: {site.name} has {size[0]} x {size[1]} units there, "
                f"{grid[0]} x {grid[1]} here"
            )
        grids[site.name] = size
        keep = Keep(torch.arange(size[0]), torch.arange(size[1]).expand(size))
        site.cut(out, keep, grid, slicer)
    if not fused:
        state = _folded(state, sites, grids)
    _narrow_embedding(out, state, slicer)
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
    for site in attentions:
        keep_temperature(site.first(out), (grids[site.name][1] / site.head_dim) ** 0.5)
    return out.eval()  # type: ignore[no-any-return]


def _refuse_undecided(state: Mapping[str, Tensor]) -> None:
    """The original sets the alphas of deleted options to 0: with one decided, one is left."""
    for name, alpha in state.items():
        if name.rpartition(".")[2] == "alpha" and int((alpha != 0).sum()) > 1:
            raise UserMistake(
                f"ofb: {name} of the state has {int((alpha != 0).sum())} widths to choose from; "
                "its search is not over, see load_searching"
            )


def _entry(state: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise UserMistake(f"ofb: the state does not fit the model: it has no {name}")
    return state[name]


def _dense_grid(site: Site, model: nn.Module) -> tuple[int, int]:
    if isinstance(site, AttentionSite):
        return site.heads, site.head_dim
    return 1, site.first(model).out_features


def _size(
    state: Mapping[str, Tensor], site: Site, grid: tuple[int, int], heads: int | None
) -> tuple[int, int]:
    """Heads and channels of a module in the state; (1, hidden) of an MLP."""
    prefix = _prefix(site)
    if not isinstance(site, AttentionSite):
        return 1, _entry(state, f"{prefix}fc1.weight").shape[0]
    units = _entry(state, f"{prefix}proj.weight").shape[1]
    score = state.get(f"{prefix}score")
    if heads is None and score is not None:
        # One row for several heads: only channels were searched, and every head is still there.
        heads = score.shape[0] if score.shape[0] > 1 else grid[0]
    choices = state.get(f"{prefix}alpha")
    if heads is None and score is None and choices is not None and choices.numel() == 1:
        heads = grid[0]  # not searched
    if heads is None:
        raise UserMistake(
            f"ofb: the number of heads of {site.name or 'the attention'} is not in the state; give heads="
        )
    if heads < 1 or units % heads:
        raise UserMistake(
            f"ofb: {site.name or 'the attention'} has {units} channels in the state, which {heads} heads cannot share"
        )
    return heads, units // heads


def _folded(
    state: Mapping[str, Tensor], sites: Sequence[Site], grids: Mapping[str, tuple[int, int]]
) -> dict[str, Tensor]:
    """The state with every score multiplied into the weights, as the original's fuse() does."""
    out = dict(state)

    def fold(name: str, factor: Tensor) -> None:
        if out.get(name) is not None:
            out[name] = out[name] * factor.reshape(-1, *[1] * (out[name].ndim - 1))

    for site in sites:
        score = state.get(f"{_prefix(site)}score")
        if score is None:
            continue
        factor = score.expand(grids[site.name]).reshape(-1)
        factor = factor.repeat(3 if isinstance(site, AttentionSite) else 1)
        for kind in ("weight", "bias"):
            fold(f"{_prefix(site)}{_first(site)}.{kind}", factor)
    score = state.get("patch_embed.score")
    if score is not None:
        for kind in ("weight", "bias"):
            fold(f"patch_embed.proj.{kind}", score[0])
        out |= {name: out[name] * score[0] for name in _TOKENS if name in out}
    return out


def _narrow_embedding(model: Any, state: Mapping[str, Tensor], slicer: Slicer) -> None:
    width = _entry(state, "patch_embed.proj.weight").shape[0]
    if width > model.patch_embed.proj.out_channels:
        raise UserMistake(
            f"ofb: the state does not fit the model: an embedding of {width} there, "
            f"{model.patch_embed.proj.out_channels} here"
        )
    for owner, name, dim in embedding_axes(model):
        slicer.select(owner, name, torch.arange(width), dim)
        sync_sizes(owner)
    set_embedding_width(model, width)
