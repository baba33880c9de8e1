"""Merge adapters into the weights, and bring the base back."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmpeft.errors import UsageError
from mmpeft.methods.precision import in_double
from mmpeft.quantization import Quantized, check_format, dequantized, quantize

from .attach import attach, detach, detach_all, detachable, moved_to
from .freeze import Injection, release
from .guards import drop_load_hook, unguard
from .offload import offloaded, onloaded
from .site import Site, chains_by_weight
from .ties import TIE, configs_to_untie, holders
from .weights import join
from .wrappers import on_inner

# Attribute of a model that was merged reversibly.
MERGED = 'peft_merged'


@dataclass(frozen=True)
class Merged:
    """What a reversible merge keeps: adapters, what ``model.peft`` was, and frozen weights.

    ``untied`` are configs that tied a weight before. ``offloaded`` are those of the frozen
    weights that are in host memory or in files.
    """

    sites: list[Site]
    records: list[Injection]
    originals: list[tuple[nn.Module, str, nn.Parameter]]
    untied: list[Any]
    offloaded: list[nn.Parameter]


def how_to_adapt(model: nn.Module) -> str:
    """What to do with a model without adapters that should have some, as a sentence."""
    if any(MERGED in vars(module) for module in model.modules()):
        return 'They are merged: call mmpeft.unmerge(model) first.'
    return 'Call mmpeft.inject(model, ...) first.'


@on_inner
def remove(model: nn.Module) -> nn.Module:
    """Detach all adapters, also of a reversible merge, and release the base, in place.

    Raises:
        UsageError: A weight has a parametrization of another library beside its
            adapter, or the model is sharded; it is unchanged.
    """
    detach_all(model)
    release(model)
    return remove(unmerge(model)) if MERGED in model.__dict__ else model


@on_inner
@torch.no_grad()
def merge(
    model: nn.Module,
    reversible: bool = False,
    frozen_dtype: str | None = None,
    offload: str | Path | None = None,
) -> nn.Module:
    """Put all adapters into the weights, in place: plain modules, plain keys.

    phi(W) is computed in float64 and rounded once to the weight's dtype. Weights in few bits
    become plain ones of their dtype, adapted or not. All weights are checked before the first is
    changed. A head that is adapted and tied to an embedding that is not is untied, in the config of
    a Hugging Face model too (``tie_word_embeddings``), so that its file loads as it is.

    Args:
        model: Computes afterwards what it did in evaluation mode.
        reversible: Keep the adapters and the frozen weights that they change
            outside the state dict, for :func:`unmerge`. Until then the base
            stays frozen. A second ``merge(model)`` drops them.
        frozen_dtype: Store merged weights that were in few bits in this format of
            :func:`mmpeft.inject`, and leave the others in few bits as they are. This rounds the
            merged weights once more.
        offload: Where a reversible merge keeps the frozen weights, so that the model takes no more
            of its device's memory: ``'cpu'`` for host memory, or a folder, in which they are
            files without names. They come back as other objects of the same values. A weight that
            trains, is in few bits, or is also held by a layer without the adapter stays.

    Raises:
        UsageError: A method cannot be merged, a weight is tied to one that is adapted
            otherwise, a merged weight has NaN or infinite elements or exceeds its dtype, a
            reversible merge would be the second one, ``offload`` is given and the merge is final,
            or the model is sharded. It is unchanged.
        OSError: There is no folder ``offload``, or it cannot be written, or is full. Likewise.
    """
    if offload is not None and not reversible:
        raise UsageError('Only a merge with reversible=True keeps weights that it could offload.')
    if frozen_dtype is not None:
        check_format(frozen_dtype)
    sites = detachable(model)
    check_mergeable(sites)
    records, earlier = getattr(model, 'peft', []), model.__dict__.get(MERGED)
    if reversible and earlier is not None and (sites or records):
        raise UsageError(
            'This model is already reversibly merged and has new adapters. Write '
            'mmpeft.merge(model) to merge for good, or mmpeft.remove(model) to restore the first '
            'base.'
        )
    weights, held = chains_by_weight(sites), holders(model)
    untied = configs_to_untie(model, weights)
    kept, elsewhere = [chains[0][0].original for chains in weights], []
    for number, chains in enumerate(weights):
        _merged(chains[0])
        stays = kept[number].requires_grad or isinstance(kept[number], Quantized)
        if offload is not None and not stays and len(held[id(kept[number])]) == len(chains):
            kept[number] = offloaded(kept[number], offload)
            elsewhere.append(kept[number])
    unguard(model)
    originals = []
    for chains, original in zip(weights, kept, strict=True):
        merged = _merged(chains[0])
        if frozen_dtype is not None and isinstance(original, Quantized):
            merged = nn.Parameter(quantize(merged, frozen_dtype), False)
        for first, *_ in chains:
            if reversible:
                originals.append((first.layer, first.tensor, original))
            detach([first])
            first.layer._parameters[first.tensor] = merged
    if frozen_dtype is None:
        originals += _dequantize(model)
    for config in untied:
        setattr(config, TIE, False)
    if not reversible:
        release(model)
        release(model, earlier.records if earlier else [])
        _forget(model)
    elif (records or originals) and earlier is None:
        model.__dict__.pop('peft', None)
        setattr(model, MERGED, Merged(sites, records, originals, untied, elsewhere))
        model.register_load_state_dict_pre_hook(_before_loading)
    return model


@on_inner
def unmerge(model: nn.Module) -> nn.Module:
    """Undo a reversible merge, in place: the same adapters on the same weights.

    Every frozen weight is what it was to the last bit, and the parameters are
    the same objects as before, except those that were offloaded, on the device and in the dtype
    that the model has now. What was trained elsewhere since then stays.

    Raises:
        UsageError: The model was not merged so, or was adapted or parametrized since.
    """
    kept = model.__dict__.get(MERGED)
    if kept is None:
        raise UsageError(
            'There is nothing to unmerge: only mmpeft.merge(model, reversible=True) keeps the '
            'adapters.'
        )
    changed = any(name not in layer._parameters for layer, name, _ in kept.originals)
    if changed or getattr(model, 'peft', []):
        raise UsageError(
            'The merged model was adapted or parametrized since. Undo that first: '
            'mmpeft.remove(model) removes adapters and brings the first base back in one step.'
        )
    elsewhere = set(map(id, kept.offloaded))
    for layer, name, original in kept.originals:
        move = onloaded if id(original) in elsewhere else moved_to
        layer._parameters[name] = move(original, layer._parameters[name])
    for config in kept.untied:
        setattr(config, TIE, True)
    attach(model, kept.sites)
    if kept.records:
        model.peft = kept.records
    _forget(model)
    return model


@contextmanager
def merged(model: nn.Module, offload: str | Path | None = None) -> Iterator[nn.Module]:
    """Merge for a ``with`` block: the speed of the plain model, and then the adapters again.

    What is loaded or trained inside into merged weights is lost at the end.

    Args:
        model: As for :func:`merge`.
        offload: Likewise.

    Yields:
        The model.

    Raises:
        UsageError: As :func:`merge` and :func:`unmerge`.
    """
    merge(model, reversible=True, offload=offload)
    try:
        yield model
    finally:
        unmerge(model)


def check_mergeable(sites: Iterable[Site]) -> None:
    """Refuse adapters that are not functions of a weight.

    Raises:
        UsageError: Says which.
    """
    fixed = [site for site in sites if not site.method.merges]
    if fixed:
        raise UsageError(
            f'{type(fixed[0].method).__name__} acts on activations ({len(fixed)} insertion points, '
            f'such as {fixed[0].name!r}) and is not a function of a weight, so it cannot be '
            'merged. Deploy the model with its adapters attached: save_adapter and load_adapter, '
            'or the checkpoint itself.'
        )


def _forget(model):
    """Undo what a reversible merge left on the model."""
    model.__dict__.pop(MERGED, None)
    drop_load_hook(model, _before_loading)


def _before_loading(module, state_dict, prefix, *rest):
    """Warn of other values for merged weights, which :func:`unmerge` would drop."""
    kept = {(layer, name) for layer, name, _ in module.__dict__[MERGED].originals}
    dropped = []
    for path, layer in module.named_modules():
        for name, merged in layer._parameters.items():
            key = prefix + join(path, name)
            if (layer, name) in kept and key in state_dict:
                held = dequantized(merged)
                if not torch.equal(dequantized(state_dict[key]).to(held), held):
                    dropped.append(key)
    if dropped:
        warnings.warn(
            f'{len(dropped)} weights of this state dict, such as {dropped[0]}, are merged '
            'reversibly in the model: mmpeft.unmerge would drop what is loaded now. Write '
            'mmpeft.unmerge(model) and mmpeft.load_base(model, state), or make the merge final '
            'by mmpeft.merge(model).',
            stacklevel=6,
        )


def _dequantize(model) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Make all weights in few bits plain, and return what they were, as in :class:`Merged`."""
    originals, plain = [], {}
    for layer in model.modules():
        for name, weight in layer._parameters.items():
            if isinstance(weight, Quantized):
                if id(weight) not in plain:
                    plain[id(weight)] = nn.Parameter(dequantized(weight), False)
                originals.append((layer, name, weight))
    for layer, name, weight in originals:
        layer._parameters[name] = plain[id(weight)]
    return originals


def _merged(chain: list[Site]) -> nn.Parameter:
    """phi(W) of all adapters of a weight, computed in float64 and rounded once to its dtype."""
    name, original = chain[0].name, dequantized(chain[0].original)
    value = in_double(original)
    for site in chain:
        value = site.adapter.in_double(value)
    rounded = torch.empty_like(original).copy_(value)
    if not rounded.isfinite().all():
        if not value.isfinite().all():
            raise UsageError(
                f'The merged {name} has NaN or infinite elements: the training diverged. Use an '
                'earlier checkpoint.'
            )
        raise UsageError(
            f'The merged {name} reaches {value.abs().max().item():.3g}, which {original.dtype} '
            'cannot hold. Merge the model in float32 or bfloat16.'
        )
    return nn.Parameter(rounded, chain[0].original.requires_grad)
