"""FLoRA as published: a second branch with an update that is built in every forward.

    y = base(x) + op(x, s G x_1 A1 x_2 A2 ...)         (arXiv:2405.14739, Eq. 5-7)

The core starts at zero and the factors Gaussian, with the widths of
``mmpeft``'s FLoRA, so that equal factors are equal functions. As published,
``groups`` are unknown to it, so that grouped convolutions stay as they are.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def multiplied(core: Tensor, factors) -> Tensor:
    """G x_1 A1 x_2 A2 ...: each product takes the first mode and puts the new one last."""
    for factor in factors:
        core = torch.tensordot(core, factor, dims=([0], [1]))
    return core


class PublishedFLoRA(nn.Module):
    """A frozen linear layer or convolution and its branch.

    Args:
        base: The layer.
        rank: Of the channel modes.
        kernel_rank: Of the kernel's modes.
        scale: s.
    """

    def __init__(self, base: nn.Module, rank: int, kernel_rank: int = 2, scale: float = 4.0):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale = scale
        like = base.weight.float()
        sizes = like.shape
        wanted = (rank, rank) + (kernel_rank,) * (len(sizes) - 2)
        ranks = [min(pair) for pair in zip(wanted, sizes, strict=True)]
        self.core = nn.Parameter(like.new_zeros(ranks))
        self.factors = nn.ParameterList(
            torch.randn(size, r, dtype=like.dtype, device=like.device) * r**-0.5
            for size, r in zip(sizes, ranks, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            update = (self.scale * multiplied(self.core, self.factors)).to(x.dtype)
        base = self.base
        if isinstance(base, nn.Linear):
            return base(x) + F.linear(x, update)
        return base(x) + F.conv2d(x, update, None, base.stride, base.padding, base.dilation)


def replace(model: nn.Module, paths, **arguments) -> nn.Module:
    """Put a branch beside the layers at the paths, in place."""
    for path in paths:
        parent, _, name = path.rpartition('.')
        parent = model.get_submodule(parent)
        setattr(parent, name, PublishedFLoRA(getattr(parent, name), **arguments))
    return model
