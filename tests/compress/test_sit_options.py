"""The sit pass: where it slims, how strongly, and what it trains."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from timm.layers import PatchDropout
from torch import Tensor, nn

from compress.passes import list_passes, make_pass, parse_pass
from compress.passes.base import Adjustable, Context, PassFailed
from compress.passes.sit import Recalibration, Sit, balanced_groups, insert_slimmings, recalibrate
from nas.profile import profile
from spaces import UserMistake
from spaces.layers.token_slimming import TokenSlimming
from tests.compress._sit_models import SIZE, batches, context, deit, same_state, slimmings


class TestPlaces:
    @pytest.mark.parametrize(
        ("options", "depth", "places"),
        [
            ({}, 12, [3, 6, 9]),
            ({"span": 0.25}, 12, [1, 2, 3]),
            ({"span": 0.5}, 12, [2, 4, 6]),
            ({}, 4, [1, 2, 3]),
            ({}, 2, [1]),
            ({"slim_after": [2, 3]}, 4, [2, 3]),
            ({"slimmings": 1}, 8, [6]),
        ],
    )
    def test_by_default_and_given(self, options: dict[str, Any], depth: int, places: list[int]) -> None:
        found = Sit(epochs=0, **options).apply(deit(depth=depth), context(probe=True))
        kinds = [isinstance(block, TokenSlimming) for block in found.blocks]  # type: ignore[union-attr]
        seen = [number - sum(kinds[:number]) for number, slims in enumerate(kinds) if slims]
        assert seen == places

    def test_tokens_given(self) -> None:
        found = Sit(slim_after=[1, 2], tokens=[9, 9], epochs=0).apply(deit(), context())
        assert [module.tokens for module in slimmings(found)] == [9, 9]

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ({"slim_after": [4]}, r"slim_after=\[4\] must rise within 1..3"),
            ({"slim_after": [2, 2]}, r"slim_after=\[2, 2\] must rise"),
            (
                {"slim_after": [1], "tokens": [20]},
                r"tokens=\[20\] must be at least 1 and not rise, .* 16 patches",
            ),
            ({"slim_after": [1], "tokens": [2, 1]}, r"with one number in tokens=\[2, 1\] each"),
        ],
    )
    def test_out_of_range(self, options: dict[str, Any], text: str) -> None:
        with pytest.raises(UserMistake, match=text):
            Sit(**options).apply(deit(), context())

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ({"keep": 0}, r"keep=0 must be in \(0, 1\]"),
            ({"span": 1.0}, r"span=1.0 must be in \(0, 1\)"),
            ({"start": "zero"}, "start='zero' must be neighbours or random"),
            ({"learning_rate": 0}, "learning_rate=0 must be above 0"),
            ({"preset": "sit_t", "slim_after": [1]}, "preset='sit_t' tells where to slim"),
        ],
    )
    def test_options(self, options: dict[str, Any], text: str) -> None:
        with pytest.raises(UserMistake, match=text):
            Sit(**options)

    def test_found_by_name(self) -> None:
        assert "sit" in list_passes()
        one = parse_pass("sit:slim_after=[1, 2],keep=0.7,epochs=3")
        assert isinstance(one, Sit)
        assert (one.slim_after, one.keep, one.epochs) == ([1, 2], 0.7, 3)
        assert make_pass("sit", **one.options()).options() == one.options()


class TestStrength:
    @pytest.mark.parametrize("options", [{}, {"slim_after": [2, 3]}, {"tokens": [9, 5, 3]}])
    def test_cost_never_rises(self, options: dict[str, Any]) -> None:
        one, model, image = Sit(**options), deit(img_size=32, depth=6), torch.zeros(1, 3, 32, 32)
        assert isinstance(one, Adjustable)
        costs = []
        for step in range(9):
            found = one.with_strength(step / 8).apply(model, Context(example=(image,), probe=True))
            costs.append(profile(found, (image,)).macs)
        assert costs == sorted(costs, reverse=True)
        assert costs[0] == profile(model, (image,)).macs
        assert costs[-1] < 0.62 * costs[0]

    def test_a_probe_has_the_shape_of_the_result(self) -> None:
        one = Sit(epochs=1)
        shapes = [
            {
                name: tuple(value.shape)
                for name, value in one.apply(deit(), context(probe=probe)).state_dict().items()
            }
            for probe in (True, False)
        ]
        assert shapes[0] == shapes[1]


class TestTraining:
    def test_the_loss_falls_and_the_seed_decides(self) -> None:
        told: list[str] = []
        model = deit()
        train = batches(1, 8)
        run = context(train=train, teacher=copy.deepcopy(model), report=told.append)
        first = Sit(epochs=8, learning_rate=2e-3).apply(model, run)
        losses = [float(line.rpartition(" ")[2]) for line in told if "loss" in line]
        assert len(losses) == 8
        assert losses[-1] < 0.8 * losses[0]
        assert same_state(first, Sit(epochs=8, learning_rate=2e-3).apply(model, run))

    def test_starts_as_means_of_neighbours(self) -> None:
        torch.manual_seed(1)
        model = deit()
        nn.init.normal_(model.pos_embed)  # trained positions tell tokens apart
        found = Sit(slim_after=[1], epochs=0).apply(model, context(train=batches(2, 64)))
        [slimming] = slimmings(found)
        seen: list[Tensor] = []
        slimming.register_forward_pre_hook(lambda _, given: seen.append(given[0][:, 1:]))
        found(torch.randn(32, 3, SIZE, SIZE))
        weights = slimming.weights(seen[0]).mean(0)  # (8, 16)
        rows, columns = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
        groups = balanced_groups(torch.stack((rows, columns), -1).flatten(0, 1).float(), 8)
        shares = torch.stack([weights[group, groups == group].sum() for group in range(8)])
        assert shares.min() > 0.8

    def test_groups_are_balanced_neighbourhoods(self) -> None:
        rows, columns = torch.meshgrid(torch.arange(14), torch.arange(14), indexing="ij")
        places = torch.stack((rows, columns), -1).flatten(0, 1).float()
        for count in (196, 98, 49, 24, 7, 1):
            groups = balanced_groups(places, count)
            sizes = groups.bincount(minlength=count)
            assert len(sizes) == count
            assert sizes.max() <= 2 * sizes.min()
        for group in range(49):
            own = places[balanced_groups(places, 49) == group]
            assert (own.amax(0) - own.amin(0)).max() <= 3

    def test_a_teacher_of_another_make(self) -> None:
        teacher = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 5)).eval()
        found = Sit(epochs=1).apply(deit(), context(teacher=teacher))
        assert found(torch.randn(1, 3, SIZE, SIZE)).shape == (1, 5)

    def test_decisions_of_a_hard_teacher(self) -> None:
        model, sure = deit(), nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 5)).eval()
        nn.init.zeros_(sure[1].weight)
        with torch.no_grad():
            sure[1].bias.copy_(torch.tensor([0.0, 0.0, 9.0, 0.0, 0.0]))
        student = copy.deepcopy(model)
        insert_slimmings(student, [1], [4])
        how = Recalibration(6, 2e-3, token_weight=0, logit_weight=0, hard_teacher=sure, hard_weight=50)
        recalibrate(student, model, context(), how, prefix=1)
        assert (student(torch.randn(9, 3, SIZE, SIZE)).argmax(-1) == 2).all()

    def test_no_patch_is_dropped_meanwhile(self) -> None:
        model = deit()
        model.patch_drop = PatchDropout(0.5)
        found = Sit(slim_after=[2], epochs=1).apply(model.train(), context())
        assert found.patch_drop.prob == 0.5
        assert found.train().patch_drop.training, "whoever trains it on drops patches again"

    def test_nan(self) -> None:
        bad = [(torch.full((4, 3, SIZE, SIZE), float("nan")), torch.zeros(4, dtype=torch.long))]
        with pytest.raises(PassFailed, match="the loss became nan in epoch 1; lower learning_rate=0"):
            Sit(epochs=1, start="random").apply(deit(), context(train=bad))

    def test_no_data(self) -> None:
        with pytest.raises(UserMistake, match="give train=, or epochs=0"):
            Sit().apply(deit(), context(train=None))
        with pytest.raises(PassFailed, match="gave no batch"):
            Sit(start="random", epochs=1).apply(deit(), context(train=[]))
        with pytest.raises(UserMistake, match="gave no batch"):
            Sit().apply(deit(), context(train=[]))


def test_a_text_is_no_list_of_blocks() -> None:
    with pytest.raises(UserMistake, match=r"slim_after='9\+12' must be a list of numbers"):
        parse_pass("sit:slim_after=9+12")
