"""The same network with adapters that others published.

Each function takes a frozen network, a rank and the paths of the layers to
adapt, and returns the network with adapters that train.
"""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft.errors import UsageError


def of_peft(model: nn.Module, rank: int, paths: list[str], config='LoraConfig', **arguments):
    """peft's adapters: LoRA, DoRA (``use_dora``), or HiRA, which is first-order LieRA."""
    import peft

    if not hasattr(peft, config):
        raise UsageError(f'peft {peft.__version__} has no {config}')
    config = getattr(peft, config)(target_modules=paths, r=rank, **arguments)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        # The network itself with its layers exchanged, without peft's wrapper around it.
        return peft.get_peft_model(model, config).base_model.model


class WithLoCon(nn.Module):
    """A network whose layers call LyCORIS' modules, which stand beside it."""

    def __init__(self, model, adapters):
        super().__init__()
        self.model = model
        self.adapters = nn.ModuleList(adapters)

    def forward(self, x):
        return self.model(x)


def locon(model: nn.Module, rank: int, paths: list[str], tucker: bool = False) -> nn.Module:
    """LyCORIS' LoCon in its default way of computing."""
    from lycoris.modules.locon import LoConModule

    adapters = []
    for path in paths:
        layer = model.get_submodule(path)
        adapter = LoConModule(path, layer, lora_dim=rank, alpha=rank, use_tucker=tucker)
        adapter.to(layer.weight.device)
        adapter.apply_to()
        adapters.append(adapter)
    return WithLoCon(model, adapters).train(model.training)


class PublishedFLoRA(nn.Module):
    """FLoRA as published: a second branch with an update that is built in every forward.

        y = base(x) + op(x, s G x_1 A1 x_2 A2 ...)         (arXiv:2405.14739, Eq. 5-7)

    The core starts at zero and the factors Gaussian, with the widths of
    mmpeft's FLoRA, so that equal factors are equal functions. It does not know
    ``groups``.

    Args:
        base: A frozen linear layer or convolution.
        rank: Of the channel modes.
        kernel_rank: Of the kernel's modes.
        scale: s.
    """

    def __init__(self, base: nn.Module, rank: int, kernel_rank: int = 2, scale: float = 4.0):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale = scale
        like = base.weight.float()
        wanted = (rank, rank) + (kernel_rank,) * (like.dim() - 2)
        ranks = [min(pair) for pair in zip(wanted, like.shape, strict=True)]
        self.core = nn.Parameter(like.new_zeros(ranks))
        self.factors = nn.ParameterList(
            torch.randn(size, r, dtype=like.dtype, device=like.device) * r**-0.5
            for size, r in zip(like.shape, ranks, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            update = self.core
            for factor in self.factors:  # takes the first mode and puts the new one last
                update = torch.tensordot(update, factor, dims=([0], [1]))
            update = (self.scale * update).to(x.dtype)
        base = self.base
        if isinstance(base, nn.Linear):
            return base(x) + F.linear(x, update)
        return base(x) + F.conv2d(x, update, None, base.stride, base.padding, base.dilation)


def published_flora(model: nn.Module, rank: int, paths: list[str], **arguments) -> nn.Module:
    """FLoRA as published beside the layers at the paths."""
    for path in paths:
        model.set_submodule(path, PublishedFLoRA(model.get_submodule(path), rank, **arguments))
    return model
