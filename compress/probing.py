"""Whether an attention or MLP of any class computes, once cut, what it computed with the removed parts at zero.

Names tell where weights are, not how a ``forward`` uses them: how the rows of qkv are ordered, what the width of a head
and the scale are taken from. So the cut is tried on a copy of the module alone, with random weights and tokens, since a
fresh model's attention is so even that a wrong scale would not show. Attentions that fail, but compute what timm's
does, are replaced by timm's.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from timm.layers.attention import Attention
from timm.layers.mlp import ConvMlp, Mlp
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn

from compress._slicing import cut_channels, cut_heads, cut_hidden, head_dim, slice_layer
from compress.outputs import relative_gap, require_same
from compress.structure import StructureError
from nas.errors import first_line

__all__ = [
    "EXACT",
    "Call",
    "Fitted",
    "calls_of",
    "first_of",
    "fit",
    "is_known",
    "moved",
    "own_random",
    "require_fit",
    "require_runs",
    "told_of",
    "why_not",
]

_KNOWN = (Attention, WindowAttention, Mlp, ConvMlp)
EXACT = 1e-3
_TOKENS = 5
_DROPOUTS = {"attn_drop": "attn_drop", "proj_drop": "proj_drop"}
_WANTED = {
    "attention": "its qkv must be ordered q, k, v, then head, then channel, head widths be taken from qkv, and the "
    "scale be kept in an attribute 'scale', or left to scaled_dot_product_attention",
    "mlp": "its hidden units must not depend on each other",
}


class Call(NamedTuple):
    """What a module is called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Fitted:
    """What ``fit`` has done: names of attentions that are timm's now, and why others cannot be cut, by name."""

    replaced: tuple[str, ...]
    reasons: dict[str, str]


def fit(
    model: nn.Module,
    attentions: Collection[str],
    mlps: Collection[str],
    kinds: Collection[str],
    example: Sequence[Tensor],
) -> Fitted:
    """Make ``model`` ready for a cut, in place: attentions that only timm's class can follow become timm's.

    Args:
        attentions, mlps: names of the modules that will be cut. Those of a class known to be right are not looked at.
        kinds: of ``heads``, ``channels``, ``hidden``, ``embedding``: what will go.
        example: inputs of the model, to find out how it calls them.

    Raises:
        StructureError: the model gives something else with an attention of timm in place of its own.
    """
    unknown = [name for name in (*attentions, *mlps) if not is_known(model.get_submodule(name))]
    if not unknown:
        return Fitted((), {})
    before, calls = copy.deepcopy(model), calls_of(model, unknown, example)
    replaced, reasons = [], {}
    for name in unknown:
        module = model.get_submodule(name)
        call = calls.get(name) or _lone_call(module)
        reason = why_not(module, call, kinds)
        if reason is None:
            continue
        plain = _plain_attention(module, call) if name in attentions else None
        if plain is None:
            reasons[name] = reason
        else:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, plain)
            replaced.append(name)
    if replaced:
        why = (
            f"{replaced[0]} ({type(before.get_submodule(replaced[0])).__name__}) cannot be replaced by timm's"
        )
        require_same(model, before, example, why)
    return Fitted(tuple(replaced), reasons)


def require_fit(module: nn.Module, name: str, kinds: Collection[str]) -> None:
    """Raises StructureError, which names ``module`` as ``name``, where a cut of ``kinds`` would not be exact."""
    if not is_known(module) and (reason := why_not(module, _lone_call(module), kinds)):
        raise StructureError(f"{name} {reason}")


def require_runs(model: nn.Module, example: Sequence[Tensor], what: str) -> None:
    """Raises StructureError where ``model``, from which ``what`` was taken, does not run on ``example`` any more."""
    try:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        with torch.no_grad(), own_random():
            copy.deepcopy(model).eval()(*(x.to(device) for x in example))
    except Exception as error:  # the model is anybody's
        raise StructureError(
            f"{type(model).__name__} does not run with fewer {what} ({told_of(error)})"
        ) from error


def why_not(module: nn.Module, call: Call, kinds: Collection[str]) -> str | None:
    """What is wrong with a cut of ``kinds`` in an attention (qkv, proj, num_heads) or MLP (fc1, fc2); None: nothing.

    The text follows the module's name in a sentence. Neither ``module`` nor the global generator is changed.
    """
    attention = hasattr(module, "qkv")
    about = f"({type(module).__name__})"
    wanted_form = _WANTED["attention" if attention else "mlp"]
    random = torch.Generator().manual_seed(0)
    full = _random_copy(module, random)
    given = _random_call(full, call, random)
    if given is None:
        return f"{about} is not called with its tokens as the first argument, so that a cut cannot be tried"
    zeroed, cut = full, copy.deepcopy(full)
    with torch.no_grad(), own_random():
        index = (_cut_attention if attention else _cut_mlp)(zeroed, cut, kinds, random)
        try:
            wanted = first_of(zeroed(*given.args, **given.kwargs))
        except Exception as error:  # its forward is anybody's
            return f"{about} cannot be tried alone ({told_of(error)})"
        axis = _axis(module)
        if index is not None:
            narrow = given.args[0].index_select(axis, index)
            given, wanted = Call((narrow, *given.args[1:]), given.kwargs), wanted.index_select(axis, index)
        what = " and ".join(sorted(kinds))
        try:
            found = first_of(cut(*given.args, **given.kwargs))
        except Exception as error:  # likewise
            return f"{about} does not run with fewer {what} ({told_of(error)}): {wanted_form}"
    gap = relative_gap(found, wanted)
    if gap <= EXACT:
        return None
    return f"{about} gives something else with fewer {what} than with these at zero (by {gap:.2g}): {wanted_form}"


