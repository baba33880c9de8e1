"""PaFi, and what it shares with other methods that train a few entries of each weight.

    W' = W, with ``values`` added to k entries of it

k is a fraction (``density``) of the weight's entries, in the order in which it
is stored. The values start at zero; their places (``index``) are fixed and
stored as integers.

PaFi (arXiv:2305.16742; Subspace tuning, Sec. 3.3.3) takes the entries of the
smallest |W|: a mask that needs no data and is the same for every task. As in
the paper the choice is made over the entries of one weight, not of the whole
network.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .allocator import best
from .arguments import require
from .base import Card, Factors, Method, register
from .spec import WeightSpec


def largest(scores: Tensor, count: int) -> Tensor:
    """Places (int64) of the largest of the flattened scores, ascending; of equal ones the first.

    On the meta device they have no values.
    """
    if scores.is_meta:
        return torch.empty(count, dtype=torch.int64, device='meta')
    return best(scores.flatten(), count).nonzero().flatten()


def check_density(method: Method) -> None:
    """Raise UsageError unless ``density`` is above 0 and at most 1."""
    in_range = 0 < method.density <= 1
    require(method, 'density', in_range, 'must be above 0 and at most 1, such as 0.005.')


@dataclass(frozen=True, kw_only=True)
class SparseMethod(Method):
    """Trained values at a fraction of each weight's entries, ``density``, at least one."""

    renamed = {'share': 'density'}

    density: float = 0.005

    def __post_init__(self):
        super().__post_init__()
        check_density(self)

    def count(self, spec: WeightSpec) -> int:
        """k of a weight."""
        return max(1, round(self.density * spec.numel))

    def scores(self, weight: Tensor) -> Tensor:
        """A score of each entry, of the weight's shape; those of the largest are trained."""
        raise NotImplementedError

    def init(self, weight, spec) -> Factors:
        count = self.count(spec)
        index = nn.Buffer(largest(self.scores(weight), count))
        return {'values': weight.new_zeros(count), 'index': index}

    def apply(self, weight, factors, spec, training=False):
        changed = weight.flatten().index_add(0, factors['index'], factors['values'])
        return changed.view(weight.shape)


@register
class PaFi(SparseMethod):
    """A few small entries of each weight, trained themselves."""

    card = Card(
        family='reconstruction',
        formula='W + v at k fixed entries',
        suits='A sparse change chosen without data, with one mask for all tasks.',
    )

    def scores(self, weight):
        return -weight.abs()
