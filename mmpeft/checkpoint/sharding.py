"""Reading and loading sharded models: all ranks gather, and rank 0 reads what they gathered."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import Tensor, distributed, nn

from mmpeft.errors import UsageError
from mmpeft.injection.weights import join
from mmpeft.injection.wrappers import (
    is_flattened,
    is_partitioned,
    is_sharded,
    refuse_offloaded,
    unwrapped,
)
from mmpeft.methods.adapter import SHARDED


def on_whole(share: bool) -> Callable:
    """Let a function that reads a model take one in wrappers, or a sharded one.

    A sharded model is gathered tensor by tensor into rank 0's main memory, where the function
    runs; every rank has to call it. What it raises there is raised on all ranks.

    Args:
        share: Send the result to all ranks; they get an empty dict otherwise.
    """

    def decorate(function):
        @wraps(function)
        def call(model, *args, **kwargs):
            refuse_offloaded(model, function.__name__.removeprefix('_'))
            if not is_sharded(model):
                with unwrapped(model) as bare:
                    return function(bare, *args, **kwargs)
            result, error = {}, None
            state = gathered(model)
            if distributed.get_rank() == 0:
                try:
                    with unwrapped(model) as bare, _filled(bare, state):
                        result = function(bare, *args, **kwargs)
                except Exception as raised:  # the other ranks wait to hear of it
                    error = raised
            return _agreed(result, error, share)

        return call

    return decorate


def gathered(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a sharded model with whole tensors; on rank 0, and there in main memory.

    Raises:
        UsageError: The shards cannot be reached from the model; on every rank alike.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    if is_partitioned(model):
        return _gathered_by_deepspeed(model)
    _check_reachable(model)
    # Where FullyShardedDataParallel is on the CPU itself, offloading ends the process (torch 2.12).
    offload = not is_flattened(model) or any(p.device.type != 'cpu' for p in model.parameters())
    options = StateDictOptions(full_state_dict=True, cpu_offload=offload)
    return get_model_state_dict(model, options=options)


def _gathered_by_deepspeed(model):
    from deepspeed import zero

    state = {}
    with unwrapped(model) as bare:
        for key, value in bare.state_dict(keep_vars=True).items():
            with zero.GatheredParameters([value] if hasattr(value, 'ds_status') else []):
                if distributed.get_rank() == 0:
                    state[key] = value.detach().cpu().clone()
    return state


def whole(data: Any) -> Any:
    """Nested dicts and lists with DTensors gathered in rank 0's main memory, and None elsewhere.

    All ranks call it. One tensor after another is gathered.
    """
    if isinstance(data, Mapping):
        return {key: whole(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return type(data)(map(whole, data))
    if not hasattr(data, 'full_tensor'):
        return data
    value = data.detach().full_tensor()
    return value.cpu() if distributed.get_rank() == 0 else None


def load_sharded(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put rank 0's state dict, which may be a part of the model's, into a sharded model."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.fsdp import FullyShardedDataParallel

    if is_flattened(model):
        sent = [dict(state)]
        distributed.broadcast_object_list(sent)
        whole = FullyShardedDataParallel.summon_full_params(model, writeback=True)
        with whole, unwrapped(model) as bare:
            keys = bare.load_state_dict(sent[0], strict=False)
    else:
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
        keys = set_model_state_dict(model, dict(state), options=options)
    assert not keys.unexpected_keys, keys


def _check_reachable(model):
    """Refuse what FullyShardedDataParallel has put where the model itself has no access to it."""
    if not is_flattened(model):
        return
    from torch.distributed.fsdp import FlatParameter, FullyShardedDataParallel

    if any(isinstance(parameter, FlatParameter) for parameter in model.parameters()):
        raise UsageError(
            'This model is sharded by FullyShardedDataParallel with use_orig_params=False, which '
            'hides what is frozen and what trains. Wrap it with use_orig_params=True.'
        )
    units = FullyShardedDataParallel.fsdp_modules(model)
    reached = {module for unit in units for module in unit.modules()}
    if any(SHARDED in m.__dict__ and m not in reached for m in model.modules()):
        raise UsageError(
            'This is the module inside a FullyShardedDataParallel, and its parameters are parts '
            'on each rank. Give the FullyShardedDataParallel itself.'
        )


@contextmanager
def _filled(model: nn.Module, state: Mapping[str, Tensor]) -> Iterator[None]:
    """A bare sharded model with a state dict's whole tensors in place of its own."""
    found, taken = {}, []
    for path, module in model.named_modules():
        taken.append((module.__dict__, SHARDED, module.__dict__.pop(SHARDED, None)))
        for held in (module._parameters, module._buffers):
            for name, own in held.items():
                if own is None or name in module._non_persistent_buffers_set:
                    continue
                taken.append((held, name, own))
                if id(own) not in found:
                    value = state[join(path, name)]
                    if isinstance(own, nn.Parameter):
                        value = nn.Parameter(value, own.requires_grad)
                    found[id(own)] = value
                held[name] = found[id(own)]
    try:
        yield
    finally:
        for held, name, own in taken:
            if own is not None:
                held[name] = own


def _agreed(result, error, share):
    """Rank 0's result, or its error on all ranks."""
    ours = error is None or type(error).__module__ == UsageError.__module__  # can be pickled
    sent = [result if share else None, error if ours else RuntimeError(f'On rank 0: {error!r}')]
    distributed.broadcast_object_list(sent)
    if error or sent[1]:
        raise error or sent[1]
    return sent[0] if share else result
