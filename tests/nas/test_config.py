"""The configuration of a run: what is accepted, and what a wrong value is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from nas.config import SearchConfig, load_recipe, parse_count, parse_duration, to_yaml
from nas.errors import UserMistake


@pytest.mark.parametrize(
    ("text", "seconds"),
    [(90, 90), ("90", 90), ("90s", 90), ("3m", 180), ("1h30m", 5400), ("1.5h", 5400), ("2m5s", 125)],
)
def test_durations(text: object, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "m3", "-3", "3 days", "nan", "inf", 0, -1, True, "0s"])
def test_wrong_durations(text: object) -> None:
    with pytest.raises(ValueError, match=r"duration"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "count"), [(5, 5), ("800k", 800_000), ("25M", 25_000_000), ("1.3G", 1_300_000_000)]
)
def test_counts(text: object, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, r"space is required"),
        ({"space": "x", "trails": 3}, r"unknown key 'trails' \(did you mean 'trials'\?\)"),
        ({"space": "x", "training": {"epoch": 3}}, r"unknown key 'training\.epoch'"),
        ({"space": "x", "trials": 0}, r"trials: .*greater than or equal to 1, got 0"),
        ({"space": "x", "trials": "many"}, r"trials: .*integer"),
        ({"space": "x", "trials": 2.5}, r"trials"),
        ({"space": ["x"]}, r"space: .*string"),
        (
            {"space": "x", "objectives": ["accuracy"]},
            r"'accuracy' must be 'name:maximize' or 'name:minimize'",
        ),
        ({"space": "x", "objectives": []}, r"at least one objective"),
        ({"space": "x", "objectives": ["a:maximize", "a:minimize"]}, r"twice"),
        ({"space": "x", "latency_budget": float("nan")}, r"latency_budget"),
        ({"space": "x", "latency_budget": -1}, r"latency_budget: .*greater than 0"),
        ({"space": "x", "seed": -1}, r"seed"),
        ({"space": "x\ny"}, r"control characters"),
        ({"space": "x", "time_budget": "soon"}, r"time_budget: 'soon' is not a duration"),
        ({"space": "x", "pruner": "best"}, r"pruner"),
        ({"space": "x", "version": 2}, r"version"),
    ],
)
def test_mistakes_are_one_line_that_names_the_key(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserMistake, match=message) as caught:
        SearchConfig.parse(values)
    assert "\n" not in str(caught.value)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            name: st.one_of(
                st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.integers())
            )
            for name in SearchConfig.model_fields
        },
    )
)
def test_any_values_parse_or_are_refused_in_one_line(values: dict[str, object]) -> None:
    try:
        config = SearchConfig.parse(values)
    except UserMistake as mistake:
        assert "\n" not in str(mistake)
        assert str(mistake).isprintable() or any(not str(value).isprintable() for value in values.values())
    else:
        assert SearchConfig.parse(config.dump()) == config


def test_a_recipe_survives_being_written_and_read(tmp_path: Path) -> None:
    config = SearchConfig.parse(
        {"space": "x", "time_budget": "3m", "params_budget": "25M", "training": {"batch_size": 8}}
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert SearchConfig.parse(load_recipe(path)) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", r"must be a YAML mapping"),
        ("space: [1\n", r"recipe\.yaml line \d"),
        ("", r"must be a YAML mapping"),
        ("3: x\n", r"must be a YAML mapping of keys"),
        ("space: !!python/object/apply:os.system ['touch sentinel']\n", r"could not determine a constructor"),
        ("a: &a [x, x]\nb: *a\n", r"aliases are not allowed"),
        ("space: " + "[" * 3000 + "]" * 3000 + "\n", r"nested too deeply"),
        ("x: 2001-99-99\n", r"recipe\.yaml"),
    ],
)
def test_hostile_or_broken_recipes(
    tmp_path: Path, text: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserMistake, match=message) as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "sentinel").exists()


def test_a_recipe_that_is_missing_binary_or_huge(tmp_path: Path) -> None:
    with pytest.raises(UserMistake, match=r"cannot be read \(No such file"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserMistake, match=r"not UTF-8"):
        load_recipe(tmp_path / "binary")
    (tmp_path / "huge").write_bytes(b"a" * 1_000_001)
    with pytest.raises(UserMistake, match=r"larger than"):
        load_recipe(tmp_path / "huge")


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_recipe_is_a_valid_configuration(path: Path) -> None:
    config = SearchConfig.parse(load_recipe(path))
    assert yaml.safe_load(to_yaml(config))["space"] == config.space
