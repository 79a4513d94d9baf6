"""The fixed workload that every measurement is held against, and its long-run time under given conditions."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

from nas.errors import UserMistake
from nas.files import atomic_write_json
from nas.latency.target import Target

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["REFERENCE_NAME", "ReferenceTimes", "check_scale_file", "reference_workload"]

REFERENCE_NAME = "reference"

# Small enough to be cheap beside any model. On a CPU its weights (0.8 MB) stay in the core's own cache: with 3.5 MB, at
# width 192, one visit scattered by 5 to 6 % on an idle machine, like this by 1 to 2 %.
_CPU_SHAPE = (4, 64, 256, 1)
_DEVICE_SHAPE = (2, 768, 196, 8)

_DIGEST = re.compile(r"[0-9a-f]{8,}-[a-z]+")  # of the conditions, and the clock
_GO_ON = "it is left as it is: give the path of another file, or delete this one"


def reference_workload(target: Target) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Pre-norm Transformer blocks with fixed weights and inputs, always run in eager mode.

    Four of width 64 on 256 tokens on a CPU (some three milliseconds on one core), two of width 768 on 8 x 196 tokens on
    other devices.
    """
    import torch
    from torch import nn

    blocks, width, tokens, batch = _CPU_SHAPE if target.device == "cpu" else _DEVICE_SHAPE
    generator = torch.Generator().manual_seed(0)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x: Tensor) -> Tensor:
            shape = (x.shape[0], x.shape[1], 3, width // 64, 64)
            q, k, v = self.qkv(self.norm1(x)).reshape(shape).permute(2, 0, 3, 1, 4)
            mixed = nn.functional.scaled_dot_product_attention(q, k, v)
            x = x + self.out(mixed.transpose(1, 2).flatten(2))
            return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))  # type: ignore[no-any-return]

    model = nn.Sequential(*(Block() for _ in range(blocks)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model, (torch.randn(batch, tokens, width, generator=generator),)


class ReferenceTimes:
    """The reference's long-run time for each identity, kept in a JSON file: one scale for all figures of a run.

    Ratios are what is measured; a scale that moved between two candidates would put the machine's drift back into
    their difference. So the first measurement under an identity sets it, and later ones use it.

    Args:
        path: the file; it need not exist. None keeps nothing: each session is its own scale.
    """

    def __init__(self, path: Path | None):
        self.path = path

    def get(self, digest: str) -> float | None:
        """Milliseconds for the conditions of this digest; None when they were never met or the file is damaged."""
        found = self._read().get(digest)
        return float(found) if _is_time(found) else None

    def put(self, digest: str, milliseconds: float) -> None:
        """Set the scale for these conditions, for whoever holds the device."""
        if self.path is not None:
            atomic_write_json(self.path, {**self._read(), digest: milliseconds})

    def _read(self) -> dict[str, object]:
        if self.path is None:
            return {}
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}


def check_scale_file(path: Path) -> None:
    """Raises UserMistake for a file that stands at ``path`` and holds no scale: the next measurement would replace it.

    A file that is not there yet is one that will be made.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return
    except (OSError, UnicodeDecodeError) as error:
        why = "is not text" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise UserMistake(f"--scale {path}: cannot be read ({why}); {_GO_ON}") from None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise UserMistake(
            f"--scale {path}: is a damaged scale file, or another kind of file; {_GO_ON}"
        ) from None
    if not isinstance(found, dict) or not all(
        _DIGEST.fullmatch(key) and _is_time(value) for key, value in found.items()
    ):
        raise UserMistake(f"--scale {path}: is not a file of an earlier --scale; {_GO_ON}")


def _is_time(value: object) -> TypeGuard[float]:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return math.isfinite(value) and value > 0
