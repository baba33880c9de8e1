"""PaFi: the entries of the smallest magnitude (arXiv:2305.16742).

    W' = W, with values added to the k entries of the smallest |W|     Subspace tuning, Sec. 3.3.3

A mask that needs no data and is the same for every task. As in the paper the
choice is made over the entries of one weight, not of the whole network.
"""

from .base import Card, register
from .sparse import SparseMethod


@register
class PaFi(SparseMethod):
    """A few small entries of each weight, trained themselves."""

    card = Card(
        family='reconstruction',
        formula='W + v at k fixed entries',
        suits='A sparse change without a look at the data, with one mask for all tasks.',
    )

    def scores(self, weight):
        return -weight.abs()
