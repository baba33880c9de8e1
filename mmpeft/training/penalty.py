"""Terms that methods add to the training loss."""

import torch
from torch import Tensor, nn

from mmpeft.injection.site import adapter_parameters, named_adapters
from mmpeft.injection.wrappers import is_sharded, refuse_parts
from mmpeft.methods.adapter import Adapter


def penalty(model: nn.Module) -> Tensor | None:
    """The sum of all adapters' terms, each with its weight; None if there are none.

    :class:`~mmpeft.engine.hooks.PEFTHook` adds it to the losses in a Runner; in a
    loop of your own add it before ``backward``, once for each optimizer step. It is a scalar.

    Raises:
        UsageError: There are terms, and the factors are sharded.
    """
    adapters = named_adapters(model).values()
    if is_sharded(model):
        refuse_parts(filter(has_term, adapters), 'penalty')
    terms = {adapter: adapter.penalty() for adapter in adapters}
    terms = {adapter: term for adapter, term in terms.items() if term is not None}
    if not terms:
        return None
    total = sum(list(terms.values())[1:], start=next(iter(terms.values())))

    def note(_=None):
        for adapter in terms:
            adapter.penalized = True

    if torch.compiler.is_compiling():
        note()
    elif total.requires_grad:
        total.register_hook(note)
    return total


def add_gradients(model: nn.Module, scale: float | Tensor = 1.0) -> None:
    """Add the gradients of :func:`penalty`, times a scale, to those of the parameters."""
    with torch.enable_grad():
        term = penalty(model)
        term = None if term is None else term * scale
    if term is not None and term.requires_grad:
        parameters = [p for p in adapter_parameters(model) if p.requires_grad]
        gradients = torch.autograd.grad(term, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                own = parameter.grad
                parameter.grad = gradient if own is None else own + gradient


def has_term(adapter: Adapter) -> bool:
    """Whether an adapter's method adds a term to the loss."""
    factors = {name: torch.empty(shape, device='meta') for name, shape in adapter.shapes.items()}
    return adapter.method.penalty(factors, adapter.spec) is not None
