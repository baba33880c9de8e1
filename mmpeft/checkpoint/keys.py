"""Which entries of a state dict belong to the frozen base, and which were trained."""

from collections.abc import Mapping

from torch import Tensor, nn

from mmpeft.errors import UsageError
from mmpeft.injection.site import named_adapters
from mmpeft.injection.weights import is_below, join, newly_initialized, plain_key

from .sharding import on_whole


def frozen_keys(model: nn.Module) -> list[str]:
    """State-dict keys of the frozen base of an adapted model, in the model's order.

    These are the parameters below a target module that do not train, and the
    buffers there, such as BatchNorm's statistics, except for what is newly
    initialized or was unfrozen: copies that average weights, and models in use,
    often require no gradient at all.
    """
    trains_base = [record.method.trains_base for record in getattr(model, 'peft', [])]
    if not trains_base or any(trains_base):
        return []
    prefixes, trained = tuple(record.prefix for record in model.peft), []
    for record in model.peft:
        found = newly_initialized(model.get_submodule(record.module))
        trained += [join(record.module, path) for path in (*found, *record.trained)]
    adapters = adapter_keys(model)
    return [
        key
        for key, value in model.state_dict(keep_vars=True).items()
        if key.startswith(prefixes) and not value.requires_grad
        if key not in adapters and not is_below(plain_key(key), trained)
    ]


def adapter_keys(model: nn.Module) -> dict[str, str]:
    """State-dict keys of all adapter tensors, each with the key that an adapter file has for it.

    They differ where several adapters share a tensor, which is stored under its first key.
    """
    held = {id(t) for adapter in named_adapters(model).values() for t in adapter.factors.values()}
    keys, first = {}, {}
    for key, value in model.state_dict(keep_vars=True).items():
        if id(value) in held:
            keys[key] = first.setdefault(id(value), key)
    return keys


def excluded_keys(model: nn.Module) -> set[str]:
    """State-dict keys that an adapter file leaves out: the frozen base, and repeated tensors."""
    repeated = {key for key, stored in adapter_keys(model).items() if key != stored}
    return repeated.union(frozen_keys(model))


@on_whole(share=False)
def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """What was trained: adapters, unfrozen parameters, and everything outside the target.

    Keys are those of the model without wrappers. All ranks of a sharded model gather it; rank 0
    returns it, and the others an empty dict.

    Raises:
        UsageError: An adapter does not have the tensors that its method made.
    """
    excluded, state = excluded_keys(model), model.state_dict()
    for path, adapter in named_adapters(model).items():
        for name, shape in adapter.shapes.items():
            value = state.get(join(path, name))
            if value is None or tuple(value.shape) != shape:
                found = 'is missing' if value is None else f'has the shape {tuple(value.shape)}'
                raise UsageError(
                    f'{join(path, name)!r} {found} in place of {shape}. Something has taken the '
                    "adapter's parameters apart, such as sharding: give the outermost model that "
                    'knows of it, such as the FullyShardedDataParallel.'
                )
    return {key: value for key, value in state.items() if key not in excluded}


def fill_frozen(
    model: nn.Module, state: Mapping[str, Tensor], prefix: str = ''
) -> dict[str, Tensor]:
    """Add the model's own frozen base to the state dict of an adapter.

    Keys of the plain model are translated, so that a checkpoint without
    adapters fills the base.

    Args:
        model: After :func:`mmpeft.inject`.
        state: From :func:`adapter_state_dict`, or a whole state dict of the
            adapted or the plain model; is not changed.
        prefix: Of the keys of ``state``, such as ``'module.'``.
    """
    result = dict(state)
    own = model.state_dict()
    for key in own:
        plain = prefix + plain_key(key)
        if prefix + key not in result and plain in result:
            result[prefix + key] = result.pop(plain)
    buffers = dict(model.named_buffers(remove_duplicate=False))
    for key in frozen_keys(model):
        # mmcv's ConvAWS2d overwrites its buffers before it reads those that it is given.
        result.setdefault(prefix + key, own[key].clone() if key in buffers else own[key])
    for key, stored in adapter_keys(model).items():
        if prefix + stored in result:
            result.setdefault(prefix + key, result[prefix + stored])
    return result
