"""One adapter that is the weighted sum of others on the same base."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Real

import torch
from torch import Tensor, nn

from mmpeft.errors import UsageError
from mmpeft.execution import AUTO
from mmpeft.injection.site import Site
from mmpeft.injection.weights import is_below
from mmpeft.methods import Method, WeightAdapter
from mmpeft.methods.base import Factors
from mmpeft.methods.spec import WeightSpec

from .adapter_state import AdapterState


@dataclass(frozen=True, kw_only=True)
class Combination(Method):
    """phi(W) = W + sum_i w_i (phi_i(W) - W), each phi_i a chain of methods.

    Attributes:
        weights: w_i.
        chains: The methods of each phi_i, in the order in which they apply.
    """

    weights: tuple[float, ...]
    chains: tuple[tuple[Method, ...], ...]

    @property
    def trains_base(self) -> bool:
        """Whether a method in it trains the weights of the target module."""
        return any(method.trains_base for chain in self.chains for method in chain)

    @property
    def merges(self) -> bool:
        """Whether all methods in it can be merged."""
        return all(method.merges for chain in self.chains for method in chain)

    def init(self, weight: Tensor, spec: WeightSpec) -> Factors:
        """None; those of the parts are registered under :func:`_prefix`."""
        return {}

    def apply(self, weight, factors, spec, training=False):
        result = (1 - math.fsum(self.weights)) * weight
        for i, (share, chain) in enumerate(zip(self.weights, self.chains, strict=True)):
            value = weight
            for j, method in enumerate(chain):
                start = _prefix(i, j)
                own = {k.removeprefix(start): v for k, v in factors.items() if k.startswith(start)}
                value = method.apply(value, own, spec)
            result = result + share * value
        return result

    def config(self):
        """Refused: a UsageError."""
        raise UsageError(
            'A combination of adapters has no file of its own. Save the adapters that it is made '
            'of and combine them again after loading, or merge it and save the model.'
        )

    def __str__(self):
        chains = (' o '.join(map(str, reversed(chain))) for chain in self.chains)
        return ' + '.join(f'{w} {c}' for w, c in zip(self.weights, chains, strict=True))


def combine(
    parts: Mapping[str, AdapterState],
    weights: Mapping[str, float],
    base: Mapping[str, Tensor],
    heads: str | None,
) -> AdapterState:
    """Combine adapters; their tensors are shared, not copied, and do not train.

    Args:
        parts: By name, none of them in use.
        weights: By the same names.
        base: Tensors of the plain base by name.
        heads: As in :meth:`AdapterLibrary.combine`, as are the errors.
    """
    sites = _combined_sites(parts, weights)
    records = [
        replace(record, method=Combination(weights=(1.0,), chains=((record.method,),)))
        for part in parts.values()
        for record in part.records
    ]
    return AdapterState(sites, records, _combined_tensors(parts, weights, base, heads))


def check_weights(weights: Mapping[str, float]) -> dict[str, float]:
    """The weights of a combination as floats.

    Raises:
        UsageError: There is no weight, or one is not a finite number.
    """
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, Real) or not math.isfinite(weight):
            raise UsageError(f'The weight of {name!r} to add it by is {weight!r}, not a number.')
    if not weights:
        raise UsageError("A combination needs adapters, such as {'coco': 0.7, 'dota': 0.3}.")
    return {name: float(weight) for name, weight in weights.items()}


def _combined_sites(parts, weights) -> list[Site]:
    places, acting = {}, {}
    for name, part in parts.items():
        for site in part.sites:
            if site.tensor:
                place = places.setdefault((site.layer, site.tensor), {})
                place.setdefault(name, []).append(site)
            else:
                acting.setdefault(name, []).append(site)
    if len(acting) > 1 or any(weights[name] != 1 for name in acting):
        kinds = {type(site.method).__name__ for sites in acting.values() for site in sites}
        raise UsageError(
            f'{" and ".join(map(repr, acting))} ({", ".join(sorted(kinds))}) act on activations, '
            'and cannot be added up as weights can. A combination takes at most one such adapter, '
            'with the weight 1.'
        )
    adapters, held, result = {}, {}, []
    for chains in places.values():
        first = next(iter(chains.values()))[0]
        key = (first.tie_key, *((n, *(id(s.adapter) for s in c)) for n, c in chains.items()))
        if key not in adapters:
            adapters[key] = _combined(first, chains, weights, held)
        adapter = adapters[key]
        result.append(replace(first, method=adapter.method, adapter=adapter, execution=AUTO))
    return result + [site for sites in acting.values() for site in sites]


def _combined(first: Site, chains: Mapping[str, list[Site]], weights, held) -> WeightAdapter:
    method = Combination(
        weights=tuple(weights[name] for name in chains),
        chains=tuple(tuple(site.method for site in chain) for chain in chains.values()),
    )
    combined = WeightAdapter(method, first.spec, first.original)
    for i, chain in enumerate(chains.values()):
        for j, site in enumerate(chain):
            adapter = site.adapter
            for name, value in adapter.factors.items():
                if isinstance(value, nn.Parameter):
                    value = held.setdefault(id(value), nn.Parameter(value.data, False))
                    combined.register_parameter(_prefix(i, j) + name, value)
                else:
                    stored = name not in adapter._non_persistent_buffers_set
                    combined.register_buffer(_prefix(i, j) + name, value, persistent=stored)
    return combined


def _prefix(chain, position):
    return f'part{chain}_{position}_'


def _combined_tensors(parts, weights, base, heads) -> dict[str, Tensor]:
    """What a combination holds besides its adapters, by name in the plain model."""
    targets = {record.module for part in parts.values() for record in part.records}
    mixed, result = {}, {}
    for key in dict.fromkeys(key for part in parts.values() for key in part.tensors):
        if key not in base:
            continue
        given = {name: part.tensors[key] for name, part in parts.items() if key in part.tensors}
        shares = weights
        if heads is not None and not is_below(key, targets):
            given = {name: value for name, value in given.items() if name == heads}
            shares = {heads: 1.0}
        if given:
            tied = (id(base[key]), *map(id, given.values()))
            if tied not in mixed:
                mixed[tied] = _mixed(base[key], given, shares)
            result[key] = mixed[tied]
    return result


def _mixed(base, given, weights):
    if not base.is_floating_point():
        return given[max(given, key=lambda name: abs(weights[name]))].detach().clone()
    rest = 1 - math.fsum(weights[name] for name in given)
    total = rest * base.detach().double() if rest else torch.zeros_like(base, dtype=torch.double)
    for name, value in given.items():
        total += weights[name] * value.detach().to(base.device, torch.double)
    mixed = torch.empty_like(base, requires_grad=False).copy_(total)
    parameter = next((v for v in given.values() if isinstance(v, nn.Parameter)), None)
    return mixed if parameter is None else nn.Parameter(mixed, parameter.requires_grad)
