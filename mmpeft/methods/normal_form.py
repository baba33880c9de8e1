"""The form in which a method tells the kernels of :mod:`mmpeft.execution` what it computes."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .channels import draw_input_dropout, magnitude_ratio
from .spec import WeightSpec
from .updates import UPDATES


@dataclass(frozen=True, eq=False)
class Scales:
    """phi(W) = D1 W D2, in layers of any groups.

    Attributes:
        outputs: D1, of the output channels over all groups; None for the identity.
        inputs: D2, of the input channels likewise.
    """

    outputs: Tensor | None
    inputs: Tensor | None


@dataclass(frozen=True, eq=False)
class NormalForm:
    """phi(W) by thin factors of its channel modes.

        dW[o, i, k] = sum_ab up[o, a] core[a, b, k] down[b, i]
        V = update(W, scale * dW)
        W' = V, or magnitude * V / ||V|| by output channel

    where all outputs see all inputs: W and dW are (out, in, *kernel).

    Attributes:
        up: (out, a)
        core: (a, b, *kernel); None for the identity, where the kernel has one element.
        down: (b, in); None for the identity.
        update: Of :data:`.updates.UPDATES`.
        scale: The factor before dW.
        dropout: Probability with which dW ignores an input channel.
        magnitude: (out,); None where V is not normalized.
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

    def chain(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """U (out, a), G (a, b) or None, and V (b, in) with dW = U G V, for a kernel of 1."""
        if self.core is None:
            return self.up, None, self.down
        core = self.core.flatten(1)
        return (self.up, None, core) if self.down is None else (self.up, core, self.down)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """U (out, r) and V (r, in) with dW = U V, where the kernel has one element."""
        up, core, down = self.chain()
        return up if core is None else up @ core, down

    def with_core(self, kernel_size: tuple[int, ...]) -> 'NormalForm':
        """The same, ``down`` as a ``core`` where there is none."""
        if self.core is not None:
            return self
        return replace(self, core=self.down.view(*self.down.shape, *kernel_size), down=None)

    @property
    def is_thin(self) -> bool:
        """Whether W' is the sum of W and dW."""
        return self.update == 'additive' and self.magnitude is None

    def unfolded(self) -> Tensor:
        """V (a, in * kernel) with dW = U V, where dW is unfolded along its first axis."""
        if self.core is None:
            return self.down
        if self.down is None:
            return self.core.flatten(1)
        return (self.down.T @ self.core.reshape(*self.core.shape[:2], -1)).flatten(1)

    def dropped(self, spec: WeightSpec) -> 'NormalForm':
        """The same with the dropout of one training step in its factors."""
        if not self.dropout:
            return self
        mask = draw_input_dropout(self.up, spec, self.dropout)
        if self.down is not None:
            return replace(self, down=self.down * mask, dropout=0.0)
        mask = mask.view(-1, *(1,) * len(spec.kernel_size))
        return replace(self, core=self.core * mask, dropout=0.0)

    @property
    def rank(self) -> int:
        """Columns of U in :meth:`matrices`."""
        return self.up.shape[1] if self.core is None or self.down is None else len(self.down)

    def ratio(self, weight: Tensor) -> Tensor | None:
        """magnitude / ||V||, (out,), for an additive update of W (out, in), without forming V.

        It is 1 where V is zero, and None without a magnitude.
        """
        if self.magnitude is None:
            return None
        up, down = self.matrices()
        up, weight = up * self.scale, weight.to(up.dtype)
        inner = torch.addmm(up @ (down @ down.T), weight, down.T, alpha=2)
        square = torch.linalg.vector_norm(weight, dim=1).square() + (up * inner).sum(1)
        square = square.detach() if self.detach_norm else square
        inverse = square.clamp_min(torch.finfo(square.dtype).tiny).rsqrt()
        return torch.where(square > 0, self.magnitude * inverse, 1)

    def built(self, weight: Tensor) -> Tensor:
        """W' as :meth:`apply` gives it, without gradients: in the memory of dW, in few passes."""
        up, shape, weight = self.up, weight.shape, weight.flatten(1).to(self.up.dtype)
        down = self.unfolded()
        if self.update == 'additive':
            adapted = torch.addmm(weight, up, down, alpha=self.scale)
        else:
            delta = up @ down
            adapted = UPDATES[self.update](weight, delta, self.scale, delta)
        if self.magnitude is not None:
            norm = torch.linalg.vector_norm(adapted, dim=1)
            adapted.mul_(magnitude_ratio(self.magnitude, norm)[:, None])
        return adapted.view(shape)

    def apply(self, weight: Tensor) -> Tensor:
        """W' without dropout, by operations of torch alone; W is (out, in, *kernel)."""
        delta = self.up if self.core is None else torch.tensordot(self.up, self.core, 1)
        if self.down is not None:
            delta = torch.tensordot(delta, self.down, ([1], [0])).movedim(-1, 1)
        direction = UPDATES[self.update](weight, delta.view(weight.shape), self.scale)
        if self.magnitude is None:
            return direction
        norm = torch.linalg.vector_norm(direction.flatten(1), dim=1)
        ratio = magnitude_ratio(self.magnitude, norm, self.detach_norm)
        return direction * ratio.view(-1, *(1,) * (weight.ndim - 1))
