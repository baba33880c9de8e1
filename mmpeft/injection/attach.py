"""How adapters hang on a network: parametrized weights, and modules with hooks."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils import parametrize

from mmpeft import execution
from mmpeft.methods import (
    ActivationAdapter,
    ActivationMethod,
    Adapter,
    Method,
    WeightAdapter,
)

from .weights import ADAPTERS, PARAMETRIZATIONS, layers

# Where a layer remembers the order of its parameters.
ORDER = 'peft_order'


@dataclass(frozen=True)
class Attachment:
    """All adapters of one weight or module.

    Attributes:
        path: Of the layer in the model.
        layer: The module.
        tensor: Name of the weight; '' for adapters of activations.
        adapters: In the order in which they apply.
    """

    path: str
    layer: nn.Module
    tensor: str
    adapters: tuple[Adapter, ...]

    @property
    def name(self) -> str:
        """Path of the weight, or of the module."""
        return '.'.join(part for part in (self.path, self.tensor) if part)


def make_adapter(method: Method, spec, weight: Tensor, empty: bool = False) -> Adapter:
    """The adapter of a method for a weight or a place; see :class:`Adapter`."""
    kind = ActivationAdapter if isinstance(method, ActivationMethod) else WeightAdapter
    return kind(method, spec, weight, empty)


def share(adapter: Adapter, held: dict) -> None:
    """Let an adapter hold in common what its method shares.

    Args:
        adapter: Takes what others hold already.
        held: What was shared so far; the adapter's own is added.
    """
    for name in adapter.method.shared:
        own = getattr(adapter, name)
        key = adapter.method, name, adapter.method.share_key(adapter.spec), own.dtype, own.device
        setattr(adapter, name, held.setdefault(key, own))


def attach(layer: nn.Module, tensor: str, adapter: Adapter, way: str = execution.AUTO) -> None:
    """Put an adapter on a weight, or on a module's activations if ``tensor`` is ''.

    Args:
        layer: The module.
        tensor: Name of the weight.
        adapter: Made for it.
        way: To compute with the weight, one of ``execution.CHOICES``.
    """
    adapter.train(layer.training)
    if tensor:
        _own_class(layer)
        layer.__dict__.setdefault(ORDER, tuple(layer._parameters))
        parametrize.register_parametrization(layer, tensor, adapter, unsafe=True)
        for holder in (layer.parametrizations, layer.parametrizations[tensor]):
            holder.training = layer.training
        execution.enable(layer, way)
        return
    holder = _holder(layer)
    if not hasattr(holder, ADAPTERS):
        setattr(holder, ADAPTERS, nn.ModuleList().train(layer.training))
    getattr(holder, ADAPTERS).append(adapter)
    if type(adapter.method).before is not ActivationMethod.before:
        adapter.handles.append(layer.register_forward_pre_hook(adapter.before, with_kwargs=True))
    adapter.handles.append(layer.register_forward_hook(adapter, with_kwargs=True))


def detach(attachment: Attachment) -> None:
    """Take all adapters off a weight or module, which is then as it was."""
    layer, tensor = attachment.layer, attachment.tensor
    if tensor:
        way = execution.execution_of(layer)
        _own_class(layer)
        parametrize.remove_parametrizations(layer, tensor, leave_parametrized=False)
        _in_order(layer)
        execution.enable(layer, way)
        return
    for adapter in attachment.adapters:
        while adapter.handles:
            adapter.handles.pop().remove()
    holder = _holder(layer)
    kept = [a for a in getattr(holder, ADAPTERS) if a not in attachment.adapters]
    delattr(holder, ADAPTERS)
    if kept:
        setattr(holder, ADAPTERS, nn.ModuleList(kept))


def attachments(model: nn.Module) -> Iterator[Attachment]:
    """All weights and modules with adapters, in the model's order."""
    for path, layer in layers(model):
        for tensor in getattr(layer, PARAMETRIZATIONS, {}):
            adapters = adapters_of(layer, tensor)
            if adapters:
                yield Attachment(path, layer, tensor, tuple(adapters))
        adapters = adapters_of(layer, '')
        if adapters:
            yield Attachment(path, layer, '', tuple(adapters))


def adapters_of(layer: nn.Module, tensor: str) -> list[Adapter]:
    """The adapters on a layer's weight, or its activations if ``tensor`` is ''."""
    if tensor:
        chain = getattr(layer, PARAMETRIZATIONS, {})
        return [p for p in chain[tensor] if isinstance(p, Adapter)] if tensor in chain else []
    hooks = layer._forward_hooks.values()
    return [hook for hook in hooks if isinstance(hook, ActivationAdapter)]


def named_adapters(model: nn.Module) -> dict[str, Adapter]:
    """All adapters of a model, each once, by path."""
    return {path: m for path, m in model.named_modules() if isinstance(m, Adapter)}


def adapter_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of all adapters of a model, each once."""
    seen = set()
    for adapter in named_adapters(model).values():
        for parameter in adapter.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield parameter


def _own_class(layer):
    """torch puts properties on a parametrized layer's class, which its copies share."""
    execution.disable(layer)
    if parametrize.is_parametrized(layer):
        kind = type(layer)
        layer.__class__ = type(kind.__name__, kind.__bases__, dict(kind.__dict__))


def _in_order(layer):
    """torch puts a parameter behind all others when it is parametrized no longer."""
    parameters = layer._parameters
    for name in layer.__dict__[ORDER]:
        if name in parameters:
            parameters[name] = parameters.pop(name)
    if not any(adapters_of(layer, tensor) for tensor in getattr(layer, PARAMETRIZATIONS, {})):
        del layer.__dict__[ORDER]


def _holder(layer):
    """The module whose child an adapter becomes: a container would run its children."""
    while isinstance(layer, nn.Sequential):
        layer = layer[-1]
    return layer
