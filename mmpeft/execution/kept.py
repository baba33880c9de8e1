"""Adapted weights that are kept while nothing trains: evaluation costs what a plain one does."""

import torch
from torch import Tensor, nn

NAME = '_mmpeft_kept'


def may_keep(layer: nn.Module) -> bool:
    """Whether a layer computes neither for training nor for a compiler."""
    if torch.is_grad_enabled() or layer.training or torch.compiler.is_compiling():
        return False
    return not layer.parametrizations.weight[0].training


def kept_weight(layer: nn.Module) -> Tensor:
    """phi(W), built anew only where W or what the adapter holds has changed."""
    chain = layer.parametrizations.weight
    held = [chain.original, *chain[0].factors.values()]
    if any(tensor.is_inference() for tensor in held):
        return layer.weight
    stamp = [(id(tensor), tensor.data_ptr(), tensor._version) for tensor in held]
    before, weight = layer.__dict__.get(NAME, (None, None))
    if before != stamp:
        weight = layer.weight.detach()
        layer.__dict__[NAME] = stamp, weight
    return weight


def forget(layer: nn.Module) -> None:
    """Free the memory."""
    layer.__dict__.pop(NAME, None)
