"""Layers that change their class, as parametrized ones do, and can be copied and pickled.

Such a class is made for one layer and has no name by which pickle could import it. What is pickled
is the class below it and the steps that lead from there.
"""

from torch import nn
from torch.nn.utils import parametrize


class Fast:
    """The base of the mixins that compute the same faster."""


def change_class(layer: nn.Module, mixin: type, **attributes) -> None:
    """Put a mixin before the class of a layer, in place; a second one goes before the first.

    Args:
        layer: Any module.
        mixin: Its methods come before those of the layer's class.
        attributes: Of the new class.
    """
    kind = type(layer)
    content = dict(__module__=kind.__module__, __qualname__=kind.__qualname__) | attributes
    layer.__class__ = type(kind.__name__, (mixin, kind), content)
    allow_pickling(layer)


def restore_class(layer: nn.Module, mixin: type) -> None:
    """Undo the last :func:`change_class` of a layer by this mixin; other changes stay."""
    kind, later = type(layer), []
    while _is_made_here(kind):
        above, below = kind.__bases__
        if issubclass(above, mixin):
            layer.__class__ = below
            for other, attributes in reversed(later):
                change_class(layer, other, **attributes)
            return
        later.append((above, _own(kind)))
        kind = below


def is_changed(layer: nn.Module) -> bool:
    """Whether the last change of a layer's class was by :func:`change_class`."""
    return _is_made_here(type(layer))


def allow_pickling(layer: nn.Module) -> None:
    """Let a layer be pickled whose class was made for it, here or by torch's parametrize."""
    type(layer).__reduce_ex__ = reduce_layer


def reduce_layer(layer: nn.Module, protocol: int) -> tuple:
    """What pickle stores of a layer, as ``__reduce_ex__`` returns it."""
    kind, steps = type(layer), []
    while _is_made_here(kind) or _is_parametrized(kind):
        own = _own(kind)
        if _is_parametrized(kind):
            steps.append((None, [k for k, v in own.items() if isinstance(v, property)]))
        else:
            steps.append((kind.__bases__[0], own))
        kind = kind.__bases__[-1]
    return _rebuild, (kind, steps[::-1]), vars(layer)


def _rebuild(kind, steps):
    layer = kind.__new__(kind)
    for mixin, content in steps:
        if mixin is not None:
            change_class(layer, mixin, **content)
            continue
        parametrize._inject_new_class(layer)
        allow_pickling(layer)
        for tensor in content:
            parametrize._inject_property(layer, tensor)
    return layer


def _own(kind):
    return {k: v for k, v in vars(kind).items() if not k.startswith('__')}


def _is_made_here(kind):
    return len(kind.__bases__) == 2 and vars(kind).get('__reduce_ex__') is reduce_layer


def _is_parametrized(kind):
    return len(kind.__bases__) == 1 and kind.__name__ == f'Parametrized{kind.__base__.__name__}'
