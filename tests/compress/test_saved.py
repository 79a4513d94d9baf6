"""A saved model comes back in a process that knows nothing of the passes, or is refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from compress import compress, load
from compress.passes import make_pass
from compress.result import CompressionResult
from compress.saved import describe, rebuild
from compress.structure import StructureError
from nas.errors import UserMistake
from nas.files import CorruptFile, read_record, write_record
from tests.compress._fresh_process import assert_same_in_a_fresh_process
from tests.compress.models import small_vit

X = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(4))


def squeezed(model: nn.Module, *passes: Any, **options: Any) -> CompressionResult:
    return compress(model, list(passes), measure_seconds=0, **options)


PASSES: dict[str, list[Any]] = {
    "widths": [make_pass("structured", ratio=0.4, units="heads+channels+mlp", bottleneck=False)],
    "global": [make_pass("structured", ratio=0.5, scope="global", multiple=1)],
    "tokens": [make_pass("token_merging", r=2), make_pass("class_token_last_block")],
    "int8": [make_pass("structured"), make_pass("dynamic_quantization", keep_anyway=True)],
}


@pytest.mark.parametrize(
    "options", [{}, {"distilled": True}, {"init_values": 0.1, "no_embed_class": True}, {"reg_tokens": 2}]
)
@pytest.mark.parametrize("kind", PASSES)
def test_the_same_outputs_after_loading(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    result = squeezed(small_vit(**options), *PASSES[kind])
    again = load(result.save(tmp_path / "saved"))
    with torch.no_grad():
        torch.testing.assert_close(again.model(X), result.model(X), rtol=0, atol=0)
    assert again.steps == result.steps
    assert again.target == "cpu:1"
    assert torch.equal(again.example[0], result.example[0])


def test_a_removed_block_and_a_timm_name(tmp_path: Path) -> None:
    from compress.structure import recognise
    from compress.surgery import remove_block

    model = timm.create_model(
        "deit3_small_patch16_224", img_size=32, embed_dim=48, num_heads=3, depth=4, num_classes=5
    )
    result = squeezed(model.eval(), "structured")
    assert result.origin == {"kind": "timm", "name": "deit3_small_patch16_224", "kwargs": {}}
    remove_block(recognise(result.model), 1)
    again = load(result.save(tmp_path / "saved"))
    with torch.no_grad():
        torch.testing.assert_close(again.model(X), result.model(X), rtol=0, atol=0)


@pytest.mark.slow
def test_a_fresh_process_imports_no_pass(tmp_path: Path) -> None:
    result = squeezed(small_vit(), *PASSES["tokens"])
    assert_same_in_a_fresh_process(result, tmp_path / "saved", torch.ones(2, 3, 32, 32))


class Own(nn.Module):
    """A user's model with a class of his own and an argument."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU())
        self.head = nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.body(x).mean((2, 3)))
        return out


def test_a_class_of_the_user_is_loaded_only_when_trusted(tmp_path: Path) -> None:
    result = squeezed(
        Own().eval(), make_pass("dynamic_quantization", keep_anyway=True, least=4, skip=[]), example=X[:1]
    )
    place = result.save(tmp_path / "saved")
    with pytest.raises(UserMistake, match=r"uses 'tests\.compress\.test_saved:Own'; .* trust=\['tests'\]"):
        load(place)
    again = load(place, trust=["tests"])
    with torch.no_grad():
        torch.testing.assert_close(again.model(X), result.model(X))


def test_only_modules_can_be_named(tmp_path: Path) -> None:
    place = squeezed(small_vit(), "class_token_last_block").save(tmp_path / "saved")
    record = read_record(place / "compressed.json")
    for text, why in (
        ("os:system", "if you trust that package"),
        ("torch.nn.functional:linear", "is no torch.nn.Module"),
        ("timm.models:nothing", "cannot be imported"),
        ("torch.nnx.evil:Module", "if you trust that package"),
    ):
        write_record(
            place / "compressed.json", {**record, "origin": {"kind": "class", "class": text, "kwargs": {}}}
        )
        with pytest.raises(UserMistake, match=why):
            load(place)
    origin = {"kind": "timm", "name": "vit_tiny_patch16_224", "kwargs": {"checkpoint_path": "/etc/passwd"}}
    write_record(place / "compressed.json", {**record, "origin": origin})
    with pytest.raises(UserMistake, match="'checkpoint_path' is not allowed"):
        load(place)


def test_damage_is_noticed(tmp_path: Path) -> None:
    place = squeezed(small_vit(), "structured").save(tmp_path / "saved")
    weights = place / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 4
    weights.write_bytes(data)
    with pytest.raises(CorruptFile, match="SHA-256"):
        load(place)
    text = (place / "compressed.json").read_text()
    (place / "compressed.json").write_text(
        text.replace("num_heads", "mum_heads", 1).replace('"seed": 0', '"seed": 1')
    )
    with pytest.raises(CorruptFile):
        load(place)
    with pytest.raises(UserMistake, match=r"holds no compressed\.json"):
        load(tmp_path)


