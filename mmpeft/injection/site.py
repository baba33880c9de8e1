"""Where an adapter is: a weight or a module of a model, and what is attached to it."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmpeft import execution
from mmpeft.errors import UsageError, suggest
from mmpeft.methods import ActivationAdapter, Adapter, Method
from mmpeft.methods.spec import InsertionPoint, WeightSpec
from mmpeft.quantization import dequantized

from .weights import ADAPTERS, PARAMETRIZATIONS, join, layers, original_of, weights_of


@dataclass(eq=False)
class Site:
    """A weight or module, and the method that adapts it.

    Attributes:
        path: Path of the layer in the model.
        tensor: Name of the weight in the layer; '' for its activations.
        spec: The role of the weight, or the insertion point.
        method: The method with the arguments that hold here.
        adapter: None until it is made.
        execution: How the layer computes, one of ``mmpeft.execution.CHOICES``.
    """

    path: str
    layer: nn.Module
    tensor: str
    spec: WeightSpec | InsertionPoint
    method: Method
    adapter: Adapter | None = None
    execution: str = execution.AUTO

    @property
    def name(self) -> str:
        """Path of the weight or module in the model without adapters."""
        return join(self.path, self.tensor)

    @property
    def weight(self) -> Tensor:
        """The weight as it is now; for activations an empty tensor of the layer's dtype."""
        if self.tensor:
            return dequantized(getattr(self.layer, self.tensor))
        like = next(iter(self.layer.parameters()), torch.empty(0))
        return torch.empty(0, dtype=like.dtype, device=like.device)

    @property
    def original(self) -> nn.Parameter:
        """The stored weight, to which all adapters of it apply."""
        return original_of(self.layer, self.tensor)

    @property
    def tie_key(self) -> int:
        """Equal for sites of one tied weight, which share an adapter."""
        return id(self.original if self.tensor else self.layer)


def attached(model: nn.Module) -> list[Site]:
    """One site for each adapter and each weight or module that it is attached to.

    They are in the model's order, and those of one weight or module in the order in which they
    apply. Attached again in this order, adapters have the same names.
    """
    found = []
    for path, layer in layers(model):
        way = execution.execution_of(layer)
        for tensor in (*getattr(layer, PARAMETRIZATIONS, {}), ''):
            for adapter in adapters_of(layer, tensor):
                spec, method = adapter.spec, adapter.method
                found.append(Site(path, layer, tensor, spec, method, adapter, way))
    return sorted(found, key=_index)


def chains_by_weight(sites: Iterable[Site]) -> list[list[list[Site]]]:
    """For each adapted weight the layers that read it, each as the chain of its sites.

    Layers that hold one tied weight with other adapters are weights of their own.
    """
    chains, weights = defaultdict(list), defaultdict(list)
    for site in sites:
        chains[site.layer, site.tensor].append(site)
    for chain in chains.values():
        weights[(chain[0].tie_key, *(id(site.adapter) for site in chain))].append(chain)
    return list(weights.values())


def sites_at(
    model: nn.Module, entries: Iterable[tuple[str, str, Method, InsertionPoint | None]]
) -> list[Site]:
    """Sites without adapters by their paths, without a search.

    Args:
        model: With or without adapters.
        entries: Path of the layer, name of the weight in it ('' for activations), method,
            and for activations the insertion point.

    Raises:
        UsageError: There is no such layer or weight, or the method is not defined on it.
    """
    found, sites = dict(layers(model)), []
    for path, tensor, method, spec in entries:
        if path not in found:
            raise UsageError(f'The model has no module {path!r} to adapt. {suggest(path, found)}')
        if tensor:
            own = dict(weights_of(found[path]))
            if tensor not in own:
                raise UsageError(
                    f'{path!r} has no weight {tensor!r} to adapt. {suggest(tensor, own)}'
                )
            spec = own[tensor]
        if not method.accepts(spec):
            raise UsageError(
                f'{type(method).__name__} is not defined on {join(path, tensor)!r}, which has '
                f'shape {tuple(spec.shape)} and kind {"/".join(sorted(spec.kinds))}.'
            )
        sites.append(Site(path, found[path], tensor, spec, method))
    return sites


def adapters_of(layer: nn.Module, tensor: str) -> list[Adapter]:
    """The adapters of a layer's weight, or of its activations if ``tensor`` is ''."""
    if tensor:
        chain = getattr(layer, PARAMETRIZATIONS, {})
        return [p for p in chain[tensor] if isinstance(p, Adapter)] if tensor in chain else []
    return [h for h in layer._forward_hooks.values() if isinstance(h, ActivationAdapter)]


def named_adapters(model: nn.Module) -> dict[str, Adapter]:
    """All adapters of a model, each once, by path."""
    return {path: m for path, m in model.named_modules() if isinstance(m, Adapter)}


def adapter_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of all adapters of a model, each once."""
    adapters = named_adapters(model).values()
    return iter({id(p): p for a in adapters for p in a.parameters(recurse=False)}.values())


def own_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of a model, each once, without those of adapters."""
    adapters = {id(p) for p in adapter_parameters(model)}
    return [p for p in model.parameters() if id(p) not in adapters]


def holder_of(layer: nn.Module) -> nn.Module:
    """The module that holds a layer's adapters of activations as children.

    An ``nn.Sequential`` would run them, so that its last child holds them.
    """
    while isinstance(layer, nn.Sequential):
        layer = layer[-1]
    return layer


def _index(site):
    """Position among the adapters of activations that one module holds for several layers."""
    return 0 if site.tensor else list(getattr(holder_of(site.layer), ADAPTERS)).index(site.adapter)
