"""DiTASK: the singular values of a weight are resampled by a diffeomorphism (arXiv:2502.06029).

    W' = U diag(S(phi(t))) V^T

with S the singular values of the weight, in descending order at equal distances t on [0, 1] and
linear in between, and phi the flow, after the time 1, of a velocity that is linear in each of
``cells`` equal cells and zero at both ends. phi keeps the order, so that S remains positive and
descending, and the largest and the smallest value stay. What trains are the velocities at the
cells' inner ends, zero at the start (the authors' program starts them at random, as coefficients of
a basis of such velocities).

The paper writes phi of the values; its program applies it to their places, as here. A matrix of two
or three times as many rows as columns, such as of queries, keys and values, is cut into squares
with one phi. Kernels unfold along their first mode. U, S and V^T are stored with the adapter. The
paper's maps for each of several tasks are several adapters here.
"""

import torch
from torch import Tensor, nn

from ..transforms import is_transformed
from .arguments import require
from .base import Card, Factors, register
from .delta import DeltaMethod
from .spec import WeightSpec

SMALL = 1e-4  # below it a quotient is taken from its series


def flow(places: Tensor, velocities: Tensor) -> Tensor:
    """How far places move in the time 1 with a continuous velocity that is linear in each cell.

    The velocity is integrated exactly, cell by cell (Freifeld et al., 2017).

    Args:
        places: (n,) on [0, 1]
        velocities: (P + 1,) at the ends of P equal cells, zero at the first and last.

    Returns:
        (n,), zero where the velocity is.
    """
    cells, moved, left = len(velocities) - 1, torch.zeros_like(places), torch.ones_like(places)
    near = torch.round(places * cells)
    start = torch.where((places * cells - near).abs() < 1e-9, near, places * cells)
    cell = start.floor().clamp(0, cells - 1).long()
    on_end = (start == cell) & (cell > 0) & (velocities[cell] < 0)
    cell = cell - on_end.long()
    for _ in range(cells):
        low, high = velocities[cell], velocities[cell + 1]
        slope = (high - low) * cells
        at = places + moved
        speed = low + slope * (at - cell / cells)
        forward, still = speed > 0, speed == 0
        end = torch.where(forward, cell + 1, cell) / cells
        end_speed = torch.where(forward, high, low)
        way, safe = end - at, torch.where(still, 1.0, speed)
        # The end is reached only where the velocity there has the same sign.
        growth = torch.where(end_speed * speed > 0, slope * way / safe, 0.0)
        time = way / safe * log_quotient(growth)
        reaches = (end_speed * speed > 0) & (time < left)
        step = speed * left * exp_quotient(slope * torch.where(reaches, 0.0, left))
        moved = moved + torch.where(reaches, way, step)
        left = torch.where(reaches, left - time, 0.0)
        cell = torch.where(reaches, torch.where(forward, cell + 1, cell - 1), cell)
        if not is_transformed() and (reaches.is_meta or not reaches.any()):
            break
    return moved


def exp_quotient(z: Tensor) -> Tensor:
    """(exp(z) - 1) / z, 1 at 0."""
    small = z.abs() < SMALL
    safe = torch.where(small, 1.0, z)
    return torch.where(small, 1 + z / 2 + z.square() / 6, torch.expm1(safe) / safe)


def log_quotient(z: Tensor) -> Tensor:
    """log(1 + z) / z, 1 at 0."""
    small = z.abs() < SMALL
    safe = torch.where(small, 1.0, z)
    return torch.where(small, 1 - z / 2 + z.square() / 3, torch.log1p(safe) / safe)


def resampled(values: Tensor, moved: Tensor) -> Tensor:
    """Values (..., n) at equal distances on [0, 1], read at places (n,) moved by as much."""
    count = values.shape[-1]
    place = torch.arange(count, device=moved.device) + moved * (count - 1)
    # An adapter that is to be loaded is NaN.
    low = place.detach().nan_to_num().floor().clamp(0, count - 1).long()
    high = (low + 1).clamp(max=count - 1)
    first = values[..., low]
    return first + (place - low) * (values[..., high] - first)


@register
class DiTASK(DeltaMethod):
    """A smooth change of all singular values that keeps their order."""

    card = Card(
        family='reconstruction',
        formula='U Σ(φ) Vᵀ, φ a diffeomorphism of the places of singular values',
        suits='Budgets of about thirty numbers per weight; stays within the pretrained spectrum.',
    )

    cells: int = 32

    def __post_init__(self):
        super().__post_init__()
        require(self, 'cells', self.cells > 1, 'must be 2 or more.')

    def accepts(self, spec):
        """Two singular values are both ends, which stay."""
        return super().accepts(spec) and min(spec.shape[0], spec.numel // spec.shape[0]) > 2

    def parts(self, spec: WeightSpec) -> int:
        """Number of squares that a weight is cut into."""
        rows, columns = spec.shape[0], spec.numel // spec.shape[0]
        return rows // columns if rows in (2 * columns, 3 * columns) else 1

    def init(self, weight, spec) -> Factors:
        parts = weight.flatten(1).unflatten(0, (self.parts(spec), -1))
        triplets = torch.linalg.svd(parts, full_matrices=False)
        stored = (nn.Buffer(part.contiguous()) for part in triplets)
        velocities = weight.new_zeros(self.cells - 1)
        return dict(zip(('left', 'values', 'right'), stored, strict=True)) | dict(theta=velocities)

    def delta(self, factors, spec) -> Tensor:
        left, values, theta = factors['left'], factors['values'], factors['theta']
        places = torch.linspace(0, 1, values.shape[1], dtype=values.dtype, device=values.device)
        moved = flow(places, torch.nn.functional.pad(theta, (1, 1)))
        change = resampled(values, moved) - values
        return (left * change[:, None] @ factors['right']).reshape(spec.shape)
