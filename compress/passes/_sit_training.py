"""Feature recalibration distillation: how a self-slimmed transformer is trained; sources in ``sit``."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from timm.layers.patch_dropout import PatchDropout
from torch import Tensor, nn

from compress.data import loss_of, move
from compress.finetune import distillation_loss
from compress.passes.base import Context, PassFailed, batches_of, class_axis
from nas.errors import UserMistake
from spaces.layers.token_slimming import ReverseTokenSlimming, TokenSlimming

__all__ = [
    "LossParts",
    "Recalibration",
    "block_tokens",
    "recalibrate",
    "recalibration_loss",
    "recover",
    "reverse_modules",
]

_CHECK_EVERY = 20


class LossParts(NamedTuple):
    """The three terms, weighted, and their sum."""

    total: Tensor
    task: Tensor
    tokens: Tensor
    logits: Tensor


def taps(model: nn.Module) -> list[nn.Module]:
    """For each transformer block of ``model.blocks`` the module behind which its tokens are read.

    That is the block itself, or the slimming that follows it.
    """
    found: list[nn.Module] = []
    for module in model.blocks.children():  # type: ignore[union-attr]
        if isinstance(module, TokenSlimming):
            found[-1] = module
        else:
            found.append(module)
    return found


@contextmanager
def listening(model: nn.Module, prefix: int) -> Iterator[list[Tensor]]:
    """While open, the list holds the patch tokens behind each block, as of the last call of ``model``."""
    tokens: list[Tensor] = []

    def note(number: int) -> Any:
        def hook(module: nn.Module, given: Any, out: Tensor) -> None:
            if number == 0:
                tokens.clear()
            tokens.append(out[:, prefix:])

        return hook

    handles = [module.register_forward_hook(note(number)) for number, module in enumerate(taps(model))]
    try:
        yield tokens
    finally:
        for handle in handles:
            handle.remove()


def block_tokens(model: nn.Module, *inputs: Tensor, prefix: int = 1) -> tuple[Any, list[Tensor]]:
    """Outputs of ``model`` and the patch tokens (B, tokens, C) behind each of its blocks, slimmed where it slims.

    Args:
        model: with transformer blocks, and perhaps slimmings, in ``blocks``.
        inputs: of the model.
        prefix: number of tokens in front of the patches, which are left out.
    """
    with listening(model, prefix) as tokens:
        return model(*inputs), tokens


def reverse_modules(counts: Sequence[int], patches: int, dim: int, *, ratio: float = 4.0) -> nn.ModuleList:
    """For each block what brings its tokens back to ``patches``; ``nn.Identity`` in front of the first slimming.

    Args:
        counts: patch tokens behind each block.
        patches: N0, patch tokens of a model without slimming.
        dim: width of a token.
        ratio: hidden widths over N0 and over ``dim``.
    """
    return nn.ModuleList(
        nn.Identity() if count == patches else ReverseTokenSlimming(dim, count, patches, ratio=ratio)
        for count in counts
    )


def recover(tokens: Sequence[Tensor], reverse: nn.ModuleList) -> list[Tensor]:
    """The tokens behind each block brought back to the number of patches."""
    return [module(one) for module, one in zip(reverse, tokens, strict=True)]


def recalibration_loss(
    task: Tensor,
    outputs: Any,
    recovered: Sequence[Tensor],
    taught: Any,
    taught_tokens: Sequence[Tensor],
    *,
    token_weight: float = 2.0,
    logit_weight: float = 2.0,
    temperature: float = 1.0,
    axis: int = -1,
) -> LossParts:
    """``task`` + weighted mean over the blocks of the tokens' MSE + weighted KL from the teacher's logits.

    Args:
        task: the task's own loss, a scalar.
        outputs, taught: logits (B, classes) of student and teacher; a tuple counts as the mean of its members.
        recovered, taught_tokens: (B, N0, C) for each block, of student and teacher.
        temperature: of both distributions, above 0; the KL term is multiplied by its square.
        axis: of the classes, where outputs have more than two dimensions; see ``distillation_loss``.
    """
    errors = [
        nn.functional.mse_loss(own.float(), other.float())
        for own, other in zip(recovered, taught_tokens, strict=True)
    ]
    tokens = token_weight * torch.stack(errors).mean() if errors else task.new_zeros(())
    logits = logit_weight * distillation_loss(outputs, taught, temperature, axis=axis)
    return LossParts(task + tokens + logits, task, tokens, logits)


@dataclass(frozen=True)
class Recalibration:
    """How to train; the defaults are the paper's, save the learning rate.

    Attributes:
        epochs: passes over the training data, at least 1.
        learning_rate: peak, above 0; falls to 1/20 along a cosine, without warm-up.
        weight_decay: of matrices, and of all of the reverse modules.
        reverse_rate: learning rate of the reverse modules over that of the rest.
        reverse_ratio: hidden widths of the reverse modules.
        token_weight, logit_weight, temperature: see ``recalibration_loss``.
        hard_teacher: a further model, a convolutional one in the paper, whose decisions are labels too; or None.
        hard_weight: of the cross entropy with those.
    """

    epochs: int
    learning_rate: float
    weight_decay: float = 0.05
    reverse_rate: float = 5.0
    reverse_ratio: float = 4.0
    token_weight: float = 2.0
    logit_weight: float = 2.0
    temperature: float = 1.0
    hard_teacher: nn.Module | None = None
    hard_weight: float = 1.0


def recalibrate(
    model: nn.Module, token_teacher: nn.Module, context: Context, how: Recalibration, *, prefix: int
) -> None:
    """Train the slimmed ``model`` in place; it ends in evaluation mode, on the device it was on.

    Args:
        model: with slimmings in ``blocks``.
        token_teacher: the same model without them, in evaluation mode; not changed.
        context: data, loss, teacher of the logits (``token_teacher`` where there is none), seed, device.
        prefix: number of tokens in front of the patches.

    Raises:
        PassFailed: the loss became NaN or infinite, or the data gave no batch.
        UserMistake: no training data.
    """
    if context.train is None:
        raise UserMistake("train: sit needs data to learn from; give train=, or epochs=0 to leave it out")
    home = next(model.parameters()).device
    device = context.device
    _set_training(model.to(device))
    teacher = copy.deepcopy(token_teacher).to(device).eval().requires_grad_(False)
    reverse = _reverse_of(model, teacher, context, how, prefix)
    optimizer = _optimizer(model, reverse, how)
    fork = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(fork), torch.inference_mode(False), torch.enable_grad():
            torch.manual_seed(context.seed)
            _epochs(model, teacher, reverse, optimizer, context, how, prefix)
    finally:
        model.to(home).eval()
        model.zero_grad(set_to_none=True)


def _set_training(model: nn.Module) -> None:
    """Training mode, but no patch is dropped: tokens are compared with the teacher's, one by one."""
    model.train()
    for module in model.modules():
        if isinstance(module, PatchDropout):
            module.eval()


