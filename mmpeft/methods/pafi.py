"""PaFi: the entries of the smallest magnitude (arXiv:2305.16742).

    W' = W, with ``values`` added to k entries of it

k is ``share`` of the weight's entries, in the order in which it is stored,
and they are those of the smallest |W|: a mask that needs no data and is the
same for every task. The values start at zero; where they stand (``index``)
is fixed and stored. As in the paper the choice is made over the entries of
one weight, not over those of the whole network.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from mmpeft.errors import UsageError
from mmpeft.registry import METHODS

from .base import Card, Method
from .fish import add_at, largest


@METHODS.register_module()
@dataclass(frozen=True, kw_only=True)
class PaFi(Method):
    """A few small entries of each weight, trained themselves.

    Attributes:
        share: Of a weight's entries that are trained, at least one.
    """

    card: ClassVar = Card(
        family='reconstruction',
        formula='W + v at k fixed entries',
        trains='values v (zero) of the entries of the smallest |W|',
        paper='PaFi (arXiv:2305.16742); Subspace tuning, Sec. 3.3.3',
        cost='The dense gradient of W. A file holds an integer for each value.',
        suits='A sparse change without a look at the data, with one mask for all tasks.',
    )

    share: float = 0.005

    def __post_init__(self):
        if not 0 < self.share <= 1:
            raise UsageError(
                f'PaFi: share={self.share} is no share above 0 and up to 1, such as 0.005.'
            )

    def init(self, weight, spec):
        count = max(1, round(self.share * spec.numel))
        index = largest(-weight.abs(), count)
        return {'values': weight.new_zeros(count), 'index': nn.Buffer(index)}

    def apply(self, weight, factors, spec, training=False):
        return add_at(weight, factors['index'], factors['values'])
