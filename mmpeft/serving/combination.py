"""One adapter that is the weighted sum of others on the same base."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Real

import torch
from torch import Tensor, nn

from mmpeft.errors import UsageError
from mmpeft.execution import AUTO
from mmpeft.injection.freeze import Injection
from mmpeft.injection.site import Site
from mmpeft.methods import Adapter, Method, WeightAdapter
from mmpeft.methods.base import Factors
from mmpeft.methods.spec import WeightSpec


@dataclass(frozen=True, kw_only=True)
class Combination(Method):
    """phi(W) = W + sum_i w_i (phi_i(W) - W), each phi_i a chain of methods.

    Attributes:
        weights: w_i.
        chains: The methods of each phi_i, in the order in which they apply.
    """

    weights: tuple[float, ...]
    chains: tuple[tuple[Method, ...], ...]

    def init(self, weight: Tensor, spec: WeightSpec) -> Factors:
        """Nothing: the parts' own factors are taken, see :func:`combined_sites`."""
        return {}

    def apply(self, weight, factors, spec, training=False):
        result = (1 - math.fsum(self.weights)) * weight
        for i, (share, chain) in enumerate(zip(self.weights, self.chains, strict=True)):
            value = weight
            for j, method in enumerate(chain):
                value = method.apply(value, _factors_of(factors, i, j), spec)
            result = result + share * value
        return result

    def __str__(self):
        chains = (' o '.join(map(str, reversed(chain))) for chain in self.chains)
        return ' + '.join(f'{w} {c}' for w, c in zip(self.weights, chains, strict=True))


@dataclass(frozen=True)
class CombinedInjection(Injection):
    """A part's injection in a combination, which no file describes."""

    def config(self):
        """Refused.

        Raises:
            UsageError: Always.
        """
        raise UsageError(
            'A combination of adapters has no file of its own. Save the adapters that it is made '
            'of and combine them again after loading, or merge it and save the model.'
        )


def normal_weights(weights: Mapping[str, float]) -> dict[str, float]:
    """Weights of a combination as floats.

    Raises:
        UsageError: There are none, or one is no finite number.
    """
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, Real) or not math.isfinite(weight):
            raise UsageError(f'The weight of {name!r} in a combination is {weight!r}, no number.')
    if not weights:
        raise UsageError("A combination needs adapters, such as {'coco': 0.7, 'dota': 0.3}.")
    return {name: float(weight) for name, weight in weights.items()}


def combined_sites(parts: Mapping, weights: Mapping[str, float]) -> list[Site]:
    """The adapters of a combination; their tensors are those of the parts, and do not train.

    Args:
        parts: Of :class:`~mmpeft.serving.adapter_state.AdapterState`, none of them in use.
        weights: By the same names.

    Raises:
        UsageError: Adapters that act on activations are not alone with the
            weight 1.
    """
    acting = _acting(parts, weights)
    chains = {}
    for name, part in parts.items():
        for piece in part.sites:
            if piece.tensor:
                place = chains.setdefault((id(piece.layer), piece.tensor), {})
                place.setdefault(name, []).append(piece)
    made, held, result = {}, {}, []
    for place in chains.values():
        first = next(iter(place.values()))[0]
        original = first.original
        adapters = [(name, tuple(p.adapter for p in chain)) for name, chain in place.items()]
        key = (id(original), *((name, *map(id, chain)) for name, chain in adapters))
        if key not in made:
            made[key] = _combined(original, adapters, weights, held)
        result.append(replace(first, adapter=made[key], method=made[key].method, execution=AUTO))
    return result + acting


def combined_records(parts: Mapping) -> list[CombinedInjection]:
    """What is ``model.peft`` while a combination is in use."""
    return [CombinedInjection(**vars(record)) for part in parts.values() for record in part.records]


def combined_tensors(
    parts: Mapping, weights: Mapping[str, float], base: Mapping[str, Tensor], heads: str | None
) -> dict[str, Tensor]:
    """What a combination holds beside its adapters.

    Args:
        parts: Of :class:`~mmpeft.serving.adapter_state.AdapterState`, none of them in use.
        weights: By the same names.
        base: Tensors of the plain base by name.
        heads: The part whose tensors outside all targets are taken; None to
            mix them.

    Returns:
        New tensors by name in the plain model.
    """
    targets = {record.module for part in parts.values() for record in part.records}
    inside = tuple(f'{path}.' if path else '' for path in targets)
    made, result = {}, {}
    for key in dict.fromkeys(key for part in parts.values() for key in part.tensors):
        if key not in base:
            continue
        given = {name: part.tensors[key] for name, part in parts.items() if key in part.tensors}
        if heads is not None and not key.startswith(inside):
            if heads not in given:
                continue
            given, shares = {heads: given[heads]}, {heads: 1.0}
        else:
            shares = weights
        tied = (id(base[key]), *map(id, given.values()))
        if tied not in made:
            made[tied] = _mixed(base[key], given, shares)
        result[key] = made[tied]
    return result


def _acting(parts, weights):
    acting = [name for name, part in parts.items() if any(not p.tensor for p in part.sites)]
    if len(acting) > 1 or any(weights[name] != 1 for name in acting):
        kinds = {type(p.adapter.method).__name__ for n in acting for p in parts[n].sites}
        raise UsageError(
            f'{" and ".join(map(repr, acting))} ({", ".join(sorted(kinds))}) act on activations, '
            'and no sum of their functions is one of weights. A combination takes at most one '
            'such adapter, with the weight 1.'
        )
    return [piece for name in acting for piece in parts[name].sites if not piece.tensor]


def _combined(original: Tensor, adapters, weights, held) -> Adapter:
    method = Combination(
        weights=tuple(weights[name] for name, _ in adapters),
        chains=tuple(tuple(adapter.method for adapter in chain) for _, chain in adapters),
    )
    combined = WeightAdapter(method, adapters[0][1][0].spec, original)
    for i, (_, chain) in enumerate(adapters):
        for j, adapter in enumerate(chain):
            fixed = adapter._non_persistent_buffers_set
            for name, value in adapter.factors.items():
                if isinstance(value, nn.Parameter):
                    value = held.setdefault(id(value), nn.Parameter(value.data, False))
                    combined.register_parameter(_prefix(i, j) + name, value)
                else:
                    combined.register_buffer(
                        _prefix(i, j) + name, value, persistent=name not in fixed
                    )
    return combined


def _prefix(chain, position):
    return f'part{chain}_{position}_'


def _factors_of(factors, chain, position):
    prefix = _prefix(chain, position)
    return {k.removeprefix(prefix): v for k, v in factors.items() if k.startswith(prefix)}


def _mixed(base, given, weights):
    parameter = next((v for v in given.values() if isinstance(v, nn.Parameter)), None)
    if not base.is_floating_point():
        return given[max(given, key=lambda name: abs(weights[name]))].detach().clone()
    rest = 1 - math.fsum(weights[name] for name in given)
    total = rest * base.detach().double() if rest else torch.zeros_like(base, dtype=torch.double)
    for name, value in given.items():
        total += weights[name] * value.detach().to(base.device, torch.double)
    mixed = torch.empty_like(base, requires_grad=False).copy_(total)
    return mixed if parameter is None else nn.Parameter(mixed, parameter.requires_grad)
