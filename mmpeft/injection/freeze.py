"""Freeze the target module of an injection, and release it again."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import nn

from mmpeft import execution
from mmpeft.errors import UsageError, suggest
from mmpeft.execution import SMALL, SPEED
from mmpeft.methods import Method
from mmpeft.quantization import Quantized

from .blocks import recomputable_blocks
from .reentrant import reach_into_checkpoints
from .site import adapter_parameters
from .statistics import freeze_statistics, release_statistics
from .weights import plain_key

# Attribute of parameters whose memory several models share (mmpeft.share_base).
IN_COMMON = 'peft_in_common'


@dataclass(frozen=True)
class Injection:
    """What one injection did to a model; ``model.peft`` lists them in order.

    Names of parameters are those of the model without adapters.

    Attributes:
        method: With its budget and scale resolved.
        module: Path of the target module; '' for the whole model.
        trained: Names, below the target module, of its parameters that train.
        trained_before: Names in the model of the parameters that were frozen here.
        frozen_before: Names in the model of the parameters that train since.
        execution: One of ``mmpeft.execution.CHOICES``.
        memory: One of ``mmpeft.execution.MEMORY``.
        adapted: Names in the model of the weights and modules that got adapters.
    """

    method: Method
    module: str
    trained: tuple[str, ...] = ()
    trained_before: tuple[str, ...] = ()
    frozen_before: tuple[str, ...] = ()
    execution: str = execution.AUTO
    memory: str = SPEED
    adapted: tuple[str, ...] = ()

    @property
    def prefix(self) -> str:
        """Prefix of the names of the target module's parameters."""
        return f'{self.module}.' if self.module else ''


def freeze_target(model: nn.Module, injection: Injection) -> None:
    """Freeze a target module except for what trains in it, and record it in ``model.peft``.

    Adapters, and parameters that earlier injections train, stay trainable. Call
    it before the adapters of the injection are attached.

    Args:
        model: With or without adapters.
        injection: ``trained_before`` and ``frozen_before`` are found here.

    Raises:
        UsageError: No parameter has a name in ``trained``; the model is unchanged.
    """
    records, module = getattr(model, 'peft', []), injection.module
    everything, own = plain_parameters(model), plain_parameters(model.get_submodule(module))
    for name in injection.trained:
        if name not in own:
            raise UsageError(
                f'{module or "The model"!r} has no parameter {name!r} to train. '
                f'{suggest(name, own)}'
            )
    kept = {id(own[name]) for name in injection.trained}
    kept |= {id(p) for p in trained_parameters(model)}
    frozen = {id(p) for p in own.values() if p.requires_grad} - kept
    if injection.method.trains_base:
        frozen = set()
    thawed = {id(own[name]) for name in injection.trained if not own[name].requires_grad}
    record = replace(
        injection,
        trained_before=tuple(name for name, p in everything.items() if id(p) in frozen),
        frozen_before=tuple(name for name, p in everything.items() if id(p) in thawed),
    )
    _apply(model, record)
    model.peft = [*records, record]


def freeze_again(model: nn.Module, records: list[Injection]) -> None:
    """Do to a released model what injections did, except for the adapters."""
    for record in records:
        _apply(model, record)
    model.peft = records


def release(model: nn.Module, records: Iterable[Injection] | None = None) -> None:
    """Undo :func:`freeze_target` in a model without adapters.

    Args:
        records: What to undo; all that is in ``model.peft``, which is deleted, if None.
    """
    if records is None:
        records = model.__dict__.pop('peft', [])
    for record in reversed(list(records)):
        root = model.get_submodule(record.module)
        for layer in root.modules():
            execution.disable(layer)
        release_statistics(root)
        _set_training(model, record.frozen_before, False)
        _set_training(model, record.trained_before, True)


def plain_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters except those of adapters, by all their names in the model without them."""
    adapters = {id(p) for p in adapter_parameters(module)}
    named = module.named_parameters(remove_duplicate=False)
    return {plain_key(name): p for name, p in named if id(p) not in adapters}


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that injections let train themselves."""
    own, records = plain_parameters(model), getattr(model, 'peft', [])
    return [own[record.prefix + name] for record in records for name in record.trained]


def _apply(model, record):
    reach_into_checkpoints()
    _set_training(model, record.trained_before, False)
    _set_training(model, record.frozen_before, True)
    root = model.get_submodule(record.module)
    if not record.method.trains_base:
        freeze_statistics(root)
        if record.execution != execution.PLAIN:
            execution.enable_frozen(root)
    blocks = recomputable_blocks(root) if record.memory == SMALL else ()
    execution.keep_less(root, record.memory, blocks)


def _set_training(model, names, trains):
    names = set(names)
    for name, parameter in plain_parameters(model).items():
        if name in names and not isinstance(parameter, Quantized):
            parameter.requires_grad_(trains)
            if trains and parameter.__dict__.pop(IN_COMMON, False):
                _part(parameter)


def _part(parameter):
    """Give a parameter memory of its own with its first gradient: other models keep theirs."""

    def part(parameter):
        handle.remove()
        parameter.data = parameter.data.clone()

    handle = parameter.register_post_accumulate_grad_hook(part)
