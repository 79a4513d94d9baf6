"""Latency as a sum of measured blocks: each distinct block is measured once, a model is looked up.

This is how tables of operators (ProxylessNAS, FBNet, Once-for-all) predict. It needs no training, and it is blind to
whatever happens between blocks: fused work, caches, the launch queue of a GPU. ``rest_ms`` and ``scale``, fitted to a
few whole models, take up the part of that which is the same for all. It is offered beside ``LatencyPredictor``.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nas.errors import UserMistake
from nas.files import canonical_json, read_record, write_record
from nas.latency.prediction.models import fit_prices

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Block", "BlockTable", "blocks_of"]

_FORMAT = 1


@dataclass(frozen=True)
class Block:
    """One block of a model with what it was called with.

    Attributes:
        signature: equal for blocks that run the same work: type and settings of its modules, shapes of parameters and
            of its inputs.
        name: of the module in its model.
        module: to be measured with ``inputs``.
        inputs: tensors of the shapes that it is called with in the model.
    """

    signature: str
    name: str
    module: nn.Module
    inputs: tuple[Tensor, ...]


def blocks_of(
    model: nn.Module, inputs: Sequence[Tensor], *, is_block: Callable[[str, nn.Module], bool] | None = None
) -> list[Block]:
    """The blocks that a model is a chain of, in the order of their calls; the model runs once and is not changed.

    Args:
        model: in any mode; it is run in evaluation mode without gradients.
        inputs: what it is called with.
        is_block: of a module's name and the module; by default the members of its ``nn.ModuleList`` and
            ``nn.Sequential`` containers that have members of their own, and the modules beside these that have none.

    Raises:
        UserMistake: no block was called with tensors only.
    """
    import torch

    chosen = _choose(model, is_block or _by_default(model))
    found: list[Block] = []

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if args and not kwargs and all(isinstance(x, torch.Tensor) for x in args):
                # Copies, because a model may change its own activations in place.
                found.append(
                    Block(_signature(module, args), name, module, tuple(x.detach().clone() for x in args))
                )

        return hook

    hooks = [module.register_forward_pre_hook(note(name), with_kwargs=True) for name, module in chosen]
    was_training = model.training
    try:
        model.eval()
        with torch.no_grad():
            model(*inputs)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    if not found:
        raise UserMistake(
            f"{type(model).__name__} has no blocks that are called with tensors only; say what a block is with is_block"
        )
    return found


class BlockTable:
    """Measured milliseconds of blocks by signature, and the sum that a model's blocks come to.

    Args:
        identity: digest of the conditions of all its measurements, as of ``LatencyPredictor``.

    Attributes:
        rest_ms: what a model takes beside its blocks.
        scale: what a block takes inside of a model, over what it takes alone.
    """

    def __init__(self, *, identity: str | None = None):
        self.identity = identity
        self.rest_ms = 0.0
        self.scale = 1.0
        self._milliseconds: dict[str, float] = {}

    def __len__(self) -> int:
        """Number of distinct blocks."""
        return len(self._milliseconds)

    def missing(self, blocks: Sequence[Block]) -> list[Block]:
        """Those blocks, each signature once, that were not measured yet."""
        first = {block.signature: block for block in reversed(blocks)}
        return [
            first[name]
            for name in dict.fromkeys(b.signature for b in blocks)
            if name not in self._milliseconds
        ]

    def add(self, signature: str, milliseconds: float) -> None:
        """Enter a measured block. Raises UserMistake unless ``milliseconds`` is positive."""
        if not 0 < milliseconds < float("inf"):
            raise UserMistake(f"milliseconds={milliseconds!r} of a block must be positive; measure it again")
        self._milliseconds[signature] = float(milliseconds)

    def total(self, blocks: Sequence[Block | str]) -> float:
        """Milliseconds of a model of these blocks (or signatures).

        Raises:
            UserMistake: a block was not measured; ``missing`` lists them.
        """
        return self.rest_ms + self.scale * self._sum(blocks)

    def calibrate(self, models: Sequence[Sequence[Block | str]], milliseconds: Sequence[float]) -> None:
        """Fit ``rest_ms`` and ``scale`` to whole models that were measured, at least three.

        Raises:
            UserMistake: too few models, unequal numbers, or a block that was not measured.
        """
        if len(models) < 3 or len(models) != len(milliseconds):
            raise UserMistake(
                f"{len(models)} models and {len(milliseconds)} latencies; at least three of each are needed"
            )
        sums = np.array([[1.0, self._sum(blocks)] for blocks in models])
        self.rest_ms, self.scale = map(
            float, fit_prices(sums, np.array(milliseconds, dtype=np.float64)).prices
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as a sealed JSON record. Raises nas.files.WriteFailed."""
        write_record(
            path,
            {
                "format": _FORMAT,
                "identity": self.identity,
                "rest_ms": self.rest_ms,
                "scale": self.scale,
                "blocks": self._milliseconds,
            },
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, identity: str | None = None) -> BlockTable:
        """Read it back.

        Raises:
            UserMistake: another version, or measurements of another identity than the one asked for.
            nas.files.CorruptFile: the file is damaged.
        """
        data: Mapping[str, Any] = read_record(path)
        if data.get("format") != _FORMAT:
            raise UserMistake(
                f"format {data.get('format')!r} of {path} is unknown, this version reads {_FORMAT}"
            )
        if identity is not None and data["identity"] not in (None, identity):
            raise UserMistake(
                f"identity={identity!r} differs from {data['identity']!r} of {path}; measure the blocks again"
            )
        table = cls(identity=data["identity"])
        table.rest_ms, table.scale = data["rest_ms"], data["scale"]
        table._milliseconds = dict(data["blocks"])
        return table

    def _sum(self, blocks: Sequence[Block | str]) -> float:
        times = Counter(block if isinstance(block, str) else block.signature for block in blocks)
        unknown = [name for name in times if name not in self._milliseconds]
        if unknown:
            raise UserMistake(
                f"{len(unknown)} of {len(times)} distinct blocks were not measured; see missing()"
            )
        return sum(self._milliseconds[name] * count for name, count in times.items())


