"""Attach adapters to a model and detach them: parametrizations of weights, hooks of modules."""

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mmpeft import execution
from mmpeft.errors import UsageError
from mmpeft.methods import ActivationAdapter, ActivationMethod, WeightAdapter

from .site import Site, adapters_of, attached, holder_of
from .weights import ADAPTERS, PARAMETRIZATIONS

# Where a layer keeps the order that its parameters had before the first adapter.
ORDER = 'peft_order'


def attach_sites(
    sites: Sequence[Site], empty: bool = False, execution: str = execution.AUTO
) -> list[Site]:
    """Make the adapters of one injection and attach them, in order.

    Args:
        sites: Without adapters.
        empty: Fill stored tensors of the adapters with NaN instead of initial values, to be loaded.
        execution: One of ``mmpeft.execution.CHOICES``.

    Returns:
        The sites with their adapters.
    """
    made = make_adapters(sites, empty, execution)
    attach(made)
    return made


def make_adapters(
    sites: Sequence[Site], empty: bool = False, execution: str = execution.AUTO
) -> list[Site]:
    """Make adapters for sites; nothing is attached yet.

    Tied weights share one adapter. Adapters of equal methods share the factors
    that the method names in ``shared``.

    Args:
        sites: Without adapters.
        empty: As in :func:`attach_sites`.
        execution: As in :func:`attach_sites`.

    Returns:
        New sites with adapters.
    """
    adapters, shared = {}, {}
    for site in track(sites, 'adapters', transient=True, disable=not sys.stderr.isatty()):
        if site.tie_key not in adapters:
            kind = ActivationAdapter if not site.tensor else WeightAdapter
            adapter = kind(site.method, site.spec, site.weight, empty)
            for name in site.method.tied:
                own = getattr(adapter, name)
                key = site.method, name, site.method.tie_key(site.spec), own.dtype, own.device
                setattr(adapter, name, shared.setdefault(key, own))
            adapters[site.tie_key] = adapter
    return [replace(site, adapter=adapters[site.tie_key], execution=execution) for site in sites]


def attach(sites: Iterable[Site]) -> None:
    """Attach adapters that exist, after moving them to their layers' device and precision."""
    for site in sites:
        _move_to_layer(site)
        site.adapter.train(site.layer.training)
        if site.tensor:
            _parametrize(site)
        else:
            _hook(site)
    # Inside torch's parametrize.cached() weights of earlier adapters would be read again.
    parametrize._cache.clear()


def detach(sites: Iterable[Site]) -> None:
    """Detach adapters; each weight must carry no others.

    Args:
        sites: From :func:`detachable`, all of a weight or none.
    """
    for site in sites:
        if not site.tensor:
            _unhook(site)
        elif parametrize.is_parametrized(site.layer, site.tensor):
            _unparametrize(site)


def detachable(model: nn.Module) -> list[Site]:
    """All sites of a model with adapters.

    Raises:
        UsageError: A weight has a parametrization of another library beside the adapter.
    """
    sites = attached(model)
    own = Counter((site.layer, site.tensor) for site in sites if site.tensor)
    for site in sites:
        if site.tensor and own[site.layer, site.tensor] < len(_chain(site)):
            raise UsageError(
                f'{site.name} has a parametrization that is not of mmpeft beside the adapter, so '
                'the adapter cannot be removed alone. Remove the other first with '
                'torch.nn.utils.parametrize.remove_parametrizations.'
            )
    return sites


def moved_to(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor on another's device and in its dtype; a parameter remains the same object."""
    if tensor.device == like.device and tensor.dtype == like.dtype:
        return tensor
    if not isinstance(tensor, nn.Parameter):
        return tensor.to(like.device, like.dtype)
    tensor.data = tensor.data.to(like.device, like.dtype)
    return tensor


def _parametrize(site):
    layer, tensor = site.layer, site.tensor
    _own_class(layer)
    layer.__dict__.setdefault(ORDER, tuple(layer._parameters))
    parametrize.register_parametrization(layer, tensor, site.adapter, unsafe=True)
    for holder in (layer.parametrizations, _chain(site)):
        holder.training = layer.training
    execution.enable(layer, site.execution)


def _unparametrize(site):
    layer = site.layer
    _own_class(layer)
    parametrize.remove_parametrizations(layer, site.tensor, leave_parametrized=False)
    parameters = layer._parameters
    for name in layer.__dict__[ORDER]:  # torch appends what is no longer parametrized
        if name in parameters:
            parameters[name] = parameters.pop(name)
    if not any(adapters_of(layer, tensor) for tensor in getattr(layer, PARAMETRIZATIONS, {})):
        del layer.__dict__[ORDER]
    execution.enable(layer, site.execution)


def _hook(site):
    layer, adapter = site.layer, site.adapter
    holder = holder_of(layer)
    if not hasattr(holder, ADAPTERS):
        setattr(holder, ADAPTERS, nn.ModuleList().train(layer.training))
    getattr(holder, ADAPTERS).append(adapter)
    if type(adapter.method).before is not ActivationMethod.before:
        adapter.handles.append(layer.register_forward_pre_hook(adapter.before, with_kwargs=True))
    adapter.handles.append(layer.register_forward_hook(adapter, with_kwargs=True))


def _unhook(site):
    while site.adapter.handles:
        site.adapter.handles.pop().remove()
    holder = holder_of(site.layer)
    kept = [adapter for adapter in getattr(holder, ADAPTERS) if adapter is not site.adapter]
    delattr(holder, ADAPTERS)
    if kept:
        setattr(holder, ADAPTERS, nn.ModuleList(kept))


def _chain(site):
    return site.layer.parametrizations[site.tensor]


def _own_class(layer):
    """Give a layer a class of its own: torch puts properties on it, which copies would share."""
    execution.disable(layer)
    if parametrize.is_parametrized(layer):
        kind = type(layer)
        layer.__class__ = type(kind.__name__, kind.__bases__, dict(kind.__dict__))


def _move_to_layer(site):
    adapter, layer = site.adapter, site.layer
    like = site.original if site.tensor else next(layer.parameters(), None)
    if like is None:
        return
    dtype = torch.promote_types(like.dtype, torch.float32)
    dtype = adapter.dtype if adapter.dtype == like.dtype else dtype
    if (adapter.device, adapter.dtype) != (like.device, dtype):
        adapter.to(like.device, dtype)
