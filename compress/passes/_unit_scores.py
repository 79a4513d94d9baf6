"""How much each head, head channel, hidden unit and embedding channel matters: by size or by first-order Taylor.

Sources: L1 and L2 norms of all weights that belong to a unit; Molchanov et al., "Importance Estimation for Neural
Network Pruning", CVPR 2019, equation 8: the squared first-order change of the loss when the unit is taken out.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compress.data import answer
from compress.passes.base import Context, PassFailed, batches_of
from compress.structure import Block, Heads, Mlp, ViTStructure
from spaces.attention.base import Attention

__all__ = ["Criterion", "Scorer", "taylor_gradients"]

Criterion = Literal["l1", "l2", "taylor"]


class Scorer:
    """Scores of units from their weights, or from several sets of gradients of these.

    Args:
        criterion: ``l1``, ``l2`` or ``taylor``.
        gradients: for ``taylor``: for each minibatch, parameter -> gradient.
    """

    def __init__(self, criterion: Criterion, gradients: Sequence[dict[Tensor, Tensor]] = ()):
        self._criterion, self._gradients = criterion, gradients

    def hidden(self, mlp: Mlp) -> Tensor:
        """(hidden,)"""
        if self._criterion == "taylor":  # fc2's columns hold all that leaves a unit
            return self._taylor(lambda change: _inputs(change(mlp.fc2.weight)))
        return self._size([_rows(mlp.fc1), _columns(mlp.fc2)])

    def heads(self, part: Block | Heads) -> Tensor:
        """(heads,)"""
        if isinstance(part, Heads):
            return self._of_mechanism(part.attention)
        block, heads = part, part.num_heads
        if self._criterion == "taylor":
            return self._taylor(lambda change: change(block.proj.weight).sum(0).reshape(heads, -1).sum(1))
        q, k, v = _rows(block.qkv).reshape(3, heads, -1)
        return self._size([q, k, v, _columns(block.proj).reshape(heads, -1)])

    def matched_channels(self, block: Block) -> Tensor:
        """(heads, head_dim) of queries and keys."""
        shape = (block.num_heads, block.head_dim)
        if self._criterion == "taylor":

            def of_queries(change: Callable[[Tensor], Tensor]) -> Tensor:
                rows = change(block.qkv.weight).sum(1)
                rows = rows if block.qkv.bias is None else rows + change(block.qkv.bias)
                return rows.reshape(3, *shape)[0]

            return self._taylor(of_queries)
        q, k, _ = _rows(block.qkv).reshape(3, shape[0] * shape[1], -1)
        return self._size([q, k]).reshape(shape)

    def carried_channels(self, block: Block) -> Tensor:
        """(heads, head_dim) of values."""
        shape = (block.num_heads, block.head_dim)
        if self._criterion == "taylor":
            return self._taylor(lambda change: change(block.proj.weight).sum(0).reshape(shape))
        v = _rows(block.qkv).reshape(3, shape[0] * shape[1], -1)[2]
        return self._size([v, _columns(block.proj)]).reshape(shape)

    def embedding(self, structure: ViTStructure) -> Tensor:
        """(width,): over everything that reads a channel, and for sizes also what writes it."""
        readers: list[Any] = [part for block in structure.blocks for part in (block.qkv, block.mlp.fc1)]
        readers += list(structure.heads.values())
        if self._criterion == "taylor":
            return self._taylor(
                lambda change: torch.stack([_inputs(change(one.weight)) for one in readers]).sum(0)
            )
        writers = [structure.embedding, *(part for b in structure.blocks for part in (b.proj, b.mlp.fc2))]
        return self._size([*(_columns(one) for one in readers), *(_rows(one) for one in writers)])

    def _of_mechanism(self, attention: Attention) -> Tensor:
        if attention.num_heads == 1:  # it stays, whatever it is worth, and need not be one that could go
            return torch.ones(1, device=next(attention.parameters()).device)
        columns = attention.head_columns()
        reader: Any = attention.out_proj
        if self._criterion == "taylor":
            return self._taylor(lambda change: change(reader.weight).sum(0)[columns].sum(1))
        # (parts, H, D, everything that makes a channel) -> (H, all of it)
        made = [_rows(layer)[rows].transpose(0, 1).flatten(1) for layer, rows in attention.head_maps()]
        return self._size([*made, _columns(reader)[columns].flatten(1)])

    def _size(self, parts: Sequence[Tensor]) -> Tensor:
        """Each part (units, n); the norm over all of a unit's weights."""
        together = torch.cat([part.float() for part in parts], dim=1)
        sizes: Tensor = together.norm(p=1 if self._criterion == "l1" else 2, dim=1)
        return sizes

    def _taylor(self, change: Callable[[Callable[[Tensor], Tensor]], Tensor]) -> Tensor:
        """Mean over the minibatches of the squared sum of weight times gradient over a unit."""
        found = []
        for gradients in self._gradients:

            def product(weight: Tensor, gradients: dict[Tensor, Tensor] = gradients) -> Tensor:
                return (weight.detach() * gradients[weight]).double()

            found.append(change(product).square())
        return torch.stack(found).mean(0)


def taylor_gradients(model: nn.Module, context: Context, batches: int) -> list[dict[Tensor, Tensor]]:
    """Gradients of the loss on the first ``batches`` minibatches, in evaluation mode; the weights stay as they are.

    Raises PassFailed when the loss is not finite.
    """
    wanted = list(model.parameters())
    home = wanted[0].device
    model.to(context.device).eval()
    found = []
    with _learning(wanted):
        for number, batch in enumerate(itertools.islice(batches_of(context), batches), 1):
            loss = answer(model, batch, context).loss
            if not torch.isfinite(loss):
                raise PassFailed(
                    f"the loss is {loss.item()} on minibatch {number}, so no importance can be taken from it"
                )
            gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
            found.append(
                {
                    parameter: torch.zeros_like(parameter) if gradient is None else gradient
                    for parameter, gradient in zip(wanted, gradients, strict=True)
                }
            )
    model.to(home)
    return [{p: g.to(home) for p, g in gradients.items()} for gradients in found]


@contextmanager
def _learning(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    before = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for parameter, flag in zip(parameters, before, strict=True):
            parameter.requires_grad_(flag)


def _rows(layer: Any) -> Tensor:
    """(outputs, everything that makes one)."""
    weight = layer.weight.detach().flatten(1)
    return weight if layer.bias is None else torch.cat([weight, layer.bias.detach()[:, None]], dim=1)


def _columns(layer: Any) -> Tensor:
    """(inputs, everything that reads one)."""
    weight: Tensor = layer.weight.detach()
    return weight.transpose(0, 1).flatten(1)


def _inputs(change: Tensor) -> Tensor:
    return change.flatten(2).sum((0, 2)) if change.dim() > 2 else change.sum(0)
