"""Filter atoms: all kernels of a layer change alike (arXiv:2403.00269).

    F = a D  ->  F' = a (D + dD)

writes the kernels F (out in, K) of K positions as combinations a of atoms D, frozen a and trained
atoms. With K atoms, which span all kernels, that is

    W' = W + W M

with M (K, K) = D^-1 dD on the kernel's axes, flattened, whatever D is, so that M trains from zero
and nothing is decomposed or stored. Fewer atoms would confine M; more would add nothing.

A weight whose kernel has one element is cut into blocks of ``block`` x ``block``, each a kernel,
or of the largest smaller divisors of its sides.
"""

from .arguments import require
from .base import Card, Factors, Method, register
from .spec import WeightSpec


def divisor(size: int, limit: int) -> int:
    """The largest divisor of a size that is at most a limit."""
    return next(d for d in range(min(size, limit), 0, -1) if size % d == 0)


@register
class FilterAtoms(Method):
    """A trained map of the positions of a kernel, the same for all kernels of a layer."""

    card = Card(
        family='reconstruction',
        formula='W + W M on the axes of the kernel',
        suits='Convolutional networks and tiny budgets: K² numbers for a layer of K positions.',
    )

    block: int = 4

    def __post_init__(self):
        super().__post_init__()
        require(self, 'block', self.block > 0, 'must be positive.')

    def cell(self, spec: WeightSpec) -> tuple[int, int]:
        """Rows and columns of a block, of a weight whose kernel has one element."""
        return divisor(spec.shape[0], self.block), divisor(spec.shape[1], self.block)

    def init(self, weight, spec) -> Factors:
        positions = spec.numel // spec.shape[:2].numel()
        if positions == 1:
            rows, columns = self.cell(spec)
            positions = rows * columns
        return {'atoms': weight.new_zeros(positions, positions)}

    def apply(self, weight, factors, spec, training=False):
        atoms = factors['atoms']
        if spec.numel > spec.shape[:2].numel():
            kernels = weight.flatten(2)
            return (kernels + kernels @ atoms).view(weight.shape)
        rows, columns = self.cell(spec)
        cut = weight.reshape(spec.shape[0] // rows, rows, spec.shape[1] // columns, columns)
        blocks = cut.transpose(1, 2).flatten(2)
        blocks = (blocks + blocks @ atoms).unflatten(2, (rows, columns))
        return blocks.transpose(1, 2).reshape(weight.shape)
