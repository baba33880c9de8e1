"""What is compared: the two ends, mmpeft's methods, the published form and peers.

A variant takes a frozen network and returns one in which its adapters train.
"""

import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import peers
import published_flora
import torch
from torch import nn

import mmpeft
from mmpeft import execution
from mmpeft.errors import UsageError, near
from mmpeft.injection.freeze import freeze_statistics
from mmpeft.injection.weights import layers

ALL = ('conv', 'linear')
# 1x1 convolutions are the linear layers of small ConvNeXts.
MATRICES = ('linear', 'pointwise')
PERTURBATION = 1e-3


@dataclass(frozen=True)
class Variant:
    """One column of the comparison.

    Attributes:
        name: As ``--variants`` takes it.
        text: What it is, in a line.
        build: From network and rank; may change the network in place.
        is_ranked: Whether the rank means anything to it.
        owns_weights: Whether it changes the weights, and needs its own.
        needs: Package that it takes.
        hook: Method and targets, if it is mmpeft's own.
    """

    name: str
    text: str
    build: Callable[[nn.Module, int], nn.Module]
    is_ranked: bool = True
    owns_weights: bool = False
    needs: str = ''
    hook: dict | None = None

    @property
    def is_available(self) -> bool:
        """Whether its package is installed."""
        return not self.needs or find_spec(self.needs) is not None

    def of(self, network: nn.Module, rank: int, seed: int = 0) -> nn.Module:
        """The variant of a frozen network, which stays as it is.

        Frozen weights are held in common. Adapters are moved off their start,
        since products with zeros are faster than others on some devices.
        """
        model = deepcopy(network) if self.owns_weights else twin(network)
        torch.manual_seed(seed)
        model = self.build(model, rank)
        if not self.owns_weights:
            freeze_statistics(model)
            with torch.no_grad():
                for parameter in trained(model):
                    parameter.add_(torch.randn_like(parameter) * PERTURBATION)
        return model


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that train, each once."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def twin(network: nn.Module) -> nn.Module:
    """A copy that holds the parameters in common with the original."""
    return deepcopy(network, {id(parameter): parameter for parameter in network.parameters()})


def inject(model, rank, method, kinds=None, is_ranked=True, plain=False):
    """mmpeft's own, or with ``plain`` as torch's parametrize runs it."""
    method = method | dict(rank=rank) if is_ranked else method
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', '.*adapters have more parameters')
        way = execution.PLAIN if plain else execution.AUTO
        mmpeft.inject(model, method, kinds and dict(kinds=kinds), execution=way)
    return model


def nothing(model, rank):
    return model


def everything(model, rank):
    return model.requires_grad_(True)


def published(model, rank, with_kernels):
    paths = ungrouped(model) if with_kernels else matrices(model)
    return published_flora.replace(model, paths, rank=rank)


def matrices(model: nn.Module) -> list[str]:
    """Paths of the linear layers and ungrouped 1x1 convolutions."""
    found = dict(layers(model))
    return [
        path
        for path in ungrouped(model)
        if isinstance(found[path], nn.Linear) or set(found[path].kernel_size) == {1}
    ]


def ungrouped(model: nn.Module) -> list[str]:
    """Paths of the linear layers and of the 2-d convolutions without groups."""
    return [
        path
        for path, layer in layers(model)
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
    ]


def every_layer(model: nn.Module) -> list[str]:
    """Paths of the linear layers and 2-d convolutions."""
    return [path for path, layer in layers(model) if isinstance(layer, nn.Linear | nn.Conv2d)]


def _ours(name, text, type, kinds=ALL, plain=False, **arguments):
    method = dict(type=type, **arguments)
    build = partial(inject, method=method, kinds=kinds, plain=plain)
    return Variant(name, text, build, hook=dict(method=method, targets=dict(kinds=kinds)))


def _peer(name, text, needs, build, select):
    def of_paths(model, rank):
        paths = select(model)
        if not paths:
            raise UsageError('the network has no layer for it')
        return build(model, rank, paths)

    return Variant(name, text, of_paths, needs=needs)


def _named(*variants):
    return {variant.name: variant for variant in variants}


FLOOR = 'floor'
VARIANTS = _named(
    Variant(
        FLOOR,
        'frozen, as torch runs it, with gradients flowing to the input',
        nothing,
        is_ranked=False,
    ),
    Variant(
        'frozen',
        'the same, as mmpeft runs frozen layers',
        partial(inject, method=dict(type='Frozen'), is_ranked=False),
        is_ranked=False,
    ),
    Variant(
        'full',
        'everything trains',
        everything,
        is_ranked=False,
        owns_weights=True,
    ),
    _ours('flora', 'FLoRA on all layers', 'FLoRA'),
    _ours('lora', 'LoRA on all layers, as loralib lays kernels out', 'LoRA'),
    _ours('lora_channel', 'LoRA on all layers by channels', 'LoRA', layout='channel'),
    _ours('dora', 'DoRA on all layers', 'DoRA'),
    _ours('liera', 'LieRA on all layers, first order', 'LieRA'),
    _ours('liera_exact', 'LieRA on all layers, exact', 'LieRA', update='lie_exact'),
    _ours('flora_linear', 'FLoRA on matrices', 'FLoRA', MATRICES),
    _ours('lora_linear', 'LoRA on matrices', 'LoRA', MATRICES),
    _ours('flora_plain', "FLoRA on all layers by torch's parametrize", 'FLoRA', plain=True),
    _ours('lora_plain', "LoRA on all layers by torch's parametrize", 'LoRA', plain=True),
    _ours('liera_plain', "LieRA on all layers by torch's parametrize", 'LieRA', plain=True),
    Variant(
        'published_flora',
        'FLoRA on matrices as published, a branch with the built update',
        partial(published, with_kernels=False),
    ),
    Variant(
        'published_flora_all',
        'the same on all layers without groups',
        partial(published, with_kernels=True),
    ),
    _peer('peft_lora', "peft's LoRA on matrices", 'peft', peers.peft_lora, matrices),
    _peer('peft_lora_all', 'the same on layers without groups', 'peft', peers.peft_lora, ungrouped),
    _peer('peft_dora', "peft's DoRA on matrices", 'peft', peers.peft_dora, matrices),
    _peer('peft_hira', "peft's HiRA on matrices", 'peft', peers.peft_hira, matrices),
    _peer('lycoris_locon', "LyCORIS's LoCon on all layers", 'lycoris', peers.locon, every_layer),
    _peer(
        'lycoris_tucker',
        'the same with a Tucker core',
        'lycoris',
        partial(peers.locon, tucker=True),
        every_layer,
    ),
)
QUICK = (
    FLOOR,
    'frozen',
    'full',
    'flora',
    'lora',
    'dora',
    'liera',
    'flora_plain',
    'published_flora',
    'peft_lora',
    'lycoris_locon',
)


def find(name: str) -> Variant:
    """The variant of a name.

    Raises:
        UsageError: There is none.
    """
    if name not in VARIANTS:
        raise UsageError(f'--variants: there is no {name!r}. {near(name, VARIANTS)}')
    return VARIANTS[name]
