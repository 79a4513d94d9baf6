"""Models and inputs for tests of runners and runtimes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from nas.latency import Target

__all__ = ["ONE", "Tokens", "one_thread", "tokens"]


ONE = Target.parse("cpu:1")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


class Tokens(nn.Module):
    """Of any length; its mean over the tokens depends on the length."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        return {"logits": self.out(self.embed(tokens).mean(1)), "argmax": self.embed(tokens).argmax(-1)}


def tokens(batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    return (torch.randint(0, 50, (batch, 24), generator=generator),)
