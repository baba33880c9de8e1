"""Layers that change their class, as parametrized ones do, and can be copied and pickled.

Such a class has no name by which pickle could import it. What is pickled is the class below it and
the steps that lead from there. Layers that change alike share one class, since ``torch.compile``
compiles equal blocks once only if their layers are of the same classes.
"""

from types import MethodType
from weakref import WeakValueDictionary

from torch import nn
from torch.nn.utils import parametrize

from mmpeft.errors import UsageError
from mmpeft.methods import WeightAdapter


class Fast:
    """The base of the mixins that compute the same faster."""


class Shared(type):
    """Of classes that layers share.

    torch's parametrize puts a property for a tensor on a layer's class. On a shared one it is that
    of the layers in which the tensor is parametrized, and stays.
    """

    def __setattr__(cls, name, value):
        getter = value.fget if isinstance(value, property) else None
        is_torchs = getattr(getter, '__module__', None) == parametrize.__name__
        super().__setattr__(name, _parametrized(name) if is_torchs else value)

    def __delattr__(cls, name):
        if name not in _properties(cls):
            super().__delattr__(name)


_SHARED = WeakValueDictionary()


def share_class(layer: nn.Module) -> None:
    """Give a layer that torch has parametrized the one class of those parametrized alike.

    The layer can be pickled then.
    """
    kind, tensors = type(layer), _properties(type(layer))
    content = vars(kind) | {tensor: _parametrized(tensor) for tensor in tensors}
    layer.__class__ = _shared((kind.__bases__, *tensors), kind, kind.__bases__, content)


def change_class(layer: nn.Module, mixin: type, **attributes) -> None:
    """Put a mixin before the class of a layer, in place; a second one goes before the first.

    Args:
        layer: Any module.
        mixin: Its methods come before those of the layer's class.
        attributes: Of the new class, hashable.
    """
    kind = type(layer)
    content = dict(__module__=kind.__module__, __qualname__=kind.__qualname__)
    content |= attributes | dict(_attributes_put=attributes)
    key = mixin, kind, *sorted(attributes.items())
    layer.__class__ = _shared(key, kind, (mixin, kind), content)


def restore_class(layer: nn.Module, mixin: type) -> None:
    """Undo the last :func:`change_class` of a layer by this mixin; other changes stay."""
    kind, later = type(layer), []
    while _is_made_here(kind):
        above, below = kind.__bases__
        if issubclass(above, mixin):
            layer.__class__ = below
            for other, attributes in reversed(later):
                change_class(layer, other, **attributes)
            _rebind(layer)
            return
        later.append((above, kind._attributes_put))
        kind = below


def forward_owner(kind: type) -> type:
    """The class that defines what a layer's ``forward`` computes.

    mmcv's wrappers of torch's layers, which its transformers use, only handle empty inputs in
    torch 1.4 and older.
    """
    owners = (c for c in kind.__mro__ if 'forward' in vars(c))
    return next(c for c in owners if c.__module__ != 'mmcv.cnn.bricks.wrappers')


def set_attributes(layer: nn.Module, **attributes) -> None:
    """Put attributes on the class that :func:`change_class` made last for a layer."""
    above, below = type(layer).__bases__
    attributes = type(layer)._attributes_put | attributes
    layer.__class__ = below
    change_class(layer, above, **attributes)


def is_changed(layer: nn.Module) -> bool:
    """Whether the last change of a layer's class was by :func:`change_class`."""
    return _is_made_here(type(layer))


def reduce_layer(layer: nn.Module, protocol: int) -> tuple:
    """What pickle stores of a layer, as ``__reduce_ex__`` returns it."""
    kind, steps = type(layer), []
    while _is_made_here(kind) or _is_parametrized(kind):
        tensors = [name for name in _properties(kind) if parametrize.is_parametrized(layer, name)]
        if _is_parametrized(kind):
            steps.append((None, tensors))
        else:
            steps += [(Shared, tensors), (kind.__bases__[0], kind._attributes_put)]
        kind = kind.__bases__[-1]
    return _rebuild, (kind, steps[::-1]), vars(layer)


def register_parameter(layer: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
    """As of ``nn.Module``, which ``layer.weight = nn.Parameter(...)`` calls.

    Raises:
        UsageError: The name is that of a parametrized tensor, for which torch has a KeyError.
    """
    if '.' in name or parametrize.is_parametrized(layer, name):
        _refuse(name)
    nn.Module.register_parameter(layer, name, parameter)


def _refuse(name):
    raise UsageError(
        f'The {name} of a layer is adapted, so no other parameter can take its place, as in '
        'fuse_conv_bn, quantization, tensor parallelism or tying. Call mmpeft.merge(model) '
        'first, or do that before mmpeft.inject.'
    )


def _rebuild(kind, steps):
    layer = kind.__new__(kind)
    for mixin, content in steps:
        if mixin not in (None, Shared):
            change_class(layer, mixin, **content)
            continue
        if mixin is None:
            parametrize._inject_new_class(layer)
        for tensor in content:
            parametrize._inject_property(layer, tensor)
        if mixin is None:
            share_class(layer)
    return layer


def _shared(key, like, bases, content):
    if key not in _SHARED:
        metaclass = type(like)
        if not issubclass(metaclass, Shared):
            metaclass = Shared if metaclass is type else type('Shared', (Shared, metaclass), {})
        content |= dict(__reduce_ex__=reduce_layer, register_parameter=register_parameter)
        return _SHARED.setdefault(key, metaclass(like.__name__, bases, content))
    return _SHARED[key]


def _properties(kind):
    return [name for name, value in vars(kind).items() if isinstance(value, property)]


def _parametrized(tensor):
    """The property that torch's parametrize puts on a class, for all layers of the class.

    torch's own keeps a weight, inside ``parametrize.cached()``, under the layer that it was made
    for. This one also leaves the tensor as it is where it is not parametrized.
    """

    def get(layer):
        chains = layer._modules['parametrizations']
        if tensor not in chains:
            return nn.Module.__getattr__(layer, tensor)
        if not parametrize._cache_enabled:
            return chains[tensor]()
        key = id(layer), tensor
        if key not in parametrize._cache:
            parametrize._cache[key] = chains[tensor]()
        return parametrize._cache[key]

    def put(layer, value):
        if parametrize.is_parametrized(layer, tensor):
            chain = layer.parametrizations[tensor]
            if any(isinstance(each, WeightAdapter) for each in chain):
                _refuse(tensor)
            chain.right_inverse(value)
        else:
            (layer._parameters if tensor in layer._parameters else layer._buffers)[tensor] = value

    return property(get, put)


def _rebind(layer):
    """Let methods that a layer holds, as hooks of accelerate do, be those of its present class."""
    for name, value in list(vars(layer).items()):
        if isinstance(value, MethodType) and value.__self__ is layer:
            function = value.__func__
            if getattr(function, '__module__', '').startswith('mmpeft.'):
                vars(layer)[name] = MethodType(getattr(type(layer), function.__name__), layer)


def _is_made_here(kind):
    return len(kind.__bases__) == 2 and vars(kind).get('__reduce_ex__') is reduce_layer


def _is_parametrized(kind):
    return len(kind.__bases__) == 1 and kind.__name__ == f'Parametrized{kind.__base__.__name__}'
