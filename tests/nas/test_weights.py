"""Weights: round trip, checksums, exact fit, shared tensors."""

from __future__ import annotations

import hashlib
import logging
import resource
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from nas.errors import UserMistake
from nas.files import CorruptFile, WriteFailed
from nas.weights import load_tensors, load_weights, save_tensors, save_weights, sidecar


class Net(nn.Module):
    def __init__(self, width: int = 4, *, tied: bool = False):
        super().__init__()
        self.first = nn.Linear(3, width)
        self.norm = nn.BatchNorm1d(width)
        self.last = nn.Linear(width, 3)
        self.copy = nn.Linear(width, 3)
        if tied:
            self.copy.weight = self.last.weight


def same(a: nn.Module, b: nn.Module) -> bool:
    own, other = a.state_dict(), b.state_dict()
    return own.keys() == other.keys() and all(torch.equal(own[name], other[name]) for name in own)


def test_round_trip_with_metadata_and_checksum(tmp_path: Path) -> None:
    model, other = Net(), Net()
    path = tmp_path / "w.safetensors"
    digest = save_weights(model, path, {"architecture": "{}"})
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert sidecar(path).read_text() == f"{digest}  w.safetensors\n"
    assert not same(model, other)
    assert load_weights(other, path)["architecture"] == "{}"
    assert same(model, other)
    assert load_weights(Net(), path, sha256=digest.upper())["format"] == "pt"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["w.safetensors", "w.safetensors.sha256"]


def test_a_state_dict_and_a_compiled_model_give_the_same_file_names(tmp_path: Path) -> None:
    class Compiled(nn.Module):  # the shape of what torch.compile returns, without its ten seconds of imports
        def __init__(self, original: nn.Module):
            super().__init__()
            self._orig_mod = original

    model = Net()
    save_weights(model.state_dict(), tmp_path / "a.safetensors")
    save_weights(Compiled(model), tmp_path / "b.safetensors")
    assert (
        load_tensors(tmp_path / "a.safetensors")[0].keys()
        == load_tensors(tmp_path / "b.safetensors")[0].keys()
    )
    other = Net()
    load_weights(other, tmp_path / "b.safetensors")
    assert same(model, other)


@pytest.mark.parametrize("position", [3, 200, -1, -20])
def test_a_flipped_bit_is_refused_by_name_and_nothing_is_loaded(tmp_path: Path, position: int) -> None:
    model, other = Net(), Net()
    path = tmp_path / "w.safetensors"
    digest = save_weights(model, path)
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(data)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    for known in (None, digest):
        with pytest.raises(CorruptFile, match=r"w\.safetensors is damaged: its SHA-256 is not"):
            load_weights(other, path, known)
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())


def test_a_file_cut_short_is_refused_without_any_checksum(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(Net(), path)
    sidecar(path).unlink()
    path.write_bytes(path.read_bytes()[:-5])
    with caplog.at_level(logging.WARNING), pytest.raises(CorruptFile, match="not a whole safetensors file"):
        load_weights(Net(), path)
    assert "loaded unchecked" in caplog.text


def test_a_damaged_sidecar_is_named(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(Net(), path)
    sidecar(path).write_text("zz")
    with pytest.raises(
        CorruptFile, match=r"w\.safetensors\.sha256 is damaged: it does not start with a SHA-256"
    ):
        load_weights(Net(), path)


def test_a_missing_file_is_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserMistake, match=r"none\.safetensors: no such file"):
        load_weights(Net(), tmp_path / "none.safetensors")


def test_every_misfit_is_named_and_nothing_is_loaded(tmp_path: Path) -> None:
    state = Net(5).state_dict()
    del state["first.bias"]
    state["extra"] = torch.zeros(1)
    state["norm.num_batches_tracked"] = torch.tensor(1.0)
    path = tmp_path / "w.safetensors"
    save_weights(state, path)
    model = Net(4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserMistake) as caught:
        load_weights(model, path)
    text = str(caught.value)
    assert "\n" not in text
    for part in (
        "1 missing (first.bias)",
        "1 unexpected (extra)",
        "of another shape (first.weight is (5, 3), not (4, 3), ",
        "1 of another kind of number (norm.num_batches_tracked)",
    ):
        assert part in text
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_shared_tensors_are_stored_once_and_come_back(tmp_path: Path) -> None:
    model = Net(tied=True)
    path = tmp_path / "w.safetensors"
    save_weights(model, path, {"note": "tied"})
    tied, untied = Net(tied=True), Net()
    assert load_weights(tied, path) == {"format": "pt", "note": "tied"}
    load_weights(untied, path)
    assert same(model, tied)
    assert same(model, untied)
    assert tied.copy.weight is tied.last.weight
    assert path.stat().st_size < 4 * sum(p.numel() for p in Net().parameters()) + 1400


def test_two_values_for_one_tensor_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(Net(), path)
    with pytest.raises(
        UserMistake, match=r"copy\.weight and last\.weight are one tensor in the model but differ"
    ):
        load_weights(Net(tied=True), path)


def test_views_and_transposes_are_saved_as_they_look(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    state = {"rows": base[1:], "flat": base.view(-1), "base": base, "turned": base.T, "empty": base[:0]}
    state["scalar"] = base[0, 0]
    save_tensors(state, tmp_path / "t.safetensors")
    loaded, _ = load_tensors(tmp_path / "t.safetensors")
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_what_has_no_data_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserMistake, match=r"'w' is on the meta device; only tensors with data"):
        save_weights({"w": torch.empty(2, device="meta")}, tmp_path / "w.safetensors")
    with pytest.raises(UserMistake, match=r"'w' is of type int"):
        save_weights({"w": 3}, tmp_path / "w.safetensors")  # type: ignore[dict-item]
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_names_the_file_and_keeps_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    digest = save_weights(Net(), path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        with pytest.raises(WriteFailed, match=r"w\.safetensors cannot be written: .*(too large|File)"):
            save_weights(Net(1000), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    load_weights(Net(), path, digest)
    assert [entry.name for entry in tmp_path.iterdir()] == ["w.safetensors"]


def test_a_writer_killed_before_its_sidecar_leaves_a_loadable_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(Net(), path)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nas.weights.atomic_write_text", die)
    model = Net()
    with pytest.raises(KeyboardInterrupt):
        save_weights(model, path)
    other = Net()
    load_weights(other, path)
    assert same(model, other)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_from_and_to_a_gpu(tmp_path: Path) -> None:
    model, other = Net(tied=True).cuda(), Net(tied=True).cuda()
    path = tmp_path / "w.safetensors"
    save_weights(model, path)
    load_weights(other, path)
    assert same(model, other)
    assert other.first.weight.is_cuda
