"""Models by name: every form loads and runs with its inputs, and every mistake is one line that names the argument."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nas.errors import UserMistake
from nas.export import describe_signature, export_trial, load_model
from nas.reader import read_run
from nas.run_directory import RunDirectory
from nas.sources import Source, load_source
from spaces import get_space
from tests.nas.faults.test_damaged_weights import SIGNATURE, trained_run
from tests.nas.toys.runs import made_run

VIT = "timm:test_vit"  # timm's own tiny model


def inputs(source: Source, batch: int = 1, seed: int = 0) -> tuple[Tensor, ...]:
    return source.make_inputs(batch, torch.Generator().manual_seed(seed))


def shapes(source: Source, batch: int = 1) -> list[tuple[int, ...]]:
    return [tuple(x.shape) for x in inputs(source, batch)]


def run(source: Source, batch: int = 1) -> Tensor:
    assert source.model is not None
    with torch.inference_mode():
        result: Tensor = source.model(*inputs(source, batch))
    return result


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return trained_run(tmp_path_factory.mktemp("sources") / "run")


@pytest.fixture(scope="module")
def exported(trained: RunDirectory) -> Path:
    found = read_run(trained.path)
    return export_trial(found, found.trial(1), trained.path / "export")


# -- timm --------------------------------------------------------------------------------------------------------------


def test_timm() -> None:
    source = load_source(VIT)
    assert shapes(source, 2) == [(2, 3, 160, 160)]
    assert run(source, 2).shape[0] == 2
    assert not source.model.training  # type: ignore[union-attr]
    assert source.name == VIT
    assert source.onnx is None


def test_building_leaves_the_callers_generator_alone_and_repeats() -> None:
    torch.manual_seed(3)
    first = load_source(VIT)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))
    assert torch.equal(run(first), run(load_source(VIT)))
    assert not torch.equal(inputs(first, seed=0)[0], inputs(first, seed=1)[0])


@pytest.mark.parametrize(("size", "expected"), [("64", (64, 64)), ("64x96", (64, 96))])
@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_timm_at_another_size(name: str, size: str, expected: tuple[int, int]) -> None:
    source = load_source(f"timm:{name}", size=size)
    assert shapes(source) == [(1, 3, *expected)]
    run(source)


def test_the_key_is_of_name_and_shapes() -> None:
    assert load_source(VIT).key == load_source(VIT).key
    assert load_source(VIT).key != load_source(VIT, size="64").key  # fewer positions
    assert load_source(VIT).key != load_source("timm:test_vit2").key
    assert len(load_source(VIT).key) == 16


# -- our own -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["{}#1", "{}/trials/1"])
def test_a_trial(trained: RunDirectory, form: str) -> None:
    source = load_source(form.format(trained.path))
    assert shapes(source, 3) == [(3, 1, 4, 4)]
    assert run(source, 3).shape == (3, 3)
    assert source.key == read_run(str(trained.path)).trial(1).key


def test_our_own_architectures_know_how_they_are_built_again(trained: RunDirectory, exported: Path) -> None:
    trial, described = load_source(f"{trained.path}#0"), load_source(str(exported), size="6x4")
    for source, signature in ((trial, SIGNATURE), (described, replace(SIGNATURE, height=6))):
        assert source.origin is not None
        assert source.origin["kind"] == "space"
        assert source.origin["signature"] == describe_signature(signature)
    assert described.origin is not None
    assert described.origin["task"] == "image_classification"
    assert load_source(VIT).origin is None


def test_an_export_has_its_weights(exported: Path) -> None:
    source = load_source(str(exported))
    expected = load_model(exported)
    assert torch.equal(run(source), expected(*inputs(source)))
    assert load_source(str(exported / "architecture.json")).key == source.key


def test_an_architecture_without_weights(exported: Path, tmp_path: Path) -> None:
    shutil.copy(exported / "architecture.json", tmp_path / "other.json")
    source = load_source(str(tmp_path / "other.json"))
    assert run(source).shape == (1, 3)
    assert source.key == load_source(str(exported)).key


def test_an_architecture_at_another_size(exported: Path) -> None:
    source = load_source(str(exported), size="6x4")
    assert shapes(source) == [(1, 1, 6, 4)]
    run(source)


def test_an_architecture_written_by_hand(tmp_path: Path) -> None:
    space = get_space("efficient_transformer", task="translation")
    signature = {"task": "translation", "source_vocabulary": 50, "target_vocabulary": 40, "max_length": 24}
    described = {"space": "efficient_transformer", "scale_task": "translation", "signature": signature}
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({**described, "architecture": next(iter(space.published.values()))}))
    source = load_source(str(path))
    assert shapes(source, 2) == [(2, 24), (2, 24)]
    tokens, shifted = inputs(source, 2)
    assert tokens.min() >= 2
    assert tokens.max() < 50
    assert shifted.max() < 40
    assert set(shifted[:, 0].tolist()) == {1}
    lengths = {shapes_of[0][1] for shapes_of in _many(load_source(str(path), size="5-8"))}
    assert lengths == {5, 6, 7, 8}
    with pytest.raises(UserMistake, match=r"--size 16-128: model '.*mine\.json' takes at most 24 tokens"):
        load_source(str(path), size="16-128")


def _many(source: Source) -> list[list[tuple[int, ...]]]:
    generator = torch.Generator().manual_seed(0)
    found = [[tuple(x.shape) for x in source.make_inputs(1, generator)] for _ in range(60)]
    assert all(first == second for first, second in found)  # one length for source and target
    return found


def test_a_changed_record_is_refused(exported: Path, tmp_path: Path) -> None:
    path = tmp_path / "architecture.json"
    path.write_text((exported / "architecture.json").read_text().replace('"width": 8', '"width": 4'))
    with pytest.raises(
        UserMistake, match="do not match its checksum; write it again, or take it from a copy"
    ):
        load_source(str(path))


# -- files -------------------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)

    def forward(self, tokens: Tensor, scale: Tensor) -> Tensor:
        result: Tensor = self.embedding(tokens).mean(1) * scale
        return result


def save_program(path: Path, *, dynamic: bool) -> str:
    batch = torch.export.Dim("batch", min=1, max=64)
    tokens, scale = torch.randint(0, 7, (2, 5)), torch.rand(2, 4)
    free = {"dynamic_shapes": ({0: batch}, {0: batch})} if dynamic else {}
    torch.export.save(torch.export.export(Scaled(), (tokens, scale), **free), path)  # type: ignore[arg-type]
    return str(path)


def test_an_exported_program(tmp_path: Path) -> None:
    source = load_source(save_program(tmp_path / "a.pt2", dynamic=True))
    assert shapes(source, 3) == [(3, 5), (3, 4)]
    assert inputs(source, 3)[0].max() < 7
    assert run(source, 3).shape == (3, 4)
    assert source.model.eval() is source.model  # type: ignore[union-attr]  # what every caller does
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_a_program_for_one_batch_says_so(tmp_path: Path) -> None:
    source = load_source(save_program(tmp_path / "a.pt2", dynamic=False))
    run(source, 2)
    with pytest.raises(
        UserMistake, match=r"made for a batch of 2 \(input 2 x 5\), not 1; choose the target @2"
    ):
        inputs(source, 1)


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (pytest.fail, ("it was unpickled",))


@pytest.mark.parametrize("place", ["data/sample_inputs/model.pt", "data/constants/opaque_obj_0"])
def test_a_program_with_a_pickle_is_not_unpickled(tmp_path: Path, place: str) -> None:
    save_program(tmp_path / "good.pt2", dynamic=True)
    bomb = tmp_path / "bomb.pt"
    torch.save(Bomb(), bomb)
    with zipfile.ZipFile(tmp_path / "good.pt2") as good, zipfile.ZipFile(tmp_path / "bad.pt2", "w") as bad:
        root = good.namelist()[0].partition("/")[0]
        for name in good.namelist():
            if not name.endswith(place):
                bad.writestr(name.replace(root, "bad", 1), good.read(name))
        contents = bomb.read_bytes() if place.endswith(".pt") else pickle.dumps(Bomb())
        bad.writestr(f"bad/{place}", contents)
    with pytest.raises(UserMistake, match=r"bad\.pt2': (holds pickled objects|torch\.export cannot load it)"):
        load_source(str(tmp_path / "bad.pt2"))


def save_onnx(path: Path, shape: list[int | str]) -> str:
    onnx = pytest.importorskip("onnx")
    helper, kinds = onnx.helper, onnx.TensorProto
    nodes = [helper.make_node("Gather", ["table", "tokens"], ["rows"], axis=0)]
    table = helper.make_tensor("table", kinds.FLOAT, [9, 2], [0.5] * 18)
    graph = helper.make_graph(
        nodes,
        "lookup",
        [helper.make_tensor_value_info("tokens", kinds.INT64, shape)],
        [helper.make_tensor_value_info("rows", kinds.FLOAT, None)],
        [table],
    )
    onnx.save(helper.make_model(graph), path)
    return str(path)


def test_an_onnx_file(tmp_path: Path) -> None:
    source = load_source(save_onnx(tmp_path / "a.onnx", ["batch", 3]))
    assert source.model is None
    assert source.onnx == tmp_path / "a.onnx"
    (tokens,) = inputs(source, 200)
    assert tokens.shape == (200, 3)
    assert tokens.dtype == torch.int64
    assert set(tokens.flatten().tolist()) == set(range(9))  # the rows of the table that they look up


def test_an_onnx_file_with_an_open_length(tmp_path: Path) -> None:
    path = save_onnx(tmp_path / "a.onnx", ["batch", "length"])
    with pytest.raises(UserMistake, match=r"dimension 1 of an input of shape \? x \? is open; give --size"):
        inputs(load_source(path))
    assert shapes(load_source(path, size="12"), 2) == [(2, 12)]


def test_damaged_files_are_one_line(tmp_path: Path) -> None:
    for name in ("a.onnx", "a.pt2"):
        (tmp_path / name).write_bytes(b"nothing of the kind")
        with pytest.raises(UserMistake, match=rf"^model '.*{name}': (onnx|torch\.export) cannot") as caught:
            load_source(str(tmp_path / name))
        assert "\n" not in str(caught.value)


# -- functions ---------------------------------------------------------------------------------------------------------

FUNCTIONS = """
import torch
from torch import nn