def _reverse_of(
    model: nn.Module, teacher: nn.Module, context: Context, how: Recalibration, prefix: int
) -> nn.ModuleList:
    example = [x.to(context.device) for x in context.example]
    model.eval()
    with torch.no_grad():
        _, slimmed = block_tokens(model, *example, prefix=prefix)
        _, full = block_tokens(teacher, *example, prefix=prefix)
    _set_training(model)
    counts = [tokens.shape[1] for tokens in slimmed]
    with torch.random.fork_rng([]):
        torch.manual_seed(context.seed)
        reverse = reverse_modules(counts, full[0].shape[1], full[0].shape[2], ratio=how.reverse_ratio)
    return reverse.to(device=context.device, dtype=full[0].dtype)


def _optimizer(model: nn.Module, reverse: nn.ModuleList, how: Recalibration) -> torch.optim.Optimizer:
    exclude: Any = getattr(model, "no_weight_decay", None)
    kept = {"cls_token", "pos_embed", *(exclude() if callable(exclude) else ())}
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[parameter.dim() > 1 and parameter.numel() > 1 and name not in kept].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": groups[True], "weight_decay": how.weight_decay},
            {"params": groups[False], "weight_decay": 0.0},
            {
                "params": list(reverse.parameters()),
                "weight_decay": how.weight_decay,
                "lr": how.learning_rate * how.reverse_rate,
            },
        ],
        lr=how.learning_rate,
    )


