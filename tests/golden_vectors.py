"""Reference vectors of the original implementations, in tests/golden: one .safetensors and one .json each."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

__all__ = ["GOLDEN", "Golden", "golden", "golden_json"]

GOLDEN = Path(__file__).resolve().parent / "golden"


@dataclass(frozen=True)
class Golden:
    """One run of an original implementation.

    Args:
        facts: the JSON beside the vectors: constructor, tolerance, source, commit.
        state: the original state dict.
        inputs, outputs, mid: tensors by name, in the layout of the original.
    """

    facts: dict[str, Any]
    state: dict[str, Tensor]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    mid: dict[str, Tensor]


def golden_json(name: str) -> Any:
    """The JSON file ``name``.json."""
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


def golden(name: str) -> Golden:
    """The vectors ``name``.safetensors with their JSON."""
    parts: dict[str, dict[str, Tensor]] = {"state": {}, "input": {}, "output": {}, "mid": {}}
    for key, value in load_file(GOLDEN / f"{name}.safetensors").items():
        part, _, rest = key.partition(".")
        parts[part][rest] = value
    return Golden(golden_json(name), parts["state"], parts["input"], parts["output"], parts["mid"])
