"""Reentrant activation checkpointing behind a frozen stem.

``torch.utils.checkpoint`` in its reentrant form, which mmengine's
``activation_checkpointing`` and the ``with_cp`` of mmdet's backbones use,
gives no gradient to what is inside unless an input requires one. Behind a
frozen stem none does.
"""

import torch
from torch import nn


def recomputed_modules(model: nn.Module, names=()) -> list[nn.Module]:
    """The modules that are recomputed in backward.

    Args:
        model: To look for ``with_cp`` in.
        names: Paths of further ones, as in ``cfg.activation_checkpointing``.
    """
    names = [names] if isinstance(names, str) else list(names)
    flagged = [m for m in model.modules() if getattr(m, 'with_cp', False) is True]
    innermost = [m for m in flagged if not any(c in flagged for c in m.modules() if c is not m)]
    return innermost + [model.get_submodule(name) for name in names]


def let_inputs_require_grad(module: nn.Module):
    """Make an input of a module require a gradient where none does.

    Returns:
        A handle whose ``remove`` undoes it.
    """

    def hook(_, args):
        tensors = [a for a in args if torch.is_tensor(a) and a.is_floating_point()]
        if not torch.is_grad_enabled() or not tensors or any(t.requires_grad for t in tensors):
            return None
        first = tensors[0]
        return tuple(a.detach().requires_grad_() if a is first else a for a in args)

    return module.register_forward_pre_hook(hook)
