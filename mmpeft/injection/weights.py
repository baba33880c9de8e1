"""The roles of weights in their layers, and names with and without adapters."""

from collections.abc import Iterable, Iterator

from torch import Tensor, nn
from torch.nn.utils import parametrize

from mmpeft.errors import UsageError
from mmpeft.methods.spec import WeightSpec

# The children of a layer that hold its adapters.
PARAMETRIZATIONS, ADAPTERS = 'parametrizations', 'peft_adapters'
ORIGINAL = '.original'
MARK = f'{PARAMETRIZATIONS}.'


def plain_key(key: str) -> str:
    """The name that a stored parameter has in the model without adapters."""
    path, mark, rest = key.rpartition(MARK)
    if not mark or not rest.endswith(ORIGINAL):
        return key
    return path + rest.removesuffix(ORIGINAL)


def join(*paths: str) -> str:
    """Paths one below the other; '' is the root."""
    return '.'.join(path for path in paths if path)


def is_below(path: str, tops: Iterable[str]) -> bool:
    """Whether a path is one of others, or below one of them."""
    return any(not top or path == top or path.startswith(f'{top}.') for top in tops)


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
        for name in getattr(layer, 'newly_initialized', ()):
            if not hasattr(layer, name):
                raise UsageError(
                    f'{type(layer).__name__}.newly_initialized names {name!r}, which it does not '
                    'have. List the names of its children that pretrained weights do not have.'
                )
            found.append(join(path, name))
    return found


def weights_of(module: nn.Module) -> Iterator[tuple[str, WeightSpec]]:
    """The parameters that a module owns itself and whose role is known.

    Layers are recognized by their type; third-party convolutions, such as
    deformable ones, by the attributes of a convolution. An ``nn.MultiheadAttention`` yields
    its input projections; its ``out_proj`` is a linear layer of its own.

    Args:
        module: Any module; children are not looked at.

    Yields:
        The parameter's name in the module and its :class:`WeightSpec`.
    """
    for name in _own_names(module):
        tensor = getattr(module, name)
        if tensor is None:
            continue
        if name == 'bias' or name.endswith('_bias'):
            yield name, _vector(tensor, _kinds(module), is_bias=True)
        elif name == 'weight' or isinstance(module, nn.MultiheadAttention):
            spec = _weight(module, name, tensor)
            if spec is not None:
                yield name, spec


def original_of(module: nn.Module, name: str) -> Tensor:
    """The stored parameter behind ``module.<name>``, parametrized or not."""
    if parametrize.is_parametrized(module, name):
        parametrization = module.parametrizations[name]
        return parametrization.original if parametrization.is_tensor else parametrization.original0
    return getattr(module, name)


def _own_names(module):
    names = list(module._parameters)
    if parametrize.is_parametrized(module):
        names += [name for name in module.parametrizations if name not in names]
    return names


def _kinds(module) -> frozenset[str]:
    if _is_conv(module):
        kinds = {'conv'}
        if module.groups == module.in_channels > 1:
            kinds.add('depthwise')
        if all(size == 1 for size in _kernel_size(module)):
            kinds.add('pointwise')
    elif isinstance(module, nn.Linear | nn.MultiheadAttention):
        kinds = {'linear'}
    elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
        kinds = {'embedding'}
    elif _is_norm(module):
        kinds = {'norm'}
    else:
        kinds = set()
    return frozenset(kinds)


def _is_conv(module):
    return isinstance(module, nn.modules.conv._ConvNd) or all(
        hasattr(module, name) for name in ('in_channels', 'out_channels', 'groups', 'kernel_size')
    )


def _is_norm(module):
    known = nn.LayerNorm | nn.GroupNorm | nn.RMSNorm | nn.modules.batchnorm._NormBase
    return isinstance(module, known) or 'norm' in type(module).__name__.lower()


def _kernel_size(module):
    return tuple(original_of(module, 'weight').shape[2:])


def _vector(tensor, kinds, is_bias=False):
    size = tensor.numel()
    return WeightSpec(tensor.shape, kinds, size, size, is_bias=is_bias)


def _weight(module, name, tensor) -> WeightSpec | None:
    kinds = _kinds(module)
    shape = tensor.shape
    if 'conv' in kinds and tensor.ndim > 2:
        return WeightSpec(
            shape,
            kinds,
            module.in_channels,
            module.out_channels,
            tuple(shape[2:]),
            module.groups,
            getattr(module, 'transposed', False),
        )
    if 'linear' in kinds and tensor.ndim == 2:
        return WeightSpec(shape, kinds, shape[1], shape[0])
    if 'embedding' in kinds:
        padding = module.padding_idx
        return WeightSpec(shape, kinds, shape[0], shape[1], padding_idx=padding)
    if 'norm' in kinds and name == 'weight':
        return _vector(tensor, kinds)
    return None
