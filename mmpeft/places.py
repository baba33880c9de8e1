"""Where activations can be changed, told from the structure of a network."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Size, nn

from .weights import WeightSpec

PLACES = ('attention', 'mixer', 'mlp', 'branch', 'layer', 'tokens', 'border')


@dataclass(frozen=True)
class Place:
    """A module whose input or output an adapter changes.

    Attributes:
        kinds: The words of ``PLACES`` that a target may select it by.
        shape: (output channels, input channels).
        axis: The channels' position in its tensors: -1 in token sequences
            and channels-last maps, 1 in maps of a convolution.
        numel: Parameters of the module.
        first: Whether it is the first of its kind in the network.
        layer: The role of the weight where the module is one layer.
    """

    kinds: frozenset[str]
    shape: Size
    axis: int
    numel: int
    first: bool = False
    layer: WeightSpec | None = None


def places(root: nn.Module, kinds: tuple[str, ...]) -> Iterator[tuple[str, nn.Module, Place]]:
    """The places of some kinds below a module, with their paths."""
    raise NotImplementedError
