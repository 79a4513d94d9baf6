"""Translation: the grammar, folders of parallel text, subwords, beam search against brute force."""

from __future__ import annotations

import gzip
import itertools
import json
import math
import os
from collections.abc import Hashable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nas.errors import TrialFailure, UserMistake
from nas.tasks import make_task
from nas.tasks.base import Task
from nas.tasks.beam_search import beam_search, select_rows
from nas.tasks.text_data import encode_corpus, generate_grammar, read_folder
from nas.tasks.translation import Translation
from spaces.signature import TranslationSignature
from tests.conformance.task import TaskConformance, tiny_model

CPU = torch.device("cpu")
PADDING, BEGIN, END = 0, 1, 2


def write_text(folder: Path, split: str, pairs: list[tuple[str, str]], packed: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for language, lines in zip(("en", "de"), zip(*pairs, strict=True), strict=True):
        text = "".join(f"{line}\n" for line in lines).encode()
        if packed:
            (folder / f"{split}.{language}.gz").write_bytes(gzip.compress(text))
        else:
            (folder / f"{split}.{language}").write_bytes(text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300, 40 and 40 sentences of the grammar with capitals and full stops, in the naming of Multi30k."""
    root = tmp_path_factory.mktemp("parallel")
    text = generate_grammar(5, train=300, held_out=40)
    splits = {
        "train": text.train,
        "val": text.validation,
        "test_2016_flickr": text.test,
        "test_2017": text.test[:9],
    }
    for split, pairs in splits.items():
        spelled = [(f"{s.capitalize()}.", f"{t.capitalize()}.") for s, t in pairs]
        write_text(root, split, spelled, packed=split != "val")
    return root


def made(folder: Path, cache: Path, **options: Any) -> Translation:
    task = make_task("translation", data=str(folder), cache_dir=str(cache), **{"max_length": 96, **options})
    assert isinstance(task, Translation)
    return task


def text_keys(task: Task) -> dict[str, list[Hashable]]:
    assert isinstance(task, Translation)
    return {
        "train": list(task.text.train),
        "validation": list(task.text.validation),
        "test": list(task.text.test),
    }


class TestGrammar(TaskConformance):
    @pytest.fixture(scope="class")
    def task(self) -> Task:
        return make_task("translation", bleu_sentences=8, max_length=40)

    def split_keys(self, task: Task) -> dict[str, list[Hashable]]:
        return text_keys(task)

    @pytest.mark.parametrize("split", ["validation"])
    def test_evaluate(self, task: Task, model: nn.Module, split: Any) -> None:
        super().test_evaluate(task, model, split)  # the test split is translated as a whole: too slow here

    def test_says_that_it_is_generated(self, task: Task) -> None:
        facts = task.describe()
        assert facts["source"] == "generated-grammar"
        assert facts["generated"] is True
        assert facts["splits"] == {"train": 3000, "validation": 400, "test": 400}


class TestFolder(TaskConformance):
    @pytest.fixture(scope="class")
    def task(self, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Task:
        return made(
            folder, tmp_path_factory.mktemp("cache"), vocabulary_size=300, max_length=40, bleu_sentences=8
        )

    def split_keys(self, task: Task) -> dict[str, list[Hashable]]:
        return text_keys(task)


def test_grammar_is_a_function_of_its_seed() -> None:
    assert generate_grammar(3, 50, 10) == generate_grammar(3, 50, 10)
    assert generate_grammar(3, 50, 10).train != generate_grammar(4, 50, 10).train


def test_grammar_reorders_and_agrees() -> None:
    text = generate_grammar(0)
    sizes = {len(side.split()) for pair in text.train for side in pair}
    assert sizes == set(range(4, 15))
    known = dict(text.train + text.validation + text.test)
    # the adverb goes first and the verb last, whatever the sentence
    for source, target in known.items():
        words, translated = source.split(), target.split()
        assert translated[-1].endswith(("at", "it", "atur", "itur"))
        assert ("ne" in translated) == ("not" in words)
        if words[-1] == "today":
            assert translated[0] == "hodi"
        if words[:2] == ["these", "cats"] and words[2] in ("sleep", "wait", "sing", "rest"):
            assert "istaj miraj" in target
            assert translated[-1].endswith("atur")
    assert len(set(known.values())) > 0.99 * len(known)


class Lookup(nn.Module):
    """Log-probabilities that depend on the source and on the whole target so far, drawn once."""

    def __init__(self, vocabulary: int, seed: int, ends: float = 0.0):
        super().__init__()
        self.vocabulary, self.seed, self.ends = vocabulary, seed, ends
        self.encoded = 0

    def row(self, source: list[int], target: list[int]) -> Tensor:
        drawn = np.random.default_rng([self.seed, *source, 99, *target]).normal(0, 2, self.vocabulary)
        drawn[END] += self.ends
        return torch.tensor(drawn, dtype=torch.float32)

    def forward(self, source: Tensor, target_in: Tensor) -> Tensor:
        rows = [
            torch.stack([self.row(s, t[: i + 1]) for i in range(len(t))])
            for s, t in zip(source.tolist(), target_in.tolist(), strict=True)
        ]
        return torch.stack(rows)


class Memory(NamedTuple):
    source: Tensor
    more: dict[str, Any]


class LookupWithMemory(Lookup):
    def encode(self, source: Tensor) -> Memory:
        self.encoded += 1
        return Memory(source, {"mask": (None, [source == PADDING]), "heads": 2})

    def decode(self, target_in: Tensor, memory: Memory) -> Tensor:
        assert memory.more["mask"][1][0].shape == memory.source.shape
        return self.forward(memory.source, target_in)


def score(model: Lookup, source: list[int], sentence: tuple[int, ...], length: int, penalty: float) -> float:
    """Penalised log-probability of ``sentence`` and ``end``, from the definition."""
    total, target = 0.0, [BEGIN]
    for position, token in enumerate([*sentence, END], start=1):
        log_probs = model.row(source, target).log_softmax(-1)
        if position < length or token == END:
            total += float(log_probs[token])
        target.append(token)
    return float(total / ((5 + len(sentence) + 1) / 6) ** penalty)


@pytest.mark.parametrize("kind", [Lookup, LookupWithMemory])
@pytest.mark.parametrize("penalty", [0.0, 0.6, 2.0])
def test_wide_beam_equals_brute_force(kind: type[Lookup], penalty: float) -> None:
    vocabulary, length = 5, 4
    source = torch.tensor([[3, 4, 2], [4, 2, 0], [3, 3, 2]])
    for seed in range(5):
        model = kind(vocabulary, seed, ends=2.0)
        found = beam_search(
            model,
            source,
            begin=BEGIN,
            end=END,
            padding=PADDING,
            max_length=length,
            beam=20,
            length_penalty=penalty,
        )
        for row, sentence in zip(source.tolist(), found, strict=True):
            everything = [s for n in range(length) for s in itertools.product((3, 4), repeat=n)]
            best = max(everything, key=lambda s: score(model, row, s, length, penalty))
            assert tuple(sentence) == best, (seed, penalty)


def greedy(model: Lookup, source: list[int], length: int) -> list[int]:
    target = [BEGIN]
    while len(target) < length:
        log_probs = model.row(source, target)
        log_probs[[PADDING, BEGIN]] = -math.inf
        token = int(log_probs.argmax())
        if token == END:
            break
        target.append(token)
    return target[1:]


def test_beam_one_is_greedy() -> None:
    source = torch.tensor([[3, 4, 2], [5, 2, 0], [6, 3, 2], [4, 4, 2]])
    lengths = set()
    for seed in range(10):
        model = LookupWithMemory(8, seed, ends=1.0)
        found = beam_search(model, source, begin=BEGIN, end=END, padding=PADDING, max_length=9, beam=1)
        assert found == [greedy(model, row, 9) for row in source.tolist()]
        assert model.encoded == 1
        lengths |= {len(sentence) for sentence in found}
    assert len(lengths) > 3  # some ended by themselves, some were cut


def test_wider_beam_scores_no_worse_than_greedy() -> None:
    source = torch.tensor([[3, 4, 2], [5, 2, 0]])
    better = 0
    for seed in range(15):
        model = Lookup(8, seed, ends=1.0)
        for row, narrow, wide in zip(
            source.tolist(),
            beam_search(model, source, begin=BEGIN, end=END, padding=PADDING, max_length=6, beam=1),
            beam_search(model, source, begin=BEGIN, end=END, padding=PADDING, max_length=6, beam=8),
            strict=True,
        ):
            gain = score(model, row, tuple(wide), 6, 0.6) - score(model, row, tuple(narrow), 6, 0.6)
            assert gain > -1e-4
            better += gain > 1e-4
    assert better > 5


class Fork(nn.Module):
    """First 3, ``END`` or 4, in this order; 3 leads nowhere, 4 ends for sure."""

    def forward(self, source: Tensor, target_in: Tensor) -> Tensor:
        chances = {
            BEGIN: [0.0, 0.0, 0.34, 0.36, 0.30],
            3: [0.0, 0.0, 1e-6, 0.5, 0.5],
            4: [0.0, 0.0, 1.0, 0.0, 0.0],
        }
        table = torch.tensor([chances.get(token, [0.2] * 5) for token in range(5)]).clamp_min(1e-9).log()
        return table[target_in]


def test_a_completed_hypothesis_takes_no_place_of_a_living_one() -> None:
    options: dict[str, Any] = {"begin": BEGIN, "end": END, "padding": PADDING, "max_length": 5}
    source = torch.tensor([[3, 2]])
    assert beam_search(Fork(), source, beam=2, length_penalty=2.0, **options) == [[4]]
    assert beam_search(Fork(), source, beam=2, length_penalty=0.0, **options) == [[]]


def test_batch_does_not_change_the_translation() -> None:
    model = LookupWithMemory(9, 4, ends=1.5)
    source = torch.tensor([[3, 4, 2], [5, 6, 2], [6, 3, 2], [8, 4, 2], [7, 7, 2]])
    options: dict[str, int] = {"begin": BEGIN, "end": END, "padding": PADDING, "max_length": 12, "beam": 3}
    together = beam_search(model, source, **options)
    assert together == [beam_search(model, row[None], **options)[0] for row in source]


def test_select_rows_repeats_every_tensor() -> None:
    tensor = torch.arange(6).view(3, 2)
    rows = torch.tensor([2, 2, 0])
    memory = Memory(tensor, {"list": [tensor, None, 3], "text": "kept"})
    found = select_rows(memory, rows)
    assert isinstance(found, Memory)
    assert found.source.tolist() == [[4, 5], [4, 5], [0, 1]]
    assert found.more["list"][0].tolist() == found.source.tolist()
    assert found.more["list"][1:] == [None, 3]
    with pytest.raises(TypeError, match=r"encode\(\) returned a set; use tensors"):
        select_rows({1, 2}, rows)


def test_beam_search_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="beam=0"):
        beam_search(Lookup(5, 0), torch.tensor([[3]]), begin=1, end=2, padding=0, max_length=3, beam=0)


def test_folder_is_read_as_named(folder: Path, tmp_path: Path) -> None:
    facts = made(folder, tmp_path, vocabulary_size=300).describe()
    assert facts["languages"] == ["en", "de"]
    assert facts["files"] == {"train": "train", "validation": "val", "test": "test_2016_flickr"}
    assert facts["splits"] == {"train": 300, "validation": 40, "test": 40}
    assert facts["vocabulary"] == 300
    other = made(
        folder, tmp_path, vocabulary_size=300, source_language="de", test_split="test_2017"
    ).describe()
    assert other["languages"] == ["de", "en"]
    assert other["splits"]["test"] == 9


@pytest.mark.parametrize("kind", ["byte", "whitespace"])
def test_subwords_give_the_text_back(folder: Path, tmp_path: Path, kind: Any) -> None:
    text = read_folder(folder, None, None, None)
    corpus = encode_corpus(text, kind, 320, tmp_path, "text")
    for pairs, ids in ((text.validation, corpus.ids["validation"]), (text.test, corpus.ids["test"])):
        for side, lines in enumerate(zip(*pairs, strict=True)):
            decoded = corpus.tokenizer.decode_batch([row.tolist() for row in ids[side]])
            assert [line.strip() for line in decoded] == list(lines)
    special = [corpus.tokenizer.token_to_id(token) for token in ("<pad>", "<bos>", "<eos>", "<unk>")]
    assert special == [0, 1, 2, 3]


def test_vocabulary_is_learned_on_training_text_alone(folder: Path, tmp_path: Path) -> None:
    first = made(folder, tmp_path, tokenizer="whitespace", vocabulary_size=200)
    changed = tmp_path / "changed"
    for split in ("train", "val", "test_2016_flickr"):
        for language in ("en", "de"):
            for file in folder.glob(f"{split}.{language}*"):
                (changed / file.name).parent.mkdir(exist_ok=True)
                (changed / file.name).write_bytes(file.read_bytes())
    (changed / "val.en").write_text("§§§ zzzzzzzz\n" * 40, encoding="utf-8")
    second = made(changed, tmp_path, tokenizer="whitespace", vocabulary_size=200)
    assert first.corpus.tokenizer.to_str() == second.corpus.tokenizer.to_str()
    assert 3 in second.corpus.ids["validation"][0][0]  # what training never showed is <unk>


def test_cached_ids_equal_fresh_ones(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = read_folder(folder, None, None, None)
    fresh = encode_corpus(text, "byte", 300, None, "text")
    encode_corpus(text, "byte", 300, tmp_path, "text")
    monkeypatch.setattr("nas.tasks.text_data._trained", None)
    kept = encode_corpus(text, "byte", 300, tmp_path, "text")
    assert kept.tokenizer.to_str() == fresh.tokenizer.to_str()
    for split, sides in fresh.ids.items():
        for ours, theirs in zip(sides, kept.ids[split], strict=True):
            assert [row.tolist() for row in ours] == [row.tolist() for row in theirs]


def test_batches_hold_every_pair_once(folder: Path, tmp_path: Path) -> None:
    task = made(folder, tmp_path, vocabulary_size=300)
    found = []
    for source, target_in, expected in task.train_batches(epoch=2, batch_size=32, seed=1, device=CPU):
        assert bool((target_in[:, 0] == BEGIN).all())
        assert torch.equal(
            target_in[:, 1:][expected[:, :-1] != END], expected[:, :-1][expected[:, :-1] != END]
        )
        assert bool(((expected == END).sum(1) == 1).all())
        assert bool(((source == END).sum(1) == 1).all())
        found += [tuple(row[row != PADDING].tolist()) for row in expected]
    assert sorted(found) == sorted((*row.tolist(), END) for row in task.corpus.ids["train"][1])


def test_batches_are_of_similar_length(folder: Path, tmp_path: Path) -> None:
    task = made(folder, tmp_path, vocabulary_size=300)
    batches = list(task.train_batches(epoch=0, batch_size=16, seed=0, device=CPU))
    filled = sum(float((expected != PADDING).float().mean()) for _, _, expected in batches) / len(batches)
    assert filled > 0.85
    widths = [source.shape[1] for source, _, _ in batches]
    assert widths != sorted(widths)  # the batches themselves are shuffled


def test_fraction_keeps_the_same_pairs(folder: Path, tmp_path: Path) -> None:
    task = made(folder, tmp_path, vocabulary_size=300)

    def pairs(epoch: int, fraction: float) -> set[tuple[int, ...]]:
        batches = task.train_batches(epoch=epoch, batch_size=8, seed=5, device=CPU, train_fraction=fraction)
        return {tuple(row[row != PADDING].tolist()) for _, _, expected in batches for row in expected}

    assert pairs(0, 0.3) == pairs(4, 0.3)
    assert pairs(0, 0.1) < pairs(0, 0.3)
    assert len(pairs(0, 0.3)) == pytest.approx(90, abs=2)


def test_long_pairs_are_dropped_or_cut_and_counted(folder: Path, tmp_path: Path) -> None:
    whole = made(folder, tmp_path, vocabulary_size=300)
    task = made(folder, tmp_path, vocabulary_size=300, max_length=24)
    facts = task.describe()
    lengths = [max(len(s), len(t)) for s, t in zip(*whole.corpus.ids["train"], strict=True)]
    assert facts["too_long_training_pairs_dropped"] == sum(length > 23 for length in lengths) > 0
    assert facts["splits"]["train"] == 300 - facts["too_long_training_pairs_dropped"]
    assert facts["splits"]["test"] == 40
    assert facts["too_long_pairs_cut"]["test"] > 0
    widths = [t.shape[1] for b in task.train_batches(epoch=0, batch_size=8, seed=0, device=CPU) for t in b]
    assert max(widths) <= 24
    assert math.isfinite(task.evaluate(tiny_model(task.signature), "test", CPU, quick=True)["loss"])


def test_empty_training_pairs_are_dropped(tmp_path: Path) -> None:
    pairs = [("one two three", "eins zwei drei"), ("", "leer"), ("four", "vier")] * 4
    for split in ("train", "dev", "test"):
        write_text(tmp_path / "data", split, pairs)
    text = read_folder(tmp_path / "data", None, None, None)
    assert text.facts["empty_training_pairs_dropped"] == 4
    assert len(text.train) == 8
    assert len(text.test) == 12


def test_line_separators_inside_a_sentence_do_not_shift_the_pairs(tmp_path: Path) -> None:
    pairs = [("a\u2028b", "x"), ("c\x0bd\x85e", "y"), ("f", "z")]
    for split in ("train", "val", "test"):
        write_text(tmp_path / "data", split, pairs)
    assert read_folder(tmp_path / "data", None, None, None).train == pairs


class Copier(nn.Module):
    """Knows the right answer of every source: the best that any model can do."""

    def __init__(self, task: Translation, wrong_tokens: int = 0):
        super().__init__()
        self.signature: TranslationSignature = task.signature
        self.answers = {}
        for sources, targets in task.corpus.ids.values():
            for source, target in zip(sources, targets, strict=True):
                right = target.tolist()
                self.answers[tuple(source.tolist())] = [5] * wrong_tokens + right[wrong_tokens:]

    def forward(self, source: Tensor, target_in: Tensor) -> Tensor:
        logits = torch.zeros(*target_in.shape, self.signature.target_vocabulary)
        for row, tokens in enumerate(source.tolist()):
            answer = self.answers[tuple(token for token in tokens if token not in (PADDING, END))]
            for position in range(target_in.shape[1]):
                logits[row, position, answer[position] if position < len(answer) else END] = 20.0
        return logits


def test_bleu_of_the_right_answer_is_100(folder: Path, tmp_path: Path) -> None:
    task = made(folder, tmp_path, vocabulary_size=300)
    metrics = task.evaluate(Copier(task), "validation", CPU)
    assert metrics["bleu"] == pytest.approx(100)
    assert metrics["loss"] < 1e-4
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
    assert task.evaluate(Copier(task, wrong_tokens=4), "validation", CPU)["bleu"] < 80


def test_quick_evaluation_searches_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = made(folder, tmp_path, vocabulary_size=300)
    monkeypatch.setattr("nas.tasks.translation.beam_search", None)
    assert set(task.evaluate(tiny_model(task.signature), "test", CPU, quick=True)) == {"loss", "perplexity"}


def test_loss_is_smoothed_and_blind_to_padding(folder: Path, tmp_path: Path) -> None:
    task = made(folder, tmp_path, vocabulary_size=300)
    model = tiny_model(task.signature)
    source, target_in, expected = next(task.train_batches(epoch=0, batch_size=8, seed=0, device=CPU))
    log_probs = model(source, target_in).log_softmax(-1)
    right = log_probs.gather(2, expected[..., None])[..., 0]
    smoothed = -(0.9 * right + 0.1 * log_probs.mean(-1))[expected != PADDING].mean()
    assert torch.allclose(task.loss(model, (source, target_in, expected)), smoothed, atol=1e-5)


def test_nan_is_a_failed_trial(folder: Path, tmp_path: Path) -> None:
    task = made(folder, tmp_path, vocabulary_size=300)
    model = tiny_model(task.signature)
    next(model.parameters()).data.fill_(math.nan)
    with pytest.raises(TrialFailure, match="validation loss is nan") as failure:
        task.evaluate(model, "validation", CPU)
    assert failure.value.kind == "nan"


def test_example_inputs_are_30_tokens() -> None:
    task = make_task("translation")
    source, target = task.example_inputs(2, CPU)
    assert source.shape == target.shape == (2, 30)
    assert bool((source != PADDING).all())
    short = make_task("translation", max_length=12).example_inputs(2, CPU)
    assert short[0].shape == (2, 12)


def test_limit_is_named(folder: Path, tmp_path: Path) -> None:
    task = made(folder, tmp_path, vocabulary_size=300, limit=50, bleu_sentences=7)
    facts = task.describe()
    assert facts["limit"] == facts["splits"]["train"] == 50
    assert facts["bleu"]["validation_sentences"] == 7
    assert facts["bleu"]["test_sentences"] == 40
    assert json.dumps(facts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "nowhere"}, r"data='nowhere' is no folder; give 'generated-grammar' or a folder"),
        ({"max_length": 2}, r"max_length=2 must be at least 8"),
        ({"limit": 0}, r"limit=0 must be at least 1"),
        ({"source_language": "en"}, r"source_language='en' needs data, a folder of parallel text"),
        (
            {"vocabulary_size": 10},
            r"vocabulary_size=10 must be at least \d+: the special tokens and every character",
        ),
        ({"tokenizer": "words"}, r"option tokenizer='words' must be"),
        ({"bleu_sentence": 3}, r"no option 'bleu_sentence' \(did you mean 'bleu_sentences'\?\)"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserMistake, match=message):
        make_task("translation", **options)


def test_wrong_folders(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    with pytest.raises(UserMistake, match="holds no parallel training text"):
        read_folder(data, None, None, None)
    write_text(data, "train", [("a b", "c d")] * 3)
    with pytest.raises(UserMistake, match=r"lacks the validation pair val/valid/validation/dev\.en\[\.gz\]"):
        read_folder(data, None, None, None)
    write_text(data, "val", [("a b", "c d")] * 3)
    with pytest.raises(UserMistake, match=r"lacks the test pair test\.en\[\.gz\]"):
        read_folder(data, None, None, None)
    write_text(data, "test", [("a b", "c d")] * 3)
    with pytest.raises(
        UserMistake, match=r"source_language='fr' has no train file .* languages there: de, en"
    ):
        read_folder(data, "fr", None, None)
    with pytest.raises(UserMistake, match=r"are both 'de'; they must differ"):
        read_folder(data, "de", "de", None)
    with pytest.raises(UserMistake, match=r"test_split='test9' is not in .* it has test"):
        read_folder(data, None, None, "test9")
    (data / "train.fr").write_text("x\ny\nz\n", encoding="utf-8")
    with pytest.raises(UserMistake, match="has de, en, fr; choose source_language and target_language"):
        read_folder(data, None, None, None)
    assert read_folder(data, "en", "de", None).train == [("a b", "c d")] * 3
    (data / "val.de").write_text("only one\n", encoding="utf-8")
    with pytest.raises(UserMistake, match=r"val\.en has 3 lines but val\.de 1; they must match"):
        read_folder(data, "en", "de", None)
    (data / "val.de").write_bytes(b"\xff\xfe\n" * 3)
    with pytest.raises(UserMistake, match=r"val\.de cannot be read as UTF-8 text"):
        read_folder(data, "en", "de", None)


def test_cut_gzip_file_is_one_clear_line(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    whole = (tmp_path / "train.de.gz").read_bytes()
    (tmp_path / "train.de.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserMistake, match=r"train\.de\.gz cannot be read as UTF-8 text .*get it again"):
        read_folder(tmp_path, None, None, None)


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


@pytest.mark.skipif(
    "NAS_TEST_DATA" not in os.environ, reason="NAS_TEST_DATA (folder with multi30k/) is not set"
)
def test_multi30k(tmp_path: Path) -> None:
    folder = Path(os.environ["NAS_TEST_DATA"]) / "multi30k"
    if not folder.is_dir():
        pytest.skip(f"{folder} does not exist")
    task = made(folder, tmp_path, limit=2000)
    facts = task.describe()
    assert facts["languages"] == ["en", "de"]
    assert facts["splits"] == {"train": 2000, "validation": 1014, "test": 1000}
    assert facts["files"]["test"] == "test_2016_flickr"
    assert facts["vocabulary"] == 8000
    source, target_in, expected = next(task.train_batches(epoch=0, batch_size=32, seed=0, device=CPU))
    assert source.shape[0] == target_in.shape[0] == expected.shape[0] == 32
