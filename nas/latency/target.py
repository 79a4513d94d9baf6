"""A target: the device and the way of running on it for which a latency counts, written as a short text."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

from nas.environment import usable_cpus
from nas.errors import UserMistake, nearest

if TYPE_CHECKING:
    import torch

__all__ = ["FORMS", "Precision", "Target"]

Precision = Literal["fp32", "bf16", "fp16"]

FORMS = (
    "cpu, cpu:THREADS, cuda or cuda:INDEX, then +bf16 or +fp16, then +compile, then @BATCH "
    "(as in cpu:1, cuda:0+bf16+compile@8)"
)
"""What a target may look like, for messages and help texts."""

_MOST_THREADS = 1024
_MOST_BATCH = 1_000_000
_DTYPES: dict[str, Precision] = {"fp32": "fp32", "bf16": "bf16", "fp16": "fp16"}


@dataclass(frozen=True)
class Target:
    """Where and how a model will run. Latencies of different targets are never compared.

    >>> str(Target.parse("cuda:0+compile+bf16@8"))
    'cuda:0+bf16+compile@8'

    Attributes:
        device: ``cpu``, ``cuda`` (the current one) or ``cuda:INDEX``.
        threads: of a CPU target, 1 to 1024; ``None`` means all cores the process may use.
        dtype: the model's weights and floating-point inputs are converted to it.
        compile: run through ``torch.compile``.
        batch: samples in one call, at least 1.
    """

    device: str
    threads: int | None = None
    dtype: Precision = "fp32"
    compile: bool = False
    batch: int = 1

    @classmethod
    def parse(cls, text: str) -> Target:
        """The target of a text; see ``FORMS``. Whether its device exists is the business of ``check``.

        Raises UserMistake naming what is allowed.
        """
        body, at, batch_text = text.strip().partition("@")
        first, *options = body.split("+")
        batch = _number(text, "batch", batch_text, 1, _MOST_BATCH) if at else 1
        device, threads = _device(text, first)
        dtype: Precision | None = None
        compiled = False
        for option in options:
            if option == "compile" and not compiled:
                compiled = True
            elif option in _DTYPES and dtype is None:
                dtype = _DTYPES[option]
            elif option == "compile" or option in _DTYPES:
                raise UserMistake(
                    f"target {text!r}: +{option} repeats or contradicts an option; allowed: {FORMS}"
                )
            else:
                hint = nearest(option, ["compile", *_DTYPES])
                raise UserMistake(f"target {text!r}: unknown option +{option}{hint}; allowed: {FORMS}")
        return cls(device, threads, dtype or "fp32", compiled, batch)

    def __str__(self) -> str:
        text = self.device if self.threads is None else f"{self.device}:{self.threads}"
        text += "" if self.dtype == "fp32" else f"+{self.dtype}"
        text += "+compile" if self.compile else ""
        return text if self.batch == 1 else f"{text}@{self.batch}"

    @property
    def is_cuda(self) -> bool:
        """Whether it runs on a CUDA device."""
        return self.device != "cpu"

    def cpu_threads(self) -> int:
        """The threads a measurement sets: as asked, or all cores that this process may use."""
        return self.threads or usable_cpus()

    def torch_device(self) -> torch.device:
        """The device for torch."""
        import torch

        return torch.device(self.device)

    def torch_dtype(self) -> torch.dtype:
        """The floating-point type for torch."""
        import torch

        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.dtype]

    def check(self) -> None:
        """Raises UserMistake when this machine cannot run it: no device, too few cores, nothing to compile with."""
        if self.is_cuda:
            self._check_cuda()
        elif self.threads is not None and self.threads > usable_cpus():
            raise UserMistake(
                f"target {str(self)!r} asks for {self.threads} threads, but this process may use "
                f"{usable_cpus()} cores; use cpu:{usable_cpus()} or fewer"
            )
        if self.compile:
            self._check_compiler()

    def _check_cuda(self) -> None:
        import torch

        if not torch.cuda.is_available():
            why = (
                "torch was built without CUDA"
                if torch.version.cuda is None
                else "no device or no working driver"
            )
            raise UserMistake(
                f"target {str(self)!r} (--gpu) asks for a CUDA device but torch sees none ({why}); "
                "use --target cpu, or run 'nas doctor' to see what is missing"
            )
        count = torch.cuda.device_count()
        index = self.torch_device().index
        if index is not None and index >= count:
            allowed = ", ".join(f"cuda:{number}" for number in range(count))
            raise UserMistake(f"target {str(self)!r}: torch sees {count} CUDA device(s); allowed: {allowed}")
        if self.dtype == "bf16" and not torch.cuda.is_bf16_supported():
            raise UserMistake(f"target {str(self)!r}: this CUDA device has no bf16; use +fp16 or neither")

    def _check_compiler(self) -> None:
        if self.is_cuda and find_spec("triton") is None:
            raise UserMistake(
                f"target {str(self)!r}: +compile on CUDA needs triton; install it, or leave +compile out"
            )
        if not self.is_cuda and not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
            raise UserMistake(
                f"target {str(self)!r}: +compile needs a C++ compiler; install g++ or leave it out"
            )


def _device(text: str, first: str) -> tuple[str, int | None]:
    kind, colon, number = first.partition(":")
    if kind == "cpu":
        return "cpu", _number(text, "threads", number, 1, _MOST_THREADS) if colon else None
    if kind == "cuda":
        return (f"cuda:{_number(text, 'device index', number, 0, 1023)}" if colon else "cuda"), None
    raise UserMistake(
        f"target {text!r}: unknown device {kind!r}{nearest(kind, ['cpu', 'cuda'])}; allowed: {FORMS}"
    )


def _number(text: str, what: str, digits: str, low: int, high: int) -> int:
    # Not int() alone: it takes signs, underscores and the digits of other scripts.
    if not re.fullmatch(r"[0-9]{1,9}", digits) or not low <= int(digits) <= high:
        raise UserMistake(
            f"target {text!r}: {what} {digits!r} must be a whole number from {low} to {high}; allowed: {FORMS}"
        )
    return int(digits)
