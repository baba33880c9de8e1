"""Terms that methods add to the training loss."""

import torch
from torch import Tensor, nn

from mmpeft.injection.site import named_adapters
from mmpeft.injection.wrappers import is_sharded, refuse_sharded


def penalty(model: nn.Module) -> Tensor | None:
    """The sum of all adapters' terms, each with its weight; None if there are none.

    :class:`~mmpeft.engine.hooks.PEFTHook` adds it to the losses in a Runner; in a
    loop of your own add it before ``backward``. It is a scalar.

    Raises:
        UsageError: There are terms, and the model is sharded.
    """
    adapters = named_adapters(model).values()
    if is_sharded(model) and any(map(_has_term, adapters)):
        refuse_sharded(model, 'penalty')
    terms = [adapter.penalty() for adapter in adapters]
    terms = [term for term in terms if term is not None]
    return sum(terms[1:], start=terms[0]) if terms else None


def _has_term(adapter):
    factors = {name: torch.empty(shape, device='meta') for name, shape in adapter.shapes.items()}
    return adapter.method.penalty(factors, adapter.spec) is not None
