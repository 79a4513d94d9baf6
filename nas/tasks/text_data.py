"""Parallel text: a small generated grammar, or a folder of files in two languages; and subwords learned on it.

The grammar translates a fragment of English into an invented language by rule, so every source sentence has exactly
one right translation. What makes it more than a word-by-word lookup: the verb comes last and its adverb first,
adjectives follow their noun, prepositions become postpositions, a phrase on a noun comes before it; adjectives and
articles agree with their noun in gender, number and case, verbs with their subject in number, and tense moves from
auxiliaries into endings.
"""

from __future__ import annotations

import gzip
import hashlib
import random
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from nas.errors import UserMistake
from nas.tasks.cache import cached

__all__ = [
    "GRAMMAR",
    "SPECIALS",
    "Corpus",
    "Pairs",
    "ParallelText",
    "encode_corpus",
    "generate_grammar",
    "read_folder",
]

GRAMMAR = "generated-grammar"
SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")  # ids 0, 1, 2, 3

Pairs = list[tuple[str, str]]
Ids = NDArray[np.int32]
Kind = Literal["byte", "whitespace"]
_MAX_TEXT_BYTES = 1 << 31


@dataclass(frozen=True)
class ParallelText:
    """Sentence pairs (source, target) of the three splits; ``facts`` is JSON for the report."""

    train: Pairs
    validation: Pairs
    test: Pairs
    source_language: str
    target_language: str
    facts: dict[str, Any]


def _table(text: str) -> list[tuple[str, ...]]:
    return [tuple(entry.split("/")) for entry in text.split()]


# English singular and plural, stem, gender ending
_NOUNS = _table(
    "dog/dogs/kun/o cat/cats/mir/a child/children/pel/e teacher/teachers/doce/o farmer/farmers/agr/o "
    "queen/queens/reg/a doctor/doctors/med/a bird/birds/avi/e horse/horses/kav/o wolf/wolves/lup/o "
    "sister/sisters/sor/a river/rivers/flum/a house/houses/dom/a garden/gardens/hort/o ship/ships/nav/a "
    "bridge/bridges/pont/o window/windows/fenes/a tree/trees/arb/e book/books/lib/o letter/letters/epist/a "
    "table/tables/mens/a stone/stones/petr/e boat/boats/bark/a market/markets/merk/o"
)
_ADJECTIVES = _table(
    "old/vet small/parv red/rub quiet/tac happy/fel tall/alt young/juv heavy/grav blue/kaer brave/fort "
    "clever/astut tired/fess"
)
# base form, third person singular, past, stem
_TRANSITIVE = _table(
    "see/sees/saw/vid find/finds/found/trov carry/carries/carried/port paint/paints/painted/ping "
    "follow/follows/followed/sekv help/helps/helped/juvand watch/watches/watched/spekt love/loves/loved/am "
    "clean/cleans/cleaned/purg leave/leaves/left/linkv draw/draws/drew/desen buy/buys/bought/emt"
)
_INTRANSITIVE = _table(
    "sleep/sleeps/slept/dorm wait/waits/waited/man sing/sings/sang/kant arrive/arrives/arrived/ven "
    "laugh/laughs/laughed/rid rest/rests/rested/kviet"
)
_PREPOSITIONS = _table("near/prope behind/post under/sub in/en beside/apud before/ante")
_ADVERBS = _table("today/hodi often/saep slowly/lente again/iter there/ibi now/nunk quickly/rapid")
# English, stem, plural
_DETERMINERS = [
    ("the", "l", False), ("the", "l", True), ("a", "un", False), ("some", "kelk", True), ("this", "ist", False),
    ("these", "ist", True), ("every", "omn", False), ("many", "mult", True),
]  # fmt: skip
_NOMINATIVE, _ACCUSATIVE, _OBLIQUE = "", "n", "s"
_LENGTHS = range(4, 15)


def generate_grammar(seed: int, train: int = 3000, held_out: int = 400) -> ParallelText:
    """``train`` + 2 * ``held_out`` different sentence pairs of 4 to 14 words, the same for the same seed."""
    rng = random.Random(seed)
    pairs: dict[str, str] = {}
    while len(pairs) < train + 2 * held_out:  # millions of sentences exist, so a repetition is rare
        source, target = _sentence(rng)
        if len(source) in _LENGTHS and len(target) in _LENGTHS:
            pairs[" ".join(source)] = " ".join(target)
    rows = list(pairs.items())
    return ParallelText(
        train=rows[2 * held_out :],
        validation=rows[:held_out],
        test=rows[held_out : 2 * held_out],
        source_language="en",
        target_language="invented",
        facts={"source": GRAMMAR, "generated": True},
    )


