"""Models inside wrappers (DDP, torch.compile, FSDP, activation checkpointing), and sharded ones.

DeepSpeed's engine is a wrapper too, and its stage 3 shards.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps

from torch import Tensor, distributed, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from mmpeft.errors import UsageError
from mmpeft.methods.adapter import SHARDED, Adapter

# The children that hold what FSDP, torch.compile and checkpoint_wrapper wrap.
WRAPPED = '_fsdp_wrapped_module', '_orig_mod', '_checkpoint_wrapped_module'


def inner(module: nn.Module) -> nn.Module:
    """What a module wraps, all wrappers down; itself if it is none."""
    while True:
        held = [module._modules[name] for name in WRAPPED if name in module._modules]
        if isinstance(module, DataParallel | DistributedDataParallel) or _is_engine(module):
            held = [module.module]
        if not held:
            return module
        module = held[0]


@contextmanager
def unwrapped(model: nn.Module) -> Iterator[nn.Module]:
    """The model inside its wrappers, those of its modules off too while the context lasts.

    All names in it are those of the model before it was wrapped.
    """
    taken = []
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is not None and inner(child) is not child:
                taken.append((module._modules, name, child))
    for children, name, child in taken:
        children[name] = inner(child)
    try:
        yield inner(model)
    finally:
        for children, name, child in taken:
            children[name] = child


def is_sharded(model: nn.Module) -> bool:
    """Whether a rank holds only parts of some parameters: FSDP, DTensor, stage 3 of DeepSpeed."""
    by_fsdp = any(SHARDED in module.__dict__ for module in model.modules())
    return by_fsdp or _has_dtensors(model) or is_partitioned(model)


def is_partitioned(model: nn.Module) -> bool:
    """Whether stage 3 of DeepSpeed has sharded a model."""
    return any(hasattr(parameter, 'ds_status') for parameter in model.parameters())


def is_in_deepspeed(model: nn.Module) -> bool:
    """Whether DeepSpeed trains a model: its optimizer has the weights and gradients that count."""
    marks = 'ds_status', '_hp_mapping'  # of parameters at stage 3, and at the others
    return any(_is_engine(module) for module in model.modules()) or any(
        hasattr(parameter, mark) for parameter in model.parameters() for mark in marks
    )


def is_flattened(model: nn.Module) -> bool:
    """Whether a sharded model is one of FullyShardedDataParallel, so that shapes are of parts."""
    if _has_dtensors(model) or is_partitioned(model) or not is_sharded(model):
        return False
    from torch.distributed.fsdp import FSDPModule

    return not any(isinstance(module, FSDPModule) for module in model.modules())


def local_part(tensor: Tensor) -> Tensor:
    """What a rank holds of a DTensor; any other tensor itself."""
    return tensor.to_local() if hasattr(tensor, 'to_local') else tensor


def refuse_sharded(model: nn.Module, name: str) -> None:
    """Raise UsageError for a function that takes no sharded model, nor an offloaded one.

    All ranks of a sharded model raise it alike.
    """
    refuse_offloaded(model, name)
    if is_sharded(model):
        _refuse(name)


def refuse_offloaded(model: nn.Module, name: str) -> None:
    """Raise UsageError for a function of a model whose weights accelerate holds elsewhere."""
    hooked = any('_hf_hook' in vars(module) for module in model.modules())
    if hooked and any(tensor.is_meta for tensor in model.parameters()):
        raise UsageError(
            f'mmpeft.{name} needs the weights, and accelerate has offloaded some of this model '
            '(device_map, cpu_offload, enable_sequential_cpu_offload); nothing was changed. Call '
            f'mmpeft.{name} before that, or after '
            'accelerate.hooks.remove_hook_from_submodules(model), which brings the weights back.'
        )


def refuse_parts(adapters: Iterable[Adapter], name: str) -> None:
    """Raise UsageError for a function of adapters of whose factors a rank holds only parts."""
    for adapter in adapters:
        for key, shape in adapter.shapes.items():
            value = getattr(adapter, key)
            if local_part(value) is not value or tuple(value.shape) != shape:
                _refuse(name)


def _refuse(name):
    raise UsageError(
        f'mmpeft.{name} needs whole parameters, and this model is sharded (FSDP, fully_shard, '
        'DTensor or DeepSpeed); nothing was changed. Call it before the model is sharded, or write '
        'the adapters with mmpeft.save_adapter on all ranks, load them into a model that is not '
        f'sharded, and call {name} there.'
    )


def refuse_elsewhere(model: nn.Module, name: str) -> None:
    """Raise UsageError for a function of a model of which another module was adapted."""
    made = {path for path, m in model.named_modules() if vars(m).get('peft')}
    adapted = any(isinstance(module, Adapter) for module in model.modules())
    if made <= {''} and (made or not adapted):
        return
    where = f'its module {min(made - {""})!r}' if made else 'a module that holds this one'
    raise UsageError(
        f'mmpeft.{name} takes the module that mmpeft.inject was given, and that was {where}; '
        f'nothing was changed. Call mmpeft.{name} on it, and to adapt a part of a model give '
        'the whole one and targets=dict(module=...).'
    )


def refuse_deepspeed(model: nn.Module, name: str) -> None:
    """Raise UsageError for a function that would be lost on a model that DeepSpeed trains."""
    if is_in_deepspeed(model):
        raise UsageError(
            f"mmpeft.{name} does not reach DeepSpeed's optimizer, which keeps its own copies of "
            'weights and gradients; nothing was changed. Call it before deepspeed.initialize '
            '(docs/api.md, On several GPUs).'
        )


def refuse_ddp(model: nn.Module, name: str) -> None:
    """Raise UsageError for a function that adds parameters, which DDP would not know."""
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise UsageError(
            f'mmpeft.{name} adds parameters, and DistributedDataParallel averages the gradients of '
            'those alone that it found when it was made. Adapt the model first, then wrap it.'
        )


def writes(model: nn.Module) -> bool:
    """Whether this process takes part in writing a model's files.

    Of those that DDP or DeepSpeed keeps equal it is the first; of a sharded model, all.
    """
    if is_sharded(model):
        return True
    wrappers = (m for m in model.modules() if isinstance(m, DistributedDataParallel))
    first = all(wrapper.process_group.rank() == 0 for wrapper in wrappers)
    return first and (not is_in_deepspeed(model) or distributed.get_rank() == 0)


def on_inner(function: Callable, adds: bool = False) -> Callable:
    """Let a function of a model work on what wrappers hold, and refuse a sharded model.

    ``adds`` says that it adds parameters, so that it refuses DDP and DeepSpeed too.
    """

    @wraps(function)
    def call(model, *args, **kwargs):
        refuse_sharded(model, function.__name__)
        if adds:
            refuse_ddp(model, function.__name__)
            refuse_deepspeed(model, function.__name__)
        with unwrapped(model) as bare:
            refuse_elsewhere(bare, function.__name__)
            result = function(bare, *args, **kwargs)
        return model if result is bare else result

    return call


def _is_engine(module):
    deepspeed = sys.modules.get('deepspeed')
    return deepspeed is not None and isinstance(module, deepspeed.DeepSpeedEngine)


def _has_dtensors(model):
    if 'torch.distributed.tensor' not in sys.modules:
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) for parameter in model.parameters())