def _by_default(model: nn.Module) -> Callable[[str, nn.Module], bool]:
    from torch import nn

    members = {
        id(child)
        for module in model.modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential))
        for child in module.children()
    }

    def is_block(name: str, module: nn.Module) -> bool:
        leaf = next(module.children(), None) is None
        return (
            bool(name)
            and not isinstance(module, (nn.ModuleList, nn.Sequential))
            and (leaf or id(module) in members)
        )

    return is_block


def _choose(model: nn.Module, is_block: Callable[[str, nn.Module], bool]) -> list[tuple[str, nn.Module]]:
    """The outermost blocks: what lies inside of one is part of it."""
    found: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer, _ in found)
        if name and not inside and is_block(name, module):
            found.append((name, module))
    return found


def _signature(module: nn.Module, args: Sequence[Tensor]) -> str:
    import hashlib

    parts = {
        # extra_repr holds strides, dropout rates, eps and the like; parameters hold the widths.
        "modules": [[name, type(m).__qualname__, m.extra_repr()] for name, m in module.named_modules()],
        "settings": [[name, _settings(m)] for name, m in module.named_modules()],
        "parameters": [[name, list(p.shape), str(p.dtype)] for name, p in module.named_parameters()],
        "inputs": [[list(x.shape), str(x.dtype)] for x in args],
    }
    return hashlib.blake2b(canonical_json(parts).encode(), digest_size=8).hexdigest()


def _settings(module: nn.Module) -> dict[str, Any]:
    """Plain attributes: head counts, window sizes, switches, which many modules do not print."""
    return {
        name: repr(value)
        for name, value in sorted(vars(module).items())
        if not name.startswith("_")
        and name != "training"
        and isinstance(value, (int, float, str, bool, tuple))
    }
