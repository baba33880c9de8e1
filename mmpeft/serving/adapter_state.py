"""What one adapted model holds besides its base, and how it is swapped with what the base holds."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmpeft.checkpoint.keys import adapter_keys, frozen_keys
from mmpeft.injection.attach import moved_to
from mmpeft.injection.freeze import Injection
from mmpeft.injection.site import Site
from mmpeft.injection.weights import plain_key


@dataclass(frozen=True)
class AdapterState:
    """All in which an adapted model differs from its base.

    Attributes:
        sites: Where the adapters belong, with the adapters.
        records: What is ``model.peft`` while they are in use.
        tensors: What was trained beside them (heads, unfrozen parameters) and
            the buffers outside the target, by their names in the plain model.
            While the adapter is in use, those of the base are kept here.
    """

    sites: list[Site]
    records: list[Injection]
    tensors: dict[str, Tensor]


def clone_state(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """New tensors for all that an adapted model holds for itself beside its adapters.

    Args:
        model: After :func:`mmpeft.inject`.
        state: Their values, a state dict of this model.

    Returns:
        Tensors by their names in the plain model, tied and trained as they
        are in the model.
    """
    plain = {plain_key(key): value for key, value in state.items()}
    made, result = {}, {}
    for key, own in _own(model).items():
        if id(own) not in made:
            value = torch.empty_like(own, requires_grad=False).copy_(plain[key].detach())
            trained = isinstance(own, nn.Parameter)
            made[id(own)] = nn.Parameter(value, own.requires_grad) if trained else value
        result[key] = made[id(own)]
    return result


def swap_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Swap tensors of a plain model, by name, with those in a dict."""
    for key, held, name in named_slots(model):
        if key in tensors:
            held[name], tensors[key] = moved_to(tensors[key], held[name]), held[name]


def named_slots(model: nn.Module) -> Iterator[tuple[str, dict, str]]:
    """All parameters and buffers of a plain model.

    Yields:
        Name in the model, the dict that holds the tensor, and its name there.
    """
    for path, module in model.named_modules():
        for held in (module._parameters, module._buffers):
            for name, value in held.items():
                if value is not None:
                    yield plain_key(f'{path}.{name}' if path else name), held, name


def _own(model):
    state = model.state_dict(keep_vars=True)
    shared = {id(state[key]) for key in frozen_keys(model)}
    adapters = adapter_keys(model)
    return {
        plain_key(key): value
        for key, value in state.items()
        if key not in adapters and id(value) not in shared
    }
