"""Fold adapters into the weights, and bring the base back."""

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import nn

from mmpeft.errors import UsageError

from .attach import attach, detach, detachable, moved_to
from .freeze import Injection, release
from .site import Site

# Where a model that was merged reversibly keeps what it was.
MERGED = 'peft_merged'


@dataclass(frozen=True)
class Merged:
    """What a reversible merge keeps for :func:`unmerge`.

    Attributes:
        sites: With their adapters.
        records: What ``model.peft`` was.
        originals: Layer, name of its weight, and the frozen weight.
    """

    sites: list[Site]
    records: list[Injection]
    originals: list[tuple[nn.Module, str, nn.Parameter]]


def remove(model: nn.Module) -> nn.Module:
    """Take all adapters off, in place: the base as it was before.

    Args:
        model: With adapters, without, or merged reversibly.

    Returns:
        The same model.

    Raises:
        UsageError: A weight carries another parametrization beside its
            adapter; the model is as it was.
    """
    detach(detachable(model))
    release(model)
    return remove(unmerge(model)) if MERGED in model.__dict__ else model


@torch.no_grad()
def merge(model: nn.Module, reversible: bool = False) -> nn.Module:
    """Fold all adapters into the weights, in place: plain modules, plain keys.

    phi(W) is computed in float64 and rounded once to the weight's dtype. All
    weights are checked before the first is changed. A weight that the model
    also reads elsewhere without the adapters stays there as it is.

    Args:
        model: With adapters or without.
        reversible: Keep the adapters and the frozen weights that they change
            outside the state dict, for :func:`unmerge`. Until then the base
            stays frozen. A second ``merge(model)`` drops them.

    Returns:
        The same model, which computes what it did in evaluation mode.

    Raises:
        UsageError: A method cannot be merged, a merged weight has NaN or
            infinity or exceeds its dtype, or a reversible merge would be the
            second one. The model is as it was.
    """
    sites = detachable(model)
    _check_methods(sites)
    earlier = model.__dict__.get(MERGED)
    if reversible and earlier is not None and (sites or getattr(model, 'peft', [])):
        raise UsageError(
            'This model was merged reversibly already, and adapted again since. Write '
            'mmpeft.merge(model) to merge for good, or mmpeft.remove(model) to have the first '
            'base back.'
        )
    weights = _adapted_weights(sites)
    for chain, *_ in weights:
        _merged(chain)
    originals = []
    for chains in weights:
        merged = _merged(chains[0])
        for chain in chains:
            layer, tensor = chain[0].layer, chain[0].tensor
            if reversible:
                originals.append((layer, tensor, chain[0].original))
            detach(chain)
            layer._parameters[tensor] = merged
    records = getattr(model, 'peft', [])
    if not reversible:
        release(model)
        release(model, earlier.records if earlier else [])
        model.__dict__.pop(MERGED, None)
    elif records:
        del model.peft
        setattr(model, MERGED, Merged(sites, records, originals))
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Undo a reversible merge, in place: the same adapters on the same weights.

    Every frozen weight is what it was to the last bit, and the parameters are
    the same objects as before, on the device and in the dtype that the model
    has now. What was trained outside since then stays.

    Args:
        model: After ``merge(model, reversible=True)``.

    Returns:
        The same model.

    Raises:
        UsageError: It was not merged so, or was adapted or parametrized since.
    """
    kept = model.__dict__.get(MERGED)
    if kept is None:
        raise UsageError(
            'There is nothing to unmerge: the way back is kept only by '
            'mmpeft.merge(model, reversible=True).'
        )
    changed = any(name not in layer._parameters for layer, name, _ in kept.originals)
    if changed or getattr(model, 'peft', []):
        raise UsageError(
            'The merged model was adapted or parametrized since. Take that off first, adapters '
            'with mmpeft.remove(model), which brings the base back in one step.'
        )
    for layer, name, original in kept.originals:
        layer._parameters[name] = moved_to(original, layer._parameters[name])
    attach(kept.sites)
    model.peft = kept.records
    del model.__dict__[MERGED]
    return model


def _adapted_weights(sites) -> list[list[list[Site]]]:
    """For each merged weight, where it goes: the chains of adapters that compute the same."""
    chains, weights = defaultdict(list), defaultdict(list)
    for site in sites:
        chains[site.layer, site.tensor].append(site)
    for chain in chains.values():
        weights[(chain[0].tie_key, *(id(site.adapter) for site in chain))].append(chain)
    return list(weights.values())


def _merged(chain: list[Site]) -> nn.Parameter:
    """phi(W) of all adapters of a weight, computed in float64 and rounded once to its dtype."""
    original = chain[0].original
    value = original.double()
    for site in chain:
        value = site.adapter.in_double(value)
    rounded = torch.empty_like(original).copy_(value)
    if rounded.isfinite().all():
        return nn.Parameter(rounded, original.requires_grad)
    if value.isfinite().all():
        raise UsageError(
            f'The merged {chain[0].name} reaches {value.abs().max().item():.3g}, which '
            f'{original.dtype} cannot hold. Merge the model in float32 or bfloat16.'
        )
    raise UsageError(
        f'The merged {chain[0].name} has NaN or infinite elements: the training diverged. Use an '
        'earlier checkpoint.'
    )


def _check_methods(sites):
    fixed = [site for site in sites if not site.method.merges]
    if fixed:
        raise UsageError(
            f'{type(fixed[0].method).__name__} acts on activations ({len(fixed)} places, such as '
            f'{fixed[0].name!r}) and is no function of a weight, so it cannot be merged. Deploy '
            'the model with its adapters attached: save_adapter and load_adapter, or the '
            'checkpoint itself.'
        )
