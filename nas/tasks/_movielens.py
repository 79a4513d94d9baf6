"""Ratings of films (MovieLens csv files) as click prediction: did the user rate this film well?

Samples are in order of time and cut by it, so that what is predicted lies after what was learned. Everything that a
sample tells of the past (how often and how well a user rated, or a film was rated) counts ratings of strictly earlier
seconds alone, as the counters of a running system would; in the held-out splits this includes earlier held-out ratings.

Letters: N ratings.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nas.errors import UserMistake, first_line
from nas.tasks._click_data import ClickData, Field
from nas.tasks.cache import cached

__all__ = ["read_movielens"]

_SHARES = (0.8, 0.9)
_LEAST_RATINGS = 100
_LAST_SECOND = 1 << 33  # the year 2242
_GENRES = 6  # columns of a film's genres; further ones are left out
_NO_GENRE = "(no genres listed)"
_YEAR = re.compile(r"\((\d{4})\)\s*$")
_BUCKET = 5  # years
_COUNT_BUCKETS = 14  # of past ratings, each twice as wide as the one before
_PRIOR = 5.0  # ratings, half of them good, that everybody starts with
_DAY = 86_400
_COLUMNS = {
    "ratings.csv": ("userId", "movieId", "rating", "timestamp"),
    "movies.csv": ("movieId", "title", "genres"),
}

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def read_movielens(
    folder: Path, *, click_rating: float, vocabulary: int, least_count: int, cache_dir: Path
) -> ClickData:
    """The ratings in a folder with ``ratings.csv`` and ``movies.csv``, as the MovieLens sets of csv files have them.

    Args:
        folder: where the files are.
        click_rating: a rating of at least this is a click.
        vocabulary: most ids of users and of films, the most frequent in training.
        least_count: ids that occur less often in training are taken as unknown.
        cache_dir: where the arrays are kept.

    Raises:
        UserMistake: a file is missing or cannot be read, there are too few ratings, or a split has clicks only or none.
    """
    missing = [name for name in _COLUMNS if not (folder / name).is_file()]
    if missing:
        raise UserMistake(
            f"data={str(folder)!r} has no {' and no '.join(missing)}; give a folder with the csv files of MovieLens, "
            "or leave data out for generated clicks"
        )
    stats = [(folder / name).stat() for name in _COLUMNS]
    key = {
        "folder": str(folder.resolve()),
        "files": [[stat.st_size, stat.st_mtime_ns] for stat in stats],
        "options": [click_rating, vocabulary, least_count],
        "rules": 1,
    }

    def make(place: Path) -> dict[str, Any]:
        data = _made(folder, click_rating, vocabulary, least_count)
        for name in ("ids", "dense", "clicks"):
            np.save(place / f"{name}.npy", getattr(data, name))
        fields = [[field.name, field.vocabulary, field.width, field.is_identity] for field in data.fields]
        return {
            "facts": data.facts,
            "fields": fields,
            "dense_names": list(data.dense_names),
            "ends": list(data.ends),
        }

    entry = cached(cache_dir, folder.resolve().name, key, make)
    first, second = entry.facts["ends"]
    return ClickData(
        entry.arrays["ids"],
        entry.arrays["dense"],
        entry.arrays["clicks"],
        (first, second),
        tuple(Field(*values) for values in entry.facts["fields"]),
        tuple(entry.facts["dense_names"]),
        entry.facts["facts"],
    )


def _made(folder: Path, click_rating: float, vocabulary: int, least_count: int) -> ClickData:
    user, movie, rating, second = _ratings(folder / "ratings.csv")
    clicks = rating >= click_rating
    ends = _cut(folder, second, clicks, click_rating)
    titles, genres = _films(folder / "movies.csv", movie)
    year = np.array([int(found[1]) if (found := _YEAR.search(title)) else 0 for title in titles])
    user_seen, user_liked = _past(user, second, clicks)
    movie_seen, movie_liked = _past(movie, second, clicks)
    columns: list[tuple[Field, NDArray[Any]]] = []
    for name, values in (("user", user), ("movie", movie)):
        ids, size = _ids(values, ends[0], vocabulary, least_count)
        columns.append((Field(name, size, is_identity=True), ids))
    columns.append(_genres(genres, ends[0]))
    released, size = _ids(np.where(year > 0, year // _BUCKET, 0), ends[0], vocabulary, 1, missing=0)
    columns.append((Field("released", size), released))
    columns.append((Field("hour", 25), 1 + second // 3600 % 24))
    columns.append(
        (Field("weekday", 8), 1 + (second // _DAY + 3) % 7)
    )  # 1970 began on a Thursday; 1 is Monday
    for name, seen in (("user_ratings", user_seen), ("movie_ratings", movie_seen)):
        bucket = np.minimum(np.log2(1 + seen).astype(np.int64), _COUNT_BUCKETS - 1)
        columns.append((Field(name, _COUNT_BUCKETS + 1), 1 + bucket))
    numbers = {
        "user_liked": (user_liked + _PRIOR / 2) / (user_seen + _PRIOR),
        "movie_liked": (movie_liked + _PRIOR / 2) / (movie_seen + _PRIOR),
        "log_user_ratings": np.log1p(user_seen),
        "log_movie_ratings": np.log1p(movie_seen),
        "age": np.where(year > 0, np.clip(_year_of(second) - year, 0, 60), 0),
        "log_days_here": np.log1p((second - _first(user, second)) / _DAY),
    }
    dense = np.column_stack([np.asarray(value, np.float64) for value in numbers.values()])
    spread = dense[: ends[0]].std(0)
    dense = (dense - dense[: ends[0]].mean(0)) / np.where(spread > 1e-9, spread, 1)
    return ClickData(
        ids=np.column_stack([ids for _, ids in columns]).astype(np.int32),
        dense=dense.astype(np.float32),
        clicks=clicks,
        ends=ends,
        fields=tuple(field for field, _ in columns),
        dense_names=tuple(numbers),
        facts={
            "source": str(folder),
            "generated": False,
            "click": f"rating >= {click_rating:g}",
            "cut": "by time: the first 80 % train, the next 10 % validation, the last 10 % test",
            "users": len(np.unique(user)),
            "movies": len(np.unique(movie)),
        },
    )


def _table(path: Path, kinds: dict[str, str]) -> list[NDArray[Any]]:
    """The columns of ``kinds``, each of its type, without gaps."""
    import pyarrow
    from pyarrow import csv

    types = {name: getattr(pyarrow, kind)() for name, kind in kinds.items()}
    options = csv.ConvertOptions(column_types=types, include_columns=list(kinds), strings_can_be_null=False)
    try:
        table = csv.read_csv(path, convert_options=options)
    except (pyarrow.ArrowException, KeyError, OSError) as error:
        reason = first_line(error).strip("'\"")[:200]
        raise UserMistake(
            f"{path.name} cannot be read ({reason}); it needs the columns {', '.join(_COLUMNS[path.name])} of MovieLens"
        ) from None
    empty = [name for name in kinds if table[name].null_count]
    if empty:
        raise UserMistake(f"{path.name}: column {empty[0]} has empty cells; give a value in every row")
    return [table[name].to_numpy() for name in kinds]


def _ratings(path: Path) -> tuple[Ints, Ints, Floats, Ints]:
    """User, film, rating and second of every rating, in order of time."""
    kinds = {"userId": "int64", "movieId": "int64", "rating": "float64", "timestamp": "int64"}
    user, movie, rating, second = _table(path, kinds)
    if len(user) < _LEAST_RATINGS:
        raise UserMistake(
            f"{path.name} has {len(user)} ratings but needs at least {_LEAST_RATINGS}; give more of them"
        )
    if not np.isfinite(rating).all():
        raise UserMistake(f"{path.name}: column rating holds values that are no finite numbers")
    if second.min() < 0 or second.max() >= _LAST_SECOND:
        raise UserMistake(
            f"{path.name}: column timestamp must hold seconds since 1970, from 0 to {_LAST_SECOND - 1}; "
            f"it has {second.min()} to {second.max()}"
        )
    order = np.lexsort((movie, user, second))
    return user[order], movie[order], rating[order], second[order]


def _cut(folder: Path, second: Ints, clicks: NDArray[np.bool_], click_rating: float) -> tuple[int, int]:
    """Where training and validation end; ratings of one second stay together."""
    first, last = (
        int(np.searchsorted(second, second[int(share * len(second))], "left")) for share in _SHARES
    )
    for part, some in (
        ("train", clicks[:first]),
        ("validation", clicks[first:last]),
        ("test", clicks[last:]),
    ):
        if not len(some):
            raise UserMistake(
                f"data={str(folder)!r}: nothing is left for {part} when ratings are cut by time; "
                "the timestamps must differ"
            )
        if some.all() or not some.any():
            raise UserMistake(
                f"data={str(folder)!r}: {'all' if some.all() else 'none'} of the {len(some)} ratings of {part} are at "
                f"least click_rating={click_rating:g}; choose another click_rating or give more ratings"
            )
    return first, last


def _films(path: Path, movie: Ints) -> tuple[list[str], list[list[str]]]:
    """Title and genres of the film of every rating; empty where it is not listed."""
    ids, titles, genres = _table(path, {"movieId": "int64", "title": "string", "genres": "string"})
    known = {int(number): place for place, number in reversed(list(enumerate(ids)))}
    different, places = np.unique(movie, return_inverse=True)
    rows = [known.get(int(number)) for number in different]
    found = [str(titles[row]) if row is not None else "" for row in rows]
    lists = [
        []
        if row is None
        else [genre for genre in str(genres[row]).split("|") if genre not in ("", _NO_GENRE)]
        for row in rows
    ]
    return [found[place] for place in places], [lists[place] for place in places]


def _genres(genres: Sequence[Sequence[str]], train: int) -> tuple[Field, NDArray[np.int64]]:
    counts = Counter(genre for some in genres[:train] for genre in some)
    numbers = {genre: number for number, genre in enumerate(sorted(counts), 1)}
    ids = np.zeros((len(genres), _GENRES), np.int64)
    for row, some in enumerate(genres):
        known = [numbers[genre] for genre in some if genre in numbers][:_GENRES]
        ids[row, : len(known)] = known
    return Field("genres", max(2, len(numbers) + 1), _GENRES), ids


def _ids(
    values: Ints, train: int, vocabulary: int, least: int, missing: int | None = None
) -> tuple[Ints, int]:
    """Numbers from 1 by falling frequency in training, 0 for all others; and how many there are with 0."""
    known, counts = np.unique(values[:train], return_counts=True)
    kept = (counts >= least) & (known != missing if missing is not None else True)
    known, counts = known[kept], counts[kept]
    chosen = known[np.argsort(-counts, kind="stable")[:vocabulary]]
    order = np.argsort(chosen)
    places = np.searchsorted(chosen, values, sorter=order)
    nearest = order[np.minimum(places, len(chosen) - 1)] if len(chosen) else np.zeros(len(values), np.int64)
    hit = chosen[nearest] == values if len(chosen) else np.zeros(len(values), bool)
    return np.where(hit, nearest + 1, 0), max(2, len(chosen) + 1)


def _past(key: Ints, second: Ints, clicks: NDArray[np.bool_]) -> tuple[Ints, Ints]:
    """For every rating how many of the same key, and how many clicks, there were in earlier seconds."""
    order = np.lexsort((second, key))
    keys, seconds = key[order], second[order]
    places = np.arange(len(key))
    new_key = np.append(True, keys[1:] != keys[:-1])
    new_second = new_key | np.append(True, seconds[1:] != seconds[:-1])
    start = np.maximum.accumulate(np.where(new_key, places, 0))
    here = np.maximum.accumulate(np.where(new_second, places, 0))
    total = np.append(0, np.cumsum(clicks[order]))
    seen, liked = np.empty_like(key), np.empty_like(key)
    seen[order], liked[order] = here - start, total[here] - total[start]
    return seen, liked


def _first(key: Ints, second: Ints) -> Ints:
    """The second of the key's first rating; ratings are in order of time."""
    _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
    return np.asarray(second[first][inverse])


def _year_of(second: Ints) -> Ints:
    return np.asarray(second.astype("datetime64[s]").astype("datetime64[Y]").astype(np.int64) + 1970)
