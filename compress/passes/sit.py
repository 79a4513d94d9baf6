"""Token slimming with feature recalibration distillation (SiT), for DeiT, LV-ViT and other plain vision transformers.

Paper: Zong, Li, Song, Wang, Qiao, Leng, Liu, "Self-slimmed Vision Transformer", ECCV 2022, arXiv 2111.12624.
Code: Sense-X/SiT, commit f5778084c45c93f2121685989fa35f930f7e8c54, Apache-2.0 (read, not copied).

The result is the given model with ``spaces.layers.token_slimming.TokenSlimming`` modules among its ``blocks``; prefix
tokens (class, distillation, registers) pass them by. Reverse modules exist during training only.

Deviations:
- slimmings start as means of neighbouring tokens (``start="neighbours"``), not at random: a fine-tuning of some epochs
  then begins with a model that works. The paper trains for 125 epochs; ``start="random"`` is its way;
- the learning rate is for some epochs of a small task; the paper's is 2e-4 for 512 samples in a batch;
- gradients are clipped at norm 1;
- the published code's term for a second, convolutional teacher cannot run; ``recalibrate`` has it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compress.data import inputs_of
from compress.finetune import epochs_of
from compress.passes import _laws as laws
from compress.passes import register_pass
from compress.passes._sit_start import balanced_groups, fit_to_neighbours, grid_of
from compress.passes._sit_training import (
    LossParts,
    Recalibration,
    block_tokens,
    recalibrate,
    recalibration_loss,
    recover,
    reverse_modules,
)
from compress.passes.base import Context, Pass, batches_of
from compress.structure import StructureError, recognise
from nas.errors import UnknownNameError, UserMistake, first_line
from spaces.layers.token_slimming import TokenSlimming, kept_tokens
from spaces.vision.lv_vit import HOSTS, SLIM_AFTER

__all__ = [
    "PRESETS",
    "LossParts",
    "Recalibration",
    "Sit",
    "balanced_groups",
    "block_tokens",
    "insert_slimmings",
    "recalibrate",
    "recalibration_loss",
    "recover",
    "reverse_modules",
]

PRESETS = tuple(SLIM_AFTER)
"""sit_t, sit_xs, sit_s, sit_m, sit_l: where the published models slim, each for its LV-ViT."""

_EPOCHS = 20
_SAMPLES = 128  # for the start of the slimmings


def insert_slimmings(
    model: nn.Module, after: Sequence[int], tokens: Sequence[int], *, ratio: float = 0.5, prefix: int = 1
) -> list[TokenSlimming]:
    """Put slimmings among ``model.blocks``, in place, with weights drawn at random.

    Args:
        model: ``blocks`` is an nn.Sequential or nn.ModuleList of transformer blocks.
        after: numbers of the blocks, from 1, that a slimming follows; rising, below the number of blocks.
        tokens: how many patch tokens each leaves.
        ratio: hidden width of the slimmings over the model's.
        prefix: number of tokens in front of the patches.

    Returns:
        The slimmings, in order.

    Raises:
        UserMistake: positions out of order or out of range.
        StructureError: no ``blocks``, or the model slims already.
    """
    container, blocks = _blocks(model)
    rising = all(one < two for one, two in zip([0, *after], [*after, len(blocks)], strict=True))
    if not rising or len(after) != len(tokens):
        raise UserMistake(
            f"sit: slim_after={list(after)} must rise within 1..{len(blocks) - 1} (the model has {len(blocks)} blocks)"
            f", with one number in tokens={list(tokens)} each"
        )
    parameter = next(blocks[0].parameters())
    dim = _width(blocks[0])
    modules: list[nn.Module] = []
    made: list[TokenSlimming] = []
    for number, block in enumerate(blocks, 1):
        modules.append(block)
        if number in after:
            slimming = TokenSlimming(dim, tokens[list(after).index(number)], ratio=ratio, prefix=prefix)
            _draw(slimming)
            made.append(slimming.to(parameter))
            modules.append(made[-1])
    model.blocks = (
        type(container)(*modules) if isinstance(container, nn.Sequential) else nn.ModuleList(modules)
    )
    return made


_LAWS = {
    "slim_after": laws.optional(laws.wholes("blocks", "slim_after=[6,9]")),
    "keep": laws.number("(0, 1]"),
    "tokens": laws.optional(laws.wholes("tokens", "tokens=[98,49]")),
    "slimmings": laws.whole(1),
    "span": laws.number("(0, 1)"),
    "ratio": laws.number("above 0"),
    "start": laws.word("neighbours", "random"),
    "epochs": laws.optional(laws.whole(0)),
    "learning_rate": laws.number("above 0"),
    "weight_decay": laws.number("at least 0"),
    "reverse_ratio": laws.number("above 0"),
    "token_weight": laws.number("at least 0"),
    "logit_weight": laws.number("at least 0"),
    "temperature": laws.number("above 0"),
}


@register_pass("sit")
class Sit(Pass):
    """Slims the tokens of a plain vision transformer at some depths, and trains it against itself before.

    Weights of the model that are frozen stay so; the slimmings learn.

    Args:
        preset: ``sit_t``, ``sit_xs``, ``sit_s``, ``sit_m`` or ``sit_l``: the published places, for a model with as many
            blocks as the LV-ViT they are for; instead of ``slim_after``.
        slim_after: numbers of the blocks, from 1, that a slimming follows. None: ``slimmings`` of them, evenly over the
            first ``span`` of the depth; with the defaults after a quarter, a half and three quarters of the blocks.
        keep: share of the patch tokens that each slimming leaves of those before it, in (0, 1]; 1 adds no slimming.
        tokens: patch tokens behind each slimming, instead of ``keep``.
        slimmings: how many, where ``slim_after`` is not given; at least 1.
        span: in (0, 1).
        ratio: hidden width of the slimmings over the model's, above 0.
        start: ``neighbours`` (means of neighbouring tokens, fitted to some training data) or ``random``.
        epochs: of fine-tuning; None: the pipeline's, or 20. 0 trains nothing.
        learning_rate: peak, above 0.
        weight_decay: at least 0.
        reverse_ratio: hidden widths of the reverse modules, above 0.
        token_weight, logit_weight: of the two distillation terms, at least 0.
        temperature: of the logits' distillation, above 0.

    Raises:
        UserMistake: an option out of its range, or two that contradict each other.
    """

    requires = frozenset({"train"})
    changes = frozenset({"tokens"})
    cannot_follow = {  # noqa: RUF012  # as declared by the base class
        **Pass.cannot_follow,
        "tokens": "a model whose token count changes already has no full tokens to be recalibrated against",
    }

    def __init__(
        self,
        *,
        preset: str | None = None,
        slim_after: Sequence[int] | None = None,
        keep: float = 0.5,
        tokens: Sequence[int] | None = None,
        slimmings: int = 3,
        span: float = 0.75,
        ratio: float = 0.5,
        start: str = "neighbours",
        epochs: int | None = None,
        learning_rate: float = 5e-4,
        weight_decay: float = 0.05,
        reverse_ratio: float = 4.0,
        token_weight: float = 2.0,
        logit_weight: float = 2.0,
        temperature: float = 1.0,
    ):
        if preset is not None and preset not in PRESETS:
            raise UnknownNameError("preset of sit", str(preset), PRESETS)
        if preset is not None and slim_after is not None:
            raise UserMistake(
                f"sit: preset={preset!r} tells where to slim; leave slim_after out, or the preset"
            )
        laws.check_options("sit", locals(), _LAWS)
        self.preset = preset
        self.slim_after = None if slim_after is None else list(slim_after)
        self.keep = keep
        self.tokens = None if tokens is None else list(tokens)
        self.slimmings = slimmings
        self.span = span
        self.ratio = ratio
        self.start = start
        self.epochs = epochs
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.reverse_ratio = reverse_ratio
        self.token_weight = token_weight
        self.logit_weight = logit_weight
        self.temperature = temperature

    def with_strength(self, strength: float) -> Sit:
        """Fewer tokens, earlier: ``keep`` falls from 0.9 to 0.05; where the places are free, they move to the front.

        0 adds no slimming at all. Cost never rises with ``strength``.
        """
        other = copy.copy(self)
        other.tokens = None
        if strength <= 0:
            other.keep = 1.0
        elif self.slim_after is not None or self.preset is not None:
            other.keep = 0.9 - 0.85 * strength
        else:
            # first fewer tokens, then earlier, then fewer still: late slimming costs the least quality
            other.keep = 0.9 - 0.8 * min(strength, 0.5) - 1.8 * max(0.0, strength - 0.75)
            other.span = 0.75 - 2.0 * min(max(0.0, strength - 0.5), 0.25)
        return other

    def apply(self, model: nn.Module, context: Context) -> nn.Module:
        """``model`` with slimmings, trained; see ``Pass.apply``.

        Raises:
            StructureError: not a plain transformer with patch tokens in ``blocks``, or one that slims already.
            UserMistake: places or token counts that the model has no room for, or no data to train with.
            PassFailed: the training came to nothing.
        """
        slimmed, full = copy.deepcopy(model).eval(), copy.deepcopy(model).eval()
        _, blocks = _blocks(slimmed)
        prefix, patches = _tokens(full, context.example)
        after = self._places(len(blocks))
        tokens = self._counts(patches, len(after))
        if not tokens:
            return slimmed
        home = next(model.parameters()).device
        with torch.random.fork_rng([]):
            torch.manual_seed(context.seed)
            made = insert_slimmings(slimmed, after, tokens, ratio=self.ratio, prefix=prefix)
        self._try(slimmed, full, context.example)
        epochs = epochs_of(self.epochs, context, _EPOCHS, must=True)
        if context.probe:
            return slimmed
        if self.start == "neighbours" and context.train is not None:
            context.report(
                f"sit: {patches} tokens, then {', '.join(map(str, tokens))}; fitting the slimmings"
            )
            slimmed.to(context.device)
            samples = [x.to(context.device) for x in _samples(context)]
            with torch.inference_mode(False), torch.enable_grad():
                fit_to_neighbours(slimmed, made, samples, grid_of(model, patches), seed=context.seed)
        if epochs:
            how = Recalibration(
                epochs,
                self.learning_rate,
                weight_decay=self.weight_decay,
                reverse_ratio=self.reverse_ratio,
                token_weight=self.token_weight,
                logit_weight=self.logit_weight,
                temperature=self.temperature,
            )
            recalibrate(slimmed, full, context, how, prefix=prefix)
        return slimmed.to(home).eval()

    def _places(self, depth: int) -> list[int]:
        if self.preset is not None:
            host, places = SLIM_AFTER[self.preset]
            if depth != HOSTS[host]["depth"]:
                raise StructureError(
                    f"sit: preset={self.preset!r} is for the {HOSTS[host]['depth']} blocks of {host}, but the model "
                    f"has {depth}; give slim_after instead"
                )
            return list(places)
        if self.slim_after is not None:
            return self.slim_after
        found: list[int] = []
        for number in range(1, self.slimmings + 1):
            wanted = round(depth * self.span * number / self.slimmings)
            found.append(max(wanted, found[-1] + 1 if found else 1))
        return [place for place in found if place < depth]

    def _counts(self, patches: int, stages: int) -> list[int]:
        tokens = self.tokens
        if tokens is None:
            tokens = list(kept_tokens(patches, self.keep, stages)) if self.keep < 1 else []
        if any(
            later > earlier or later < 1 for earlier, later in zip([patches, *tokens], tokens, strict=False)
        ):
            raise UserMistake(
                f"sit: tokens={tokens} must be at least 1 and not rise, starting from the model's {patches} patches"
            )
        return tokens

    @staticmethod
    def _try(slimmed: nn.Module, full: nn.Module, example: Sequence[Tensor]) -> None:
        """Some models hold on to the number of tokens elsewhere (rotary positions, masks): found by running it."""
        try:
            with torch.no_grad():
                own, other = (_first(model(*_near(model, example))) for model in (slimmed, full))
        except Exception as error:  # the model is anybody's
            raise StructureError(
                f"sit: {type(full).__name__} does not run with fewer tokens ({type(error).__name__}: "
                f"{first_line(error, 150)})"
            ) from error
        if own.shape != other.shape:
            raise StructureError(
                f"sit: the outputs of {type(full).__name__} depend on the number of tokens "
                f"({tuple(other.shape)} became {tuple(own.shape)}); it needs a head that pools them"
            )


def _blocks(model: nn.Module) -> tuple[nn.Module, list[nn.Module]]:
    """The container of the transformer blocks, and what is in it."""
    container = getattr(model, "blocks", None)
    if not isinstance(container, (nn.Sequential, nn.ModuleList)) or len(container) < 2:
        raise StructureError(
            f"sit: {type(model).__name__} has no 'blocks' (nn.Sequential or nn.ModuleList of at least two transformer "
            "blocks); slimming is for plain vision transformers"
        )
    blocks = list(container)
    if len(set(blocks)) != len(blocks):
        raise StructureError(
            f"sit: {type(model).__name__} runs one block more than once, which is not supported"
        )
    if any(isinstance(block, TokenSlimming) for block in blocks):
        raise StructureError(f"sit: {type(model).__name__} slims its tokens already")
    return container, blocks


def _prefix(model: nn.Module) -> int:
    told = getattr(model, "num_prefix_tokens", None)
    return told if isinstance(told, int) else recognise(model).prefix


def _width(block: nn.Module) -> int:
    norm = getattr(block, "norm1", None)
    shape = getattr(norm, "normalized_shape", None)
    if not shape:
        raise StructureError(f"sit: {type(block).__name__} has no 'norm1' that tells the width of a token")
    return int(shape[-1])


def _tokens(model: nn.Module, example: Sequence[Tensor]) -> tuple[int, int]:
    """Number of tokens in front of the patches, and number of patches, the same behind every block."""
    kind = type(model).__name__
    try:
        with torch.no_grad():
            _, tokens = block_tokens(model, *_near(model, example), prefix=0)
    except TypeError as error:
        raise StructureError(f"sit: the blocks of {kind} do not give one tensor each ({error})") from error
    shapes = {tuple(one.shape[1:]) for one in tokens}
    if len(shapes) != 1 or tokens[0].dim() != 3:
        found = ", ".join(str(shape) for shape in sorted(shapes))
        raise StructureError(
            f"sit: {kind} must have (batch, tokens, width) behind every block, with one number of tokens; found {found}"
        )
    count = tokens[0].shape[1]
    # some models (CaiT) have a class token that joins behind these blocks
    alone = count == getattr(getattr(model, "patch_embed", None), "num_patches", None)
    prefix = 0 if alone else _prefix(model)
    if count - prefix < 2:
        raise StructureError(f"sit: {kind} has {count - prefix} patch tokens; there is nothing to slim")
    return prefix, count - prefix


def _near(model: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
    """``inputs`` where the model is."""
    device = next(model.parameters()).device
    return [one.to(device) for one in inputs]


def _first(outputs: Any) -> Tensor:
    return outputs[0] if isinstance(outputs, (tuple, list)) else outputs  # type: ignore[no-any-return]


def _samples(context: Context) -> list[Tensor]:
    """Some training inputs."""
    found: list[tuple[Tensor, ...]] = []
    for batch in batches_of(context):
        found.append(inputs_of(batch))
        if sum(len(one[0]) for one in found) >= _SAMPLES:
            break
    if not found:
        raise UserMistake("train: the data gave no batch")
    return [torch.cat(several)[:_SAMPLES] for several in zip(*found, strict=True)]


def _draw(slimming: TokenSlimming) -> None:
    """The paper's start: truncated normal 0.02 and zero biases."""
    for layer in (slimming.fc1, slimming.fc2):
        nn.init.trunc_normal_(layer.weight, std=0.02)
        nn.init.zeros_(layer.bias)
