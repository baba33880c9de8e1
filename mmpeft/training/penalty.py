"""Terms that methods add to the training loss."""

from torch import Tensor, nn

from mmpeft.injection.site import named_adapters
from mmpeft.injection.wrappers import refuse_sharded


def penalty(model: nn.Module) -> Tensor | None:
    """The sum of all adapters' terms, each with its weight; None if there are none.

    :class:`~mmpeft.engine.hooks.PEFTHook` adds it to the losses in a Runner; in a
    loop of your own add it before ``backward``. It is a scalar.

    Raises:
        UsageError: There are terms, and the model is sharded.
    """
    terms = [adapter.penalty() for adapter in named_adapters(model).values()]
    terms = [term for term in terms if term is not None]
    if terms:
        refuse_sharded(model, 'penalty')
    return sum(terms[1:], start=terms[0]) if terms else None
