"""Dropout of input channels, which makes the dropout of LoRA's branch a function of the weight."""

import torch
from torch import Tensor

from .channels import per_input
from .spec import WeightSpec


def draw_input_dropout(like: Tensor, spec: WeightSpec, p: float) -> Tensor:
    """A random 0 or 1 / (1 - p) for each input channel.

    Args:
        like: Gives dtype and device.
        spec: The weight's role.
        p: Probability of 0.

    Returns:
        (in_features,)
    """
    keep = torch.full((spec.in_features,), 1 - p, dtype=like.dtype, device=like.device)
    return torch.bernoulli(keep) / (1 - p)


def input_dropout_mask(weight: Tensor, spec: WeightSpec, p: float) -> Tensor:
    """The same, shaped to multiply a weight.

    Args:
        weight: Gives dtype and device.
        spec: The weight's role; a grouped convolution's rows see the channels
            of their own group.
        p: Probability of 0.

    Returns:
        Broadcastable to ``spec.shape``.
    """
    return per_input(draw_input_dropout(weight, spec, p), spec)
