"""DoRA: weight-decomposed low-rank adaptation (arXiv:2402.09353).

    W' = m * V / ||V||,   V = update(W, dW),   m starts at ||W||       Eq. 5

with one magnitude and one norm for each output channel. The norms divide
before they multiply, so that the start is W to the last bit, and a channel
whose weights are all zero stays zero instead of becoming NaN.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmpeft.registry import METHODS

from .base import Card
from .lora import LoRA
from .spec import WeightSpec


def output_norm(weight: Tensor, spec: WeightSpec) -> Tensor:
    """Euclidean norm of the weights of each output channel.

    Args:
        weight: Of ``spec.shape``.
        spec: The weight's role.

    Returns:
        (out_features,)
    """
    if not spec.input_first:
        return torch.linalg.vector_norm(weight.flatten(1), dim=1)
    grouped = weight.reshape(spec.groups, -1, spec.shape[1], *spec.kernel_size)
    return torch.linalg.vector_norm(grouped.transpose(1, 2).flatten(2), dim=2).flatten()


def per_output(values: Tensor, spec: WeightSpec) -> Tensor:
    """A number for each output channel, shaped to multiply the weight.

    Args:
        values: (out_features,)
        spec: The weight's role.

    Returns:
        Broadcastable to ``spec.shape``.
    """
    ones = (1,) * len(spec.kernel_size)
    if not spec.input_first:
        return values.view(-1, 1, *ones)
    rows = values.view(spec.groups, 1, spec.shape[1])
    return rows.expand(-1, spec.shape[0] // spec.groups, -1).reshape(spec.shape[:2] + ones)


@METHODS.register_module()
@dataclass(frozen=True, kw_only=True)
class DoRA(LoRA):
    """LoRA on the direction of the weight, with its magnitude trained apart.

    Attributes:
        detach_norm: Take ||V|| as a constant in backward (the paper's Sec.
            4.3, as peft does): cheaper, and no longer the exact gradient.
    """

    card: ClassVar = Card(
        family='combination',
        formula='m · V / ‖V‖ by output channel, V = W + s · B A',
        trains='A (uniform), B (zero), magnitude m (‖W‖)',
        paper='DoRA, Eq. 5 (arXiv:2402.09353); Subspace tuning, Eq. 27',
        cost='One product and a norm of the whole weight.',
        suits='Low ranks, where LoRA falls short; takes more time a step.',
    )

    detach_norm: bool = False

    def init(self, weight, spec):
        return super().init(weight, spec) | {'magnitude': output_norm(weight, spec)}

    def apply(self, weight, factors, spec, training=False):
        direction = super().apply(weight, factors, spec, training)
        norm = output_norm(direction, spec)
        if self.detach_norm:
            norm = norm.detach()
        ratio = torch.where(norm > 0, factors['magnitude'] / norm.clamp_min(1e-30), 1)
        return direction * per_output(ratio, spec)
