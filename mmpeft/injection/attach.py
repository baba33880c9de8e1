"""Attach adapters to a model, and detach them."""

import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mmpeft import execution
from mmpeft.errors import UsageError
from mmpeft.execution.classes import share_class
from mmpeft.methods import ActivationAdapter, WeightAdapter
from mmpeft.quantization import Quantized

from .calls import unwatch, watch
from .freeze import Injection, freeze_target
from .guards import guard, unguard
from .site import Site, adapters_of, attached, holder_of
from .weights import ADAPTERS, PARAMETRIZATIONS

# Attribute of a layer: the order that its parameters had before the first adapter.
ORDER = 'peft_order'


def adapt(
    model: nn.Module, injection: Injection, sites: Sequence[Site], empty: bool = False
) -> list[Site]:
    """Do one injection, of which everything is known: freeze its target, attach its adapters.

    Args:
        model: With or without adapters of earlier injections.
        injection: See :func:`freeze_target`, as the errors.
        sites: Of the injection, without adapters.
        empty: See :func:`make_adapters`.

    Returns:
        The sites with their adapters.
    """
    sites = make_adapters(sites, empty, injection.execution)
    adapted = tuple(dict.fromkeys(site.name for site in sites))
    freeze_target(model, replace(injection, adapted=adapted))
    for site in sites:
        site.adapter.injection = len(model.peft) - 1
    attach(model, sites)
    return sites


def make_adapters(
    sites: Sequence[Site], empty: bool = False, execution: str = execution.AUTO
) -> list[Site]:
    """The sites of one injection with new adapters, to be attached.

    Tied weights share one adapter, and adapters of equal methods the factors in ``method.tied``.

    Args:
        sites: Without adapters.
        empty: Fill what files store of adapters with NaN, to be loaded, and spare computing it.
        execution: One of ``mmpeft.execution.CHOICES``.
    """
    adapters, shared = {}, {}
    terminal = sys.stderr.isatty()  # without one, track would start a thread for nothing
    for site in track(sites, 'adapters', transient=True) if terminal else sites:
        if site.tie_key in adapters:
            continue
        kind = WeightAdapter if site.tensor else ActivationAdapter
        adapter = kind(site.method, site.spec, site.weight, empty)
        for name in site.method.tied:
            own = getattr(adapter, name)
            key = site.method, name, site.method.tie_key(site.spec), own.dtype, own.device
            if site.method.tied_in_layer:
                key += id(site.layer), re.sub('(weight|bias|gamma|beta)$', '', site.tensor)
            setattr(adapter, name, shared.setdefault(key, own))
        adapters[site.tie_key] = adapter
    return [replace(s, adapter=adapters[s.tie_key], execution=execution) for s in sites]


def attach(model: nn.Module, sites: Iterable[Site]) -> None:
    """Attach the adapters of a model's sites, in their layers' mode, device and precision.

    The model then watches its first pass (:func:`.watch`) and warns of plain files
    (:func:`.guard`).
    """
    for site in sites:
        adapter, layer = site.adapter, site.layer
        like = site.original if site.tensor else next(layer.parameters(), None)
        if like is not None:
            exact = adapter.dtype == like.dtype
            dtype = like.dtype if exact else torch.promote_types(like.dtype, torch.float32)
            if (adapter.device, adapter.dtype) != (like.device, dtype):
                adapter.to(like.device, dtype)
        adapter.train(layer.training)
        if site.tensor:
            _parametrize(site)
            continue
        holder = holder_of(layer)
        if not hasattr(holder, ADAPTERS):
            setattr(holder, ADAPTERS, nn.ModuleList().train(layer.training))
        getattr(holder, ADAPTERS).append(adapter)
        adapter.hook(layer)
    # Inside torch's parametrize.cached() weights of earlier adapters would be read again.
    parametrize._cache.clear()
    watch(model)
    guard(model)


def detach(sites: Iterable[Site]) -> None:
    """Detach the adapters of sites, and of a weight all of them; see :func:`detachable`."""
    for site in sites:
        if site.tensor:
            if parametrize.is_parametrized(site.layer, site.tensor):
                _unparametrize(site.layer, site.tensor, site.execution)
            continue
        site.adapter.unhook()
        holder = holder_of(site.layer)
        kept = [adapter for adapter in getattr(holder, ADAPTERS) if adapter is not site.adapter]
        delattr(holder, ADAPTERS)
        if kept:
            setattr(holder, ADAPTERS, nn.ModuleList(kept))


def detachable(model: nn.Module) -> list[Site]:
    """All sites of a model with adapters.

    Raises:
        UsageError: A weight has a parametrization of another library beside the adapter.
    """
    sites = attached(model)
    for site in (site for site in sites if site.tensor):
        chain = site.layer.parametrizations[site.tensor]
        if not all(isinstance(each, WeightAdapter) for each in chain):
            raise UsageError(
                f'{site.name} has a parametrization that is not of mmpeft beside the adapter, so '
                'the adapter cannot be removed alone. Remove the other first with '
                'torch.nn.utils.parametrize.remove_parametrizations.'
            )
    return sites


def detach_all(model: nn.Module) -> None:
    """Detach all adapters of a model; the base stays frozen.

    Raises:
        UsageError: As :func:`detachable`; the model is unchanged.
    """
    detach(detachable(model))
    unwatch(model)
    unguard(model)


def moved_to(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor on another's device and in its dtype; a plain parameter remains the same object."""
    moved = tensor.to(like.device, like.dtype)
    if moved is tensor or not isinstance(tensor, nn.Parameter):
        return moved
    if isinstance(tensor, Quantized):
        return nn.Parameter(moved, tensor.requires_grad)
    tensor.data = moved.data
    return tensor


def _parametrize(site):
    layer, tensor = site.layer, site.tensor
    execution.disable(layer)
    layer.__dict__.setdefault(ORDER, tuple(layer._parameters))
    original = layer._parameters.get(tensor)
    if isinstance(original, Quantized):
        site.adapter.in_few_bits = True
        # torch would swap it with itself, and fails where a graph for backward holds it.
        blank = torch.empty(original.shape, dtype=original.dtype, device='meta')
        layer._parameters[tensor] = nn.Parameter(blank, False)
    if parametrize.is_parametrized(layer):
        share_class(layer)  # copies of the layer have the class too, which gets a property
    parametrize.register_parametrization(layer, tensor, site.adapter, unsafe=True)
    if isinstance(original, Quantized):
        layer.parametrizations[tensor].original = original
    share_class(layer)
    layer.parametrizations.training = layer.training
    layer.parametrizations[tensor].training = layer.training
    execution.enable(layer, site.execution)


def _unparametrize(layer, tensor, way):
    execution.disable(layer)
    parametrize.remove_parametrizations(layer, tensor, leave_parametrized=False)
    parameters = layer._parameters
    for name in layer.__dict__[ORDER]:  # torch has moved the weight to the end
        if name in parameters:
            parameters[name] = parameters.pop(name)
    if not any(adapters_of(layer, tensor) for tensor in getattr(layer, PARAMETRIZATIONS, {})):
        del layer.__dict__[ORDER]
    execution.enable(layer, way)
