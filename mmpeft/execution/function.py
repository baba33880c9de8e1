"""The base of all fast forms: one autograd function around hand-written gradients."""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor
from torch.autograd import Function

from mmpeft.methods.precision import outside_autocast
from mmpeft.transforms import is_transformed

from .checkpointing import save_first
from .recompute import restored, saved_or_recomputed


class FastFunction:
    """y = f(x, *tensors), with its gradients.

    A subclass is a dataclass of the arguments that are not tensors. It defines functions which run
    outside autocast:

    ``forward(save, x, *tensors)`` returns y. Before it computes y, a product calls ``save`` once
        with what is saved besides the arguments.
    ``saves_output(x, *tensors)`` says whether y is saved too; by default it is not.
    ``gradients(needs, dy, x, *tensors, *saved[, y])`` returns the gradients of x and the tensors,
        where ``needs`` says that they are needed. Trailing ones that do not exist may be omitted.
        y is None if later layers changed it in place.
    ``reference(x, *tensors)`` returns y, computed by torch's operations alone. It takes the place
        of the others where these are transformed (:func:`is_transformed`) and where gradients are
        differentiated again (``create_graph=True``).

    Backward may recompute the tensors instead of saving them, and x where ``recomputes_input``.
    Where ``asks_for_input``, ``gradients`` is given a function in place of x that returns it.
    """

    recomputes_input: ClassVar[bool] = False
    asks_for_input: ClassVar[bool] = False

    def saves_output(self, x: Tensor, *tensors: Tensor | None) -> bool:
        """See above."""
        return False

    def __call__(self, x: Tensor, *tensors: Tensor | None) -> Tensor:
        """y, with its gradients."""
        if is_transformed():
            return self.reference(x, *tensors)
        if not torch.is_grad_enabled():
            with outside_autocast(x.device.type):
                return self.forward(_save_nothing, x, *tensors)
        return _Recorded.apply(self, x, *tensors)


class _Recorded(Function):
    @staticmethod
    def forward(ctx, function, x, *tensors):
        ctx.restores, kept = saved_or_recomputed((x, *tensors), function.recomputes_input)
        ctx.saved_first = None

        def save(*more):
            kept.extend(more)
            ctx.saved_first = save_first(*kept)

        with outside_autocast(x.device.type):
            y = function.forward(save, x, *tensors)
        output, saves_output = y, function.saves_output(x, *tensors)
        if saves_output or y._is_view():
            # No view, since in-place activations refuse views. If one changes the output, it
            # changes the saved y too, whose memory is the same, and autograd does not notice.
            output = y.data
        ctx.function, ctx.changed = function, changes_of(output) if saves_output else None
        rest = kept if ctx.saved_first is None else ()
        ctx.save_for_backward(*rest, *((y,) if saves_output else ()))
        return output

    @staticmethod
    def backward(ctx, dy):
        _, *needs = ctx.needs_input_grad
        later = ctx.function.asks_for_input and not torch.is_grad_enabled()
        with outside_autocast(dy.device.type):
            first = () if ctx.saved_first is None else ctx.saved_first.saved_tensors
            arguments, saved = restored(ctx.restores, (*first, *ctx.saved_tensors), later)
            if torch.is_grad_enabled():
                return None, *_of_reference(ctx.function, needs, dy, arguments)
            if ctx.changed is not None and ctx.changed():
                saved = *saved[:-1], None
            found = ctx.function.gradients(needs, dy, *arguments, *saved)
        return None, *found, *(None,) * (len(needs) - len(found))


def _of_reference(function, needs, dy, arguments):
    # Views, since one argument may depend on another, and these are partial derivatives.
    pairs = zip(arguments, needs, strict=True)
    arguments = [tensor.view_as(tensor) if need else tensor for tensor, need in pairs]
    wanted = [tensor for tensor, need in zip(arguments, needs, strict=True) if need]
    y = function.reference(*arguments)
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
    return [next(found) if need else None for need in needs]


def _save_nothing(*_):
    pass


def changes_of(y: Tensor) -> Callable[[], bool]:
    """A function that says whether a tensor was changed in place since; it holds no memory."""
    counter, before = y.detach(), y._version
    counter.data = y.new_empty(0)
    return lambda: counter._version != before
