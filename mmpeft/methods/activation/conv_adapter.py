"""Conv-Adapter: a depthwise separable bottleneck beside a convolution (arXiv:2208.07463).

    f(x) -> f(x) + s (h(x * K + k) B + b)

with K a convolution of the layer's kernel, stride, padding and dilation from its ``in`` channels
to w in w groups, B a 1x1 convolution and s a number for each output channel. w is the largest
divisor of ``in`` that is at most ``in`` / reduction. This is the paper's 'convolution parallel',
on every convolution with more than one position but transposed ones; the authors' program adapts
one convolution a block, and adds behind its norm in ResNet.

B and the biases start at zero, so that the start is the identity (in the program B is uniform), s
at 1 and K uniform, as there.
"""

from mmpeft.methods.arguments import require
from mmpeft.methods.base import Card, register, uniform
from mmpeft.methods.spec import InsertionPoint

from .base import BranchMethod
from .bottleneck import ACTIVATIONS, Activation, across_channels
from .parallel import check_size


@register
class ConvAdapter(BranchMethod):
    """A depthwise separable bottleneck beside each convolution; ``activation`` is h."""

    card = Card(
        family='activations',
        formula='x ∗ W + s (h(x ∗ K + k) B + b)',
        suits='Convolutional networks, where a non-linearity between the factors is wanted.',
    )

    kinds = ('layer',)
    reduction: int = 8
    activation: Activation = 'relu'

    def __post_init__(self):
        super().__post_init__()
        require(self, 'reduction', self.reduction > 0, 'must be positive.')

    def accepts(self, point):
        layer = point.layer
        return 'conv' in layer.kinds and 'pointwise' not in layer.kinds and not layer.transposed

    def width(self, point: InsertionPoint) -> int:
        """w, the channels between the two convolutions."""
        limit = max(1, point.in_features // self.reduction)
        return next(w for w in range(limit, 0, -1) if point.in_features % w == 0)

    def init(self, weight, point):
        width, out = self.width(point), point.out_features
        return {
            'kernel': uniform(weight, width, point.in_features // width, *point.layer.kernel_size),
            'kernel_bias': weight.new_zeros(width),
            'up': weight.new_zeros(out, width),
            'up_bias': weight.new_zeros(out),
            'scale': weight.new_ones(out),
        }

    def branch(self, x, y, factors, point):
        kernel, axes = factors['kernel'], len(point.layer.kernel_size)
        x = x.to(kernel.dtype)
        inner = point.geometry.convolve(x, kernel, factors['kernel_bias'], len(kernel))
        active, axis = ACTIVATIONS[self.activation](inner), -1 - axes
        added = across_channels(active, factors['up'], factors['up_bias'], axis)
        check_size(self, added, y, point)
        return added * factors['scale'].view(-1, *(1,) * axes)
