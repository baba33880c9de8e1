"""The injections that the arguments of PEFTHook ask for, and a model adapted by them."""

import copy
import inspect
from collections.abc import Mapping, Sequence

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from mmpeft.errors import UsageError
from mmpeft.injection.inject import inject
from mmpeft.injection.summary import Summary
from mmpeft.injection.targets import Targets
from mmpeft.registry import METHODS

from .config import find_hook
from .packages import import_task


def injections(
    method: Mapping | Sequence,
    targets: Mapping | Targets | None = None,
    unfreeze: str | Sequence[str] = (),
) -> list[dict]:
    """Arguments of :func:`mmpeft.inject`, once for each method.

    Args:
        method: A method, or a list of methods and of
            ``dict(method=..., targets=..., unfreeze=...)``.
        targets: Of all; a method's own are merged into them. ``module`` is
            ``'backbone'`` unless given.
        unfreeze: Of all methods without their own.

    Returns:
        Dicts with ``method``, ``targets`` and ``unfreeze``, in the order of
        injection.

    Raises:
        UsageError: The list is empty, or an entry has an unknown key.
    """
    if isinstance(targets, Targets):
        return [dict(method=method, targets=targets, unfreeze=unfreeze)]
    entries = method if isinstance(method, (list, tuple)) else [method]
    if not entries:
        raise UsageError("method=[] names no method. Write one, such as dict(type='LoRA', rank=4).")
    found = []
    for entry in entries:
        entry = entry if isinstance(entry, Mapping) and 'type' not in entry else dict(method=entry)
        unknown = sorted(set(entry) - {'method', 'targets', 'unfreeze'})
        if unknown or 'method' not in entry:
            raise UsageError(
                f'An entry of a list of methods is a method, or dict(method=..., targets=..., '
                f'unfreeze=...), not {dict(entry)}.'
            )
        own = dict(module='backbone') | dict(targets or {}) | dict(entry.get('targets') or {})
        unfrozen = entry.get('unfreeze', unfreeze)
        found.append(dict(method=entry['method'], targets=own, unfreeze=unfrozen))
    return found


def build_model(cfg: Config, meta: bool = False) -> nn.Module:
    """The model of a config, without adapters and without its pretrained weights.

    Args:
        cfg: With ``model``; its package is imported and registered.
        meta: Without memory for parameters, unless the model's own code reads
            numbers off tensors (mmdet's Swin and mmseg's MiT do, for their
            drop-path rates).
    """
    import_task(cfg)
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    if meta:
        try:
            with torch.device('meta'):
                return MODELS.build(copy.deepcopy(cfg.model))
        except RuntimeError:
            pass
    return MODELS.build(copy.deepcopy(cfg.model))


def adapt(model: nn.Module, cfg: Config, rank: int | None = None) -> Summary:
    """Inject what the hook of a config says, from the weights that the model has.

    Args:
        model: From :func:`build_model`.
        cfg: Its config.
        rank: In place of the rank or budget of its methods.

    Raises:
        UsageError: The config has no hook, or ``rank`` is given and a method
            has none.
    """
    hook = find_hook(cfg)
    if hook is None:
        raise UsageError(
            f'{cfg.filename} has no PEFTHook, so nothing is adapted. Add --method, such as '
            '--method flora.'
        )
    given = {k: hook[k] for k in ('method', 'targets', 'unfreeze') if k in hook}
    for each in injections(**given):
        if rank is not None:
            each['method'] = _with_rank(each['method'], rank)
        summary = inject(model, **each, execution=hook.get('execution', 'auto'))
    return summary


def build_adapted(cfg: Config, recompute: bool = False) -> nn.Module | None:
    """The model of a config with its adapters, from random weights.

    Args:
        cfg: See :func:`adapt`.
        recompute: The backbone's ``with_cp``. The result is None if it is to
            recompute and has no such argument.
    """
    cfg = copy.deepcopy(cfg)
    cfg.model.backbone.pop('checkpoint', None)  # not read here, and InternViT prepares for it
    import_task(cfg)
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    with MODELS.switch_scope_and_registry(None) as registry:
        kind = registry.get(cfg.model.backbone.type)
    if 'with_cp' in inspect.signature(kind).parameters:
        cfg.model.backbone.with_cp = recompute
    elif recompute:
        return None
    model = build_model(cfg)
    adapt(model, cfg)
    return model


def _with_rank(method, rank):
    kind = METHODS.get(method['type'])
    if kind is not None and not hasattr(kind, 'rank'):
        raise UsageError(f'--rank {rank}: {method["type"]} has no rank. Leave --rank out.')
    return dict(method, rank=rank, budget=None)
