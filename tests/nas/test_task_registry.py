"""Tasks by name: known ones, those of others, and what naming them imports."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from nas.errors import UnknownNameError, UserMistake
from nas.tasks import list_tasks, make_task, register_task
from nas.tasks.image_classification import ImageClassification


def test_known_names() -> None:
    assert {"image_classification", "translation"} <= set(list_tasks())
    with pytest.raises(
        UnknownNameError,
        match=r"unknown task 'image_clasification' \(did you mean 'image_classification'\?\)",
    ):
        make_task("image_clasification")
    with pytest.raises(UnknownNameError, match="unknown task 'no such'"):
        make_task("no such")


def test_third_party_tasks() -> None:
    task = make_task("nas.tasks.image_classification:ImageClassification", seed=1)
    assert task.describe()["seed"] == 1
    with pytest.raises(UserMistake, match=r"task 'nas\.errors:UserMistake' is not a subclass"):
        make_task("nas.errors:UserMistake")
    with pytest.raises(UserMistake, match=r"task 'no_such_module:X' cannot be loaded"):
        make_task("no_such_module:X")
    with pytest.raises(ValueError, match="task 'translation' is registered twice"):
        register_task("translation")(ImageClassification)
    assert ImageClassification.name == "image_classification"


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    code = (
        "import sys, json\n"
        "heavy = ('torch', 'torchvision', 'sklearn', 'tokenizers', 'pyarrow', 'sacrebleu', 'pydantic')\n"
        "import nas.tasks\n"
        "first = [name for name in heavy if name in sys.modules]\n"
        "nas.tasks.list_tasks()\n"
        "second = [name for name in heavy if name in sys.modules]\n"
        "nas.tasks.make_task('image_classification')\n"
        "third = [name for name in heavy if name in sys.modules]\n"
        "print(json.dumps([first, second, third]))\n"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    first, second, third = json.loads(output)
    assert first == []
    assert second == ["torch"]
    # Where pandas is installed, scikit-learn loads it, and pandas pyarrow.
    assert set(third) - {"pyarrow"} == {"torch", "sklearn", "pydantic"}
