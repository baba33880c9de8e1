"""Models of configs without a Runner: plain, and adapted from the weights that they have."""

import copy
import inspect
from collections.abc import Mapping

import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from mmpeft.errors import UsageError
from mmpeft.injection.summary import Summary
from mmpeft.registry import HOOKS

from .config import find_hook
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
                return MODELS.build(model_settings(cfg))
        except RuntimeError:
            pass
    return MODELS.build(model_settings(cfg))


def model_settings(cfg: Config) -> ConfigDict:
    """What a Runner builds the model from: a data preprocessor may stand beside it in a config."""
    settings = copy.deepcopy(cfg.model)
    if cfg.get('data_preprocessor') is not None:
        settings.setdefault('data_preprocessor', copy.deepcopy(cfg.data_preprocessor))
    return settings


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
    return HOOKS.build(copy.deepcopy(hook)).inject(model, manifest, rank=rank)


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
    kind = cfg.model.backbone.type
    if isinstance(kind, str):
        with MODELS.switch_scope_and_registry(None) as registry:
            kind = registry.get(kind)
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
