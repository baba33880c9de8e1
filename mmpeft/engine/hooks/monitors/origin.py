"""Where in a network values that are not finite appear first."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn


class Origin:
    """Watches all layers in forward and backward for NaN and infinity.

    It waits for the device at each layer, and is for a few iterations only.

    Args:
        model: Whose layers are watched from here on.

    Attributes:
        arose: The first layer, in order of execution, whose output has NaN
            though its inputs have none; and the same for infinity, which some
            networks mask with.
        reached: The first layer that has such an input.
        gradient: The first gradient in backward that is not finite.
        before: The last finite one before it.
    """

    def __init__(self, model: nn.Module):
        self.forget()
        self._handles = []
        for name, module in model.named_modules():
            hook = self._forward_hook(name or 'the model')
            self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self._handles.append(parameter.register_hook(self._gradient_hook(name)))

    def forget(self) -> None:
        """Begin anew, as at the next iteration."""
        self.arose, self.reached = {}, {}
        self.gradient = self.before = None

    def close(self) -> None:
        """Take the hooks off."""
        while self._handles:
            self._handles.pop().remove()

    def _forward_hook(self, name):
        def hook(module, args, kwargs, output):
            for kind in kinds_in(output) - self.arose.keys():
                found = self.reached if kind in kinds_in((args, kwargs)) else self.arose
                found.setdefault(kind, name)
            for tensor in tensors_in(output):
                if tensor.grad_fn is not None:
                    tensor.register_hook(self._gradient_hook(f'the output of {name}'))

        return hook

    def _gradient_hook(self, name):
        def hook(gradient):
            if not self.gradient:
                if gradient.isfinite().all():
                    self.before = name
                else:
                    self.gradient = name

        return hook

    def __str__(self):
        told = [
            f'Forward: {kind} appears first in {self.arose[kind]!r}, whose inputs have none.'
            if kind in self.arose
            else f'Forward: {kind} is first given to {self.reached[kind]!r}.'
            for kind in sorted(self.arose | self.reached)
        ]
        if not told and (self.before or self.gradient):
            told.append('Forward: all layers are finite.')
        if self.gradient:
            told.append(
                f'Backward: the first gradient that is not finite is that of {self.gradient}'
                + (f'; that of {self.before} is finite.' if self.before else '.')
            )
        elif self.before:
            told.append('Backward: all gradients are finite.')
        return ' '.join(told) or 'No layer could be watched.'


def tensors_in(value) -> Iterator[Tensor]:
    """The floating tensors in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def kinds_in(value) -> set[str]:
    """Of NaN and infinity those that tensors in it have."""
    tensors = [tensor for tensor in tensors_in(value) if not tensor.isfinite().all()]
    kinds = dict(NaN=torch.isnan, infinity=torch.isinf)
    return {kind for kind, test in kinds.items() if any(test(t).any() for t in tensors)}
