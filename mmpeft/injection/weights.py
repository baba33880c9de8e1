"""The roles of weights in their layers, and names with and without adapters."""

import re
from collections.abc import Iterable, Iterator

from torch import Size, Tensor, nn
from torch.nn.utils import parametrize

from mmpeft.errors import UsageError
from mmpeft.methods import WeightAdapter
from mmpeft.methods.spec import WeightSpec

# The children of a layer that hold its adapters.
PARAMETRIZATIONS, ADAPTERS = 'parametrizations', 'peft_adapters'
ORIGINAL = '.original'
MARK = f'{PARAMETRIZATIONS}.'

CONVOLUTION = 'in_channels', 'out_channels', 'groups', 'kernel_size'
# A linear layer that stores (in, out), in GPT-2 and its kin.
CONV1D = 'transformers.pytorch_utils.Conv1D'
KINDS = {
    nn.Linear | nn.MultiheadAttention: 'linear',
    nn.Embedding | nn.EmbeddingBag: 'embedding',
    nn.LayerNorm | nn.GroupNorm | nn.RMSNorm | nn.modules.batchnorm._NormBase: 'norm',
}


def plain_key(key: str) -> str:
    """The name that a stored parameter has in the model without adapters."""
    path, mark, rest = key.rpartition(MARK)
    return path + rest.removesuffix(ORIGINAL) if mark and rest.endswith(ORIGINAL) else key


def join(*paths: str) -> str:
    """Paths one below the other; '' is the root."""
    return '.'.join(path for path in paths if path)


def is_below(path: str, tops: Iterable[str]) -> bool:
    """Whether a path is one of others, or below one of them."""
    return any(not top or path == top or path.startswith(f'{top}.') for top in tops)


def lineage(path: str) -> list[str]:
    """The paths from the root's to a module's own."""
    parts = path.split('.') if path else []
    return ['.'.join(parts[:n]) for n in range(len(parts) + 1)]


def within(paths: Iterable[str], top: str) -> list[str]:
    """Those of some paths that are at another or below it."""
    return [path for path in paths if is_below(path, [top])]


def layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules below a module with their paths, without the adapters in them."""
    for path, layer in module.named_modules():
        if not {PARAMETRIZATIONS, ADAPTERS}.intersection(path.split('.')):
            yield path, layer


def newly_initialized(module: nn.Module) -> list[str]:
    """Paths below a module of what its pretrained weights do not have.

    A backbone lists the names of such children of its own in an attribute
    ``newly_initialized``, for example norms that it adds to its outputs.

    Raises:
        UsageError: It lists a name that the backbone does not have.
    """
    found = []
    for path, layer in layers(module):
        names = getattr(layer, 'newly_initialized', ())
        for name in (names,) if isinstance(names, str) else names:
            if not hasattr(layer, name):
                raise UsageError(
                    f'{type(layer).__name__}.newly_initialized names {name!r}, which it does not '
                    'have. List the names of its children that pretrained weights do not have.'
                )
            found.append(join(path, name))
    return found


def weights_of(module: nn.Module) -> Iterator[tuple[str, WeightSpec]]:
    """Names and roles of the parameters that a module owns itself and whose role is known.

    One without elements, as of a classifier of no classes, has none.

    Layers are recognized by their type; third-party convolutions, such as
    deformable ones, by the attributes of a convolution. An ``nn.MultiheadAttention`` yields
    its input projections; its ``out_proj`` is a linear layer of its own.
    """
    names = list(module._parameters)
    names += [n for n in getattr(module, PARAMETRIZATIONS, ()) if n not in names]
    for name in names:
        tensor = _shaped(module, name)
        spec = None if tensor is None or not tensor.numel() else _spec(module, name, tensor)
        if spec is not None:
            yield name, spec


def unknown_parameters(module: nn.Module) -> dict[str, int]:
    """Elements of the frozen parameters that no method is defined on, by name below a module.

    They have two and more dimensions and no known role: experts as one tensor, learned positions,
    tables of windows. A convolution that computes its kernel from parameters of its own (e2cnn's)
    counts as one, by its path. What is newly initialized is left out.
    """
    found, counted, done = {}, set(), newly_initialized(module)
    for path, layer in layers(module):
        if is_below(path, done):
            continue
        roles = dict(weights_of(layer))
        own = {join(path, n): p for n, p in layer._parameters.items() if n not in roles}
        own = {name: [p] for name, p in own.items() if p is not None and p.ndim > 1}
        if hasattr(layer, 'groups') and hasattr(layer, 'kernel_size'):
            if all(spec.is_bias for spec in roles.values()):
                own = {path: list(layer.parameters())}
                done.append(path)
        for name, parameters in own.items():
            frozen = {id(p): p.numel() for p in parameters if not p.requires_grad}
            size = sum(n for key, n in frozen.items() if key not in counted)
            counted |= frozen.keys()
            found |= {name: size} if size else {}
    return found


def original_of(module: nn.Module, name: str) -> Tensor:
    """The stored parameter behind ``module.<name>``, parametrized or not."""
    if parametrize.is_parametrized(module, name):
        parametrization = module.parametrizations[name]
        return parametrization.original if parametrization.is_tensor else parametrization.original0
    return getattr(module, name)


def _shaped(module, name) -> Tensor | None:
    """A tensor of the shape of a parameter, without computing what adapters make of it."""
    chain = getattr(module, PARAMETRIZATIONS, {})
    if name in chain and all(isinstance(each, WeightAdapter) for each in chain[name]):
        return chain[name].original
    return getattr(module, name)


def _spec(module, name, tensor) -> WeightSpec | None:
    kinds, shape, size = _kinds(module), tensor.shape, tensor.numel()
    is_norm = 'norm' in kinds  # GRN of mmpretrain calls its weight gamma, its bias beta
    is_bias = name == 'bias' or name.endswith('_bias') or (is_norm and name == 'beta')
    if is_bias or (is_norm and name in ('weight', 'gamma')):
        return WeightSpec(shape, kinds, size, size, is_bias=is_bias)
    if name != 'weight' and not isinstance(module, nn.MultiheadAttention):
        return None
    if 'conv' in kinds and tensor.ndim > 2:
        widths, groups = (module.in_channels, module.out_channels), module.groups
        transposed = getattr(module, 'transposed', False)
        return WeightSpec(shape, kinds, *widths, tuple(shape[2:]), groups, transposed)
    if 'linear' in kinds and tensor.ndim == 2:
        is_transposed = _is_a(module, CONV1D)
        out, features = reversed(shape) if is_transposed else shape
        return WeightSpec(Size((out, features)), kinds, features, out, fan_in_fan_out=is_transposed)
    if 'embedding' in kinds:
        return WeightSpec(shape, kinds, shape[0], shape[1], padding_idx=module.padding_idx)
    return None


def _is_a(module, name) -> bool:
    """Whether a module is of a class that is named, not imported."""
    return any(f'{c.__module__}.{c.__qualname__}' == name for c in type(module).__mro__)


def _kinds(module) -> frozenset[str]:
    if all(hasattr(module, name) for name in CONVOLUTION):
        kinds = {'conv'}
        if module.groups == module.in_channels > 1:
            kinds.add('depthwise')
        is_adapted = parametrize.is_parametrized(module, 'weight')
        has_weight = is_adapted or hasattr(module, 'weight')
        weight = original_of(module, 'weight') if has_weight else None
        if isinstance(weight, Tensor) and set(weight.shape[2:]) <= {1}:
            kinds.add('pointwise')
        return frozenset(kinds)
    for types, kind in KINDS.items():
        if isinstance(module, types):
            return frozenset({kind})
    if _is_a(module, CONV1D):
        return frozenset({'linear'})
    is_norm = re.search('norm|grn$', type(module).__name__, re.IGNORECASE)
    return frozenset({'norm'} if is_norm else ())
