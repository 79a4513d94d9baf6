"""Click prediction: the generated clicks, folders of ratings against counting one by one, data that cannot be used."""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Hashable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from nas.errors import TrialFailure, UserMistake
from nas.tasks import make_task
from nas.tasks._click_data import ClickData, auc_of, generate_clicks
from nas.tasks.base import Task
from nas.tasks.click_through_rate import ClickThroughRate
from nas.training import TrainConfig, train
from spaces import get_space
from tests.conformance.task import TaskConformance

CPU = torch.device("cpu")
GENRES = ("Action", "Comedy", "Drama", "War")
Row = tuple[int, int, float, int]


def ratings(count: int = 900, seed: int = 0) -> list[Row]:
    """A user's taste is for films of his own parity; several ratings share a second."""
    rng = random.Random(seed)
    pairs = rng.sample([(user, film) for user in range(1, 41) for film in range(1, 61)], count)
    rows = []
    for number, (user, film) in enumerate(pairs):
        likes = rng.random() < (0.8 if user % 2 == film % 2 else 0.3)
        rows.append((user, film, 4.5 if likes else 2.0, 1_000_000_000 + 7_000 * (number // 3)))
    rng.shuffle(rows)
    return rows


def write(folder: Path, rows: list[Row], films: list[tuple[int, str, str]] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if films is None:
        films = [
            (film, f'Film, no. "{film}" ({1990 + film % 12})', "|".join(GENRES[: 1 + film % 4]))
            for film in range(1, 60)  # the last one is not listed
        ]
    for name, header, lines in (
        ("ratings.csv", ("userId", "movieId", "rating", "timestamp"), rows),
        ("movies.csv", ("movieId", "title", "genres"), films),
    ):
        with (folder / name).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *lines])
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("films"), ratings())


def made(data: Path | None, cache: Path, **options: Any) -> ClickThroughRate:
    task = make_task(
        "click_through_rate", data=None if data is None else str(data), cache_dir=str(cache), **options
    )
    assert isinstance(task, ClickThroughRate)
    return task


def column(data: ClickData, name: str) -> np.ndarray[Any, Any]:
    """(N, width) ids of a field."""
    start = 0
    for field in data.fields:
        if field.name == name:
            return data.ids[:, start : start + field.width]
        start += field.width
    raise KeyError(name)


def row_keys(task: Task) -> dict[str, list[Hashable]]:
    assert isinstance(task, ClickThroughRate)
    ids, dense = task.data.ids, task.data.dense
    return {
        part: [(ids[row].tobytes(), dense[row].tobytes()) for row in task.data.rows(part)]
        for part in ("train", "validation", "test")
    }


class TestGenerated(TaskConformance):
    batch_size = 512

    @pytest.fixture(scope="class")
    def task(self) -> Task:
        return make_task("click_through_rate")

    def split_keys(self, task: Task) -> dict[str, list[Hashable]]:
        return row_keys(task)


class TestRatings(TaskConformance):
    @pytest.fixture(scope="class")
    def task(self, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Task:
        return made(folder, tmp_path_factory.mktemp("cache"))

    def split_keys(self, task: Task) -> dict[str, list[Hashable]]:
        return row_keys(task)


# -- generated clicks --------------------------------------------------------------------------------------------------


def logistic(data: ClickData, pairs: list[tuple[str, str]], strength: float = 1.0) -> float:
    """Validation AUC of logistic regression on single features, and on these pairs of fields as fields."""
    blocks = [scipy.sparse.csr_matrix(data.dense)]
    for field in data.fields:
        hot = np.zeros((len(data.clicks), field.vocabulary), np.float32)
        for ids in column(data, field.name).T:
            hot[np.arange(len(hot)), ids] = 1
        blocks.append(scipy.sparse.csr_matrix(hot))
    sizes = {field.name: field.vocabulary for field in data.fields}
    for one, other in pairs:
        both = column(data, one)[:, 0] * sizes[other] + column(data, other)[:, 0]
        places = (np.ones(len(both)), (np.arange(len(both)), both))
        blocks.append(scipy.sparse.csr_matrix(places, shape=(len(both), sizes[one] * sizes[other])))
    x = scipy.sparse.hstack(blocks).tocsr()
    parts = [slice(data.rows(part).start, data.rows(part).stop) for part in ("train", "validation")]
    model = LogisticRegression(C=strength, max_iter=200).fit(x[parts[0]], data.clicks[parts[0]])
    return auc_of(data.clicks[parts[1]], model.decision_function(x[parts[1]]))


def test_generated_clicks_lie_in_pairs_of_fields() -> None:
    data = generate_clicks(0, train=12_000, held_out=4_000)
    assert data.facts["source"] == "generated-clicks"
    best = data.facts["best_possible_auc"]["validation"]
    single = logistic(data, [])
    right = logistic(data, [("field0", "field7"), ("field1", "field6"), ("field2", "field5")])
    wrong = logistic(data, [("field6", "field7"), ("field3", "field6"), ("field2", "field4")])
    assert single < best - 0.08
    assert right > single + 0.02
    assert wrong < right - 0.02


def test_generated_clicks_follow_the_seed() -> None:
    one, same, other = (generate_clicks(seed, 500, 100) for seed in (1, 1, 2))
    assert np.array_equal(one.ids, same.ids)
    assert np.array_equal(one.clicks, same.clicks)
    assert not np.array_equal(one.ids, other.ids)
    assert (one.signature, one.rows("validation")) == (other.signature, range(500, 600))


@pytest.mark.slow
def test_heterogeneous_interactions_beat_single_features_and_shared_weights() -> None:
    task, space = make_task("click_through_rate"), get_space("hiformer")
    assert isinstance(task, ClickThroughRate)
    found = {}
    for name in ("transformer_1layer", "hiformer_1layer"):
        torch.manual_seed(0)
        model = space.build(space.published[name], task.signature)
        config = TrainConfig(2, task.default_batch_size, task.default_learning_rate)
        found[name] = train(model, task, config, "cpu").metrics["auc"]
    assert found["hiformer_1layer"] > found["transformer_1layer"] + 0.01
    assert found["hiformer_1layer"] > logistic(task.data, []) + 0.03


# -- ratings -----------------------------------------------------------------------------------------------------------


def test_features_are_what_counting_one_by_one_gives(folder: Path, tmp_path: Path) -> None:
    data = made(folder, tmp_path).data
    rows = sorted(ratings(), key=lambda row: (row[3], row[0], row[1]))
    before = [[other for other in rows if other[3] < row[3]] for row in rows]
    seen, liked = (
        [
            float(sum(other[place] == row[place] and other[2] >= least for other in earlier))
            for row, earlier in zip(rows, before, strict=True)
            for place in (0, 1)
        ]
        for least in (0, 4)
    )
    expected = np.column_stack(
        [
            (np.array(liked[0::2]) + 2.5) / (np.array(seen[0::2]) + 5),
            (np.array(liked[1::2]) + 2.5) / (np.array(seen[1::2]) + 5),
            np.log1p(seen[0::2]),
            np.log1p(seen[1::2]),
        ]
    )
    start = data.ends[0]
    expected = (expected - expected[:start].mean(0)) / expected[:start].std(0)
    np.testing.assert_allclose(data.dense[:, :4], expected, rtol=1e-4, atol=1e-5)
    assert data.dense_names[:4] == ("user_liked", "movie_liked", "log_user_ratings", "log_movie_ratings")
    assert data.clicks.tolist() == [row[2] >= 4 for row in rows]
    bucket = [1 + int(math.log2(1 + count)) for count in seen[0::2]]
    assert column(data, "user_ratings")[:, 0].tolist() == bucket
    moments = [datetime.fromtimestamp(row[3], tz=timezone.utc) for row in rows]
    assert column(data, "hour")[:, 0].tolist() == [moment.hour + 1 for moment in moments]
    assert column(data, "weekday")[:, 0].tolist() == [moment.isoweekday() for moment in moments]


def test_splits_are_cut_by_time(folder: Path, tmp_path: Path) -> None:
    task = made(folder, tmp_path)
    seconds = sorted(row[3] for row in ratings())
    for end, share in zip(task.data.ends, (0.8, 0.9), strict=True):
        assert seconds[end - 1] < seconds[end]  # one second is not torn apart
        assert abs(end - share * len(seconds)) <= 3
    assert task.describe()["splits"] == {"train": 720, "validation": 90, "test": 90}
    assert "by time" in task.describe()["cut"]


def test_vocabularies_come_from_training_alone(tmp_path: Path) -> None:
    rows = sorted(ratings(), key=lambda row: row[3])
    late = [(user + 100, film, rating, second) for user, film, rating, second in rows[-150:]]
    data = made(write(tmp_path / "late", rows[:-150] + late), tmp_path).data
    users = column(data, "user")[:, 0]
    assert not users[data.rows("test").start :].any()
    assert users[: data.ends[0]].min() >= 0
    assert int((users[: data.ends[0]] > 0).sum()) > 0.9 * data.ends[0]
    few = made(tmp_path / "late", tmp_path, vocabulary=3).data
    counts = np.bincount(column(few, "user")[: few.ends[0], 0])
    assert len(counts) == few.fields[0].vocabulary == 4
    assert counts[1] >= counts[2] >= counts[3]
    rare = made(tmp_path / "late", tmp_path, least_count=20).data
    counts = np.bincount(column(rare, "user")[: rare.ends[0], 0])
    assert counts[1:].min() >= 20


def test_sets_of_genres(tmp_path: Path) -> None:
    many = "|".join(f"Genre{number}" for number in range(9))
    films = [(1, "No year", "(no genres listed)"), (2, "A (1999)", "War|Action"), (3, "B (1999) ", many)]
    data = made(
        write(tmp_path / "films", [(u, 1 + f % 4, r, s) for u, f, r, s in ratings()], films), tmp_path
    ).data
    genres, released = column(data, "genres"), column(data, "released")[:, 0]
    assert data.fields[2].vocabulary == 1 + 2 + 9
    assert {int((row > 0).sum()) for row in genres} == {0, 2, 6}
    assert {int(released[row]) for row in range(len(genres)) if not genres[row].any()} == {0}
    assert {int(released[row]) for row in range(len(genres)) if genres[row].any()} == {1}


def test_users_and_films_are_hidden_at_times(folder: Path, tmp_path: Path) -> None:
    shares = {}
    for share in (0.0, 0.5):
        task = made(folder, tmp_path, unknown_share=share, least_count=1)
        batches = list(task.train_batches(epoch=0, batch_size=100, seed=0, device=CPU))
        ids = torch.cat([batch[0] for batch in batches])
        shares[share] = (ids[:, :2] == 0).float().mean().item()
        assert bool((ids[:, -2:] > 0).all())  # what is no identity stays
    assert shares[0.0] == 0
    assert 0.4 < shares[0.5] < 0.6


def test_arrays_are_kept_and_made_again_when_the_files_change(folder: Path, tmp_path: Path) -> None:
    copy = write(tmp_path / "copy", ratings())
    first = made(copy, tmp_path / "cache").data
    again = made(copy, tmp_path / "cache").data
    assert len(list((tmp_path / "cache").glob("copy-*"))) == 1
    assert np.array_equal(first.dense, again.dense)
    assert (first.fields, first.facts, first.ends) == (again.fields, again.facts, again.ends)
    write(copy, ratings(600))
    assert len(made(copy, tmp_path / "cache").data.clicks) == 600


def test_limit(folder: Path, tmp_path: Path) -> None:
    task = made(folder, tmp_path, limit=50)
    assert task.describe()["splits"]["train"] == 50
    assert task.batches_per_epoch(25) == 2
    with pytest.raises(UserMistake, match="limit=0 must be at least 1"):
        made(folder, tmp_path, limit=0)


def _with(place: int, value: Any, row: int = 5) -> list[Any]:
    rows: list[Any] = [list(one) for one in ratings()]
    rows[row][place] = value
    return rows


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (ratings(60), {}, "ratings.csv has 60 ratings but needs at least 100"),
        (_with(2, "good"), {}, r"ratings\.csv cannot be read \(.*good.*\); it needs the columns userId"),
        (_with(0, ""), {}, r"ratings\.csv: column userId has empty cells; give a value in every row"),
        (_with(2, "inf"), {}, "column rating holds values that are no finite numbers"),
        (_with(3, -1), {}, "column timestamp must hold seconds since 1970"),
        (ratings(), {"click_rating": 6.0}, "none of the 720 ratings of train are at least click_rating=6"),
        (ratings(), {"click_rating": math.nan}, "click_rating=nan must be a finite number"),
        (ratings(), {"click_rating": 0.0}, "all of the 720 ratings of train"),
        ([(*row[:3], 5) for row in ratings()], {}, "nothing is left for train when ratings are cut by time"),
        (ratings(), {"vocabulary": 0}, "vocabulary=0 must be at least 1"),
        (ratings(), {"unknown_share": 1.0}, r"unknown_share=1.0 must lie in \[0, 1\)"),
    ],
)
def test_data_that_cannot_be_used(tmp_path: Path, rows: Any, options: Any, message: str) -> None:
    with pytest.raises(UserMistake, match=message):
        made(write(tmp_path / "bad", rows), tmp_path / "cache", **options)


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserMistake, match="neither 'generated-clicks' nor a folder; give a folder"):
        made(tmp_path / "missing", tmp_path)
    with pytest.raises(UserMistake, match=r"has no ratings\.csv and no movies\.csv; give a folder"):
        made(tmp_path, tmp_path)
    write(tmp_path, ratings())
    (tmp_path / "ratings.csv").write_text("user,item\n1,2\n")
    with pytest.raises(
        UserMistake, match=r"ratings\.csv cannot be read .*it needs the columns userId, movieId"
    ):
        made(tmp_path, tmp_path)


