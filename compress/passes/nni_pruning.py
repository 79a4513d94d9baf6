"""NNI's pruners as peers to compare with: they choose the units, our surgery takes these out.

NNI 3.0 prunes by masks. Its own ``ModelSpeedup``, which should make a masked model small, fails on present ViTs (with
PyTorch 2.15 its tracer ends in an AttributeError before anything is cut) and is not used.
Of its pruners all that can mask whole units are offered. Not offered: ``LevelPruner``, which masks single weights, so
that nothing can be taken out, and the schedules ``LinearPruner`` and ``AGPPruner``, which repeat one of the others.

What NNI masks for a unit: a hidden unit is a row of ``mlp.fc1`` with its bias, NNI's own default for a Linear; a head
is the block of columns of ``attn.proj`` (``out_proj``) that reads it, because in one fused ``qkv`` NNI would judge the
query, the key and the value of a head apart. Removing a unit equals masking it (for the MLP: where the activation of 0
is 0).
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from compress._probing_heads import why_heads_stay
from compress.data import answer
from compress.finetune import epochs_of, finetune
from compress.passes import register_pass
from compress.passes.base import Context, Pass, PassFailed, batches_of
from compress.structure import (
    Block,
    Heads,
    Mlp,
    StructureError,
    ViTStructure,
    find_heads,
    find_mlps,
    recognise,
)
from compress.surgery import keep_heads, keep_mlp_units
from nas.errors import UserMistake, nearest
from nas.nni_import import nni_module

__all__ = ["NniPruning", "masks_by_nni"]

Pruner = Literal["l1", "l2", "fpgm", "taylor", "movement", "slim"]
Masks = Mapping[str, Mapping[str, Tensor]]

PRUNERS: Mapping[str, str] = {
    "l1": "L1NormPruner",
    "l2": "L2NormPruner",
    "fpgm": "FPGMPruner",
    "taylor": "TaylorPruner",
    "movement": "MovementPruner",
    "slim": "SlimPruner",
}
UNITS = ("heads", "mlp")
_LEARNING = ("movement", "slim")  # these train the weights while they choose
_LEAST_STEPS = 5
_STRONGEST = 0.97
_EPOCHS = 3


@register_pass("nni")
class NniPruning(Pass):
    """NNI chooses the units that go; they are taken out and the rest is fine-tuned with distillation.

    Every layer loses the same share. NNI rounds the number that goes down: of 3 heads a ratio of 0.5 takes one.

    Args:
        ratio: share of the units of every kind that goes, in [0, 1).
        pruner: ``l1``, ``l2`` (norm of the masked weights), ``fpgm`` (distance to the other units' weights),
            ``taylor`` (squared gradient times weight; needs training data), ``movement`` or ``slim`` (learnt scores
            or scales; these need training data and train the weights too).
        units: of ``heads``, ``mlp`` (hidden units); a list, or a text such as ``heads+mlp``.
        steps: minibatches in which taylor, movement and slim make up their minds, at least 5; the training data are
            gone through again where they are fewer.
        epochs: of fine-tuning; None takes the pipeline's, else 3. Without training data there is none.
        learning_rate: of the fine-tuning, and of the training by movement and slim.
        distillation: of the fine-tuning.

    Raises:
        UserMistake: an option out of its range, or NNI cannot be imported.
    """

    changes = frozenset({"widths"})

    def __init__(
        self,
        ratio: float = 0.5,
        *,
        pruner: Pruner = "l1",
        units: str | Sequence[str] = ("mlp",),
        steps: int = 100,
        epochs: int | None = None,
        learning_rate: float = 5e-4,
        distillation: float = 0.5,
    ):
        kinds = [one.strip() for one in units.split("+")] if isinstance(units, str) else list(units)
        for what, given, known in (("pruner", [pruner], PRUNERS), ("units", kinds, UNITS)):
            if not given:
                raise UserMistake(f"nni: units is empty; known: {', '.join(known)}")
            for one in given:
                if one not in known:
                    hint = nearest(str(one), known)
                    raise UserMistake(f"nni: unknown {what} {one!r}{hint}; known: {', '.join(known)}")
        if not 0 <= ratio < 1:
            raise UserMistake(f"nni: ratio={ratio} must be in [0, 1), the share that goes")
        if steps < _LEAST_STEPS:
            raise UserMistake(f"nni: steps={steps} must be at least {_LEAST_STEPS}")
        _from_nni("compression.pruning")  # before another pass works for hours
        self.ratio, self.pruner, self.units, self.steps = ratio, pruner, tuple(kinds), steps
        self.epochs, self.learning_rate, self.distillation = epochs, learning_rate, distillation
        self.requires = frozenset({"train"} if pruner in ("taylor", *_LEARNING) or epochs else ())

    def with_strength(self, strength: float) -> Pass:
        """``ratio`` from 0 to 0.97."""
        options = {name: value for name, value in self.options().items() if name != "ratio"}
        return NniPruning(strength * _STRONGEST, **options)

    def apply(self, model: nn.Module, context: Context) -> nn.Module:
        """See ``Pass.apply``."""
        _require_fit(model, self.units, context)
        # The numbers that remain do not depend on which ones they are.
        pruner: Pruner = "l1" if context.probe else self.pruner
        trained, masks = masks_by_nni(
            model,
            context,
            pruner,
            units=self.units,
            ratio=self.ratio,
            steps=self.steps,
            learning_rate=self.learning_rate,
        )
        result = copy.deepcopy(model).eval()
        if trained is not None:
            result.load_state_dict(trained)
        _remove(_parts(result), masks)
        finetune(
            result,
            context,
            epochs=epochs_of(self.epochs, context, _EPOCHS),
            learning_rate=self.learning_rate,
            distillation=self.distillation,
        )
        return result


def masks_by_nni(
    model: nn.Module,
    context: Context,
    pruner: Pruner,
    *,
    units: Sequence[str],
    ratio: float,
    steps: int = 100,
    learning_rate: float = 5e-4,
) -> tuple[dict[str, Tensor] | None, Masks]:
    """What NNI makes of a copy of ``model``; arguments as of ``NniPruning``.

    Returns:
        The weights that it has trained, by name (movement, slim; None for the others), and for each masked module of
        the model and each of its parameters the mask: 0 and 1, of the parameter's shape.

    Raises:
        PassFailed: the loss is not finite.
    """
    pruning = _from_nni("compression.pruning")
    # NNI puts wrappers into the modules and buffers in place of their parameters: nothing of this copy is kept.
    scratch = copy.deepcopy(model).requires_grad_(True)
    make = getattr(pruning, PRUNERS[pruner])
    config = _config(_parts(scratch), units, ratio)
    if pruner in ("l1", "l2", "fpgm"):
        return None, _on_cpu(make(scratch, config).compress()[1])
    scratch.to(context.device).train(pruner in _LEARNING)
    evaluator = _evaluator(scratch, context, learning_rate if pruner in _LEARNING else 0.0)
    devices = [context.device] if context.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        torch.manual_seed(context.seed)
        if pruner == "movement":
            warm, cool = steps // 5, steps - steps // 5
            tool = make(scratch, config, evaluator, warmup_step=warm, cooldown_begin_step=cool)
            masks = tool.compress(steps, None)[1]
        else:
            tool = make(scratch, config, evaluator, training_steps=steps)
            masks = tool.compress()[1]
    tool.unwrap_model()
    if pruner == "slim":
        _fold_scales(scratch, tool.scaling_factors)
    trained = {name: value.detach().cpu() for name, value in scratch.state_dict().items()}
    return (trained if pruner in _LEARNING else None), _on_cpu(masks)


def _from_nni(name: str) -> Any:
    return nni_module(name, "pass 'nni'", "pass 'structured'")


class _Parts(NamedTuple):
    """What of a model can lose units: attentions of several heads, and MLPs."""

    attentions: tuple[Block | Heads, ...]
    mlps: tuple[Mlp, ...]


def _parts(model: nn.Module) -> _Parts:
    """Those of a plain ViT, or of a network whose attentions are mechanisms of ``spaces.attention``.

    Raises:
        StructureError: it is neither.
    """
    try:
        return _of_vit(recognise(model))
    except StructureError:
        if not (found := find_heads(model)):
            raise
        return _Parts(tuple(one for one in found if one.num_heads > 1), find_mlps(model))


def _of_vit(structure: ViTStructure) -> _Parts:
    return _Parts(structure.blocks, tuple(block.mlp for block in structure.blocks))


def _require_fit(model: nn.Module, units: Sequence[str], context: Context) -> None:
    """Raises StructureError where mechanisms of attention cannot lose heads exactly, or not those that NNI masks."""
    mechanisms = [one for one in _parts(model).attentions if isinstance(one, Heads)]
    if "heads" not in units or not mechanisms:
        return
    for name, reason in why_heads_stay(model, mechanisms, context.example).items():
        raise StructureError(f"{type(model).__name__}: {name} {reason}; units=mlp alone asks for less")
    for one in mechanisms:
        columns = one.attention.head_columns()
        if not torch.equal(columns.flatten(), torch.arange(columns.numel())):
            raise StructureError(
                f"{type(model).__name__}: {one.name} does not read its heads one behind the other, as NNI masks them; "
                "use pass 'structured'"
            )


def _config(parts: _Parts, units: Sequence[str], ratio: float) -> list[dict[str, Any]]:
    """NNI's list of what to mask, and in which layers."""
    found: list[dict[str, Any]] = []
    if "mlp" in units:
        found += [{"op_names": [f"{mlp.name}.fc1"], "sparse_ratio": float(ratio)} for mlp in parts.mlps]
    for one in parts.attentions if "heads" in units else ():
        found.append(
            {
                "op_names": [_reader_name(one)],
                "target_names": ["weight"],
                "granularity": [-1, _head_width(one)],
                "sparse_ratio": float(ratio),
            }
        )
    return found


def _reader_name(part: Block | Heads) -> str:
    """Of the layer that reads the heads."""
    if isinstance(part, Block):
        return f"{part.name}.attn.proj"
    return f"{part.name}.out_proj" if part.name else "out_proj"


def _head_width(part: Block | Heads) -> int:
    """Columns of that layer that read one head."""
    return part.head_dim if isinstance(part, Block) else part.attention.head_columns().shape[1]


def _evaluator(model: nn.Module, context: Context, learning_rate: float) -> Any:
    """NNI's view of a training; with a rate of 0 it takes gradients and leaves the weights as they are."""
    trace = _from_nni("common.serializer").trace
    kind = torch.optim.AdamW if learning_rate else torch.optim.SGD
    optimizer = trace(kind)(model.parameters(), lr=learning_rate)

    def loss_of(batch: Any, model: nn.Module, *_: Any, **__: Any) -> Tensor:
        loss = answer(model, batch, context).loss
        if not torch.isfinite(loss):
            raise PassFailed(
                f"nni: the loss became {loss.item()} while its pruner was at work; lower learning_rate"
            )
        return loss

    def run(
        model: nn.Module,
        optimizer: Any,
        step: Callable[..., Tensor],
        _schedule: Any = None,
        max_steps: int | None = None,
        _max_epochs: Any = None,
    ) -> None:
        for batch in itertools.islice(_endless(context), max_steps):
            optimizer.zero_grad()
            step(batch, model).backward()
            optimizer.step()

    return _from_nni("compression").TorchEvaluator(run, optimizer, loss_of)


def _endless(context: Context) -> Any:
    while True:
        number = -1
        for number, batch in enumerate(batches_of(context)):  # noqa: B007  (asked for below)
            yield batch
        if number < 0:
            raise PassFailed("nni: the training data gave no batch")


def _fold_scales(model: nn.Module, scales: Masks) -> None:
    """SlimPruner trains weights times scales, and hands back the weights alone."""
    with torch.no_grad():
        for name, factors in scales.items():
            module: Any = model.get_submodule(name)
            for target, factor in factors.items():
                parameter = getattr(module, target)
                for dim, size in enumerate(parameter.shape):
                    factor = factor.repeat_interleave(size // factor.shape[dim], dim)
                parameter.mul_(factor)


def _on_cpu(masks: Mapping[str, Mapping[str, Tensor | None]]) -> Masks:
    return {
        name: {target: mask.detach().cpu() for target, mask in found.items() if mask is not None}
        for name, found in masks.items()
    }


def _remove(found: ViTStructure | _Parts, masks: Masks) -> None:
    """Take out every unit whose weights are masked as a whole."""
    parts = _of_vit(found) if isinstance(found, ViTStructure) else found
    for mlp in parts.mlps:
        if (mask := masks.get(f"{mlp.name}.fc1")) is not None:
            keep_mlp_units(mlp, mask["weight"].flatten(1).any(1).nonzero().flatten())
    for one in parts.attentions:
        if (mask := masks.get(_reader_name(one))) is not None:
            by_head = mask["weight"].reshape(-1, one.num_heads, _head_width(one))
            keep_heads(one, by_head.transpose(0, 1).flatten(1).any(1).nonzero().flatten())
