"""NNI chooses, our surgery removes: what goes is what NNI masked, and the result computes the same."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress.measuring import count
from compress.passes import make_pass, nni_pruning
from compress.passes.base import Adjustable, Context, PassFailed
from compress.passes.nni_pruning import PRUNERS, masks_by_nni
from compress.structure import StructureError, recognise
from nas.errors import UserMistake
from tests.compress.models import batches, small_vit

CONTEXT = Context(example=(torch.randn(1, 3, 32, 32),), train=batches(3), epochs=0)
# NNI takes more than a second to import.
with_nni = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("nni") is None, reason="NNI is not installed: pip install 'nas-toolkit[nni]'"
    ),
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def kept_units(model: nn.Module, made: nn.Module) -> list[list[int]]:
    """Rows of each ``fc1`` of ``model`` that are in ``made``, found by their values."""
    found = []
    for old, new in zip(recognise(model).blocks, recognise(made).blocks, strict=True):
        rows = [row.tolist() for row in old.mlp.fc1.weight]
        found.append([rows.index(row.tolist()) for row in new.mlp.fc1.weight])
    return found


def masked(model: nn.Module, masks: Any) -> nn.Module:
    """The model with its weights times NNI's masks, all of its size."""
    hard = copy.deepcopy(model)
    with torch.no_grad():
        for name, found in masks.items():
            for target, mask in found.items():
                getattr(hard.get_submodule(name), target).mul_(mask)
    return hard


