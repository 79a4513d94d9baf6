"""What every runtime does: check that it can run, take a model and its inputs, run one of them at a time."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from nas.errors import TrialFailure, UserMistake
from spaces.names import Registry

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from nas.latency.target import Target

__all__ = [
    "ALIASES",
    "RUNTIMES",
    "Runtime",
    "check_outputs",
    "distinct_shapes",
    "installed",
    "tensors_of",
    "twin",
]

InputSets = Sequence[tuple["Tensor", ...]]

ALIASES = {"ort": "onnxruntime", "trt": "tensorrt"}
"""Short names that a target's text may use."""

_TOLERANCE = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 1e-1}


class Runtime(ABC):
    """A private copy of a model, made ready to run in one way on one target.

    Attributes:
        devices: kinds of device that it can run on.
        packages: what must be installed, by the names of their modules.
        install: the command that installs them.
        reads_onnx: the model may also be the path of an ONNX file; its outputs are then not compared with anything.
        own_layout: it arranges memory as it likes, so that ``+channels_last`` has no meaning for it.
        cpu_clock: ``thread`` when the calling thread does the work of a single-threaded target; ``process`` when a
            thread of the engine may do it, so that only the CPU time of the whole process holds it.
        stream: the CUDA stream that its work runs on; ``None`` means the current one.
        found: versions and facts of this model's preparation, beside those of ``versions``.
    """

    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda", "mps")
    packages: ClassVar[tuple[str, ...]] = ()
    install: ClassVar[str] = ""
    reads_onnx: ClassVar[bool] = False
    own_layout: ClassVar[bool] = False
    cpu_clock: ClassVar[Literal["thread", "process"]] = "thread"
    stream: Any = None
    found: Mapping[str, str] = MappingProxyType({})

    @abstractmethod
    def __init__(self, model: Any, sets: InputSets, target: Target):
        """Prepare ``model`` (left as it is) for ``sets`` of inputs, which are on the CPU.

        Raises TrialFailure when this model cannot be run in this way, or computes something else in it.
        """

    @abstractmethod
    def run(self) -> Any:
        """Run the model on the staged inputs. This is what is timed; on CUDA it may return before it is done."""

    @abstractmethod
    def stage(self, number: int) -> None:
        """Make set ``number`` the one that ``run`` uses. Not timed."""

    def move(self) -> Callable[[], None] | None:
        """Copy what ``run`` reads to other memory; what is returned switches to the copy. None: it cannot be moved.

        The values stay the same, and so does the set of inputs that is staged. Not timed.
        """
        return None

    def close(self) -> None:
        """Let go of the model and of the engine's memory."""
        self.__dict__.clear()

    @classmethod
    def check(cls, target: Target) -> None:
        """Raises UserMistake when it cannot run this target here; the device itself has been checked."""
        if target.device_kind not in cls.devices:
            raise UserMistake(
                f"target {str(target)!r}: +{target.runtime} runs on {' or '.join(cls.devices)} only; "
                f"use that device, or leave +{target.runtime} out"
            )
        missing = [name for name in cls.packages if find_spec(name) is None]
        if missing:
            raise UserMistake(
                f"target {str(target)!r}: +{target.runtime} needs {' and '.join(missing)}, which is not installed; "
                f"{cls.install}, or leave +{target.runtime} out"
            )
        if cls.own_layout and target.channels_last:
            raise UserMistake(
                f"target {str(target)!r}: {target.runtime} chooses the memory format itself; "
                "leave +channels_last out"
            )

    @classmethod
    def versions(cls, target: Target) -> dict[str, str]:
        """Version by name of everything that the time depends on."""
        import torch

        found = {"torch": str(torch.__version__)}
        if target.is_cuda:
            found["cuda"] = str(torch.version.cuda)
            found["cudnn"] = str(torch.backends.cudnn.version())
        return {**found, **{name: installed(name) for name in cls.packages}}


RUNTIMES: Registry[type[Runtime]] = Registry("runtime", "nas.latency.runtimes")


def installed(module: str) -> str:
    """Version of an installed package; the GPU builds of some are distributions of another name."""
    for name in (module, f"{module}-gpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"


def twin(
    model: nn.Module, dtype: torch.dtype, device: torch.device | str, *, channels_last: bool
) -> nn.Module:
    """A copy in evaluation mode; its floating-point weights are converted."""
    import torch

    def placed(x: Tensor) -> Tensor:
        return x.to(device, dtype) if x.is_floating_point() else x.to(device)

    # Not .to(dtype): that would make complex weights real.
    prepared: nn.Module = copy.deepcopy(model).eval()._apply(placed)
    if channels_last:
        layout: Any = {"memory_format": torch.channels_last}
        prepared = prepared.to(**layout)
    return prepared


def tensors_of(outputs: Any) -> list[Tensor]:
    """The tensors of whatever a model returns, in the order in which an exporter lists them."""
    import torch
    from torch.utils._pytree import tree_flatten

    return [leaf for leaf in tree_flatten(outputs)[0] if isinstance(leaf, torch.Tensor)]


def distinct_shapes(sets: InputSets) -> list[int]:
    """Number of the first set of every shape."""
    first: dict[tuple[tuple[int, ...], ...], int] = {}
    for number, tensors in enumerate(sets):
        first.setdefault(tuple(tuple(x.shape) for x in tensors), number)
    return list(first.values())


def check_outputs(expected: Sequence[Tensor], found: Sequence[Tensor], target: Target) -> None:
    """Compare what a runtime computed with what the model computes by itself.

    The difference counts relative to the largest expected value. A quick wrong answer has no latency worth a name.
    Raises TrialFailure naming the output, the difference and the bound.
    """
    if len(expected) != len(found):
        raise TrialFailure(
            "error", f"{target.runtime}: gives {len(found)} outputs, but the model {len(expected)}"
        )
    bound = _TOLERANCE[target.dtype]
    for number, (want, got) in enumerate(zip(expected, found, strict=True)):
        if want.shape != got.shape:
            shapes = f"has shape {tuple(got.shape)}, but the model's has {tuple(want.shape)}"
            raise TrialFailure("error", f"{target.runtime}: output {number} {shapes}")
        if want.numel() == 0:
            continue
        exact = not want.is_floating_point()
        want, got = want.cpu().double(), got.cpu().double()
        difference = ((want - got).abs().max() / want.abs().max().clamp_min(1e-12)).item()
        # "not <=" and not ">": a NaN must not pass.
        if not difference <= (0.0 if exact else bound):
            raise TrialFailure(
                "error",
                f"{target.runtime}: output {number} deviates from the eager model's by {difference:.2g} of its "
                f"largest value (bound {0.0 if exact else bound:g}); this runtime computes something else",
            )
