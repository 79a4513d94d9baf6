"""Translation: the grammar, folders of parallel text, subwords, batches, evaluation."""

from __future__ import annotations

import gzip
import json
import math
import os
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nas.errors import TrialFailure, UserMistake
from nas.tasks import make_task
from nas.tasks.base import Task
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
