"""VPT: visual prompt tuning (arXiv:2203.12119).

    block(x) -> block([x, P]) without what became of P        Subspace tuning, Eq. 10 and 11

with x (N, L, d) the tokens and P (p, d) the prompts. Deep: each block has its
own. Shallow: they enter the first block and pass through all, hidden from all
modules between blocks: a tensor of tokens carries them as an attribute from one
block to the next. They start uniform within sqrt(6 / (3 s^2 + d)), s the patch
size, as in the paper, so that the start is not the identity. The paper puts them
after the class token; here they come last, which is the same to attention
without positions and keeps the index of each token.

Convolutional networks have no tokens. The paper frames the image with learned
pixels; here the zeros that a convolution pads its input with are learned, so
that every size of image fits and the start is the identity: one value for each
channel and ring, in the convolutions of stride 1 of every block (deep) or in
the first (shallow).
"""

from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from mmpeft.errors import UsageError
from mmpeft.methods.arguments import require
from mmpeft.methods.base import Card, Factors, register

from .base import ActivationMethod

# The attribute of a tensor of tokens that holds the prompts that belong to it.
PROMPTS = '_mmpeft_prompts'


def ring_numbers(size: tuple[int, ...], padding: tuple[int, ...]) -> Tensor:
    """How many steps each position of a padded map lies outside a map of some size; 0 inside."""
    outside = []
    for length, pad in zip(size, padding, strict=True):
        position = torch.arange(-pad, length + pad)
        outside.append(torch.maximum(-position, position - length + 1).clamp_min(0))
    return torch.stack(torch.meshgrid(*outside, indexing='ij')).amax(0)


def framed(x: Tensor, rings: Tensor, padding: tuple[int, ...]) -> Tensor:
    """A map (..., channels, *size) in a frame that is ``padding`` wide on both sides of each axis.

    ``rings`` (channels, number of rings) has the innermost first.
    """
    numbers = ring_numbers(x.shape[-len(padding) :], padding).to(rings.device)
    frame = F.pad(rings, (1, 0))[:, numbers].to(x.dtype)
    sides = [side for pad in reversed(padding) for side in (pad, pad)]
    return F.pad(x, sides) + frame


def cropped(y: Tensor, padding: tuple[int, ...]) -> Tensor:
    """A map without its frame; the reverse of :func:`framed` in size."""
    middle = tuple(slice(pad, -pad or None) for pad in padding)
    return y[(..., *middle)]


@register
class VPT(ActivationMethod):
    """Learned tokens beside an image's own, or learned padding of convolutions.

    Attributes:
        tokens: Number of prompts p.
        deep: New prompts in each block, not in the first alone.
        patch_size: s, for the initial values.
    """

    card = Card(
        family='activations',
        formula='block([x, P]); in convolutional networks the zero padding is P',
        suits='Plain vision transformers; convolutional networks get only a few numbers.',
    )

    kinds = ('tokens', 'border')
    tokens: int = 10
    deep: bool = False
    patch_size: int = 16

    def __post_init__(self):
        super().__post_init__()
        for name in ('tokens', 'patch_size'):
            require(self, name, getattr(self, name) > 0, 'must be a positive integer.')

    @property
    def tied(self):
        """Blocks share the prompts of a shallow VPT, which pass through all of them."""
        return () if self.deep else ('prompts',)

    def narrow(self, points):
        """Token blocks, or zero paddings where there are none; the first alone if shallow."""
        tokens = {path: point for path, point in points.items() if 'tokens' in point.kinds}
        return tokens or (points if self.deep else dict(list(points.items())[:1]))

    def init(self, weight, point) -> Factors:
        if 'border' in point.kinds:
            rings = max(point.geometry.zeros)
            return {'prompts': weight.new_zeros(point.in_features, rings)}
        width = point.in_features
        bound = sqrt(6 / (3 * self.patch_size**2 + width))
        return {'prompts': weight.new_empty(self.tokens, width).uniform_(-bound, bound)}

    def before(self, x, factors, point):
        if 'border' in point.kinds:
            return framed(x, factors['prompts'], point.geometry.zeros)
        if x.ndim != 3:
            raise UsageError(
                f'VPT: a block got a tensor of shape {tuple(x.shape)}, and prompts need a sequence '
                '(images, tokens, channels). Leave such blocks out with targets.exclude.'
            )
        if self.deep or point.first:
            prompts = factors['prompts'].to(x.dtype).expand(len(x), -1, -1)
        else:
            prompts = getattr(x, PROMPTS, None)
        if prompts is None:
            raise UsageError(
                'VPT: the prompts of the block before did not reach a block. Either the first '
                'block is not adapted, or tokens are changed between blocks, or blocks run in a '
                'reentrant checkpoint (use_reentrant=False keeps the prompts). Set deep=True, '
                'which gives each block prompts of its own.'
            )
        return torch.cat([x, prompts], 1)

    def after(self, x, y, factors, point):
        if 'border' in point.kinds:
            return cropped(y, point.geometry.zeros).clone()  # dense, in the layout of y
        if y.shape != x.shape:
            raise UsageError(
                f'VPT: a block returned {tuple(y.shape)} for {tuple(x.shape)}, so the prompts '
                'in its output are unknown. Leave such blocks out with targets.exclude.'
            )
        visible = y[:, : -self.tokens].contiguous()
        if not self.deep:
            setattr(visible, PROMPTS, y[:, -self.tokens :])
        return visible
