"""The difference between an adapted model and its base, and swapping the two."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmpeft.checkpoint.keys import adapter_keys, frozen_keys
from mmpeft.injection.attach import moved_to
from mmpeft.injection.freeze import Injection
from mmpeft.injection.site import Site
from mmpeft.injection.weights import join, plain_key


@dataclass(frozen=True)
class AdapterState:
    """Everything in which an adapted model differs from its base.

    Attributes:
        sites: With their adapters.
        records: What ``model.peft`` is while they are in use.
        tensors: What was trained besides them (heads, unfrozen parameters) and
            the buffers outside the target, by their names in the plain model.
            While the adapter is in use, those of the base.
    """

    sites: list[Site]
    records: list[Injection]
    tensors: dict[str, Tensor]


def clone_state(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """New tensors for everything that an adapted model holds besides adapters and frozen base.

    They have the values of a state dict of the model and their names in the
    plain model, and are tied and trainable as in the model.
    """
    own = model.state_dict(keep_vars=True)
    shared = {id(own[key]) for key in (*frozen_keys(model), *adapter_keys(model))}
    clones, result = {}, {}
    for key, value in own.items():
        if id(value) in shared:
            continue
        if id(value) not in clones:
            clone = torch.empty_like(value, requires_grad=False).copy_(state[key].detach())
            is_parameter = isinstance(value, nn.Parameter)
            clones[id(value)] = nn.Parameter(clone, value.requires_grad) if is_parameter else clone
        result[plain_key(key)] = clones[id(value)]
    return result


def swap_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Swap tensors of a plain model with those in a dict, by name."""
    for path, module in model.named_modules():
        for held in (module._parameters, module._buffers):
            for name, value in held.items():
                key = join(path, name)
                if key in tensors:
                    held[name], tensors[key] = moved_to(tensors[key], value), value