# -- metrics -----------------------------------------------------------------------------------------------------------


class Fixed(nn.Module):
    """The first dense number as the logit."""

    def __init__(self, scale: float = 1.0):
        super().__init__()
        self.scale = scale

    def forward(self, ids: Tensor, dense: Tensor) -> Tensor:
        return self.scale * dense[:, :1]


def test_metrics_are_their_definitions(folder: Path, tmp_path: Path) -> None:
    task = made(folder, tmp_path)
    rows = task.data.rows("validation")
    scores = task.data.dense[rows.start : rows.stop, 0].astype(np.float64)
    clicks = task.data.clicks[rows.start : rows.stop]
    wins = scores[clicks][:, None] - scores[~clicks][None]
    found = task.evaluate(Fixed(), "validation", CPU)
    assert found["auc"] == pytest.approx(float(((wins > 0) + 0.5 * (wins == 0)).mean()), abs=1e-9)
    chances = 1 / (1 + np.exp(-scores))
    expected = -float(np.where(clicks, np.log(chances), np.log(1 - chances)).mean())
    assert found["loss"] == pytest.approx(expected, rel=1e-9)
    assert set(found) == {"auc", "loss"}


def test_the_training_loss_is_in_full_precision(folder: Path, tmp_path: Path) -> None:
    task = made(folder, tmp_path)
    batch = next(task.train_batches(epoch=0, batch_size=64, seed=0, device=CPU))
    model = nn.Module()
    model.forward = lambda ids, dense: dense[:, :1].bfloat16()  # type: ignore[method-assign]
    assert task.loss(model, batch).dtype == torch.float32


def test_a_loss_that_is_no_number(folder: Path, tmp_path: Path) -> None:
    task = made(folder, tmp_path)
    with pytest.raises(TrialFailure, match="validation loss is nan"):
        task.evaluate(Fixed(math.nan), "validation", CPU)
