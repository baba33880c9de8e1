"""Take adapters off a model and put the same ones on again; freeze its base and release it."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mmpeft import execution
from mmpeft.errors import UsageError
from mmpeft.methods import Adapter

from .attach import Attachment, attach, attachments, detach
from .freeze import freeze_statistics, unfreeze_statistics
from .targets import target_module
from .weights import ADAPTERS, plain_key


@dataclass(frozen=True)
class Piece:
    """One adapter and where it belongs.

    Attributes:
        layer: The module.
        tensor: Name of the weight; '' for adapters of activations.
        adapter: The adapter.
        way: To compute with the weight, one of ``execution.CHOICES``.
    """

    layer: nn.Module
    tensor: str
    adapter: Adapter
    way: str


def pieces(model: nn.Module) -> list[Piece]:
    """All adapters of a model, in an order in which :func:`put_on` gives them the same names."""
    found = [
        Piece(a.layer, a.tensor, adapter, execution.execution_of(a.layer))
        for a in attachments(model)
        for adapter in a.adapters
    ]
    places = {}
    for path, module in model.named_modules():
        if path.split('.')[-2:-1] == [ADAPTERS]:
            places[id(module)] = int(path.split('.')[-1])
    return sorted(found, key=lambda piece: 0 if piece.tensor else places[id(piece.adapter)])


def take_off(model: nn.Module) -> None:
    """Take all adapters off; the base stays frozen.

    Raises:
        UsageError: A weight carries another parametrization beside them; the
            model is as it was.
    """
    for attachment in separable(model):
        detach(attachment)


def put_on(taken: Iterable[Piece]) -> None:
    """Put adapters on layers that have none; they follow the layers' device and precision."""
    for piece in taken:
        _follow(piece)
        attach(piece.layer, piece.tensor, piece.adapter, piece.way)
    # Inside torch's parametrize.cached() weights of earlier adapters would be read again.
    parametrize._cache.clear()


def separable(model: nn.Module) -> list[Attachment]:
    """All weights and modules with adapters.

    Raises:
        UsageError: A weight carries another parametrization beside them.
    """
    adapted = list(attachments(model))
    for attachment in adapted:
        tensor = attachment.tensor
        if tensor and len(attachment.adapters) < len(attachment.layer.parametrizations[tensor]):
            raise UsageError(
                f'{attachment.name} carries a parametrization that is not of mmpeft beside the '
                'adapter, so neither can be taken off alone. Remove it first with '
                'torch.nn.utils.parametrize.remove_parametrizations.'
            )
    return adapted


def freeze(model: nn.Module, records: Iterable) -> None:
    """Make a plain model's base what earlier injections made it.

    Args:
        model: Without adapters.
        records: Of :class:`~mmpeft.injection.inject.Injection`.
    """
    for record in records:
        if not record.method.trains_base:
            freeze_statistics(target_module(model, record.targets.module))
        _set_training(model, record.trained_before, False)
        _set_training(model, record.frozen_before, True)


def release(model: nn.Module, records: Iterable) -> None:
    """Undo what injections did to a model's base.

    Args:
        model: Without adapters.
        records: Of :class:`~mmpeft.injection.inject.Injection`.
    """
    for record in reversed(list(records)):
        root = target_module(model, record.targets.module)
        unfreeze_statistics(root)
        for layer in root.modules():
            execution.disable(layer)
        _set_training(model, record.frozen_before, False)
        _set_training(model, record.trained_before, True)


def speed_up(model: nn.Module, records: Iterable) -> None:
    """Let frozen layers compute as injections let them; see :func:`mmpeft.inject`.

    Args:
        model: With its adapters.
        records: Of :class:`~mmpeft.injection.inject.Injection`.
    """
    for record in records:
        if record.execution != execution.PLAIN and not record.method.trains_base:
            execution.enable_frozen(target_module(model, record.targets.module))


def names_of(model: nn.Module, parameters: Iterable[nn.Parameter]) -> tuple[str, ...]:
    """All names that parameters have in the model without adapters."""
    wanted = {id(p) for p in parameters}
    named = model.named_parameters(remove_duplicate=False)
    return tuple(plain_key(name) for name, p in named if id(p) in wanted)


def moved_to(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor on another's device and in its dtype; a parameter remains the same object."""
    if tensor.device == like.device and tensor.dtype == like.dtype:
        return tensor
    if not isinstance(tensor, nn.Parameter):
        return tensor.to(like.device, like.dtype)
    tensor.data = tensor.data.to(like.device, like.dtype)
    return tensor


def _set_training(model, names, trains):
    if not names:
        return
    names = set(names)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if plain_key(name) in names:
            parameter.requires_grad_(trains)


def _follow(piece):
    own = piece.layer._parameters
    like = own.get(piece.tensor)
    if like is None:
        like = next(piece.layer.parameters(), None)
    if like is not None:
        dtype = piece.adapter.dtype
        if dtype != like.dtype:
            dtype = torch.promote_types(like.dtype, torch.float32)
        piece.adapter.to(like.device, dtype)