def is_known(module: nn.Module) -> bool:
    """Whether a cut of ``module`` is known to be exact: some classes of timm, and ours."""
    return type(module) in _KNOWN or type(module).__module__.startswith("spaces.")


def calls_of(model: nn.Module, names: Sequence[str], example: Sequence[Tensor]) -> dict[str, Call]:
    """The first call of each module in a run of ``model``; those that are not called are left out."""
    scratch, found = copy.deepcopy(model).eval(), dict[str, Call]()

    def note(name: str) -> Any:
        return lambda _, args, kwargs: found.setdefault(name, Call(args, kwargs)) and None

    for name in names:
        scratch.get_submodule(name).register_forward_pre_hook(note(name), with_kwargs=True)
    device = next(scratch.parameters()).device
    with torch.no_grad(), own_random():
        scratch(*(x.to(device) for x in example))
    return found


def _lone_call(module: Any) -> Call:
    """Tokens alone."""
    first = module.qkv if hasattr(module, "qkv") else module.fc1
    width = first.weight.shape[1]
    shape = (1, width, 2, 2) if isinstance(first, nn.Conv2d) else (1, _TOKENS, width)
    return Call((torch.zeros(shape),), {})


def _random_copy(module: nn.Module, random: torch.Generator) -> Any:
    """On the CPU, in evaluation mode and at least float32; large weights, since small ones make attention even."""
    made: Any = copy.deepcopy(module).cpu().eval().requires_grad_(False)
    made = made if next(made.parameters()).dtype == torch.float64 else made.float()
    for layer in (made.qkv, made.proj) if hasattr(made, "qkv") else (made.fc1, made.fc2):
        fan = layer.weight[0].numel()
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=random) * 1.5 * fan**-0.5)
        if layer.bias is not None:
            layer.bias.copy_(torch.randn(layer.bias.shape, generator=random) * 0.5)
    return made


def _random_call(module: Any, call: Call, random: torch.Generator) -> Call | None:
    first = module.qkv if hasattr(module, "qkv") else module.fc1
    tokens, kind = call.args[0] if call.args else None, first.weight.dtype
    if not isinstance(tokens, Tensor) or tokens.dim() < 2:
        return None
    if tokens.shape[_axis(module)] != first.weight.shape[1]:
        return None
    drawn = torch.randn(tokens.shape, generator=random).to(kind)
    rest = [moved(one, kind) for one in call.args[1:]]
    return Call((drawn, *rest), {name: moved(one, kind) for name, one in call.kwargs.items()})


def moved(value: Any, kind: torch.dtype) -> Any:
    """On the CPU where it is a tensor, as ``kind`` where it holds fractions."""
    if not isinstance(value, Tensor):
        return value
    return value.cpu().to(kind) if value.is_floating_point() else value.cpu()


def _axis(module: Any) -> int:
    """Along which channels lie."""
    return 1 if isinstance(getattr(module, "fc1", None), nn.Conv2d) else -1


def _cut_attention(zeroed: Any, cut: Any, kinds: Collection[str], random: torch.Generator) -> Tensor | None:
    """Zero some units of the one, take them out of the other; the embedding channels that are left, if some go."""
    heads, dim = int(zeroed.num_heads), head_dim(zeroed)
    kept = torch.arange(heads)
    if "heads" in kinds and heads > 1:
        kept = kept[1:]
        zeroed.proj.weight[:, :dim] = 0
        cut_heads(cut, kept)
    if "channels" in kinds and dim > 1:
        matched, carried = (_some_of_each(len(kept), dim, random) for _ in range(2))
        for head, queries, values in zip(kept.tolist(), matched, carried, strict=True):
            for start in (0, heads * dim):
                _zero_rows(zeroed.qkv, start + head * dim + _others(queries, dim))
            zeroed.proj.weight[:, head * dim + _others(values, dim)] = 0
        cut_channels(cut, matched, carried)
    return _cut_embedding(zeroed.qkv, cut.qkv, cut.proj, kinds)


