"""Files of ``torch.export``: read without unpickling anything, and called like any other module."""

from __future__ import annotations

import os
import re
import zipfile
from typing import TYPE_CHECKING, Any

from nas.errors import UserMistake
from spaces.loading import cause_of

if TYPE_CHECKING:
    from torch import nn

__all__ = ["as_module", "load_program"]


def load_program(path: str) -> Any:
    """The ``torch.export.ExportedProgram`` in a file of ``torch.export.save``.

    A program is code that runs; pickled objects, which would run while they are read, are refused.

    Raises:
        UserMistake: a file that is not one, is damaged, or holds pickled objects.
    """
    import torch

    try:
        with zipfile.ZipFile(path) as archive:
            if any(re.search(r"data/constants/(custom|opaque)_obj_", name) for name in archive.namelist()):
                raise UserMistake(
                    f"model {path!r}: holds pickled objects, which are not loaded; export without them"
                )
        # torch falls back to unpickling whatever is in the file unless this forbids it.
        before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
        os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
        try:
            return torch.export.load(path)
        finally:
            os.environ.pop("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
            if before is not None:
                os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before
    except UserMistake:
        raise
    except Exception as error:  # damaged archives make torch raise nearly anything
        raise UserMistake(f"model {path!r}: torch.export cannot load it: {cause_of(error)}") from error


def as_module(program: Any) -> nn.Module:
    """An exported program as a module with the usual methods: its own ``train`` and ``eval`` only raise."""
    from torch import nn

    inner = program.module()

    class Exported(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner
            self.training = False

        def train(self, mode: bool = True) -> Exported:
            return self

        def forward(self, *inputs: Any) -> Any:
            return self.inner(*inputs)

    return Exported()
