"""What is compared. A variant takes a frozen network and a rank, and returns one that trains.

``floor`` trains nothing, and torch runs it; ``frozen`` is the same as mmpeft
runs it, ``full`` trains everything. ``flora``, ``lora``, ``dora`` and
``liera`` are mmpeft's, on all convolutions and linear layers; those of LoRA's
kin lay kernels out as loralib does, but for ``lora_channel``. ``*_linear``
adapt matrices alone: linear layers and 1x1 convolutions, which are the linear
layers of small ConvNeXts. ``*_plain`` are computed by torch's parametrize,
``*_composed`` beside the layers by torch's own.
``published_flora``, ``peft_*`` and ``lycoris_*`` are others' code, on matrices;
with ``_all`` on all layers without groups, LyCORIS' on all layers.
``*_merged`` and ``*_branch`` put updates into the weight, or beside the layer,
and ``ia3`` scales channels: what gpu_check.py compares ``auto`` with.
``*_balanced`` and ``*_small`` are mmpeft's modes of memory. ``_compiled``
behind any name compiles its blocks, one by one.
"""

import warnings
from copy import deepcopy
from functools import partial
from importlib.util import find_spec

import peers
import torch
from records import FLOOR
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import mmpeft
from mmpeft.errors import UsageError, suggest
from mmpeft.injection.blocks import blocks

PERTURBATION = 1e-3


def layers(model: nn.Module, with_groups=True, with_kernels=True) -> list[str]:
    """Paths of the linear layers and 2-d convolutions.

    Args:
        model: Without adapters.
        with_groups: Grouped convolutions too.
        with_kernels: Kernels larger than 1x1 too.
    """
    return [
        path
        for path, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
        or isinstance(layer, nn.Conv2d)
        and (with_groups or layer.groups == 1)
        and (with_kernels or set(layer.kernel_size) == {1})
    ]


def inject(
    model, rank, type, kinds=('conv', 'linear'), execution='auto', memory='speed', **arguments
):
    """mmpeft's adapters."""
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', '.*adapters have more parameters')
        method = dict(type=type, **arguments) | (dict(rank=rank) if rank else {})
        mmpeft.inject(model, method, dict(kinds=kinds), execution=execution, memory=memory)
    return model


def scale(model, rank, **arguments):
    """Scales of channels, which have no rank."""
    return inject(model, None, 'IA3', **arguments)


def freeze(model, rank):
    """Nothing that trains, run by mmpeft."""
    mmpeft.inject(model, dict(type='Frozen'))
    return model


def adapt(build, select=layers, **arguments):
    """A variant of others' code on selected layers."""

    def of_paths(model, rank):
        paths = select(model)
        if not paths:
            raise UsageError('the network has no layer for it')
        return build(model, rank, paths, **arguments)

    return of_paths


ungrouped = partial(layers, with_groups=False)
matrices = partial(layers, with_groups=False, with_kernels=False)
flora = partial(inject, type='FLoRA')
lora = partial(inject, type='LoRA', layout='loralib')
liera = partial(inject, type='LieRA', layout='loralib')
VARIANTS = {
    FLOOR: lambda model, rank: model,
    'frozen': freeze,
    'full': lambda model, rank: model.requires_grad_(True),
    'flora': flora,
    'lora': lora,
    'lora_channel': partial(inject, type='LoRA', layout='channel'),
    'dora': partial(inject, type='DoRA', layout='loralib'),
    'liera': liera,
    'liera_exact': partial(liera, update='lie_exact'),
    'flora_linear': partial(flora, kinds=('linear', 'pointwise')),
    'lora_linear': partial(lora, kinds=('linear', 'pointwise')),
    'flora_plain': partial(flora, execution='plain'),
    'lora_plain': partial(lora, execution='plain'),
    'liera_plain': partial(liera, execution='plain'),
    'flora_composed': partial(flora, execution='composed'),
    'lora_composed': partial(lora, execution='composed'),
    'published_flora': adapt(peers.published_flora, matrices),
    'published_flora_all': adapt(peers.published_flora, ungrouped),
    'peft_lora': adapt(peers.of_peft, matrices),
    'peft_lora_all': adapt(peers.of_peft, ungrouped),
    'peft_dora': adapt(peers.of_peft, matrices, use_dora=True),
    'peft_hira': adapt(peers.of_peft, matrices, config='HiraConfig'),
    'lycoris_locon': adapt(peers.locon),
    'lycoris_tucker': adapt(peers.locon, tucker=True),
}
ALL = tuple(VARIANTS)
VARIANTS |= {
    'ia3': scale,
    'ia3_plain': partial(scale, execution='plain'),
    'dora_plain': partial(VARIANTS['dora'], execution='plain'),
}
VARIANTS |= {
    f'{name}_{way}': partial(VARIANTS[name], execution=way)
    for name in ('flora', 'lora', 'ia3')
    for way in ('merged', 'branch')
}
VARIANTS |= {
    f'flora_{memory}': partial(VARIANTS['flora'], memory=memory) for memory in ('balanced', 'small')
}
MEMORY = 'frozen', 'full', 'flora', 'flora_balanced', 'flora_small', 'lora_channel', 'peft_lora'
QUICK = ('frozen', 'full', 'flora', 'lora', 'dora', 'liera')
QUICK += ('flora_plain', 'published_flora', 'peft_lora', 'lycoris_locon')
WITHOUT_RANK = (FLOOR, 'frozen', 'full', *(name for name in VARIANTS if name.startswith('ia3')))
COMPILED = '_compiled'
WITHOUT_RANK += tuple(name + COMPILED for name in WITHOUT_RANK)


def check_name(name: str) -> None:
    """Raise UsageError unless there is such a variant."""
    if name.removesuffix(COMPILED) not in VARIANTS:
        raise UsageError(f'--variants: there is no {name!r}. {suggest(name, VARIANTS)}')


def package_of(name: str) -> str:
    """The package that a variant needs; '' for torch and mmpeft alone."""
    package = name.partition('_')[0]
    return package if package in ('peft', 'lycoris') else ''


def build(name: str, network: nn.Module, rank: int | None = None, seed: int = 0) -> nn.Module:
    """A variant of a frozen network, which stays as it is.

    Frozen weights are shared. Adapters are moved off their start, since
    products with zeros are faster than others on some devices.

    Raises:
        UsageError: Its package is not installed, or it has nothing to adapt.
    """
    package = package_of(name)
    if package and find_spec(package) is None:
        raise UsageError(f'{package} is not installed')
    plain = name.removesuffix(COMPILED)
    shared = {} if plain == 'full' else {id(p): p for p in network.parameters()}
    model = deepcopy(network, shared)
    torch.manual_seed(seed)
    model = VARIANTS[plain](model, rank)
    if plain != 'full':
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        with torch.no_grad():
            for parameter in trained(model):
                parameter.add_(torch.randn_like(parameter) * PERTURBATION)
    if plain != name:
        _compile(model)
    return model


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that train, each once."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _compile(model):
    on_cpu = next(model.parameters()).device.type == 'cpu'
    backend = 'aot_eager' if on_cpu else 'inductor'  # the former needs no compiler
    # All variants of a process count against the limits, beyond which blocks run uncompiled.
    torch._dynamo.config.recompile_limit = 2**10
    torch._dynamo.config.accumulated_recompile_limit = 2**12
    for block in blocks(model).values():
        block.compile(backend=backend, dynamic=False)
