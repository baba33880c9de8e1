"""The form in which a method tells the kernels of :mod:`mmpeft.execution` what it computes."""

from dataclasses import dataclass, replace

from torch import Tensor

from .dropout import draw_input_dropout
from .spec import WeightSpec


@dataclass(frozen=True, eq=False)
class NormalForm:
    """phi(W) by thin factors of its channel modes, which is faster to train than dW itself.

        dW[o, i, k] = sum_ab up[o, a] core[a, b, k] down[b, i]
        W' = update(W, scale * dW) = V, or magnitude * V / ||V|| by output channel

    of a weight whose outputs see all inputs, (out, in, *kernel).

    Attributes:
        up: (out, a)
        core: (a, b, *kernel); None for the identity, where the kernel has one element.
        down: (b, in); None for the identity.
        update: Of :data:`.updates.UPDATES`.
        scale: The factor before dW.
        dropout: Probability with which dW ignores an input channel.
        magnitude: (out,); None where the rows are not normalized.
        detach_norm: Whether ||V|| counts as a constant in backward.
    """

    up: Tensor
    core: Tensor | None
    down: Tensor | None
    update: str = 'additive'
    scale: float = 1.0
    dropout: float = 0.0
    magnitude: Tensor | None = None
    detach_norm: bool = False

    def matrices(self) -> tuple[Tensor, Tensor]:
        """U (out, r) and V (r, in) with dW = U V, where the kernel has one element."""
        if self.core is None:
            return self.up, self.down
        core = self.core.flatten(1)
        return (self.up, core) if self.down is None else (self.up @ core, self.down)

    def with_kernel(self, kernel_size: tuple[int, ...]) -> 'NormalForm':
        """The same with a ``core`` in any case."""
        if self.core is not None:
            return self
        return replace(self, core=self.down.view(*self.down.shape, *kernel_size), down=None)

    def dropped(self, spec: WeightSpec) -> 'NormalForm':
        """The same with the input channels of one training step dropped."""
        if not self.dropout:
            return self
        mask = draw_input_dropout(self.up, spec, self.dropout)
        if self.down is not None:
            return replace(self, down=self.down * mask, dropout=0.0)
        mask = mask.view(-1, *(1,) * len(spec.kernel_size))
        return replace(self, core=self.core * mask, dropout=0.0)
