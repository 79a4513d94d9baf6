"""Where the slimmings of a fine-tuning start: as pooling of neighbours, which they learn from the model's own tokens.

Freshly drawn slimmings make every token the same mean of all, and all that the blocks behind them have learnt is lost
until they have found something better. Source: none, this is ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spaces.layers.token_slimming import TokenSlimming

__all__ = ["balanced_groups", "fit_to_neighbours", "grid_of"]

_STEPS = 150
_BATCH = 32
_RATE = 5e-3


def grid_of(model: nn.Module, patches: int) -> tuple[int, int]:
    """Rows and columns of ``patches`` tokens: what the patch embedding tells, a square, or else a single row."""
    embedding: Any = getattr(model, "patch_embed", None)
    grid = getattr(embedding, "grid", None) or getattr(embedding, "grid_size", None)
    if isinstance(grid, Sequence) and len(grid) == 2 and math.prod(grid) == patches:
        return int(grid[0]), int(grid[1])
    side = math.isqrt(patches)
    return (side, side) if side * side == patches else (1, patches)


def balanced_groups(places: Tensor, groups: int) -> Tensor:
    """Which of ``groups`` neighbourhoods each place belongs to: (N, 2) -> (N,) whole numbers.

    The places are halved along their longer side again and again, so that no group is empty and sizes differ little.

    Args:
        places: N places in the plane.
        groups: between 1 and N.
    """
    belongs = torch.zeros(len(places), dtype=torch.long)

    def split(members: Tensor, first: int, count: int) -> None:
        if count == 1:
            belongs[members] = first
            return
        own = places[members]
        axis = int((own.amax(0) - own.amin(0)).argmax())
        ordered = members[own[:, axis].argsort(stable=True)]
        half = count // 2
        cut = min(max(round(len(members) * half / count), half), len(members) - (count - half))
        split(ordered[:cut], first, half)
        split(ordered[cut:], first + half, count - half)

    split(torch.arange(len(places)), 0, groups)
    return belongs


def fit_to_neighbours(
    model: nn.Module,
    slimmings: Sequence[TokenSlimming],
    inputs: Sequence[Tensor],
    grid: tuple[int, int],
    *,
    seed: int,
) -> None:
    """Teach each of ``slimmings`` in place to average groups of neighbouring tokens, one behind the other.

    Args:
        model: holds the slimmings; in evaluation mode, not changed otherwise.
        slimmings: in the order in which they run.
        inputs: what the model is called with, some dozens of samples, on its device.
        grid: rows and columns of the patch tokens in front of the first slimming.
        seed: of the draw of samples.
    """
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    places = torch.stack((rows, columns), dim=-1).flatten(0, 1).float()
    for slimming in slimmings:
        belongs = balanced_groups(places, slimming.tokens)
        members = nn.functional.one_hot(belongs, slimming.tokens).T.float()  # (K, N)
        wanted = members / members.sum(1, keepdim=True)
        _fit(slimming, _tokens_before(model, slimming, inputs), wanted.to(inputs[0].device), seed)
        places = wanted @ places  # where the new tokens lie


def _tokens_before(model: nn.Module, slimming: TokenSlimming, inputs: Sequence[Tensor]) -> Tensor:
    seen: list[Tensor] = []
    handle = slimming.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        with torch.no_grad():
            for batch in zip(*(x.split(_BATCH) for x in inputs), strict=True):
                model(*batch)
    finally:
        handle.remove()
    return torch.cat(seen)[:, slimming.prefix :]


def _fit(slimming: TokenSlimming, tokens: Tensor, wanted: Tensor, seed: int) -> None:
    """Cross entropy between the weights wanted, (K, N), and those that ``slimming`` gives for ``tokens``, (B, N, C)."""
    order = torch.Generator().manual_seed(seed)
    kind = tokens.dtype
    wide = torch.promote_types(kind, torch.float32)  # steps this small are lost in numbers of two bytes
    slimming.to(wide)
    tokens = tokens.to(wide)
    parameters = list(slimming.parameters())
    optimizer = torch.optim.Adam(parameters, lr=_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
    for _ in range(_STEPS):
        batch = tokens[torch.randint(len(tokens), (min(_BATCH, len(tokens)),), generator=order)]
        shares = slimming.weights(batch).clamp_min(torch.finfo(batch.dtype).tiny)
        loss = -(wanted * shares.log()).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    optimizer.zero_grad()
    slimming.to(kind)