def test_what_cannot_be_told_is_refused(tmp_path: Path) -> None:
    result = squeezed(small_vit(), "structured")
    model: Any = result.model
    handle = model.blocks[0].register_forward_hook(lambda *args: None)
    with pytest.raises(StructureError, match=r"blocks\.0: has a hook"):
        result.save(tmp_path / "a")
    handle.remove()
    model.blocks[0].forward = lambda x: x
    with pytest.raises(StructureError, match=r"blocks\.0: its forward was replaced"):
        result.save(tmp_path / "b")
    del model.blocks[0].forward
    model.norm = nn.Sequential(Own())
    with pytest.raises(
        StructureError, match=r"norm\.0: a tests\.compress\.test_saved:Own cannot be described"
    ):
        result.save(tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


def test_tied_parameters_stay_tied(tmp_path: Path) -> None:
    model: Any = small_vit()
    model.blocks[1].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight
    again: Any = load(squeezed(model, "token_merging:r=2").save(tmp_path / "saved")).model
    assert again.blocks[1].mlp.fc1.weight is again.blocks[0].mlp.fc1.weight


def test_nothing_to_tell_about_an_unchanged_model() -> None:
    model, base = small_vit(0), small_vit(1)
    assert describe(model, base) == {}
    assert rebuild({}, base) is base


def test_a_place_that_is_taken(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine")
    with pytest.raises(UserMistake, match="not an empty directory"):
        squeezed(small_vit(), "structured").save(tmp_path)


@pytest.mark.parametrize("text", ["structured", "low_rank:keep=anyway,rank=8", "token_merging:r=2"])
def test_a_model_without_a_class_token(text: str, tmp_path: Path) -> None:
    """What is None in the model may be a parameter in the base, and the other way round."""
    model: Any = small_vit(
        class_token=False, global_pool="avg", pos_embed="none" if "low" in text else "learn"
    )
    result = squeezed(model, text, example=X[:1], savable=True)
    again: Any = load(result.save(tmp_path / "saved")).model
    assert again.cls_token is None
    with torch.no_grad():
        assert torch.equal(again(X), result.model(X))
    base: Any = small_vit(class_token=False, global_pool="avg")
    back: Any = rebuild(describe(small_vit(), base), base)
    assert isinstance(back.cls_token, nn.Parameter)


@pytest.mark.parametrize(
    ("size", "change", "fits"), [(1e-6, 1e-2, False), (1e6, 1e-6, True), (1.0, 1e-3, False)]
)
def test_the_check_goes_by_the_size_of_the_outputs(
    size: float, change: float, fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress import result as module

    model: Any = small_vit()
    with torch.no_grad():
        model.head.weight *= size
        model.head.bias *= size
    made = squeezed(model, "structured")

    def changed(place: Any, **options: Any) -> Any:
        found: Any = load(place, **options)
        with torch.no_grad():
            found.model.head.weight *= 1 + change
            found.model.head.bias *= 1 + change
        return found

    monkeypatch.setattr(module, "load", changed)
    if fits:
        made.save(tmp_path / "saved")
    else:
        with pytest.raises(StructureError, match="built again from its description it gives other outputs"):
            made.save(tmp_path / "saved")
        assert list(tmp_path.iterdir()) == []


class Recurrent(nn.Module):
    """torch's recurrent layers keep a second list of their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(96, 24, batch_first=True)
        self.head = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(
            self.rnn(x.flatten(2).transpose(1, 2).reshape(len(x), -1, 96))[0][:, -1]
        )
        return out


def test_recurrent_layers(tmp_path: Path) -> None:
    result = squeezed(Recurrent().eval(), "low_rank:keep=anyway,least=4,rank=2", example=X[:1], savable=True)
    again = load(result.save(tmp_path / "saved"), trust=["tests"]).model
    with torch.no_grad():
        assert torch.equal(again(X), result.model(X))


class Prepared(nn.Module):
    """Does not run before it was prepared, and keeps that in no tensor of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(192, 5)
        self.kept: dict[str, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(x.flatten(1)) * self.kept["scale"]
        return out


def test_a_model_that_does_not_run_when_it_is_built_again() -> None:
    """Compressing it needs no saving, and saving says what is wrong."""
    model = Prepared()
    model.kept["scale"] = torch.ones(5)
    told: list[str] = []
    x = torch.randn(1, 3, 8, 8)
    squeezed(model, "low_rank:keep=anyway,least=4,rank=2", example=x, report=told.append)
    assert "Prepared: built again from its description it does not run (KeyError: 'scale')" in told[0]
    with pytest.raises(StructureError, match=r"could not be saved: .*does not run"):
        squeezed(model, "low_rank:keep=anyway,least=4,rank=2", example=x, savable=True)


def test_loaded_tensors_lie_where_kernels_are_fast(tmp_path: Path) -> None:
    """In a file they lie anywhere; from there the same layers round otherwise and are slower."""
    model = load(squeezed(small_vit(), "structured").save(tmp_path / "saved")).model
    assert {tensor.data_ptr() % 64 for tensor in model.parameters()} == {0}