def pair(): return nn.Linear(4, 2), (torch.ones(3, 4),)
def one(): return nn.Linear(4, 2), torch.ones(3, 4)
def sequence(): return nn.Embedding(9, 2), (torch.tensor([[1, 2, 8]]),)
def bare(): return nn.Linear(4, 2)
def text(): return "a model"
def broken(): raise RuntimeError("no\\nway")
def named(): return nn.Linear(4, 2), {"x": torch.ones(1, 4)}
def lazy(): return nn.LazyLinear(2), torch.ones(1, 4)
class Image(nn.Conv2d):
    pretrained_cfg = {"input_size": (3, 8, 8)}
    def __init__(self): super().__init__(3, 4, 3)
"""


@pytest.fixture
def functions(tmp_path: Path) -> str:
    path = tmp_path / "functions.py"
    path.write_text(FUNCTIONS)
    return str(path)


@pytest.mark.parametrize("name", ["pair", "one"])
def test_a_function(functions: str, name: str) -> None:
    source = load_source(f"{functions}:{name}")
    assert shapes(source, 5) == [(5, 4)]
    assert torch.equal(inputs(source, 3)[0], torch.ones(3, 4))
    assert run(source, 5).shape == (5, 2)


def test_a_function_of_tokens_keeps_to_the_values_it_gave(functions: str) -> None:
    source = load_source(f"{functions}:sequence", size="40")
    assert shapes(source, 2) == [(2, 40)]
    assert set(inputs(source, 2)[0].flatten().tolist()) == {1, 2, 8}
    run(source, 2)


def test_a_class_with_the_configuration_of_timm(functions: str) -> None:
    assert shapes(load_source(f"{functions}:Image"), 2) == [(2, 3, 8, 8)]
    assert shapes(load_source(f"{functions}:Image", size="12x10")) == [(1, 3, 12, 10)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bare", r"returns a module without inputs; return \(module, inputs\)"),
        ("text", r"must return a torch\.nn\.Module or \(module, inputs\), not str"),
        ("broken", r"functions\.py, line 10: RuntimeError: no way"),
        ("named", r"its inputs must be a tuple of tensors"),
        ("lazy", r"some tensors hold no values yet \(meta device, or lazy layers"),
        ("pairs", r"has no attribute 'pairs' \(did you mean 'pair'\?\)"),
    ],
)
def test_mistakes_in_functions(functions: str, name: str, message: str) -> None:
    with pytest.raises(UserMistake, match=message) as caught:
        load_source(f"{functions}:{name}")
    assert "\n" not in str(caught.value)


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size", "message"),
    [
        ("timm:deit_tinny_patch16_224", None, r"no model 'deit_tinny_patch16_224' \(did you mean 'deit_tiny_patch"),
        ("test_vit", None, r"model 'test_vit': names no model \(did you mean 'timm:test_vit'\?\); allowed: timm:"),
        ("nothing.json", None, r"model 'nothing\.json': there is no such file"),
        ("nothing.onnx", None, r"model 'nothing\.onnx': there is no such file"),
        ("nothing.pt2", None, r"model 'nothing\.pt2': there is no such file"),
        ("nothing#3", None, r"nothing: not a run directory"),
        ("nowhere:function", None, r"there is no module 'nowhere'"),
        ("", None, r"model '': holds no architecture\.json"),
        (VIT, "16-128", r"--size 16-128: model 'timm:test_vit' takes images; give one size"),
        (VIT, "small", r"--size small: must be such as 224"),
        (VIT, "128-16", r"--size 128-16: must be .*the shortest first"),
        (VIT, "0", r"--size 0: must be"),
    ],
)  # fmt: skip
def test_mistakes(text: str, size: str | None, message: str) -> None:
    with pytest.raises(UserMistake, match=message) as caught:
        load_source(text, size=size)
    assert "\n" not in str(caught.value)


def test_a_run_needs_a_trial_and_a_model(trained: RunDirectory, tmp_path: Path) -> None:
    with pytest.raises(UserMistake, match=r"holds no architecture\.json; a run's trial is RUN#NUMBER"):
        load_source(str(trained.path))
    with pytest.raises(UserMistake, match=r"trial 7: not in .*; its trials: 0 to 1"):
        load_source(f"{trained.path}#7")
    toys = made_run(tmp_path / "toys")
    with pytest.raises(UserMistake, match=r"evaluates a function \(--evaluator\); its trials have no model"):
        load_source(f"{toys.path}#0")


def test_a_description_lacking_something_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"space": "efficient_transformer"}')
    with pytest.raises(UserMistake, match=r"must hold an object with space, architecture, signature"):
        load_source(str(path))


def test_a_size_for_a_model_without_one(functions: str) -> None:
    with pytest.raises(UserMistake, match=r"takes neither images nor sequences; leave it out"):
        load_source(f"{functions}:pair", size="32")


def test_the_signature_is_what_the_run_had(trained: RunDirectory) -> None:
    source = load_source(f"{trained.path}#0")
    assert shapes(source) == [(1, SIGNATURE.channels, SIGNATURE.height, SIGNATURE.width)]
