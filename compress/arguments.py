"""The arguments of ``compress``, looked at before anything is done: each mistake is told in one line."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compress.passes import parse_pass
from compress.passes._laws import Law, number, optional, whole
from compress.passes.base import Budget, Pass
from nas.errors import UserMistake, first_line
from nas.latency import Target

__all__ = [
    "check_learnable",
    "check_plain_arguments",
    "device_of",
    "learnable_batches",
    "passes_of",
    "private_copy",
    "target_of",
]

_TYING_MATTERS = frozenset({"widths", "ranks", "experts", "fusion", "precision"})
_MOST_SEEDS = 2**32


def passes_of(passes: Any) -> list[Pass]:
    """The passes, texts among them read. Raises UserMistake for anything else, an unknown pass, or a wrong option."""
    several = [passes] if isinstance(passes, (str, Pass)) else passes
    if not isinstance(several, Iterable) or isinstance(several, Mapping):
        raise UserMistake(
            f"passes={passes!r}: give a pass or a list of them: texts such as 'ofb:target=0.5', or objects of make_pass"
        )
    several = list(several)
    for one in several:
        if not isinstance(one, (str, Pass)):
            raise UserMistake(
                f"passes: {one!r} is none; each is a text such as 'ofb:target=0.5', or an object of make_pass"
            )
    return [parse_pass(one) if isinstance(one, str) else one for one in several]


def target_of(target: Any) -> Target:
    """The target, which this machine can run. Raises UserMistake."""
    if not isinstance(target, (str, Mapping, Target)):
        raise UserMistake(
            f"target={target!r}: give a text such as 'cpu:1' or 'cuda:0+bf16@8', as for nas measure"
        )
    place = target if isinstance(target, Target) else Target.parse(target)
    place.check()
    return place


def device_of(device: Any, target: Target) -> torch.device:
    """Where passes train: ``device``, or that of the target. Raises UserMistake when it is not there."""
    if device is None:
        return target.torch_device()
    allowed = "give cpu, cuda, cuda:INDEX or mps, or leave it out"
    try:
        found = torch.device(device) if isinstance(device, (str, torch.device)) else None
    except RuntimeError:
        found = None
    if found is None or found.type == "meta":
        raise UserMistake(f"device={str(device)!r}: is nothing to train on; {allowed}")
    try:
        torch.empty(0, device=found)
    except Exception as error:  # each kind of device refuses in its own way
        reason = first_line(error).partition(". ")[0][:120]
        raise UserMistake(f"device={str(device)!r}: is not to be had here ({reason}); {allowed}") from None
    return found


def check_plain_arguments(
    *,
    seed: Any,
    epochs: Any,
    measure_seconds: Any,
    budget: Budget | None,
    example: Any,
    origin: Any,
    loss: Any,
    report: Any,
) -> None:
    """Raises UserMistake for the first that is not of its type or out of its range."""
    inputs = example if isinstance(example, (tuple, list)) else (example,)
    laws = {
        "seed": (seed, Law(lambda x: whole(0).holds(x) and x < _MOST_SEEDS, "a whole number in [0, 2**32)")),
        "epochs": (
            epochs,
            Law(optional(whole(0)).holds, "a whole number of at least 0, or None: as each pass says"),
        ),
        "measure_seconds": (
            measure_seconds,
            Law(number("at least 0").holds, "a number of at least 0; 0 measures nothing"),
        ),
        "origin": (
            origin,
            Law(lambda x: x is None or isinstance(x, Mapping), "a mapping, see compress.origins"),
        ),
        "loss": (loss, Law(lambda x: x is None or callable(x), "a function of outputs and labels")),
        "report": (report, Law(lambda x: x is None or callable(x), "a function of one text")),
    }
    for name, (value, law) in laws.items():
        if not law.holds(value):
            raise UserMistake(f"{name}={value!r}: must be {law.text}")
    if example is not None and not (inputs and all(isinstance(x, Tensor) and x.dim() > 0 for x in inputs)):
        raise UserMistake("example: must be a tensor with the batch first, or a tuple of such")
    if budget is not None and budget.kind == "latency" and not measure_seconds:
        raise UserMistake("measure_seconds=0: a latency budget is met by measuring; give some seconds")


def learnable_batches(data: Any) -> Any:
    """``data``, of which a list or tuple of batches gives copies of tensors made under ``torch.inference_mode``.

    Nothing can be learnt from such tensors, whatever mode is on. Loaders make new tensors of what they are given.
    """
    if isinstance(data, Tensor):
        return data.clone() if data.is_inference() else data
    if type(data) in (list, tuple):
        return type(data)(learnable_batches(one) for one in data)
    return data


def check_learnable(what: str, tensors: Iterable[Tensor | None]) -> None:
    """Raises UserMistake for tensors of ``what`` that nothing can be learnt from, as told in ``learnable_batches``."""
    if any(x is not None and x.is_inference() for x in tensors):
        raise UserMistake(
            f"{what}: yields tensors made under torch.inference_mode, which nothing can be learnt from; give clones of "
            "them, made outside"
        )


def private_copy(model: Any, passes: Sequence[Pass]) -> nn.Module:
    """A copy on the CPU, in evaluation mode, of what is within wrappers.

    Raises UserMistake for what cannot be compressed: no module, wrapped for several devices, weights without values or
    tied where a pass would tear them apart, hooks, parametrizations, or what cannot be copied.
    """
    if not isinstance(model, nn.Module):
        raise UserMistake(f"model: {type(model).__name__} is no torch.nn.Module")
    inner = getattr(model, "_orig_mod", None)  # torch.compile's wrapper
    model = inner if isinstance(inner, nn.Module) else model
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise UserMistake(f"model: is wrapped in {type(model).__name__}; give its .module")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise UserMistake(
                f"model: {name or 'it'} is a torch.jit program (traced or scripted), whose layers cannot be changed; "
                "give the module that it was made of"
            )
    _refuse_tied(model, passes)
    for parameter in model.parameters():
        if parameter.device.type == "meta":
            raise UserMistake(
                "model: some parameters are on the meta device and have no values; load its weights first"
            )
    for name, module in model.named_modules():
        if getattr(module, "_forward_hooks", None) or getattr(module, "_forward_pre_hooks", None):
            raise UserMistake(
                f"model: {name or 'it'} has a forward hook, which the result could not keep; remove it first"
            )
        if hasattr(module, "parametrizations"):
            raise UserMistake(
                f"model: {name or 'it'} is parametrized; make its weights plain first "
                "(torch.nn.utils.parametrize.remove_parametrizations)"
            )
    # Copies of tensors made under torch.inference_mode would be such tensors again.
    known: dict[int, Any] = {id(x): _learnable(x) for x in _tensors_of(model) if x.is_inference()}
    try:
        copied: nn.Module = copy.deepcopy(model, known).cpu().eval()
        return copied
    except (RuntimeError, TypeError) as error:
        raise UserMistake(
            f"model: cannot be copied ({first_line(error, 150)}); detach the tensors that it keeps, or build it anew"
        ) from None


def _tensors_of(model: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers, and what modules keep beside them."""
    for module in model.modules():
        for value in vars(module).values():
            several = value.values() if isinstance(value, dict) else (value,)
            yield from (x for x in several if isinstance(x, Tensor))


def _learnable(x: Tensor) -> Tensor:
    made = x.detach().clone()
    return nn.Parameter(made, x.requires_grad) if isinstance(x, nn.Parameter) else made


def _refuse_tied(model: nn.Module, passes: Sequence[Pass]) -> None:
    seen: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not parameter.is_floating_point() or parameter.device.type == "meta":
            continue
        first = seen.setdefault(id(parameter), name)
        if first != name and (one := next((p for p in passes if p.changes & _TYING_MATTERS), None)):
            raise UserMistake(
                f"model: {first} and {name} are one tensor (tied weights), which pass {one.name!r} would tear apart; "
                "untie them (give each its own copy) first"
            )