def _cut_mlp(zeroed: Any, cut: Any, kinds: Collection[str], random: torch.Generator) -> Tensor | None:
    """As ``_cut_attention``."""
    hidden = int(zeroed.fc1.weight.shape[0])
    if "hidden" in kinds and hidden > 1:
        [kept] = _some_of_each(1, hidden, random)
        zeroed.fc2.weight[:, _others(kept, hidden)] = 0
        cut_hidden(cut, kept)
    return _cut_embedding(zeroed.fc1, cut.fc1, cut.fc2, kinds)


def _cut_embedding(zeroed: Any, first: Any, last: Any, kinds: Collection[str]) -> Tensor | None:
    width = int(zeroed.weight.shape[1])
    if "embedding" not in kinds or width < 2:
        return None
    index = torch.arange(0, width, 2)
    zeroed.weight[:, 1::2] = 0
    slice_layer(first, inputs=index)
    slice_layer(last, outputs=index)
    return index


def _some_of_each(rows: int, size: int, random: torch.Generator) -> Tensor:
    """(rows, size // 2) positions, other ones in every row."""
    return torch.stack(
        [torch.randperm(size, generator=random)[: size // 2].sort().values for _ in range(rows)]
    )


def _others(kept: Tensor, size: int) -> Tensor:
    gone = torch.ones(size, dtype=torch.bool)
    gone[kept] = False
    return gone.nonzero().flatten()


def _zero_rows(layer: Any, rows: Tensor) -> None:
    layer.weight[rows] = 0
    if layer.bias is not None:
        layer.bias[rows] = 0


def _plain_attention(module: Any, call: Call) -> Attention | None:
    """An attention of timm with the same weights that computes the same as ``module``; None where there is none."""
    drops = _dropouts(module)
    tensors = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    beside = tensors - {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias"}
    if beside or drops is None or len(call.args) != 1 or call.kwargs:
        return None
    random = torch.Generator().manual_seed(1)
    tried = _random_copy(module, random)
    given = _random_call(tried, call, random)
    if given is None:
        return None
    for order in _orders(int(module.num_heads), head_dim(module)):
        with torch.no_grad(), own_random():
            if _same(_as_timm(tried, order, drops), tried, given):
                return _as_timm(module, order, drops)
    return None


def _orders(heads: int, dim: int) -> list[Tensor]:
    """For each order in which qkv may have its rows, the places of those of timm's order."""
    sizes = (3, heads, dim)
    found = []
    for axes in itertools.permutations(range(3)):
        grid = torch.arange(3 * heads * dim).reshape([sizes[axis] for axis in axes])
        found.append(grid.permute([axes.index(axis) for axis in range(3)]).flatten())
    return found


def _dropouts(module: nn.Module) -> dict[str, float] | None:
    """The dropouts under timm's names; None where something else acts beside qkv and proj, perhaps in training only."""
    found = {}
    for name, child in module.named_children():
        if name in ("qkv", "proj") or isinstance(child, (nn.Identity, nn.Softmax)):
            continue
        if not isinstance(child, nn.Dropout) or (child.p and name not in _DROPOUTS):
            return None
        found[name] = child.p
    return {name: p for name, p in found.items() if name in _DROPOUTS}


def _as_timm(module: Any, order: Tensor, drops: dict[str, Any]) -> Attention:
    qkv, proj = module.qkv, module.proj
    made = Attention(
        qkv.in_features,
        int(module.num_heads),
        attn_head_dim=head_dim(module),
        dim_out=proj.out_features,
        qkv_bias=qkv.bias is not None,
        proj_bias=proj.bias is not None,
        device=torch.device("meta"),
        **drops,
    )
    made.qkv, made.proj = copy.deepcopy(qkv), copy.deepcopy(proj)
    order = order.to(qkv.weight.device)
    for parameter in made.qkv.parameters():
        parameter.data = parameter.data[order].clone()
    return made.train(module.training)


def _same(plain: nn.Module, module: nn.Module, given: Call) -> bool:
    """Whether both give the same, in evaluation mode and, without dropout, in training mode."""
    for training in (False, True):
        outputs = []
        for one in (plain, module):
            one = copy.deepcopy(one).train(training)
            for child in one.modules():
                if isinstance(child, nn.Dropout):
                    child.p = 0.0
            try:
                outputs.append(one(*given.args, **given.kwargs))
            except Exception:  # its forward is anybody's; only equals are wanted here
                return False
        if not relative_gap(*outputs) <= EXACT / 10:
            return False
    return True


def first_of(outputs: Any) -> Any:
    """Of an attention that hands out its weights too."""
    return outputs[0] if isinstance(outputs, (tuple, list)) and outputs else outputs


def own_random() -> AbstractContextManager[None]:
    """What is drawn within leaves the global generator where it was."""
    return torch.random.fork_rng([])


def told_of(error: Exception) -> str:
    """Kind and first line, for a message."""
    return f"{type(error).__name__}: {first_line(error, 120)}"