class TestWithNni:
    pytestmark = with_nni

    @pytest.mark.parametrize("pruner", ["l1", "l2"])
    def test_the_smallest_units_go(self, pruner: str) -> None:
        """Closed form: the rows of fc1 with the smallest norm (NNI leaves biases out of it)."""
        model = small_vit()
        made = make_pass("nni", ratio=0.3, pruner=pruner).apply(model, CONTEXT)
        order = 1 if pruner == "l1" else 2
        for block, kept in zip(recognise(model).blocks, kept_units(model, made), strict=True):
            norms = block.mlp.fc1.weight.detach().norm(p=order, dim=1)
            gone = norms.topk(int(192 * 0.3), largest=False).indices
            assert kept == sorted(set(range(192)) - set(gone.tolist()))

    def test_fpgm_removes_what_is_nearest_to_all_others(self) -> None:
        model = small_vit()
        made = make_pass("nni", ratio=0.5, pruner="fpgm").apply(model, CONTEXT)
        for block, kept in zip(recognise(model).blocks, kept_units(model, made), strict=True):
            rows = block.mlp.fc1.weight.detach().double()
            distances = torch.cdist(rows, rows).sum(1)
            assert kept == distances.topk(96).indices.sort().values.tolist()

    def test_taylor_is_the_squared_gradient_times_weight(self) -> None:
        """NNI adds the squares up over the minibatches and takes the sum over a row."""
        model = small_vit()
        made = make_pass("nni", pruner="taylor", steps=6).apply(model, CONTEXT)
        totals = [torch.zeros_like(block.mlp.fc1.weight) for block in recognise(model).blocks]
        weights = [block.mlp.fc1.weight for block in recognise(model).blocks]
        for images, labels in batches(3) * 2:
            found = torch.autograd.grad(CONTEXT.loss(model(images), labels), weights)
            for total, weight, gradient in zip(totals, weights, found, strict=True):
                total += (weight.detach() * gradient).square()
        for total, kept in zip(totals, kept_units(model, made), strict=True):
            assert kept == total.sum(1).topk(96).indices.sort().values.tolist()

    @pytest.mark.parametrize("pruner", PRUNERS)
    @pytest.mark.parametrize("units", ["mlp", "heads", "heads+mlp"])
    def test_the_extracted_model_is_the_masked_one(self, pruner: Any, units: str) -> None:
        model = small_vit()
        model.requires_grad_(False)
        before = copy.deepcopy(model.state_dict())
        modules = {name: type(module) for name, module in model.named_modules()}
        made = make_pass("nni", ratio=0.5, pruner=pruner, units=units, steps=8).apply(model, CONTEXT)

        assert {name: type(module) for name, module in model.named_modules()} == modules
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert {name: type(module) for name, module in made.named_modules()} == modules
        assert not made.training
        assert not any(parameter.requires_grad for parameter in made.parameters())

        trained, masks = masks_by_nni(model, CONTEXT, pruner, units=units.split("+"), ratio=0.5, steps=8)
        hard = copy.deepcopy(model)
        if trained is not None:
            assert not torch.equal(trained["blocks.0.mlp.fc1.weight"], before["blocks.0.mlp.fc1.weight"])
            hard.load_state_dict(trained)
        images = torch.randn(4, 3, 32, 32)
        torch.testing.assert_close(made(images), masked(hard, masks)(images), atol=1e-5, rtol=1e-5)
        shapes = [(block.num_heads, block.mlp.hidden) for block in recognise(made).blocks]
        assert shapes == [(2 if "heads" in units else 3, 96 if "mlp" in units else 192)] * 3
        assert count(made, CONTEXT.example)["params"] < count(model, CONTEXT.example)["params"]

    def test_the_least_heads_go(self) -> None:
        model = small_vit()
        made = make_pass("nni", ratio=0.34, units="heads").apply(model, CONTEXT)
        for old, new in zip(recognise(model).blocks, recognise(made).blocks, strict=True):
            sizes = old.proj.weight.detach().abs().reshape(48, 3, 16).sum((0, 2))
            kept = [head for head in range(3) if head != int(sizes.argmin())]
            expected = old.proj.weight.reshape(48, 3, 16)[:, kept].reshape(48, 32)
            assert torch.equal(new.proj.weight, expected)

    def test_random_numbers_and_seeds(self) -> None:
        model, context = small_vit(proj_drop_rate=0.1), CONTEXT.with_changes(seed=3)
        state = torch.get_rng_state()
        made = [
            make_pass("nni", pruner="movement", steps=8).apply(model, one)
            for one in (context, context, CONTEXT)
        ]
        assert torch.equal(state, torch.get_rng_state())
        weights: list[Tensor] = [recognise(one).blocks[0].mlp.fc1.weight for one in made]
        assert torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[0], weights[2])

    def test_fine_tuning_learns(self) -> None:
        model, data = small_vit(), batches(6)
        context = CONTEXT.with_changes(train=data, epochs=None)
        plain = make_pass("nni", ratio=0.6, epochs=0).apply(model, context)
        tuned = make_pass("nni", ratio=0.6, epochs=4, learning_rate=2e-3).apply(model, context)
        images, labels = data[0]
        with torch.no_grad():
            assert context.loss(tuned(images), labels) < 0.8 * context.loss(plain(images), labels)

    def test_strength_and_probe(self) -> None:
        chosen: Any = make_pass("nni", pruner="movement", units="heads+mlp", steps=8)
        assert isinstance(chosen, Adjustable)
        assert chosen.requires == {"train"}
        assert str(chosen.with_strength(0.5)) == "nni:ratio=0.485,pruner=movement,units=[heads, mlp],steps=8"
        probe = CONTEXT.with_changes(probe=True, train=None)
        costs = [
            count(chosen.with_strength(strength).apply(small_vit(), probe), CONTEXT.example)["macs"]
            for strength in (0.0, 0.5, 1.0)
        ]
        assert costs[0] == count(small_vit(), CONTEXT.example)["macs"]
        assert costs[0] > costs[1] > costs[2]
        real = chosen.with_strength(0.5).apply(small_vit(), CONTEXT)
        assert count(real, CONTEXT.example)["macs"] == costs[1]

    def test_mistakes(self) -> None:
        with pytest.raises(UserMistake, match=r"nni: unknown pruner 'level'.*known: l1, l2, fpgm"):
            make_pass("nni", pruner="level")
        with pytest.raises(UserMistake, match=r"unknown units 'head' \(did you mean 'heads'\?\)"):
            make_pass("nni", units="head")
        with pytest.raises(UserMistake, match="units is empty; known: heads, mlp"):
            make_pass("nni", units=[])
        with pytest.raises(UserMistake, match=r"ratio=1 must be in \[0, 1\)"):
            make_pass("nni", ratio=1)
        with pytest.raises(UserMistake, match="steps=4 must be at least 5"):
            make_pass("nni", steps=4)
        with pytest.raises(StructureError, match="no 'blocks'"):
            make_pass("nni").apply(nn.Linear(3, 3), CONTEXT)

    @pytest.mark.parametrize("pruner", ["taylor", "movement"])
    def test_a_loss_that_is_not_finite_is_said(self, pruner: str) -> None:
        context = CONTEXT.with_changes(loss=lambda outputs, labels: outputs[0].sum() * float("nan"))
        with pytest.raises(PassFailed, match="the loss became nan while its pruner was at work"):
            make_pass("nni", pruner=pruner).apply(small_vit(), context)
        with pytest.raises(PassFailed, match="the training data gave no batch"):
            make_pass("nni", pruner=pruner).apply(small_vit(), CONTEXT.with_changes(train=[]))


def test_without_nni_the_message_names_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nni", "nni.compression", "nni.compression.pruning"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserMistake) as caught:
        make_pass("nni")
    assert str(caught.value) == (
        "pass 'nni' needs NNI 3.0, which is not installed; install it with: pip install 'nas-toolkit[nni]', or use "
        "pass 'structured'"
    )


def test_units_are_taken_out_where_all_of_their_weights_are_masked() -> None:
    """Without NNI: masks as it makes them."""
    model = small_vit()
    images = torch.randn(2, 3, 32, 32)
    rows, columns = torch.ones(192, 48), torch.ones(48, 48)
    rows[[0, 5, 191]] = 0
    columns[:, 16:32] = 0
    masks = {
        "blocks.1.mlp.fc1": {"weight": rows, "bias": rows[:, 0]},
        "blocks.2.attn.proj": {"weight": columns},
    }
    made = copy.deepcopy(model)
    nni_pruning._remove(recognise(made), masks)
    assert [block.mlp.hidden for block in recognise(made).blocks] == [192, 189, 192]
    assert [block.num_heads for block in recognise(made).blocks] == [3, 3, 2]
    torch.testing.assert_close(made(images), masked(model, masks)(images), atol=1e-5, rtol=1e-5)