def _epochs(
    model: nn.Module,
    teacher: nn.Module,
    reverse: nn.ModuleList,
    optimizer: torch.optim.Optimizer,
    context: Context,
    how: Recalibration,
    prefix: int,
) -> None:
    device, peaks = context.device, [group["lr"] for group in optimizer.param_groups]
    logits_of = context.teacher if context.teacher is not None else teacher
    same = logits_of is teacher or _alike(logits_of, teacher)
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    length = _length(context.train)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for epoch in range(how.epochs):
        total, steps = torch.zeros((), device=device), 0
        for batch in batches_of(context):
            _set_rates(optimizer, peaks, (epoch + min(1.0, steps / length)) / how.epochs)
            inputs, labels = move(batch, device)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                with torch.no_grad():
                    taught, taught_tokens = block_tokens(teacher, *inputs, prefix=prefix)
                    if not same:
                        taught = logits_of(*inputs)
                outputs, tokens = block_tokens(model, *inputs, prefix=prefix)
                recovered = recover(tokens, reverse)
            loss = recalibration_loss(
                loss_of(context, outputs, inputs, labels) + _hard_term(outputs, inputs, how),
                outputs,
                recovered,
                taught,
                taught_tokens,
                token_weight=how.token_weight,
                logit_weight=how.logit_weight,
                temperature=how.temperature,
                axis=class_axis(context),
            ).total
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            total, steps = total + loss.detach(), steps + 1
            if steps % _CHECK_EVERY == 0:
                _finite(total, epoch, how)
        if steps == 0:
            raise PassFailed("sit: the training data gave no batch")
        _finite(total, epoch, how)
        context.report(f"sit: epoch {epoch + 1} of {how.epochs}, loss {float(total) / steps:.4f}")


def _length(batches: Any) -> float:
    """Number of batches; without a length the learning rate falls by the epoch, as in the published code."""
    try:
        return float(max(1, len(batches)))
    except TypeError:
        return math.inf


def _set_rates(optimizer: torch.optim.Optimizer, peaks: Sequence[float], done: float) -> None:
    """A half cosine to 1/20 of the peaks, which is the published minimum; ``done`` is the share of the training."""
    share = 0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2
    for group, peak in zip(optimizer.param_groups, peaks, strict=True):
        group["lr"] = peak * share


def _alike(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models hold the same weights, so that one call gives the logits of both."""
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(
        mine[key].shape == theirs[key].shape and torch.equal(mine[key].to(theirs[key].device), theirs[key])
        for key in mine
    )


def _hard_term(outputs: Any, inputs: Sequence[Tensor], how: Recalibration) -> Tensor:
    """Cross entropy with the hard teacher's decisions, of the distillation head where there is one."""
    last = outputs[-1] if isinstance(outputs, (tuple, list)) else outputs
    if how.hard_teacher is None:
        return last.new_zeros(())  # type: ignore[no-any-return]
    with torch.no_grad():
        decisions = how.hard_teacher(*inputs).argmax(-1)
    return how.hard_weight * nn.functional.cross_entropy(last.float(), decisions)


def _finite(total: Tensor, epoch: int, how: Recalibration) -> None:
    if not torch.isfinite(total):
        raise PassFailed(
            f"sit: the loss became {float(total)} in epoch {epoch + 1}; lower learning_rate={how.learning_rate:g}"
        )
