"""Layers with scaled channels: their scales' gradients are sums over maps, not of a dense gradient.

y = D1 W D2 x + b, with d(D1) = sum dy * (y - b) / D1 and d(D2) = sum dx * x / D2.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mmpeft.methods.spec import ConvGeometry

from .conv import convolution_gradients
from .function import FastFunction
from .linear import has_zeros
from .matmul import ChannelsLast, flat, layout_of, linear


@dataclass(eq=False)
class ScaledLayer(FastFunction):
    """y of a linear layer or a convolution whose outputs and inputs are scaled.

    Shapes: ``x`` (..., I) or (N, I, *size); ``weight`` W (O, I / groups, *kernel), frozen;
    ``bias`` b (O,) or None; ``outputs`` (O,) or None; ``inputs`` (I,) or None. Each gradient has
    its argument's shape.

    Attributes:
        geometry: Of a convolution, with zeros alone and as many before an axis as after it; None
            for a linear layer.
        groups: Of a convolution.
        beside: Scale the maps instead of the weight.
    """

    recomputes_input: ClassVar = True
    asks_for_input: ClassVar = True
    geometry: ConvGeometry | None
    groups: int
    beside: bool

    def forward(self, save, x, weight, bias, outputs, inputs):
        save()
        if not self.beside:
            return self._run(x, self._scaled(weight, outputs, inputs), bias)
        x = x if inputs is None else x * self._along(inputs, x)
        y = self._run(x, weight, bias if outputs is None else None)
        if outputs is not None:
            y.mul_(self._along(outputs, y))
            y = y if bias is None else y.add_(self._along(bias, y))
        return y

    def saves_output(self, x, weight, bias, outputs, inputs):
        return outputs is not None

    def gradients(self, needs, dy, x, weight, bias, outputs, inputs, y=None):
        need_x, _, need_bias, need_outputs, need_inputs = needs
        dx = d_bias = d_outputs = d_inputs = None
        dy = dy.contiguous() if self.geometry is None else dy
        if need_bias or (need_outputs and bias is not None):
            d_bias = self._total(dy, torch.promote_types(dy.dtype, torch.float32))
        y = None if need_outputs and y is not None and has_zeros(outputs) else y
        if self.geometry is not None or need_inputs or (need_outputs and y is None):
            x = x()
        if need_outputs and y is None:
            y = self._run(x, self._scaled(weight, None, inputs))
            d_outputs = self._dot(dy, y, outputs.dtype)
        elif need_outputs:
            d_outputs = self._dot(dy, y, outputs.dtype)
            d_outputs = (d_outputs if bias is None else d_outputs - bias * d_bias) / outputs
        if need_x or need_inputs:
            apart = self.beside or (need_inputs and has_zeros(inputs))
            pulled = dy * self._along(outputs, dy) if self.beside and outputs is not None else dy
            within = None if self.beside else outputs, None if apart else inputs
            dx = self._pulled(pulled, x, self._scaled(weight, *within))
        if need_inputs:
            d_inputs = self._dot(dx, x, inputs.dtype)
            d_inputs = d_inputs if apart else d_inputs / inputs
        if dx is not None and inputs is not None and apart:
            dx = dx * self._along(inputs, dx)
        d_bias = d_bias.to(bias.dtype) if need_bias else None
        return dx if need_x else None, None, d_bias, d_outputs, d_inputs

    def reference(self, x, weight, bias, outputs, inputs):
        weight = self._scaled(weight, outputs, inputs)
        if self.geometry is None:
            return F.linear(x, weight, bias)
        return self.geometry.convolve(x, weight, bias, self.groups)

    def _scaled(self, weight, outputs, inputs):
        """D1 W D2, rounded once."""
        scaled, ones = weight, (1,) * (weight.ndim - 2)
        if outputs is not None:
            scaled = scaled * outputs.view(-1, 1, *ones)
        if inputs is not None:
            rows = inputs.view(self.groups, 1, -1).expand(-1, len(weight) // self.groups, -1)
            scaled = scaled * rows.reshape(len(weight), -1, *ones)
        return scaled.to(weight.dtype)

    def _run(self, x, weight, bias=None):
        if self.geometry is None:
            return linear(x, weight, bias)
        return self.geometry.convolve(x, weight, bias, self.groups)

    def _pulled(self, dy, x, weight):
        if self.geometry is None:
            return linear(dy, weight.T)
        needs = [True, False]
        return convolution_gradients(self.geometry, dy, x, weight, needs, self.groups)[0]

    def _dot(self, one, other, dtype):
        """The sum of the product of two maps over positions, (channels,)."""
        if self.geometry is None:
            return ChannelsLast.dot(one, other, dtype)
        layout = layout_of(other)
        return layout.dot(flat(one, layout), flat(other, layout), dtype)

    def _along(self, values: Tensor, x: Tensor) -> Tensor:
        """Numbers of channels, to multiply a map, in its dtype."""
        values = values.to(x.dtype)
        return values if self.geometry is None else values.view(-1, *(1,) * (x.ndim - 2))

    def _total(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The sum of a map over its positions, (channels,)."""
        channel = x.ndim - 1 if self.geometry is None else 1
        where = [d for d in range(x.ndim) if d != channel]
        return x.sum(where, dtype=dtype) if where else x.to(dtype)
