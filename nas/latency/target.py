"""A target: the device and the way of running on it for which a latency counts, written as a short text."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from nas.environment import usable_cpus
from nas.errors import UnknownNameError, UserMistake, nearest
from nas.latency.runtimes import ALIASES, RUNTIMES, Runtime

if TYPE_CHECKING:
    import torch

__all__ = ["FORMS", "Precision", "Target"]

Precision = Literal["fp32", "bf16", "fp16"]

FORMS = (
    "cpu, cpu:THREADS, cuda, cuda:INDEX or mps, then +bf16 or +fp16, then +compile, +cudagraph, +onnxruntime (+ort), "
    "+openvino or +tensorrt, then +channels_last, then @BATCH, then /SIZE (224, 224x192, or lengths 16-128), "
    "as in cpu:1, cpu:4+onnxruntime, cuda:0+bf16+compile@8/224"
)
"""What a target may look like, for messages and help texts."""

_MOST_THREADS = 1024
_MOST_INDEX = 1023
_MOST_BATCH = 1_000_000
_MOST_SIZE = 10_000_000
_DTYPES: dict[str, Precision] = {"fp32": "fp32", "bf16": "bf16", "fp16": "fp16"}
_DEVICE = re.compile(r"cpu|cuda|cuda:(?:0|[1-9][0-9]{0,3})|mps")
_SIZE = re.compile(r"[1-9][0-9]{0,7}(?:([x-])[1-9][0-9]{0,7})?")
_CPU_RUNTIMES = ("onnxruntime", "openvino")
"""Runtimes whose name alone is a target, on the CPU."""


@dataclass(frozen=True)
class Target:
    """Where and how a model will run. Latencies of different targets are never compared.

    >>> str(Target.parse("cuda:0+compile+bf16@8/0224"))
    'cuda:0+bf16+compile@8/224'

    Attributes:
        device: ``cpu``, ``cuda`` (the current one), ``cuda:INDEX`` or ``mps``.
        threads: of a CPU target, 1 to 1024; ``None`` means all cores the process may use.
        dtype: the model's weights and floating-point inputs are converted to it.
        runtime: ``eager``, ``compile``, ``cudagraph``, ``onnxruntime``, ``openvino``, ``tensorrt``, or another that
            is registered in ``nas.latency.runtimes``.
        batch: samples in one call, 1 to 1,000,000.
        size: of the input: ``224`` (a square image's side in pixels, or a sequence's length in tokens), ``224x192``
            (height and width), ``16-128`` (lengths uniform in that range, both ends included); ``None`` leaves it to
            the model.
        channels_last: images and the weights that act on them lie in memory with the channels innermost.

    Raises:
        UserMistake: a field out of its range.
    """

    device: str
    threads: int | None = None
    dtype: Precision = "fp32"
    runtime: str = "eager"
    batch: int = 1
    size: str | None = None
    channels_last: bool = False

    def __post_init__(self) -> None:
        if (
            not isinstance(self.device, str)
            or not _DEVICE.fullmatch(self.device)
            or self._index() > _MOST_INDEX
        ):
            self._refuse("device", "cpu, cuda, cuda:INDEX or mps")
        if self.threads is not None and (self.device != "cpu" or not _within(self.threads, _MOST_THREADS)):
            self._refuse("threads", f"a whole number from 1 to {_MOST_THREADS} on a CPU, else None")
        if not isinstance(self.dtype, str) or self.dtype not in _DTYPES:
            self._refuse("dtype", ", ".join(_DTYPES), nearest(str(self.dtype), list(_DTYPES)))
        if not _within(self.batch, _MOST_BATCH):
            self._refuse("batch", f"a whole number from 1 to {_MOST_BATCH}")
        if self.size is not None and not _is_size(self.size):
            self._refuse("size", "'224', '224x192', a range of lengths '16-128' (lower end first), or None")
        if not isinstance(self.channels_last, bool):
            self._refuse("channels_last", "true or false")
        self._runtime()

    def _index(self) -> int:
        return int(self.device.partition(":")[2] or 0)

    def _refuse(self, field: str, allowed: str, hint: str = "") -> None:
        raise UserMistake(f"target: {field}={getattr(self, field)!r}{hint}; allowed: {allowed}")

    @classmethod
    def parse(cls, text: str | Mapping[str, Any]) -> Target:
        """The target of a text (see ``FORMS``) or of a mapping with the fields of this class, as in a recipe.

        Whether this machine can run it is the business of ``check``. Raises UserMistake naming what is allowed.
        """
        if isinstance(text, Mapping):
            return cls._of_mapping(text)
        if not isinstance(text, str):
            raise UserMistake(f"target {text!r} must be a text or a mapping of fields; allowed: {FORMS}")
        body, slash, size_text = text.strip().partition("/")
        body, at, batch_text = body.partition("@")
        first, *options = body.split("+")
        size = _size(text, size_text) if slash else None
        batch = _number(text, "batch", batch_text, 1, _MOST_BATCH) if at else 1
        fields = _device(text, first)
        for option in options:
            field, value = _option(text, option)
            if field in fields:
                raise UserMistake(
                    f"target {text!r}: +{option} repeats or contradicts an option; allowed: {FORMS}"
                )
            fields[field] = value
        return cls(**fields, batch=batch, size=size)

    @classmethod
    def _of_mapping(cls, given: Mapping[str, Any]) -> Target:
        known = [field.name for field in dataclasses.fields(cls)]
        for name in given:
            if name not in known:
                raise UserMistake(
                    f"target: unknown field {name!r}{nearest(str(name), known)}; allowed: {', '.join(known)}"
                )
        if "device" not in given:
            raise UserMistake("target: the field 'device' is missing; allowed: cpu, cuda, cuda:INDEX or mps")
        values = dict(given)
        if type(values.get("size")) is int:  # YAML reads 224 as a number
            values["size"] = str(values["size"])
        runtime = values.get("runtime", "eager")
        values["runtime"] = ALIASES.get(runtime, runtime) if isinstance(runtime, str) else runtime
        return cls(**values)

    def __str__(self) -> str:
        text = self.device if self.threads is None else f"{self.device}:{self.threads}"
        text += "" if self.dtype == "fp32" else f"+{self.dtype}"
        text += "" if self.runtime == "eager" else f"+{self.runtime}"
        text += "+channels_last" if self.channels_last else ""
        text += "" if self.batch == 1 else f"@{self.batch}"
        return text if self.size is None else f"{text}/{self.size}"

    @property
    def device_kind(self) -> Literal["cpu", "cuda", "mps"]:
        """The device without its index."""
        return "cuda" if self.device.startswith("cuda") else "mps" if self.device == "mps" else "cpu"

    @property
    def is_cuda(self) -> bool:
        """Whether it runs on a CUDA device."""
        return self.device_kind == "cuda"

    @property
    def compile(self) -> bool:
        """Whether it runs through ``torch.compile``."""
        return self.runtime == "compile"

    @property
    def lengths(self) -> tuple[int, int] | None:
        """Shortest and longest of a distribution of lengths; ``None`` when all inputs have one size."""
        if self.size is None or "-" not in self.size:
            return None
        low, _, high = self.size.partition("-")
        return int(low), int(high)

    def cpu_threads(self) -> int:
        """The threads a measurement sets: as asked, or all cores that this process may use."""
        return self.threads or usable_cpus()

    def cuda_index(self) -> int:
        """Number of the CUDA device, as torch counts them."""
        import torch

        index = self.torch_device().index
        return torch.cuda.current_device() if index is None else index

    def torch_device(self) -> torch.device:
        """The device for torch."""
        import torch

        return torch.device(self.device)

    def torch_dtype(self) -> torch.dtype:
        """The floating-point type for torch."""
        import torch

        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.dtype]

    def check(self) -> None:
        """Raises UserMistake, in one line, when this machine cannot run it.

        No such device, too few cores, a runtime that is not installed or not for this device, a dtype or memory
        format that the two do not have.
        """
        if self.is_cuda:
            self._check_cuda()
        elif self.device == "mps":
            self._check_mps()
        elif self.threads is not None and self.threads > usable_cpus():
            raise UserMistake(
                f"target {str(self)!r} asks for {self.threads} threads, but this process may use "
                f"{usable_cpus()} cores; use cpu:{usable_cpus()} or fewer"
            )
        self._runtime().check(self)

    def _runtime(self) -> type[Runtime]:
        if isinstance(self.runtime, str):
            try:
                return RUNTIMES.get(self.runtime)
            except UnknownNameError:
                pass
        names = RUNTIMES.names()
        hint = nearest(str(self.runtime), names)
        raise UserMistake(f"target: runtime={self.runtime!r}{hint}; allowed: {', '.join(names)}")

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
        if self._index() >= count:
            allowed = ", ".join(f"cuda:{number}" for number in range(count))
            raise UserMistake(f"target {str(self)!r}: torch sees {count} CUDA device(s); allowed: {allowed}")
        if self.dtype == "bf16" and not torch.cuda.is_bf16_supported():
            raise UserMistake(f"target {str(self)!r}: this CUDA device has no bf16; use +fp16 or neither")

    def _check_mps(self) -> None:
        import torch

        if not torch.backends.mps.is_available():
            raise UserMistake(
                f"target {str(self)!r} asks for Apple's GPU but torch sees none; use --target cpu or cuda"
            )
        if self.channels_last:
            raise UserMistake(
                f"target {str(self)!r}: mps has no kernels for channels_last; leave +channels_last out"
            )
        if self.dtype == "bf16":
            try:
                torch.zeros(1, dtype=torch.bfloat16, device="mps")
            except (RuntimeError, TypeError):
                raise UserMistake(
                    f"target {str(self)!r}: this macOS has no bf16 on mps; use +fp16 or neither"
                ) from None


def _within(value: object, most: int) -> bool:
    return type(value) is int and 1 <= value <= most


def _is_size(text: object) -> bool:
    found = _SIZE.fullmatch(text) if isinstance(text, str) else None
    if found is None:
        return False
    numbers = [int(number) for number in re.split("[x-]", found[0])]
    rising = found[1] != "-" or numbers[0] < numbers[1]
    return rising and all(number <= _MOST_SIZE for number in numbers)


def _device(text: str, first: str) -> dict[str, Any]:
    kind, colon, number = first.partition(":")
    runtime = ALIASES.get(kind, kind)
    if kind == "cpu" or runtime in _CPU_RUNTIMES:
        threads = _number(text, "threads", number, 1, _MOST_THREADS) if colon else None
        alone = {} if kind == "cpu" else {"runtime": runtime}
        return {"device": "cpu", "threads": threads, **alone}
    if kind == "cuda":
        index = _number(text, "device index", number, 0, _MOST_INDEX) if colon else None
        return {"device": "cuda" if index is None else f"cuda:{index}"}
    if first == "mps":
        return {"device": "mps"}
    hint = nearest(kind, ["cpu", "cuda", "mps", *_CPU_RUNTIMES])
    raise UserMistake(f"target {text!r}: unknown device {first!r}{hint}; allowed: {FORMS}")


def _option(text: str, option: str) -> tuple[str, Any]:
    if option in _DTYPES:
        return "dtype", _DTYPES[option]
    if option == "channels_last":
        return "channels_last", True
    runtime = ALIASES.get(option, option)
    try:
        RUNTIMES.get(runtime)
    except UnknownNameError:
        hint = nearest(option, [*RUNTIMES.names(), *ALIASES, *_DTYPES, "channels_last"])
        raise UserMistake(f"target {text!r}: unknown option +{option}{hint}; allowed: {FORMS}") from None
    return "runtime", runtime


def _number(text: str, what: str, digits: str, low: int, high: int) -> int:
    # Not int() alone: it takes signs, underscores and the digits of other scripts.
    if not re.fullmatch(r"[0-9]{1,9}", digits) or not low <= int(digits) <= high:
        raise UserMistake(
            f"target {text!r}: {what} {digits!r} must be a whole number from {low} to {high}; allowed: {FORMS}"
        )
    return int(digits)


def _size(text: str, given: str) -> str:
    plain = (
        re.sub(r"(?<![0-9])0+(?=[0-9])", "", given)
        if re.fullmatch(r"[0-9]+(?:[x-][0-9]+)?", given)
        else given
    )
    if not _is_size(plain):
        raise UserMistake(
            f"target {text!r}: size {given!r} must be 224, 224x192 or a range of lengths 16-128 (lower end first), "
            f"each number from 1 to {_MOST_SIZE}; allowed: {FORMS}"
        )
    return plain
