"""Models of configs without a Runner: plain, and adapted from the weights that they have."""

import copy
import inspect
from collections.abc import Mapping

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from mmpeft.errors import UsageError
from mmpeft.injection.summary import Summary
from mmpeft.registry import HOOKS, METHODS

from .config import find_hook
from .injections import inject_all, injections
from .packages import import_task


def build_model(cfg: Config, meta: bool = False) -> nn.Module:
    """The model of a config, without adapters and without its pretrained weights.

    Args:
        cfg: Its package is imported and registered.
        meta: Without memory for parameters, unless the model's own code reads
            numbers off tensors (mmdet's Swin and mmseg's MiT do, for their
            drop-path rates).

    Raises:
        UsageError: The config has no model, or its package is missing.
    """
    if not cfg.get('model'):
        raise UsageError(f'{cfg.filename} has no model. Give the config of a whole run.')
    _enter_scope(cfg)
    if meta:
        try:
            with torch.device('meta'):
                return MODELS.build(copy.deepcopy(cfg.model))
        except RuntimeError:
            pass
    return MODELS.build(copy.deepcopy(cfg.model))


def adapt(
    model: nn.Module, cfg: Config, rank: int | None = None, manifest: Mapping | None = None
) -> Summary:
    """Inject what the hook of a model's config says, from the weights that the model has.

    Args:
        model: Without adapters.
        cfg: With a PEFTHook.
        rank: In place of the rank or budget of its methods.
        manifest: See :func:`~mmpeft.engine.injections.inject_all`.

    Raises:
        UsageError: The config has no hook or one with a wrong argument, or ``rank`` is given and
            a method has none.
    """
    hook = find_hook(cfg)
    if hook is None:
        raise UsageError(
            f'{cfg.filename} has no PEFTHook, so nothing is adapted. Add --method, such as '
            '--method flora.'
        )
    HOOKS.build(copy.deepcopy(hook))  # raises for what is wrong in its arguments
    names = ('method', 'targets', 'unfreeze', 'sensitivity')
    found = injections(**{name: hook[name] for name in names if name in hook})
    if rank is not None:
        found = [each | dict(method=_with_rank(each['method'], rank)) for each in found]
    ways = {name: hook[name] for name in ('execution', 'memory', 'frozen_dtype') if name in hook}
    return inject_all(model, found, manifest, **ways)


def build_adapted(cfg: Config, memory: str | None = None) -> nn.Module:
    """The model of a config with its adapters, from random weights.

    Args:
        cfg: With a PEFTHook.
        memory: In place of the hook's, and of the backbone's ``with_cp``.

    Raises:
        UsageError: The config has no backbone or no hook.
    """
    if not (cfg.get('model') or {}).get('backbone'):
        raise UsageError(
            f'{cfg.filename} has no model.backbone, whose layers this counts. Give the config of '
            'a whole run whose model has one.'
        )
    cfg = copy.deepcopy(cfg)
    cfg.model.backbone.pop('checkpoint', None)  # not read here, and InternViT prepares for it
    _enter_scope(cfg)
    with MODELS.switch_scope_and_registry(None) as registry:
        kind = registry.get(cfg.model.backbone.type)
    if memory is not None and find_hook(cfg) is not None:
        find_hook(cfg).memory = memory
        if 'with_cp' in inspect.signature(kind).parameters:
            cfg.model.backbone.with_cp = False
    model = build_model(cfg)
    adapt(model, cfg)
    return model


def _enter_scope(cfg):
    import_task(cfg)
    init_default_scope(cfg.get('default_scope') or 'mmengine')


def _with_rank(method, rank):
    kind = METHODS.get(method['type'])
    if kind is not None and not hasattr(kind, 'rank'):
        raise UsageError(f'--rank {rank}: {method["type"]} has no rank. Leave --rank out.')
    return dict(method, rank=rank, budget=None)
