"""RepAdapter: a linear bottleneck before a layer, folded into its weight (arXiv:2302.08106).

    W' = W (I + s U D)

on the input channels of W, D (r, n) dense and U (n, r) block-diagonal with g blocks: a part of the
channels is made of a part of the r features. Kernels keep their axes (in the paper the adapter is
a 1x1 convolution before the layer). A grouped convolution has the same U and D in each group, so
that a depthwise one, with a single channel a group, has a scale.

D starts as Xavier's uniform and U at zero. The authors' program puts adapters before attention and
MLP (in ConvNeXt before the depthwise convolution and the MLP), which is
``include=('qkv', 'fc1', 'conv_dw')`` in timm's names, and gives D and U biases: what they add to a
layer without padding is a change of its bias, as BitFit has it. It drops entries between D and U
with a probability of 0.1.

The change of W is made of W itself, so that it has no thin form.
"""

import torch
from torch import Tensor

from .arguments import require
from .base import Card, Factors, register
from .ranked import Ranked
from .spec import WeightSpec


@register
class RepAdapter(Ranked):
    """A bottleneck of ``rank`` r before each layer; ``scale`` is s, ``groups`` g.

    r is capped by n. Where one of them is not a multiple of g, there is one block.
    """

    card = Card(
        family='reconstruction',
        formula='W (I + s · U D) on the input channels',
        suits='Adapters before a layer that cost nothing when merged; U and D are small.',
    )

    grows = False  # an odd rank has one block

    groups: int = 2
    scale: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        require(self, 'groups', self.groups > 0, 'must be positive.')

    def inputs(self, spec: WeightSpec) -> int:
        """n, the input channels of a group."""
        return spec.in_features // spec.groups

    def init(self, weight, spec) -> Factors:
        size = self.inputs(spec)
        rank = min(self.rank, size)
        groups = 1 if rank % self.groups or size % self.groups else self.groups
        bound = (6 / (size + rank)) ** 0.5
        return {
            'down': weight.new_empty(rank, size).uniform_(-bound, bound),
            'up': weight.new_zeros(groups, size // groups, rank // groups),
        }

    def apply(self, weight, factors, spec, training=False):
        update = self.scale * torch.block_diag(*factors['up']) @ factors['down']
        return weight + along_inputs(weight, update, spec)


def along_inputs(weight: Tensor, matrix: Tensor, spec: WeightSpec) -> Tensor:
    """W M with M (n, n) on the input channels of each group; of the weight's shape."""
    if not spec.input_first:
        return torch.tensordot(weight, matrix, ([1], [0])).movedim(-1, 1)
    grouped = weight.unflatten(0, (spec.groups, -1))
    return torch.tensordot(grouped, matrix, ([1], [0])).movedim(-1, 1).flatten(0, 1)