def _sentence(rng: random.Random) -> tuple[list[str], list[str]]:
    subject, subject_target, plural = _noun_phrase(rng, _NOMINATIVE, phrase=rng.random() < 0.25)
    past, negated = rng.random() < 0.5, rng.random() < 0.25
    transitive = rng.random() < 0.7
    base, third, past_form, stem = rng.choice(_TRANSITIVE if transitive else _INTRANSITIVE)
    if negated:
        verb = ["did" if past else "do" if plural else "does", "not", base]
    else:
        verb = [past_form if past else base if plural else third]
    verb_target = ["ne"] * negated + [stem + ("it" if past else "at") + ("ur" if plural else "")]
    source = subject + verb
    middle: list[str] = []
    if transitive:
        noun, noun_target, _ = _noun_phrase(rng, _ACCUSATIVE, phrase=rng.random() < 0.15)
        source, middle = source + noun, middle + noun_target
    elif rng.random() < 0.7:
        place, place_target = _prepositional_phrase(rng)
        source, middle = source + place, middle + place_target
    first = []
    if rng.random() < 0.4:
        adverb, adverb_target = rng.choice(_ADVERBS)
        source, first = [*source, adverb], [adverb_target]
    return source, first + subject_target + middle + verb_target


def _noun_phrase(rng: random.Random, case: str, *, phrase: bool) -> tuple[list[str], list[str], bool]:
    """Words, their translation, and whether the noun is plural."""
    article, article_stem, plural = rng.choice(_DETERMINERS)
    singular_form, plural_form, stem, gender = rng.choice(_NOUNS)
    ending = gender + "j" * plural + case
    source, target = [article], [article_stem + ending, stem + ending]
    if rng.random() < 0.4:
        adjective, adjective_stem = rng.choice(_ADJECTIVES)
        source.append(adjective)
        target.append(adjective_stem + ending)
    source.append(plural_form if plural else singular_form)
    if phrase:
        place, place_target = _prepositional_phrase(rng)
        source, target = source + place, place_target + target
    return source, target, plural


def _prepositional_phrase(rng: random.Random) -> tuple[list[str], list[str]]:
    preposition, postposition = rng.choice(_PREPOSITIONS)
    noun, noun_target, _ = _noun_phrase(rng, _OBLIQUE, phrase=False)
    return [preposition, *noun], [*noun_target, postposition]


@dataclass(frozen=True)
class Corpus:
    """Token ids of (sources, targets) for each split, without special tokens, and the tokenizer that made them."""

    tokenizer: Any
    ids: dict[str, tuple[list[Ids], list[Ids]]]


_SPLIT_NAMES = {"train": ("train",), "validation": ("val", "valid", "validation", "dev")}
_FILE = re.compile(r"(?P<split>[A-Za-z0-9_-]+)\.(?P<language>[A-Za-z]{2,3}(?:[-_][A-Za-z0-9]+)*)(?:\.gz)?")


def read_folder(
    folder: Path, source_language: str | None, target_language: str | None, test_split: str | None
) -> ParallelText:
    """Files <split>.<language>[.gz], one sentence a line, line i of one the translation of line i of the other.

    Splits are train, one of val, valid, validation, dev, and those that start with test: ``test_split``, else the
    one called test, else the first by name. Training pairs with an empty side are dropped and counted.

    Raises:
        UserMistake: a split or a language is missing, the line counts differ, or a file is no UTF-8 text.
    """
    files = {
        m["split"] + "." + m["language"]: path for path in sorted(folder.iterdir()) if (m := _matched(path))
    }
    known = sorted({name.split(".")[1] for name in files if name.startswith("train.")})
    source_language, target_language = _languages(folder, known, source_language, target_language)
    both = [name.split(".")[0] for name in files if name.endswith(f".{source_language}")]
    splits = [split for split in both if f"{split}.{target_language}" in files]
    chosen = {part: next((s for s in names if s in splits), None) for part, names in _SPLIT_NAMES.items()}
    tests = sorted(split for split in splits if split.startswith("test"))
    if test_split is not None and test_split not in tests:
        raise UserMistake(
            f"test_split={test_split!r} is not in {str(folder)!r}; it has {', '.join(tests) or 'none'}"
        )
    chosen["test"] = test_split or ("test" if "test" in tests else next(iter(tests), None))
    pairs: dict[str, Pairs] = {}
    for part, split in chosen.items():
        if split is None:
            names = "/".join(_SPLIT_NAMES.get(part, ("test",)))
            raise UserMistake(
                f"data={str(folder)!r} lacks the {part} pair {names}.{source_language}[.gz] and "
                f"{names}.{target_language}[.gz]"
            )
        pairs[part] = _read_pair(files[f"{split}.{source_language}"], files[f"{split}.{target_language}"])
    full = [pair for pair in pairs["train"] if all(pair)]
    facts = {
        "source": folder.resolve().name,
        "generated": False,
        "files": chosen,
        "empty_training_pairs_dropped": len(pairs["train"]) - len(full),
    }
    return ParallelText(full, pairs["validation"], pairs["test"], source_language, target_language, facts)


def _matched(path: Path) -> re.Match[str] | None:
    return _FILE.fullmatch(path.name) if path.is_file() else None


