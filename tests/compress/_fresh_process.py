"""Saved models in processes that never saw how they were made."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from compress.result import CompressionResult

__all__ = ["assert_same_in_a_fresh_process"]

SCRIPT = """
import json, sys, torch, compress
torch.set_num_threads(1)
model = compress.load(sys.argv[1]).model
outputs = model(*[torch.tensor(each) for each in json.load(sys.stdin)])
print(json.dumps({"modules": list(sys.modules), "outputs": outputs.tolist()}))
"""
UNNEEDED = ("compress.passes", "compress.finetune", "compress.pipeline", "nas.training", "sklearn")


def assert_same_in_a_fresh_process(result: CompressionResult, place: Path, *inputs: Tensor) -> None:
    """Saves the result at ``place``; a process that loads it imports no pass and computes the same from ``inputs``."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(result.save(place))],
        input=json.dumps([each.tolist() for each in inputs]),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [name for name in found["modules"] if name.startswith(UNNEEDED)] == []
    with torch.no_grad():
        expected = result.model(*inputs)
    torch.testing.assert_close(torch.tensor(found["outputs"]), expected, rtol=0, atol=1e-5)
