"""Buffers that modules make when they first run, and that files of trained models hold.

mmseg's SegNeXt with ``rand_init=False`` draws its bases then, unless it has them.
"""

from collections.abc import Mapping
from contextlib import suppress

import torch
from torch import Tensor, nn


def late_buffers(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, tuple[nn.Module, str]]:
    """Module and name of the buffers in a state dict that the model will make itself, by key."""
    found = {}
    for key in state.keys() - model.state_dict().keys():
        path, _, name = key.rpartition('.')
        with suppress(AttributeError):  # no such module, or a forward that is not in Python
            module = model.get_submodule(path)
            code = type(module).forward.__code__
            if 'register_buffer' in code.co_names and name in code.co_consts:
                found[key] = module, name
    return found


def make_late_buffers(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Register those buffers, where the model is, for ``load_state_dict`` to fill."""
    device = next((p.device for p in model.parameters()), None)
    for key, (module, name) in late_buffers(model, state).items():
        module.register_buffer(name, torch.empty_like(state[key], device=device))