def _languages(folder: Path, known: list[str], source: str | None, target: str | None) -> tuple[str, str]:
    for option, language in (("source_language", source), ("target_language", target)):
        if language is not None and language not in known:
            found = ", ".join(known) or "none"
            raise UserMistake(
                f"{option}={language!r} has no train file in {str(folder)!r}; languages there: {found}"
            )
    if len(known) < 2:
        raise UserMistake(
            f"data={str(folder)!r} holds no parallel training text; it needs train.<language>[.gz] in two languages"
        )
    if source is None and target is None and len(known) > 2:
        raise UserMistake(
            f"data={str(folder)!r} has {', '.join(known)}; choose source_language and target_language"
        )
    source = source or next(
        language for language in ["en", *known] if language in known and language != target
    )
    target = target or next(language for language in known if language != source)
    if source == target:
        raise UserMistake(f"source_language and target_language are both {source!r}; they must differ")
    return source, target


def _read_pair(source: Path, target: Path) -> Pairs:
    lines = _lines(source), _lines(target)
    if len(lines[0]) != len(lines[1]):
        raise UserMistake(
            f"{source.name} has {len(lines[0])} lines but {target.name} {len(lines[1])}; they must match"
        )
    if not lines[0]:
        raise UserMistake(f"{source.name} is empty; give at least one sentence pair")
    return list(zip(*lines, strict=True))


def _lines(path: Path) -> list[str]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(_MAX_TEXT_BYTES + 1)
        if len(content) > _MAX_TEXT_BYTES:
            raise UserMistake(f"{path.name} holds more than {_MAX_TEXT_BYTES >> 30} GiB of text; split it")
        text = content.decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserMistake(f"{path.name} cannot be read as UTF-8 text ({error}); get it again") from error
    # Not splitlines(): it also cuts at characters that occur inside sentences, and the pairs would slip.
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    return [line.strip() for line in lines]


def encode_corpus(
    text: ParallelText, kind: Kind, vocabulary_size: int, cache_dir: Path | None, name: str
) -> Corpus:
    """Learns one BPE vocabulary for both sides on the training pairs alone, and encodes all splits with it.

    Args:
        text: the corpus.
        kind: ``byte`` (any text can be written with it) or ``whitespace`` (words are split at spaces; characters
            never seen in training become ``<unk>``).
        vocabulary_size: most entries, ``SPECIALS`` included, which have the ids 0..3.
        cache_dir: where the result is kept; ``None`` keeps nothing.
        name: names the cache entry.

    Raises:
        UserMistake: ``vocabulary_size`` has no room for the characters.
    """
    from tokenizers import Tokenizer

    splits = {"train": text.train, "validation": text.validation, "test": text.test}
    if cache_dir is None:
        tokenizer = _trained(text.train, kind, vocabulary_size)
        return Corpus(tokenizer, {split: _encoded(tokenizer, pairs) for split, pairs in splits.items()})

    def make(folder: Path) -> dict[str, Any]:
        tokenizer = _trained(text.train, kind, vocabulary_size)
        for split, pairs in splits.items():
            for side, ids in zip(("source", "target"), _encoded(tokenizer, pairs), strict=True):
                np.save(folder / f"{split}-{side}-ids.npy", np.concatenate([np.empty(0, np.int32), *ids]))
                np.save(folder / f"{split}-{side}-lengths.npy", np.array([len(row) for row in ids], np.int64))
        return {"tokenizer": tokenizer.to_str()}

    digest = hashlib.sha256(repr(list(splits.values())).encode()).hexdigest()
    key = {"text": digest, "kind": kind, "vocabulary_size": vocabulary_size, "rules": 1}
    entry = cached(cache_dir, name, key, make)

    def rows(split: str, side: str) -> list[Ids]:
        lengths = entry.arrays[f"{split}-{side}-lengths"]
        return np.split(entry.arrays[f"{split}-{side}-ids"], np.cumsum(lengths)[:-1])

    ids = {split: (rows(split, "source"), rows(split, "target")) for split in splits}
    return Corpus(Tokenizer.from_str(entry.facts["tokenizer"]), ids)


def _encoded(tokenizer: Any, pairs: Pairs) -> tuple[list[Ids], list[Ids]]:
    sources, targets = zip(*pairs, strict=True)
    source_ids, target_ids = (
        [np.array(encoding.ids, np.int32) for encoding in tokenizer.encode_batch_fast(list(lines))]
        for lines in (sources, targets)
    )
    return source_ids, target_ids


def _trained(pairs: Pairs, kind: Kind, vocabulary_size: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    lines = [line for pair in pairs for line in pair]
    tokenizer = Tokenizer(models.BPE(unk_token=SPECIALS[3]))
    if kind == "byte":
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        marker = "\u2581"  # stands for the space before a word
        alphabet = sorted({character for line in lines for character in line if character != " "} | {marker})
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
    least = len(SPECIALS) + len(alphabet)
    if vocabulary_size < least:
        raise UserMistake(
            f"vocabulary_size={vocabulary_size} must be at least {least}: the special tokens and every "
            f"{'byte' if kind == 'byte' else 'character'} of the training text"
        )
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer
