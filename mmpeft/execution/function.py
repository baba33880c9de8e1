"""What all fast forms have in common: one function of autograd around a form's own mathematics."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor
from torch.autograd import Function

from mmpeft.methods.precision import outside_autocast

from .recompute import save_or_recompute


class FastFunction:
    """y = f(x, *tensors), with a forward and gradients written by hand.

    Both run outside autocast and are not recorded by autograd. Where the gradients are to be
    differentiated in turn (``create_graph=True``), those of :meth:`reference` are taken.
    Subclasses are dataclasses of what is not a tensor, and document the shapes of all that is.

    Attributes:
        recomputes_input: Whether ``x`` may be computed again in backward; it is saved if not.
    """

    recomputes_input: ClassVar[bool] = False

    def __call__(self, x: Tensor, *tensors: Tensor | None) -> Tensor:
        """y, with its gradients."""
        return _Recorded.apply(self, x, *tensors)

    def forward(self, x: Tensor, *tensors: Tensor | None) -> tuple[Tensor, tuple]:
        """y, and the tensors to save beside the arguments.

        ``y`` itself may be one of them. It is None in backward if later layers changed it in place.
        """
        raise NotImplementedError

    def gradients(
        self, needs: Sequence[bool], dy: Tensor, x: Tensor, *tensors_and_saved: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """The gradients of x and ``tensors``.

        Args:
            needs: Which of them are needed.
            dy: The gradient of y, of its shape.
            x: As in forward.
            *tensors_and_saved: ``tensors``, then what forward saved.

        Returns:
            One for each argument; those at the end that have none may be left out.
        """
        raise NotImplementedError

    def reference(self, x: Tensor, *tensors: Tensor | None) -> Tensor:
        """y by operations that torch differentiates any number of times."""
        raise NotImplementedError


class _Recorded(Function):
    @staticmethod
    def forward(ctx, function, x, *tensors):
        with outside_autocast(x.device.type):
            y, saved = function.forward(x, *tensors)
        if torch.compiler.is_compiling():
            saved = [None if tensor is y else tensor for tensor in saved]
        ctx.function = function
        restore, kept = save_or_recompute(x) if function.recomputes_input else (_itself, (x,))
        ctx.restore, ctx.ends = restore, (len(kept), len(kept) + len(tensors))
        ctx.save_for_backward(*kept, *tensors, *saved)
        # No view, which activations in place refuse. What is saved of y is an alias of the output,
        # whose changes autograd does not see.
        output = torch.ops.aten._unsafe_view(y, y.shape)
        ctx.position = next((i for i, tensor in enumerate(saved) if tensor is y), None)
        ctx.changed = None if ctx.position is None else changes_of(output)
        return output

    @staticmethod
    def backward(ctx, dy):
        function, needs = ctx.function, ctx.needs_input_grad[1:]
        tensors = list(ctx.saved_tensors)
        kept, tensors, saved = (tensors[i:j] for i, j in pairwise((0, *ctx.ends, None)))
        with outside_autocast(dy.device.type):
            x = ctx.restore(*kept)
            if torch.is_grad_enabled():
                return None, *_of_reference(function, needs, dy, (x, *tensors))
            if ctx.position is not None and ctx.changed():
                saved[ctx.position] = None
            found = function.gradients(needs, dy, x, *tensors, *saved)
        return None, *found, *(None,) * (len(needs) - len(found))


def changes_of(y: Tensor) -> Callable[[], bool]:
    """Tells later whether a tensor was changed in place since, without holding its memory."""
    counter, before = y.detach(), y._version
    counter.data = y.new_empty(0)
    return lambda: counter._version != before


def _of_reference(function, needs, dy, arguments):
    wanted = [argument for argument, need in zip(arguments, needs, strict=True) if need]
    y = function.reference(*arguments)
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needs]


def _itself(x):
    return x
