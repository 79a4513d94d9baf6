"""The generated grammar can be learned: a small network translates it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nas.tasks import make_task
from nas.tasks.translation import Translation
from spaces.signature import TranslationSignature

CPU = torch.device("cpu")

PADDING, BEGIN, END = 0, 1, 2


class TinyTransformer(nn.Module):
    """Two layers on each side, sinusoidal positions, one embedding for everything."""

    def __init__(self, signature: TranslationSignature, dim: int = 64):
        super().__init__()
        self.embedding = nn.Embedding(signature.source_vocabulary, dim)
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)
        angles = torch.arange(signature.max_length)[:, None] * torch.exp(
            torch.arange(0, dim, 2) * (-9.2 / dim)
        )
        self.register_buffer("places", torch.cat([angles.sin(), angles.cos()], dim=1))
        options: dict[str, Any] = {"dropout": 0.0, "batch_first": True, "norm_first": True}
        encoder = nn.TransformerEncoderLayer(dim, 4, 2 * dim, **options)
        decoder = nn.TransformerDecoderLayer(dim, 4, 2 * dim, **options)
        self.encoder = nn.TransformerEncoder(encoder, 2, nn.LayerNorm(dim), enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(decoder, 2, nn.LayerNorm(dim))

    def embed(self, tokens: Tensor) -> Tensor:
        places: Tensor = self.get_buffer("places")
        hidden: Tensor = self.embedding(tokens) * self.embedding.embedding_dim**0.5
        return hidden + places[: tokens.shape[1]]

    def encode(self, source: Tensor) -> tuple[Tensor, Tensor]:
        mask = source == PADDING
        return self.encoder(self.embed(source), src_key_padding_mask=mask), mask

    def decode(self, target_in: Tensor, memory: tuple[Tensor, Tensor]) -> Tensor:
        size = target_in.shape[1]
        causal = torch.ones(size, size, dtype=torch.bool).triu(1)
        hidden = self.decoder(
            self.embed(target_in), memory[0], tgt_mask=causal, memory_key_padding_mask=memory[1]
        )
        logits: Tensor = hidden @ self.embedding.weight.T
        return logits

    def forward(self, source: Tensor, target_in: Tensor) -> Tensor:
        return self.decode(target_in, self.encode(source))


@pytest.mark.slow
def test_a_tiny_transformer_learns_the_grammar() -> None:
    task = make_task("translation", bleu_sentences=100)
    assert isinstance(task, Translation)
    model = TinyTransformer(task.signature)
    optimizer = torch.optim.AdamW(model.parameters(), task.default_learning_rate, betas=(0.9, 0.98))
    steps = task.batches_per_epoch(task.default_batch_size) * task.default_epochs
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, task.default_learning_rate, steps, pct_start=0.1
    )
    for epoch in range(task.default_epochs):
        for batch in task.train_batches(epoch=epoch, batch_size=task.default_batch_size, seed=0, device=CPU):
            optimizer.zero_grad()
            task.loss(model, batch).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    assert task.evaluate(model, "validation", CPU)["bleu"] > 60
