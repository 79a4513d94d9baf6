"""Translation: a generated grammar by default, or a folder of parallel text; judged by BLEU with beam search.

Letters: B batch, S source length, T target length. A source is its tokens and ``end``; a target that is fed in starts
with ``begin``, the one that is expected back ends with ``end``. All are padded on the right.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nas.errors import TrialFailure, UserMistake
from nas.tasks import register_task
from nas.tasks.base import Batch, Objective, Split, Task
from nas.tasks.beam_search import beam_search
from nas.tasks.cache import default_cache_dir
from nas.tasks.text_data import GRAMMAR, Ids, ParallelText, encode_corpus, generate_grammar, read_folder
from spaces.signature import TranslationSignature

__all__ = ["Translation"]

_PADDING, _BEGIN, _END = 0, 1, 2  # the order of text_data.SPECIALS
_BEAM, _LENGTH_PENALTY = 4, 0.6
_LABEL_SMOOTHING = 0.1
_EXAMPLE_LENGTH = (
    30  # tokens; what latency on WMT'14 is measured with in the literature on hardware-aware search
)
_SMALLEST_LENGTH = 8
_GRAMMAR_VOCABULARY = 512
_EVALUATION_BATCH = 128  # sentences
_SEARCH_BATCH = 64  # sentences, each times the beam
_MOST_EXPONENT = 50.0

_Part = Literal["train", "validation", "test"]


@register_task("translation")
class Translation(Task):
    """Sentences to sentences, judged by BLEU (sacrebleu, 0..100) of beam search (beam 4, GNMT length penalty 0.6).

    The model is called as ``model(source, target_in)``; with ``encode`` and ``decode`` beam search encodes once, see
    ``nas.tasks.beam_search``. The subword vocabulary is shared by both sides and learned on training text alone.

    Args:
        data: ``generated-grammar`` (default; no real language, see ``nas.tasks.text_data``), or a folder of files
            <split>.<language>[.gz].
        data_root: not used; every task takes it.
        cache_dir: where token ids are kept; ./runs/.cache by default. Nothing is kept of the grammar.
        seed: of the grammar's sentences and of ``limit``.
        source_language, target_language: by default what the file names tell, English as the source if there.
        test_split: name of the test files; by default ``test``, else the first that starts with it.
        tokenizer: ``byte`` or ``whitespace`` BPE; default byte for folders, whitespace for the grammar.
        vocabulary_size: most subwords; 8000 by default, fewer for the grammar.
        max_length: most tokens of a sentence, special ones included. Longer training pairs are dropped, longer
            sources and targets of the other splits are cut; ``describe`` counts both. References of BLEU stay whole.
        limit: number of training pairs to keep, for quick tries.
        bleu_sentences: number of validation sentences, spread evenly, that beam search translates; the test split
            is translated as a whole.

    Raises:
        UserMistake: data that cannot be used, or an option out of its range.
    """

    objective = Objective("bleu", "maximize")
    signature: TranslationSignature

    def __init__(
        self,
        data: str | None = None,
        data_root: str | None = None,
        cache_dir: str | None = None,
        seed: int = 0,
        *,
        source_language: str | None = None,
        target_language: str | None = None,
        test_split: str | None = None,
        tokenizer: Literal["byte", "whitespace"] | None = None,
        vocabulary_size: int | None = None,
        max_length: int = 64,
        limit: int | None = None,
        bleu_sentences: int = 500,
    ):
        for option, value, least in (
            ("max_length", max_length, _SMALLEST_LENGTH),
            ("limit", limit, 1),
            ("bleu_sentences", bleu_sentences, 1),
        ):
            if value is not None and value < least:
                raise UserMistake(f"{option}={value} must be at least {least}")
        generated = data is None or data == GRAMMAR
        self.text = _source(data, seed, source_language, target_language, test_split)
        self.corpus = encode_corpus(
            self.text,
            tokenizer or ("whitespace" if generated else "byte"),
            vocabulary_size or (_GRAMMAR_VOCABULARY if generated else 8000),
            None if generated else default_cache_dir(cache_dir),
            self.text.facts["source"],
        )
        size = self.corpus.tokenizer.get_vocab_size()
        self.signature = TranslationSignature(size, size, max_length, True, _PADDING, _BEGIN, _END)
        self._seed, self._limit, self._bleu_sentences = seed, limit, bleu_sentences
        self._tokenizer_kind = tokenizer or ("whitespace" if generated else "byte")
        self._train, self._dropped = self._training_rows()
        self.default_epochs = 12 if generated else 10
        self.default_batch_size = 64
        self.default_learning_rate = 3e-3 if generated else 1e-3

    def _training_rows(self) -> tuple[Ids, int]:
        """Numbers of the training pairs that are used, and how many were too long."""
        sources, targets = self.corpus.ids["train"]
        longest = np.array([max(len(s), len(t)) for s, t in zip(sources, targets, strict=True)])
        rows = np.flatnonzero(longest < self.signature.max_length).astype(np.int32)
        dropped = len(longest) - len(rows)
        if not len(rows):
            raise UserMistake(f"max_length={self.signature.max_length} is below all training pairs; raise it")
        if self._limit is not None:
            rows = np.sort(np.random.default_rng([abs(self._seed), 2]).permutation(rows)[: self._limit])
        return rows, dropped

    def train_batches(
        self, *, epoch: int, batch_size: int, seed: int, device: torch.device, train_fraction: float = 1.0
    ) -> Iterator[Batch]:
        """Triples source (B, S), target fed in (B, T), target expected (B, T), all int64 and of similar length."""
        count = self.batches_per_epoch(batch_size, train_fraction)
        kept = np.random.default_rng([abs(seed), 0]).permutation(self._train)[: self._kept(train_fraction)]
        rng = np.random.default_rng([abs(seed), 1, epoch])
        sources, targets = self.corpus.ids["train"]
        rows = rng.permutation(kept)
        lengths = [len(sources[row]) + len(targets[row]) for row in rows]
        # A stable sort keeps the shuffle among pairs of one length, so the batches differ from epoch to epoch.
        rows = rows[np.argsort(lengths, kind="stable")]
        for number in rng.permutation(count):
            yield self._batch("train", rows[number * batch_size : (number + 1) * batch_size], device)

    def batches_per_epoch(self, batch_size: int, train_fraction: float = 1.0) -> int:
        """Number of batches; the one of the longest sentences may be smaller."""
        if batch_size < 1:
            raise UserMistake(f"batch_size={batch_size} must be at least 1")
        return math.ceil(self._kept(train_fraction) / batch_size)

    def _kept(self, fraction: float) -> int:
        if not 0 < fraction <= 1:
            raise UserMistake(f"train_fraction={fraction} must lie in (0, 1]")
        return math.ceil(fraction * len(self._train))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy with label smoothing 0.1, averaged over the tokens that are not padding."""
        source, target_in, expected = batch
        logits = model(source, target_in).float()
        return F.cross_entropy(
            logits.flatten(0, 1), expected.flatten(), ignore_index=_PADDING, label_smoothing=_LABEL_SMOOTHING
        )

    @torch.inference_mode()
    def evaluate(
        self, model: nn.Module, split: Split, device: torch.device, *, quick: bool = False
    ) -> dict[str, float]:
        """``loss`` (nats a token, no smoothing), ``perplexity`` (at most e^50), and unless ``quick`` ``bleu``.

        Loss and perplexity are over the whole split, BLEU of validation over ``bleu_sentences`` of it.
        Raises TrialFailure("nan") when the loss is not finite.
        """
        training = model.training
        model.eval()
        try:
            loss = self._token_loss(model, split, device)
            if not math.isfinite(loss):
                raise TrialFailure("nan", f"{split} loss is {loss}")
            metrics = {"loss": loss, "perplexity": math.exp(min(loss, _MOST_EXPONENT))}
            if not quick:
                metrics["bleu"] = self._bleu(model, split, device)
        finally:
            model.train(training)
        return metrics

    def translate(self, model: nn.Module, sentences: Sequence[str], device: torch.device) -> list[str]:
        """Translations by beam search of sentences in the source language; ``model`` is in eval mode."""
        encodings = self.corpus.tokenizer.encode_batch_fast(list(sentences))
        rows = [np.array(encoding.ids, np.int32) for encoding in encodings]
        found: list[str] = [""] * len(rows)
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
        for start in range(0, len(order), _SEARCH_BATCH):
            chosen = order[start : start + _SEARCH_BATCH]
            source = _padded([self._source_row(rows[row]) for row in chosen], device)
            outputs = beam_search(
                model,
                source,
                begin=_BEGIN,
                end=_END,
                padding=_PADDING,
                max_length=min(self.signature.max_length, 2 * source.shape[1] + 10),
                beam=_BEAM,
                length_penalty=_LENGTH_PENALTY,
            )
            for row, text in zip(chosen, self.corpus.tokenizer.decode_batch(outputs), strict=True):
                found[row] = text.strip()
        return found

    def example_inputs(self, batch_size: int, device: torch.device) -> tuple[Tensor, ...]:
        """Source (B, 30) and target fed in (B, 30) of real tokens without padding; shorter if max_length is."""
        length = min(_EXAMPLE_LENGTH, self.signature.max_length)
        sides = []
        for side in self.corpus.ids["validation"]:
            tokens = np.concatenate(side)
            sides.append(np.resize(tokens, (batch_size, length)).astype(np.int64))
        source, target = (torch.from_numpy(side).to(device) for side in sides)
        source[:, -1] = _END
        target[:, 0] = _BEGIN
        return source, target

    def describe(self) -> dict[str, Any]:
        """JSON facts: source of the text, sizes of the splits, vocabulary, what was cut, how BLEU is made."""
        text, signature = self.text, self.signature
        scored = min(self._bleu_sentences, len(text.validation))
        return {
            "task": self.name,
            **text.facts,
            "languages": [text.source_language, text.target_language],
            "splits": {
                "train": len(self._train),
                "validation": len(text.validation),
                "test": len(text.test),
            },
            "seed": self._seed,
            "limit": self._limit,
            "tokenizer": f"{self._tokenizer_kind} BPE learned on the training pairs",
            "vocabulary": signature.source_vocabulary,
            "max_length": signature.max_length,
            "too_long_training_pairs_dropped": self._dropped,
            "too_long_pairs_cut": {split: self._too_long(split) for split in ("validation", "test")},
            "label_smoothing": _LABEL_SMOOTHING,
            "bleu": {
                "validation_sentences": scored,
                "test_sentences": len(text.test),
                "beam": _BEAM,
                "length_penalty": _LENGTH_PENALTY,
            },
        }

    def _too_long(self, split: str) -> int:
        most = self.signature.max_length - 1
        return sum(len(s) > most or len(t) > most for s, t in zip(*self.corpus.ids[split], strict=True))

    def _source_row(self, ids: Ids) -> list[int]:
        return [*ids[: self.signature.max_length - 1].tolist(), _END]

    def _batch(self, split: _Part, rows: Sequence[int] | Ids, device: torch.device) -> Batch:
        sources, targets = self.corpus.ids[split]
        cut = [targets[row][: self.signature.max_length - 1].tolist() for row in rows]
        return (
            _padded([self._source_row(sources[row]) for row in rows], device),
            _padded([[_BEGIN, *target] for target in cut], device),
            _padded([[*target, _END] for target in cut], device),
        )

    def _token_loss(self, model: nn.Module, split: Split, device: torch.device) -> float:
        sources, targets = self.corpus.ids[split]
        order = sorted(range(len(sources)), key=lambda row: len(sources[row]) + len(targets[row]))
        losses, tokens = [], 0
        for start in range(0, len(order), _EVALUATION_BATCH):
            source, target_in, expected = self._batch(split, order[start : start + _EVALUATION_BATCH], device)
            logits = model(source, target_in).float()
            losses.append(
                F.cross_entropy(
                    logits.flatten(0, 1), expected.flatten(), ignore_index=_PADDING, reduction="sum"
                )
            )
            tokens += int((expected != _PADDING).sum())
        return torch.stack(losses).cpu().double().sum().item() / tokens

    def _bleu(self, model: nn.Module, split: Split, device: torch.device) -> float:
        from sacrebleu import corpus_bleu

        pairs = self.text.validation if split == "validation" else self.text.test
        if split == "validation" and self._bleu_sentences < len(pairs):
            places = np.linspace(0, len(pairs) - 1, self._bleu_sentences).round().astype(int)
            pairs = [pairs[place] for place in places]
        outputs = self.translate(model, [source for source, _ in pairs], device)
        # force: text whose punctuation stands alone, such as the grammar's, is meant to be scored as it is
        return float(corpus_bleu(outputs, [[target for _, target in pairs]], force=True).score)


def _source(
    data: str | None, seed: int, source: str | None, target: str | None, test_split: str | None
) -> ParallelText:
    if data is None or data == GRAMMAR:
        given = {"source_language": source, "target_language": target, "test_split": test_split}
        for option, value in given.items():
            if value is not None:
                raise UserMistake(
                    f"{option}={value!r} needs data, a folder of parallel text; the grammar has none"
                )
        return generate_grammar(seed)
    if not Path(data).is_dir():
        raise UserMistake(
            f"data={data!r} is no folder; give {GRAMMAR!r} or a folder of <split>.<language>[.gz]"
        )
    return read_folder(Path(data), source, target, test_split)


def _padded(rows: Sequence[list[int]], device: torch.device) -> Tensor:
    """(B, longest) int64."""
    longest = max(len(row) for row in rows)
    return torch.tensor([row + [_PADDING] * (longest - len(row)) for row in rows], device=device)
