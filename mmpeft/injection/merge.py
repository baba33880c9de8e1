"""Fold adapters into the weights, and bring the base back."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmpeft.errors import UsageError
from mmpeft.methods import Adapter

from .attach import Attachment, detach
from .reattach import (
    Piece,
    moved_to,
    pieces,
    put_on,
    release,
    separable,
    take_off,
)
from .weights import original_of

# Where a model that was merged reversibly keeps what it was.
MERGED = 'peft_merged'


@dataclass(frozen=True)
class Merged:
    """What a reversible merge put aside.

    Attributes:
        pieces: The adapters.
        records: What was ``model.peft``.
        originals: Layer, name of its weight, and the frozen weight.
    """

    pieces: list[Piece]
    records: list
    originals: list[tuple[nn.Module, str, nn.Parameter]]


@dataclass(frozen=True)
class Group:
    """A frozen weight and the adapters that change it, wherever they do.

    Attributes:
        original: The frozen weight.
        adapters: In the order in which they apply.
        attachments: Where the model reads it through these adapters.
    """

    original: nn.Parameter
    adapters: tuple[Adapter, ...]
    attachments: list[Attachment]

    def merged(self) -> nn.Parameter:
        """phi(W), computed in float64 and rounded once to the weight's dtype.

        Raises:
            UsageError: It has NaN or infinite elements.
        """
        value = self.original.double()
        for adapter in self.adapters:
            value = adapter.in_double(value)
        rounded = torch.empty_like(self.original).copy_(value)
        if not rounded.isfinite().all():
            raise UsageError(self._unusable(value))
        return nn.Parameter(rounded, self.original.requires_grad)

    def _unusable(self, value: Tensor) -> str:
        name = self.attachments[0].name
        if value.isfinite().all():
            largest = value.abs().max().item()
            return (
                f'The merged {name} reaches {largest:.3g}, which {self.original.dtype} cannot '
                'hold. Merge the model in float32 or bfloat16.'
            )
        return (
            f'The merged {name} has NaN or infinite elements. The adapter was trained to '
            'destruction: use an earlier checkpoint.'
        )


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
    take_off(model)
    release(model, model.__dict__.pop('peft', []))
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
    adapted = separable(model)
    _check_methods(adapted)
    earlier = model.__dict__.get(MERGED)
    if reversible and earlier is not None and (adapted or getattr(model, 'peft', [])):
        raise UsageError(
            'This model was merged reversibly already, and adapted again since. Write '
            'mmpeft.merge(model) to merge for good, or mmpeft.remove(model) to have the first '
            'base back.'
        )
    groups = _groups(adapted)
    for group in groups:
        group.merged()
    taken, originals = pieces(model) if reversible else [], []
    while groups:
        group = groups.pop()  # so that its frozen weight is given free
        weight = group.merged()
        for attachment in group.attachments:
            detach(attachment)
            attachment.layer._parameters[attachment.tensor] = weight
            if reversible:
                originals.append((attachment.layer, attachment.tensor, group.original))
    records = model.__dict__.pop('peft', [])
    if reversible and records:
        setattr(model, MERGED, Merged(taken, records, originals))
    elif not reversible:
        release(model, records)
        release(model, earlier.records if earlier else [])
        model.__dict__.pop(MERGED, None)
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
    put_on(kept.pieces)
    model.peft = kept.records
    del model.__dict__[MERGED]
    return model


def _groups(adapted) -> list[Group]:
    groups = {}
    for attachment in adapted:
        original = original_of(attachment.layer, attachment.tensor)
        key = (id(original), *map(id, attachment.adapters))
        group = groups.setdefault(key, Group(original, attachment.adapters, []))
        group.attachments.append(attachment)
    return list(groups.values())


def _check_methods(adapted):
    fixed = [(a.name, m) for a in adapted for m in (p.method for p in a.adapters) if not m.merges]
    if fixed:
        name, method = fixed[0]
        raise UsageError(
            f'{type(method).__name__} acts on activations ({len(fixed)} places, such as {name!r}) '
            'and is no function of a weight, so it cannot be merged. Deploy the model with its '
            'adapters attached: save_adapter and load_adapter, or the checkpoint itself.'
        )
