"""Merged checkpoints with their configs, which know nothing of adapters."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import Tensor, nn

from mmpeft.analysis.comparison import Difference, differences, observe
from mmpeft.checkpoint.atomic import replacing
from mmpeft.checkpoint.late_buffers import make_late_buffers
from mmpeft.injection.merge import merge
from mmpeft.interop.mmpretrain import mmpretrain_convnext
from mmpeft.quantization import FORMATS

from .building import model_settings
from .config import class_name, type_name


def plain_config(cfg: Config) -> Config:
    """The config of the model without adapters; building it fetches nothing."""
    plain = Config(cfg.to_dict(), filename=cfg.filename)
    plain.model = model_settings(plain)
    plain.pop('data_preprocessor', None)
    hooks = plain.get('default_hooks') or {}
    for name in [name for name, hook in hooks.items() if _is_ours(hook)]:
        del hooks[name]
    if 'custom_hooks' in cfg:
        plain.custom_hooks = [hook for hook in plain.custom_hooks if not _is_ours(hook)]
    for key in ('peft', 'load_from', 'resume', 'launcher', 'work_dir'):
        plain.pop(key, None)
    backbone = plain.model.get('backbone', {})
    if class_name(backbone) == 'TimmBackbone':
        backbone.update(pretrained=False, checkpoint=None)
        backbone.pop('frozen_dtype', None)
    if backbone.get('frozen_dtype') in FORMATS:
        backbone.frozen_dtype = (
            'bfloat16'  # which merged weights are, and few bits would round them
        )
    return plain


def merged(
    model: nn.Module, cfg: Config, backbone: str = 'timm'
) -> tuple[Config, dict[str, Tensor]]:
    """Merge a model's adapters, in place; config and state dict of the plain model.

    Args:
        model: With adapters.
        cfg: Of the adapted model.
        backbone: ``'mmpretrain'`` makes timm's ConvNeXt mmpretrain's.

    Raises:
        UsageError: A method cannot be merged, or the backbone cannot be
            converted.
    """
    merge(model)
    plain, state = plain_config(cfg), model.state_dict()
    if backbone == 'mmpretrain':
        plain.model.backbone, state = mmpretrain_convnext(plain.model.backbone, state)
    return plain, state


def compare_merged(
    before: Mapping, plain: Config, state: Mapping[str, Tensor], batch: Any
) -> list[Difference]:
    """Compare the model of :func:`merged` with the adapted one.

    Args:
        before: What the adapted model made of the batch, by
            :func:`~mmpeft.analysis.comparison.observe`.
        plain: From :func:`merged`, as ``state``.
        batch: As a dataloader gives it.
    """
    model = MODELS.build(copy.deepcopy(plain.model))  # DETR's kin change what they are built from
    make_late_buffers(model, state)
    model.load_state_dict(state)
    model.to(next(iter(state.values())).device)
    return differences(observe(model, batch), before)


def write_merged(
    path: Path, plain: Config, state: Mapping[str, Tensor], meta: Mapping | None = None
) -> Path:
    """Write a plain checkpoint ``OUT.pth``, and its config ``OUT.py``, which is returned.

    Args:
        path: Of the checkpoint.
        plain: From :func:`merged`, as ``state``.
        meta: Of the checkpoint that was merged.

    Raises:
        UnwrittenFileError: The disk is full or cannot be written to.
    """
    meta = {key: value for key, value in (meta or {}).items() if key != 'mmpeft'}
    meta['cfg'] = plain.pretty_text
    with replacing(path) as temporary:
        torch.save(dict(meta=meta, state_dict=dict(state)), temporary)
    plain.dump(path.with_suffix('.py'))
    return path.with_suffix('.py')


def _is_ours(hook):
    return type_name(hook).startswith('mmpeft.') or type_name(hook) in ('PEFTHook', 'SeedHook')
