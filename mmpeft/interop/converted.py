"""Converted adapters as files for the tools: an adapter file, or a checkpoint with its config."""

import re
from collections import Counter
from pathlib import Path

import torch
from mmengine.config import Config, ConfigDict
from torch import nn

from mmpeft.checkpoint.adapter_file import json_beside, save_adapter
from mmpeft.checkpoint.atomic import replacing
from mmpeft.checkpoint.keys import adapter_state_dict
from mmpeft.checkpoint.manifest import describe
from mmpeft.errors import UsageError
from mmpeft.injection.site import attached
from mmpeft.models import TimmBackbone

from .peft_names import Names


def base_names(model: nn.Module, module: str = '', timm: bool = False) -> Names:
    """How peft's base calls the modules of a model.

    Its base is a module of the model, or timm's whole network under timm's own names.

    Raises:
        UsageError: ``timm``, and the backbone is not one of timm's.
    """
    if not timm:
        return Names(module)
    if not isinstance(model.backbone, TimmBackbone):
        kind = type(model.backbone).__name__
        raise UsageError(f'--timm: the backbone is a {kind}. Write --module backbone.')
    return Names('backbone.model', model.backbone.names_in_whole())


def files_of(out: Path) -> tuple[Path, Path]:
    """The two files that :func:`write_converted` writes.

    Raises:
        UsageError: The name ends in neither .pth nor .safetensors.
    """
    if out.suffix == '.safetensors':
        return out, json_beside(out)
    if out.suffix == '.pth':
        return out, out.with_suffix('.py')
    raise UsageError(f'{str(out)!r} ends in neither .pth nor .safetensors.')


def write_converted(model: nn.Module, out: Path, cfg: Config, hook: ConfigDict) -> None:
    """Write the adapters of one injection: an adapter file, or a checkpoint and its config.

    ``hook``, the entry of PEFTHook in ``cfg``, gets the arguments that adapt the model so.

    Raises:
        UnwrittenFileError: The disk is full or cannot be written to.
    """
    path, config = files_of(out)
    if path.suffix == '.safetensors':
        save_adapter(model, path)
        return
    base = cfg.get('load_from') or hook.get('base_checkpoint')
    meta = dict(mmpeft=describe(model) | dict(holds_base=False, base_checkpoint=base))
    with replacing(path) as temporary:
        torch.save(dict(meta=meta, state_dict=adapter_state_dict(model)), temporary)
    hook.clear()
    hook.update(type='mmpeft.PEFTHook', base_checkpoint=base, **_hook_arguments(model))
    for key in ('peft', 'load_from', 'work_dir', 'launcher'):
        cfg.pop(key, None)
    cfg.dump(config)


def _hook_arguments(model):
    """Arguments of PEFTHook that adapt exactly the weights that are adapted in a model."""
    (record,), sites = model.peft, attached(model)
    method = Counter(site.method for site in sites).most_common(1)[0][0].config()
    include, overrides = [], {}
    for site in sites:
        include.append(_exactly(site.name.removeprefix(record.prefix)))
        own = site.method.config()
        changed = {key: value for key, value in own.items() if value != method[key]}
        if changed:
            overrides[include[-1]] = changed
    targets = dict(module=record.module, include=include, overrides=overrides)
    return dict(method=method, targets=targets, unfreeze=[_exactly(n) for n in record.trained])


def _exactly(name):
    return f'^{re.escape(name)}$'
