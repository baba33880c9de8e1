"""Guards against what knows nothing of adapters: files of plain models, and new layers."""

import warnings
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from inspect import signature

from torch import nn

from .site import attached
from .weights import MARK, lineage

SAVE = 'save_pretrained'


def guard(model: nn.Module) -> None:
    """Let an adapted model, and all modules above its adapters, warn of what would go wrong.

    - ``load_state_dict`` of a plain state dict, which ``strict=False`` lets pass.
    - ``save_pretrained`` of the model's own, whose file holds adapted weights under other names.

    ``load_state_dict(assign=True)`` keeps shared what several adapters or layers share. Copies and
    pickles of the model are guarded too.
    """
    unguard(model)
    for path in {above for site in attached(model) for above in lineage(site.path)}:
        module = model.get_submodule(path)
        module.register_load_state_dict_pre_hook(_before_loading)
        if callable(getattr(type(module), SAVE, None)):
            module.__dict__[SAVE] = _Save(module)


def unguard(model: nn.Module) -> None:
    """Undo :func:`guard`."""
    for module in model.modules():
        drop_load_hook(module, _before_loading)
        if isinstance(module.__dict__.get(SAVE), _Save):
            del module.__dict__[SAVE]


def drop_load_hook(module: nn.Module, hook: Callable) -> None:
    """Undo ``module.register_load_state_dict_pre_hook(hook)``, also in a copy of the module."""
    hooks = module._load_state_dict_pre_hooks
    for key in [key for key, each in hooks.items() if getattr(each, 'hook', None) is hook]:
        del hooks[key]


def warn_of_replaced(model: nn.Module) -> None:
    """Warn of adapters that are gone with their layers since they were injected."""
    kept = {site.name for site in attached(model)}
    adapted = [name for record in getattr(model, 'peft', ()) for name in record.adapted]
    if lost := [name for name in adapted if name not in kept]:
        warnings.warn(
            f'{len(lost)} of {len(adapted)} adapters are no longer in the model: the layer of '
            f'{lost[0]} was replaced or removed after mmpeft.inject. Call what replaces layers '
            '(resize_token_embeddings, reset_classifier) before it, and name in unfreeze what is '
            'to train directly.',
            stacklevel=3,
        )


def _before_loading(module, state_dict, prefix, local_metadata, *rest):
    if prefix and not hasattr(module, 'peft'):
        return  # the module that load_state_dict was called on has warned
    plain = [site.name for site in attached(module) if site.tensor]
    plain = [name for name in dict.fromkeys(plain) if prefix + name in state_dict]
    if local_metadata.get('assign_to_params_buffers'):
        _keep_shared(module, state_dict, prefix)
    if plain:
        warnings.warn(
            f'{len(plain)} weights of this state dict, such as {prefix + plain[0]}, have other '
            f'names in {type(module).__name__}, where they are adapted: load_state_dict leaves '
            'them as they are in the model. Write mmpeft.load_base(model, state), or load it '
            'before mmpeft.inject.',
            stacklevel=6,
        )


def _names(module):
    """All names of each parameter."""
    names = defaultdict(list)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names[parameter].append(name)
    return names


def _keep_shared(module, state_dict, prefix):
    """Give a parameter one entry under all its names, or ``assign`` would make one of each."""
    for parameter, shared in _names(module).items():
        shared = [prefix + name for name in shared]
        given = [name for name in shared if name in state_dict]
        if len(shared) > 1 and given:
            entry = nn.Parameter(state_dict[given[-1]], parameter.requires_grad)
            state_dict.update(dict.fromkeys(given, entry))


class _Save:
    """``save_pretrained`` of an adapted model: that of its class, after a warning."""

    def __init__(self, module):
        self.module = module

    def __call__(self, *args, **kwargs):
        kind = type(self.module)
        warnings.warn(
            f'The file that {kind.__name__}.save_pretrained writes of an adapted model does not '
            'load: from_pretrained initializes the adapted weights anew, or leaves the adapters '
            'out. Write mmpeft.save_pretrained(model, folder) for a plain model with the adapters '
            'merged, or mmpeft.save_adapter(model, path) for the adapters alone.',
            stacklevel=2,
        )
        save = partial(kind.save_pretrained, self.module)
        given = signature(save).bind(*args, **kwargs)
        shared = {name for names in _names(self.module).values() for name in names[1:]}
        shared = {name for name in shared if MARK in name}  # which transformers refuses to write
        if shared and 'state_dict' in given.signature.parameters:
            state = given.arguments.get('state_dict') or self.module.state_dict()
            given.arguments['state_dict'] = {k: v for k, v in state.items() if k not in shared}
        return save(*given.args, **given.kwargs)
