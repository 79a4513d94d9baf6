"""OFB: bi-mask, deletion of options, slicing with moments, losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import AdamW

from compress.passes._ofb_gate import (
    Gate,
    channel_options,
    embedding_options,
    head_options,
    hidden_options,
)
from compress.passes._ofb_losses import (
    local_normalisation,
    one_hot_loss,
    reconstruction_loss,
    sparsity_losses,
)
from compress.passes._ofb_slicing import Slicer
from compress.passes._ofb_supernet import Supernet
from tests.compress.ofb_models import IMAGES, scatter_alpha, vit


def gate_of(heads: int, channels: int, **options: Any) -> Gate:
    return Gate(
        "attention",
        heads,
        channels,
        head_options=head_options(heads),
        channel_options=channel_options(channels),
        **options,
    )


# Options and the bi-mask


def test_options_of_the_paper() -> None:
    assert head_options(6) == (2, 4, 6)
    assert channel_options(64) == (16, 24, 32, 40, 48, 56, 64)
    assert hidden_options(1536) == (384, 576, 768, 960, 1152, 1344, 1536)
    assert embedding_options(384)[:2] == (192, 204)
    assert len(embedding_options(768)) == 33


@given(st.integers(1, 400))
def test_the_widest_option_is_everything(size: int) -> None:
    for options in (head_options(size), channel_options(size), hidden_options(size), embedding_options(size)):
        assert options[-1] == size
        assert options[0] >= 1
        assert list(options) == sorted(set(options))


@settings(max_examples=25)
@given(st.integers(0, 2**16), st.sampled_from([(4, 8), (6, 16), (3, 5), (1, 48)]))
def test_sparsity_is_a_falling_mask(seed: int, size: tuple[int, int]) -> None:
    torch.manual_seed(seed)
    gate = gate_of(*size)
    with torch.no_grad():
        gate.alpha.normal_(std=2)
    ordered, mask, p = gate.sparsity_sorted(), gate.sparsity(), gate.probabilities()
    assert float(mask.detach().min()) >= 0
    assert float(mask.detach().max()) <= 1 + 1e-6
    assert (ordered.diff(dim=0) <= 1e-6).all()
    assert (ordered.diff(dim=1) <= 1e-6).all()
    narrow = ordered[: gate.head_options[0], : gate.channel_options[0]]
    torch.testing.assert_close(narrow, torch.ones_like(narrow))
    widths = torch.tensor([[h * c for c in gate.channel_options] for h in gate.head_options])
    torch.testing.assert_close(gate.expected_width(), (p * widths).sum())
    torch.testing.assert_close(mask.sum(), ordered.sum())
    # A channel of higher score in the same head never has a smaller share.
    order = gate.score.argsort(dim=1, descending=True)
    assert (mask.gather(1, order).diff(dim=1) <= 1e-6).all()


def test_the_ends_of_lambda() -> None:
    gate = gate_of(4, 8)
    gate.lam = 1.0
    before = gate.bimask()
    with torch.no_grad():
        gate.alpha.normal_()
    assert torch.equal(gate.bimask(), before)
    gate.lam = 0.0
    before = gate.bimask()
    with torch.no_grad():
        gate.score.mul_(3)  # the same ranking of channels; heads keep theirs for scores this small
    torch.testing.assert_close(gate.bimask().sort(dim=1).values.sum(), before.sort(dim=1).values.sum())
    assert gate.score.grad is None


@pytest.mark.parametrize("lam", [0.99, 0.5, 0.1])
def test_a_calibrated_gate_leaves_a_kept_average_unit_as_it_is(lam: float) -> None:
    gate = gate_of(4, 8, calibrated=True)
    gate.lam = lam
    with torch.no_grad():
        gate.score.zero_()
        gate.alpha.fill_(-50.0)
        gate.alpha[-1, -1] = 50.0
    factor = gate.multiplier()
    assert factor is not None
    torch.testing.assert_close(factor, torch.ones(4, 8))


# Deletion


@settings(max_examples=25)
@given(st.integers(0, 2**16), st.floats(0.01, 1.0))
def test_deletion_keeps_the_best_and_only_shrinks(seed: int, tau: float) -> None:
    torch.manual_seed(seed)
    gate = gate_of(4, 16)
    for _ in range(4):
        with torch.no_grad():
            gate.alpha.normal_(std=2).mul_(gate.alive)
        best = (
            gate.probabilities().argmax() // gate.alpha.shape[1],
            gate.probabilities().argmax() % gate.alpha.shape[1],
        )
        wanted = (gate.head_options[best[0]], gate.channel_options[best[1]])
        before = {
            (h, c)
            for i, h in enumerate(gate.head_options)
            for j, c in enumerate(gate.channel_options)
            if gate.alive[i, j]
        }
        size, decided, score = (gate.heads, gate.channels), gate.decided, gate.score.detach().clone()
        keep = gate.compress(tau)
        assert (gate.heads, gate.channels) <= size
        if decided:
            assert keep is None
            assert torch.equal(gate.score, score)
            continue
        if gate.decided:
            assert (gate.heads, gate.channels) == wanted
            continue
        after = {
            (h, c)
            for i, h in enumerate(gate.head_options)
            for j, c in enumerate(gate.channel_options)
            if gate.alive[i, j]
        }
        assert wanted in after
        assert after <= before
        assert gate.score.shape == (gate.heads, gate.channels)


def test_equal_probabilities_are_decided_by_force() -> None:
    gate = gate_of(4, 8)
    with torch.no_grad():
        gate.alpha.zero_()
    gate.compress(1.0)
    assert gate.decided


def test_marking_changes_no_weight() -> None:
    supernet = Supernet(vit())
    for gate in supernet.gates():
        with torch.no_grad():
            gate.alpha.zero_()
            gate.alpha.view(-1)[0] = -20
    before = {name: x.clone() for name, x in supernet.state_dict().items()}
    assert not supernet.compress(0.2)
    after = supernet.state_dict()
    assert all(torch.equal(after[n], x) for n, x in before.items() if not n.endswith(("alpha", "alive")))
    assert all(int((~gate.alive).sum()) == 1 for gate in supernet.gates())


def test_slicing_keeps_the_best_units_in_order() -> None:
    model = vit(depth=1)
    supernet = Supernet(model)
    gate = supernet.sites[1].gated(supernet.host).gate
    with torch.no_grad():
        gate.alpha.fill_(-20)
        gate.alpha[0, 2] = 20
        gate.alpha[0, 1] = 20
    order = gate.score.detach()[0].argsort(descending=True)
    supernet.compress(0.2)
    wide = gate.channel_options[-1]
    assert wide < 128
    first, last = supernet.host.blocks[0].mlp.fc1.linear, supernet.host.blocks[0].mlp.fc2
    assert torch.equal(first.weight, model.blocks[0].mlp.fc1.weight[order[:wide]])
    assert torch.equal(first.bias, model.blocks[0].mlp.fc1.bias[order[:wide]])
    assert torch.equal(last.weight, model.blocks[0].mlp.fc2.weight[:, order[:wide]])
    assert gate.channel_ids[0] == order[:wide].tolist()
    assert gate.channel_order(0) == order.tolist()
    assert (first.out_features, last.in_features) == (wide, wide)


def test_moments_are_cut_with_their_parameters_and_the_next_step_uses_them() -> None:
    supernet = Supernet(vit())
    optimizer = AdamW(supernet.parameters(), lr=1e-3)
    slicer = Slicer([optimizer])
    supernet.train()
    supernet.schedule(0.5, 0.5)
    for _ in range(2):
        supernet(IMAGES).square().sum().backward()
        optimizer.step()
    scatter_alpha(supernet, 8)
    old = {
        n: (p, optimizer.state[p]["exp_avg"].clone())
        for n, p in supernet.named_parameters()
        if p in optimizer.state
    }
    assert supernet.compress(0.2, slicer)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    names = {id(p): name for name, p in supernet.named_parameters()}
    assert {id(p) for p in held} <= set(names)
    cut = 0
    for parameter in held:
        state = optimizer.state.get(parameter)
        if state and not names[id(parameter)].endswith(("alpha", "score")):
            assert state["exp_avg"].shape == parameter.shape
            assert float(state["step"]) == 2
            cut += parameter.shape != old[names[id(parameter)]][0].shape
    assert cut > 10
    assert not any(
        p in optimizer.state for n, (p, _) in old.items() if p.shape != supernet.get_parameter(n).shape
    )
    weight = supernet.host.blocks[0].mlp.fc2.weight
    before = weight.detach().clone()
    optimizer.zero_grad()
    supernet(IMAGES).square().sum().backward()
    optimizer.step()
    assert float(optimizer.state[weight]["step"]) == 3
    assert not torch.equal(weight, before)


# Losses


def test_one_hot_loss_of_the_sheet() -> None:
    expected = {(0.26, 0.25, 0.25, 0.24): 1193.7, (0.4, 0.2, 0.2, 0.2): 7.9, (0.7, 0.1, 0.1, 0.1): 0.47}
    for p, value in {**expected, (0.97, 0.01, 0.01, 0.01): -3.98}.items():
        tensor = torch.tensor(p, dtype=torch.float64)
        loss = one_hot_loss(tensor, clamp=0)
        tangent = float(loss - torch.special.entr(tensor).sum()) * len(p)
        assert tangent == pytest.approx(value, rel=0.02)


@pytest.mark.parametrize("p", [[0.25] * 4, [1.0, 0.0, 0.0, 0.0], [0.5, 0.5]])
def test_clamped_one_hot_loss_is_bounded_with_finite_gradients(p: list[float]) -> None:
    alpha = torch.tensor(p).clamp(min=1e-30).log().requires_grad_()
    loss = one_hot_loss(alpha.softmax(0))
    loss.backward()
    assert alpha.grad is not None
    assert loss.abs() < 400
    assert torch.isfinite(alpha.grad).all()
    if p[0] == 1.0:
        assert loss < 0
    else:
        assert loss > 0


def test_decided_gates_have_no_sparsity_loss() -> None:
    supernet = Supernet(vit())
    assert set(sparsity_losses(supernet.gates())) == {"attention", "mlp", "embedding"}
    supernet.compress(0.2, force=True)
    assert sparsity_losses(supernet.gates()) == {}


def test_reconstruction_counts_hidden_patches_only() -> None:
    target = local_normalisation(IMAGES)
    hidden = torch.zeros(3, 16)
    hidden[:, 0] = 1
    guess = target.clone()
    guess[..., 4:, :] += 7
    guess[..., :4, 4:] -= 7
    torch.testing.assert_close(reconstruction_loss(IMAGES, guess, hidden), torch.tensor(0.0))
    guess[..., :4, :4] += 2
    torch.testing.assert_close(
        reconstruction_loss(IMAGES, guess, hidden), torch.tensor(2.0), rtol=1e-4, atol=0
    )


def test_as_many_patches_are_hidden_as_asked() -> None:
    supernet = Supernet(vit()).train()
    supernet.schedule(0.5, 0.8)
    supernet(IMAGES)
    assert supernet.embedder is not None
    assert supernet.embedder.hidden is not None
    assert supernet.embedder.hidden.sum(1).tolist() == [4, 4, 4]  # int(16 * 0.8) are shown
    supernet.eval()(IMAGES)
    assert supernet.embedder.hidden is None
    assert supernet.reconstruction(IMAGES) is None
