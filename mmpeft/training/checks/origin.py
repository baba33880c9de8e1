"""Where in a network values that are not finite appear first."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


class Origin:
    """Checks all layers of a model, from here on, in forward and backward for NaN and infinity.

    It waits for the device at each layer, so it is for a few iterations only.

    Attributes:
        first_output: The first layer, in order of execution, whose output has
            NaN though its inputs have none; likewise for infinity, which some
            networks mask with.
        first_input: The first layer that has such an input.
        first_gradient: The first gradient in backward that is not finite.
        last_finite: The last finite gradient before it.
    """

    def __init__(self, model: nn.Module):
        self.reset()
        self._handles = []
        for name, module in model.named_modules():
            hook = self._forward_hook(name or 'the model')
            self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self._handles.append(parameter.register_hook(self._gradient_hook(name)))

    def reset(self) -> None:
        """Start again, as at the next iteration."""
        self.first_output, self.first_input = {}, {}
        self.first_gradient = self.last_finite = None

    def close(self) -> None:
        """Remove the hooks."""
        while self._handles:
            self._handles.pop().remove()

    def _forward_hook(self, name):
        def hook(module, args, kwargs, output):
            for kind in _nonfinite_kinds(output) - self.first_output.keys():
                in_input = kind in _nonfinite_kinds((args, kwargs))
                (self.first_input if in_input else self.first_output).setdefault(kind, name)
            for tensor in _tensors_in(output):
                if tensor.grad_fn is not None:
                    tensor.register_hook(self._gradient_hook(f'the output of {name}'))

        return hook

    def _gradient_hook(self, name):
        def hook(gradient):
            if not self.first_gradient:
                if values_of(gradient).isfinite().all():
                    self.last_finite = name
                else:
                    self.first_gradient = name

        return hook

    def __str__(self):
        found = [
            f'Forward: {kind} appears first in {self.first_output[kind]!r}, whose inputs have none.'
            if kind in self.first_output
            else f'Forward: {kind} is first given to {self.first_input[kind]!r}.'
            for kind in sorted(self.first_output | self.first_input)
        ]
        if not found and (self.last_finite or self.first_gradient):
            found.append('Forward: all layers are finite.')
        if self.first_gradient:
            found.append(
                f'Backward: the first gradient that is not finite is that of {self.first_gradient}'
                + (f'; that of {self.last_finite} is finite.' if self.last_finite else '.')
            )
        elif self.last_finite:
            found.append('Backward: all gradients are finite.')
        return ' '.join(found) or 'No layer could be checked.'


def values_of(gradient: Tensor) -> Tensor:
    """A gradient, or what a sparse one (``nn.Embedding(sparse=True)``) stores."""
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def _tensors_in(value: Any) -> list[Tensor]:
    """The floating tensors in nested lists, tuples and dicts."""
    tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return [tensor for tensor in tensors if tensor.is_floating_point()]


def _nonfinite_kinds(value):
    tensors = [tensor for tensor in _tensors_in(value) if not tensor.isfinite().all()]
    kinds = dict(NaN=torch.isnan, infinity=torch.isinf)
    return {kind for kind, test in kinds.items() if any(test(t).any() for t in tensors)}
