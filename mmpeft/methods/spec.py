"""What a method sees of where it is applied: the role of a weight, or a place in the network."""

from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Size, Tensor, nn

KINDS = ('conv', 'depthwise', 'pointwise', 'linear', 'embedding', 'norm')
POINT_DESCRIPTIONS = dict(
    attention='attention',
    mixer='the depthwise convolution of a block with an mlp',
    mlp='layers d -> h -> d with h >= d',
    branch='the end of a residual branch of convolutions',
    layer='a linear layer or convolution',
    tokens='a transformer block with global attention over a plain sequence, not over windows',
    border='a zero-padded convolution of stride 1 in a block',
    block='a residual block of convolutions, of one with an mlp, or of attention and an mlp',
)
POINT_KINDS = tuple(POINT_DESCRIPTIONS)
CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class WeightSpec:
    """The layer's view of one of its parameters.

    A convolution stores (out, in / groups, *kernel), a transposed one
    (in, out / groups, *kernel), a linear layer (out, in), an embedding
    (in, out) with ``in`` the number of its entries. GPT-2's Conv1D, a linear layer that
    stores (in, out), is given to methods as (out, in).

    Attributes:
        shape: Of the tensor that methods see.
        kinds: Words of ``KINDS`` that a target may select the layer by.
        in_features: Input channels of the layer, over all groups.
        out_features: Output channels of the layer, over all groups.
        kernel_size: Empty for layers without a kernel.
        groups: Of a convolution.
        transposed: Whether the convolution is.
        padding_idx: The entry of an embedding that stays as it is.
        is_bias: Whether the parameter is added, not multiplied.
        fan_in_fan_out: Whether a linear layer stores the transpose of what methods see.
    """

    shape: Size
    kinds: frozenset[str]
    in_features: int
    out_features: int
    kernel_size: tuple[int, ...] = ()
    groups: int = 1
    transposed: bool = False
    padding_idx: int | None = None
    is_bias: bool = False
    fan_in_fan_out: bool = False

    @property
    def numel(self) -> int:
        return self.shape.numel()

    @property
    def is_plain(self) -> bool:
        """Whether all outputs see all inputs: (out, in, *kernel)."""
        return self.groups == 1 and not self.input_first and len(self.shape) > 1

    @property
    def is_matrix(self) -> bool:
        """Whether all outputs see all inputs, at one position: (out, in), or (out, in, 1, 1)."""
        return self.is_plain and all(size == 1 for size in self.kernel_size)

    @property
    def input_first(self) -> bool:
        """Whether the stored tensor has the input mode before the output mode."""
        return self.transposed or 'embedding' in self.kinds


@dataclass(frozen=True)
class ConvGeometry:
    """How a convolution's kernel slides.

    Attributes:
        stride: One number an axis.
        padding: Before and after each axis.
        padding_mode: As in ``nn.Conv2d``.
        dilation: One number an axis.
    """

    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    padding_mode: str
    dilation: tuple[int, ...]

    @classmethod
    def of(cls, module: nn.Module, spec: WeightSpec) -> 'ConvGeometry':
        """Of torch's convolution or a third party's."""
        axes = len(spec.kernel_size)

        def each(name, default):
            value = getattr(module, name, default)
            return tuple(value) if isinstance(value, tuple | list) else (value,) * axes

        dilation = each('dilation', 1)
        if getattr(module, 'padding', 0) == 'same':
            total = [d * (k - 1) for d, k in zip(dilation, spec.kernel_size, strict=True)]
            padding = tuple((t // 2, t - t // 2) for t in total)
        else:
            padding = tuple((0, 0) if p == 'valid' else (p, p) for p in each('padding', 0))
        mode = getattr(module, 'padding_mode', 'zeros')
        return cls(each('stride', 1), padding, mode, dilation)

    @property
    def zeros(self) -> tuple[int, ...]:
        """Zeros before and after each axis, where they are as many."""
        return tuple(before for before, _ in self.padding)

    def padded(self, x: Tensor) -> tuple[Tensor, 'ConvGeometry']:
        """A map with the padding that torch does not take as numbers, and what is left to do."""
        if self.padding_mode == 'zeros' and all(a == b for a, b in self.padding):
            return x, self
        sides = [side for pair in reversed(self.padding) for side in pair]
        x = F.pad(x, sides, 'constant' if self.padding_mode == 'zeros' else self.padding_mode)
        return x, replace(self, padding=((0, 0),) * len(self.padding), padding_mode='zeros')

    def convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, groups: int = 1
    ) -> Tensor:
        """The convolution of a map, with or without a batch, by (out, in / groups, *kernel)."""
        x, rest = self.padded(x)
        function = CONVOLUTIONS[weight.ndim - 2]
        return function(x, weight, bias, rest.stride, rest.zeros, rest.dilation, groups)


@dataclass(frozen=True)
class InsertionPoint:
    """A module whose input or output an adapter changes.

    Attributes:
        kinds: What a target may select it by: one of ``POINT_KINDS``, and those of
            ``KINDS`` that the layer is where that is ``'layer'``.
        shape: (output channels, input channels).
        axis: The channels' position in its tensors: -1 in sequences and channels-last maps, 1 in
            maps of a convolution.
        numel: Parameters of the module, or of the block whose residual branch it ends.
        first: Whether it is the first of its kind in the network.
        ends: Empty, or the paths below the module of two layers whose input and output are meant:
            the module has an MLP, say, that is not a module of its own. Of a ``'block'`` with
            attention, the norm before its MLP, which gets what lies between the two, and the
            first layer of the MLP.
        layer: The role of the weight, if the point is a ``'layer'``.
        geometry: If the module is a convolution and the point a ``'layer'`` or ``'border'``.
        grid: While the network runs, of the patches of an image, for methods that ask for it.
    """

    kinds: frozenset[str]
    shape: Size
    axis: int
    numel: int
    first: bool = False
    ends: tuple[str, ...] = ()
    layer: WeightSpec | None = None
    geometry: ConvGeometry | None = None
    grid: tuple[int, int] | None = None

    @property
    def out_features(self) -> int:
        return self.shape[0]

    @property
    def in_features(self) -> int:
        return self.shape[1]

    def to_dict(self) -> dict:
        """Plain data for JSON, without what the module has: ``layer``, ``geometry``, ``grid``.

        :func:`mmpeft.injection.points.restore_point` is the reverse.
        """
        return dict(
            kinds=sorted(self.kinds),
            shape=list(self.shape),
            axis=self.axis,
            numel=self.numel,
            first=self.first,
            ends=list(self.ends),
        )
