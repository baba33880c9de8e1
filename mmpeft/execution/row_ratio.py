"""What scales the rows of an adapted matrix to their magnitudes, without forming the matrix.

With V' = W + s U V, its rows' squared norms and their gradients follow from thin products:

    q = ||W||^2 + s U . (2 W V^T + s U V V^T)       by row
    dU = 2 s dq (W V^T + s U V V^T),    dV = E^T W + s E^T U V  with E = 2 s dq U
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mmpeft.methods.normal_form import NormalForm
from mmpeft.quantization import dequantized

from .function import FastFunction
from .matmul import times
from .recompute import cast


@dataclass(eq=False)
class RowRatio(FastFunction):
    """magnitude / ||V'|| by row, 1 where V' is zero: :meth:`.NormalForm.ratio`.

    Shapes: ``up`` U (O, r); ``weight`` W (O, I), frozen, as it is stored; ``down`` V (r, I);
    ``magnitude`` (O,). The result is (O,), and each gradient has its argument's shape.

    Attributes:
        scale: s
    """

    scale: float

    def forward(self, save, up, weight, down, magnitude):
        weight = cast(dequantized(weight), up.dtype)
        narrow = weight @ down.T
        pull = torch.addmm(narrow, up, down @ down.T, alpha=self.scale)
        norm = torch.linalg.vector_norm(weight, dim=1)
        cross = torch.linalg.vecdot(up, narrow.add_(pull))
        square = torch.addcmul(times(cross, self.scale), norm, norm)
        positive = square > 0
        inverse = torch.where(positive, square.rsqrt(), 0)
        save(inverse, pull)
        return torch.where(positive, magnitude * inverse, 1)

    def gradients(self, needs, dy, up, weight, down, magnitude, inverse, pull):
        d_magnitude = dy * inverse
        if not (needs[0] or needs[2]):
            return None, None, None, d_magnitude
        weight = cast(dequantized(weight), up.dtype)
        # 2 s dq
        slope = times(d_magnitude * magnitude, -self.scale).mul_(inverse.square())[:, None]
        rows = slope * up
        d_down = torch.addmm(rows.T @ weight, rows.T @ up, down, alpha=self.scale)
        return slope * pull, None, d_down, d_magnitude

    def reference(self, up, weight, down, magnitude):
        form = NormalForm(up, None, down, scale=self.scale, magnitude=magnitude)
        return form.ratio(dequantized(weight))


def row_ratio(form: NormalForm, weight: Tensor) -> Tensor | None:
    """The ratio of a normal form and W (O, I); None without a magnitude."""
    if form.magnitude is None:
        return None
    up, down = form.matrices()
    if form.detach_norm:
        up, down = up.detach(), down.detach()
    return RowRatio(form.scale)(up, weight, down, form.magnitude)
