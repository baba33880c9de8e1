"""One number for each output or input channel of a weight."""

import torch
from torch import Tensor

from .spec import WeightSpec


def output_norm(weight: Tensor, spec: WeightSpec) -> Tensor:
    """Euclidean norm of the weights of each output channel, (out_features,)."""
    if not spec.input_first:
        return torch.linalg.vector_norm(weight.flatten(1), dim=1)
    grouped = weight.reshape(spec.groups, -1, spec.shape[1], *spec.kernel_size)
    return torch.linalg.vector_norm(grouped.transpose(1, 2).flatten(2), dim=2).flatten()


def magnitude_ratio(magnitude: Tensor, norm: Tensor, detach: bool = False) -> Tensor:
    """magnitude / norm, 1 where the norm is 0; ``detach`` takes the norm as a constant."""
    norm = norm.detach() if detach else norm
    return torch.where(norm > 0, magnitude / norm.clamp_min(1e-30), 1)


def per_output(values: Tensor, spec: WeightSpec) -> Tensor:
    """A number for each output channel, (out_features,), shaped to multiply the weight."""
    if spec.numel == spec.out_features:  # a norm's weight or a bias, in transformers also on 4 axes
        return values.view(spec.shape)
    ones = (1,) * len(spec.kernel_size)
    if not spec.input_first:
        return values.view(-1, 1, *ones)
    rows = values.view(spec.groups, 1, spec.shape[1])
    return rows.expand(-1, spec.shape[0] // spec.groups, -1).reshape(spec.shape[:2] + ones)


def per_input(values: Tensor, spec: WeightSpec) -> Tensor:
    """A number for each input channel, (in_features,), shaped to multiply the weight.

    A grouped convolution's rows see the channels of their own group.
    """
    if len(spec.shape) == 1:
        return values
    ones = (1,) * len(spec.kernel_size)
    if spec.input_first:
        return values.view(-1, 1, *ones)
    rows = values.view(spec.groups, 1, -1).expand(-1, spec.shape[0] // spec.groups, -1)
    return rows.reshape(spec.shape[0], -1, *ones)


def draw_input_dropout(like: Tensor, spec: WeightSpec, p: float) -> Tensor:
    """A random 0, with probability p, or 1 / (1 - p) for each input channel, (in_features,).

    ``like`` gives dtype and device.
    """
    keep = torch.full((spec.in_features,), 1 - p, dtype=like.dtype, device=like.device)
    return torch.bernoulli(keep) / (1 - p)
