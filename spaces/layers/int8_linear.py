"""A linear layer with int8 weights; its inputs are quantised anew in every call."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["DynamicInt8Linear"]

_HAS_KERNEL = (
    hasattr(torch, "_make_per_channel_quantized_tensor") and torch.backends.quantized.engine != "none"
)


class DynamicInt8Linear(nn.Module):
    """``x (..., in) -> (..., out)`` with weights of int8, one scale for each output, by torch's quantised CPU kernels.

    Weights are plain buffers, so that the layer is copied and saved like any other; the kernel's packed form is made
    at the first call. While it is exported, and on devices without that kernel, the same arithmetic is done in floats.

    Args:
        in_features, out_features, bias: as of nn.Linear.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(out_features))
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)
        self._packed: Any = None

    @classmethod
    def of(cls, layer: nn.Linear) -> DynamicInt8Linear:
        """Quantised symmetrically: scale = largest weight of the output / 127."""
        made = cls(layer.in_features, layer.out_features, layer.bias is not None)
        values = layer.weight.detach().float().cpu()
        made.scale = (values.abs().amax(dim=1) / 127).clamp(min=1e-12)
        made.weight = (values / made.scale[:, None]).round().clamp(-127, 127).to(torch.int8)
        if layer.bias is not None:
            made.bias = layer.bias.detach().float().cpu().clone()
        return made.eval()

    def config(self) -> dict[str, Any]:
        """Arguments that make this structure again."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias is not None,
        }

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) float32 -> (..., out_features) float32."""
        # Counters work on tensors without data, exporters on symbolic ones: neither has the kernel.
        plain = (
            not _HAS_KERNEL
            or x.device.type != "cpu"
            or torch.compiler.is_compiling()
            or torch.onnx.is_in_onnx_export()
        )
        if plain or type(x) is not Tensor:
            return self._in_floats(x)
        if self._packed is None:
            self._packed = self._pack()
        out: Tensor = torch.ops.quantized.linear_dynamic(x.contiguous(), self._packed, True)
        return out

    def _pack(self) -> Any:
        with warnings.catch_warnings():
            # Quantised tensors are to leave torch one day; here one lives only until the kernel has packed it.
            warnings.simplefilter("ignore")
            quantised = torch._make_per_channel_quantized_tensor(
                self.weight, self.scale.double(), torch.zeros(self.out_features, dtype=torch.long), 0
            )
            return torch.ops.quantized.linear_prepack(quantised, self.bias)

    def _in_floats(self, x: Tensor) -> Tensor:
        """The same quantisation of the inputs (7 bits of range, over the whole tensor), then a product in floats."""
        low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
        step = ((high - low) / 127).clamp(min=1e-12)
        zero = (-low / step).round().clamp(0, 127)
        x = ((x / step).round() + zero).clamp(0, 127) - zero
        return functional.linear(
            x * step, self.weight.to(x.dtype) * self.scale[:, None].to(x.dtype), self.bias
        )

    def __getstate__(self) -> dict[str, Any]:
        # The packed form belongs to this process and to this machine's kernels.
        return {**super().__getstate__(), "_packed": None}
