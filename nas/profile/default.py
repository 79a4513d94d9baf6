"""The figures that every candidate of a search gets: by one counter, with what it leaves out named beside them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from nas.errors import UserMistake, first_line
from nas.profile.by_torch import count_by_torch
from nas.profile.skeleton import empty, full_copy, refuse_lazy, refuse_scripts, skeleton
from nas.profile.tally import MissingCounter

__all__ = ["Profile", "profile", "with_or_without_data"]

logger = logging.getLogger("nas.profile")

T = TypeVar("T")


@dataclass(frozen=True)
class Profile:
    """What a model costs to keep and to run once.

    Attributes:
        params: numbers in all parameters, shared ones once.
        trainable: those of them that a training changes.
        macs: multiply-accumulates of one call with the given inputs, all samples of the batch together.
        uncounted: operators that did work which ``macs`` does not contain, by name; to be shown beside ``macs``.
        method: ``meta`` (without data) or ``data``, when the model's control flow needs the values of its inputs and
            ``macs`` therefore holds for inputs like these.
    """

    params: int
    trainable: int
    macs: int
    uncounted: tuple[str, ...] = ()
    method: str = "meta"

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {**asdict(self), "uncounted": list(self.uncounted)}


def profile(model: nn.Module, inputs: Sequence[Tensor]) -> Profile:
    """Count ``model`` as it runs in evaluation mode, by FlopCounterMode; it is not changed, its weights are not copied.

    Args:
        model: on any device.
        inputs: what it is called with; only shapes and types matter unless its control flow reads values. With one
            sample, ``macs`` is the cost of one sample.

    Raises:
        UserMistake: a TorchScript module, parameters without a shape yet, or a model without data (on the ``meta``
            device) whose control flow reads values.
        Exception: whatever the model raises when called with ``inputs``.
    """
    tally, method = with_or_without_data(count_by_torch, model, inputs)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Profile(tally.params, trainable, tally.total.macs, tuple(sorted(tally.uncounted)), method)


def with_or_without_data(
    count: Callable[[nn.Module, Sequence[Tensor]], T], model: nn.Module, inputs: Sequence[Tensor]
) -> tuple[T, str]:
    """``count`` on a copy without data and "meta", or if it cannot run so, on a full copy and "data".

    Raises:
        UserMistake: as ``profile``.
    """
    refuse_scripts(model)
    refuse_lazy(model)
    try:
        return count(_frozen(skeleton(model)), [empty(x) for x in inputs]), "meta"
    except MissingCounter:
        raise
    except (
        Exception
    ) as error:  # anything may go wrong without data; with data the model's own errors come out
        logger.info(
            "%s cannot run without data (%s); counted with data", type(model).__name__, first_line(error, 200)
        )
        if any(x.is_meta for x in (*model.parameters(), *model.buffers(), *inputs)):
            raise UserMistake(
                f"{type(model).__name__} or its inputs are on the meta device and it cannot run without data "
                f"({first_line(error, 200)}); build it and its inputs on the CPU"
            ) from error
    return count(_frozen(full_copy(model)), [x.detach() for x in inputs]), "data"


def _frozen(model: nn.Module) -> nn.Module:
    """FlopCounterMode follows gradients, and stumbles over parameters that a module is called with."""
    return model.eval().requires_grad_(False)
