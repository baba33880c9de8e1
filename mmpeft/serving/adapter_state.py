"""What one adapted model has apart from its base, and its exchange for what the base has."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmpeft.checkpoint.keys import adapter_keys, frozen_keys
from mmpeft.injection.reattach import Piece, moved_to
from mmpeft.injection.weights import plain_key


@dataclass(frozen=True)
class Part:
    """All in which an adapted model differs from its base.

    Attributes:
        pieces: The adapters.
        records: What is ``model.peft`` while they are in use.
        tensors: What was trained beside them (heads, unfrozen parameters) and
            the buffers outside the target, by their names in the plain model.
            While the part is in use, the base's own stand here.
    """

    pieces: list[Piece]
    records: list
    tensors: dict[str, Tensor]


def copies(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
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


def exchange(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put tensors in their places in a plain model, and what was there in the dict."""
    for key, held, name in places(model):
        if key in tensors:
            held[name], tensors[key] = moved_to(tensors[key], held[name]), held[name]


def places(model: nn.Module) -> Iterator[tuple[str, dict, str]]:
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
