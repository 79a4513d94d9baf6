"""Int8 weights with dynamically quantised inputs, kept only where they are really faster on the target."""

from __future__ import annotations

import copy
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from compress.measuring import compare_on_target, count
from compress.passes import register_pass
from compress.passes.base import Context, Pass
from nas.errors import UserMistake
from spaces.layers.int8_linear import DynamicInt8Linear

__all__ = ["DynamicQuantization"]

Backend = Literal["auto", "torch", "torchao"]


@register_pass("dynamic_quantization")
class DynamicQuantization(Pass):
    """Turns Linear layers into int8 layers; if the model is then not faster on the target, it stays as it was.

    Args:
        backend: ``torch`` (quantised CPU kernels of torch: a CPU target in fp32), ``torchao`` (int8 weights and
            activations of that package, where it is installed; such a result cannot be saved), or ``auto``: torch on a
            CPU, torchao on a GPU.
        least: layers with fewer inputs or outputs stay in floats, at least 1.
        skip: parts of names of layers that stay in floats; the classifier by default.
        seconds: of measuring whether it is faster, above 0.
        keep_anyway: keep the int8 model without looking.
    """

    changes = frozenset({"precision"})

    def __init__(
        self,
        backend: Backend = "auto",
        *,
        least: int = 16,
        skip: tuple[str, ...] | list[str] = ("head",),
        seconds: float = 6.0,
        keep_anyway: bool = False,
    ):
        if backend not in ("auto", "torch", "torchao"):
            raise UserMistake(f"dynamic_quantization: backend={backend!r}; allowed: auto, torch, torchao")
        if least < 1 or not seconds > 0:
            raise UserMistake(
                f"dynamic_quantization: least={least} must be at least 1 and seconds={seconds} above 0"
            )
        self.backend, self.least, self.skip = backend, least, tuple(skip)
        self.seconds, self.keep_anyway = seconds, keep_anyway
        self._verdicts: dict[Any, tuple[bool, str]] = {}

    def apply(self, model: nn.Module, context: Context) -> nn.Module:
        """See ``Pass.apply``; nothing is trained and no data is needed."""
        make = self._maker(context)
        quantised = make(copy.deepcopy(model).eval())
        if self.keep_anyway:
            return quantised
        faster, words = self._verdict(quantised, model, context)
        context.report(words)
        return quantised if faster else copy.deepcopy(model).eval()

    def _verdict(self, quantised: nn.Module, model: nn.Module, context: Context) -> tuple[bool, str]:
        """Whether int8 is faster, and the figures; a pipeline that looks first does not measure twice."""
        shapes = tuple((name, tuple(x.shape)) for name, x in model.state_dict().items())
        key = (shapes, count(model, context.example)["macs"], str(context.target))
        if key not in self._verdicts:
            pair = compare_on_target(quantised, model, context, seconds=self.seconds)
            figures = f"int8 takes {pair.ratio:.3f} [{pair.low:.3f}, {pair.high:.3f}] of the time on {context.target}"
            faster = pair.verdict == "faster"
            how = ": kept" if faster else ", which is not surely faster: the model stays as it was"
            self._verdicts[key] = (faster, figures + how)
        return self._verdicts[key]

    def _maker(self, context: Context) -> Callable[[nn.Module], nn.Module]:
        target = context.target
        backend = self.backend
        if backend == "auto":
            backend = "torch" if target.device_kind == "cpu" else "torchao"
        if backend == "torchao":
            if importlib.util.find_spec("torchao") is None:
                raise UserMistake(
                    f"dynamic_quantization: int8 on {str(target)!r} needs torchao, which is not installed; "
                    "pip install torchao, or leave this pass out"
                )
            return self._by_torchao
        if target.device_kind != "cpu" or target.dtype != "fp32":
            raise UserMistake(
                f"dynamic_quantization: torch's int8 kernels are for a CPU target in fp32, not {str(target)!r}; "
                "use backend=torchao, or leave this pass out"
            )
        if not torch.backends.quantized.supported_engines or torch.backends.quantized.engine == "none":
            raise UserMistake(
                "dynamic_quantization: this build of torch has no int8 kernels; leave this pass out"
            )
        return self._by_torch

    def _by_torch(self, model: nn.Module) -> nn.Module:
        # Layers whose weights somebody uses without calling them cannot become int8.
        read = {
            f"{name}.{part}".lstrip(".")
            for name, module in model.named_modules()
            for part in getattr(module, "reads_weights", ())
        }
        chosen = [
            name for name, module in model.named_modules() if name not in read and self._fits(name, module)
        ]
        if not chosen:
            raise UserMistake(
                f"dynamic_quantization: no Linear layer of at least {self.least} inputs and outputs to quantise"
            )
        for name in chosen:
            owner, _, leaf = name.rpartition(".")
            layer = model.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            setattr(model.get_submodule(owner), leaf, DynamicInt8Linear.of(layer))
        return model

    def _by_torchao(self, model: nn.Module) -> nn.Module:
        quantization: Any = importlib.import_module("torchao.quantization")
        quantization.quantize_(
            model,
            quantization.Int8DynamicActivationInt8WeightConfig(),
            filter_fn=lambda module, name: self._fits(name, module),
        )
        return model

    def _fits(self, name: str, module: nn.Module) -> bool:
        # Of a class that Linear is only the parent of, nothing is known.
        if type(module) is not nn.Linear or any(word in name.split(".") for word in self.skip):
            return False
        return min(module.in_features, module.out_features) >= self.least
