"""Adapted models for inference, outside of a Runner."""

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger, print_log
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS
from torch import nn

from mmpeft.checkpoint.adapter_file import read_adapter
from mmpeft.checkpoint.file_kind import is_safetensors
from mmpeft.checkpoint.legacy import is_former, upgraded
from mmpeft.checkpoint.manifest import attach_adapters
from mmpeft.checkpoint.validation import check_whole
from mmpeft.errors import UsageError

from .building import adapt, build_model
from .config import compose, find_hook
from .launch import check_checkpoint
from .loading import KEPT, Source, complete, load_base, load_fitting, load_whole, read_source


def init_model(
    config: str | Path | Config,
    checkpoint: str | Path | None = None,
    device: str = 'cpu',
    method: str | Mapping | list | None = None,
    options: Mapping | None = None,
) -> nn.Module:
    """A model ready for inference, from a config and what training or merging saved.

    It takes the place of ``mmdet.apis.init_detector`` and ``mmseg.apis.init_model``:
    ``inference_detector`` and ``inference_model`` take its result.

    Args:
        config: See :func:`~mmpeft.engine.config.compose`, as ``method`` and
            ``options``. Without a PEFTHook, adapters are those that the
            checkpoint lists.
        checkpoint: An adapter file, a checkpoint with adapters, or one without,
            such as a merged one. A checkpoint without adapters makes a model
            without, whatever the config. None leaves the base with the
            config's adapters at their initial values.
        device: Where the model goes.

    Returns:
        In evaluation mode, with ``cfg`` and ``dataset_meta``.

    Raises:
        UsageError: The config, the checkpoint or the base does not exist, or
            they do not fit each other.
    """
    cfg = compose(config, method, options)
    source = None if checkpoint is None else read_saved(checkpoint)
    with _quiet(), _seeded(cfg):
        model = revert_sync_batchnorm(build_model(cfg))
        _fill(model, cfg, source)
    meta = (source.content.get('meta') or {}).get('dataset_meta') if source else None
    model.dataset_meta = _dataset_meta(cfg, meta or {})
    dataset = (cfg.get('test_dataloader') or {}).get('dataset') or {}
    if 'pipeline' in dataset:
        cfg.setdefault('test_pipeline', dataset.pipeline)  # which mmseg's inference_model reads
    model.cfg = model._config = cfg
    model._dataset_meta = model.dataset_meta  # as mmpretrain calls it
    return model.to(device).eval()


def read_saved(checkpoint: str | Path) -> Source:
    """Read a checkpoint, or an adapter file as a checkpoint.

    Raises:
        UsageError: The file does not exist, or is neither.
    """
    path = str(checkpoint)
    check_checkpoint(path)
    if not _is_adapter_file(path):
        return read_source(path)
    manifest, state = read_adapter(path)
    return Source(path, dict(meta=dict(mmpeft=manifest), state_dict=state))


def _is_adapter_file(path):
    return '://' not in path and is_safetensors(Path(path))


def _fill(model, cfg, source):
    """Put base, adapters and heads into a model."""
    hook = find_hook(cfg) or {}
    manifest = source and source.manifest
    if not hook and source is None:
        raise UsageError(
            f'{cfg.filename} has no PEFTHook, and no checkpoint was given that lists adapters. '
            'Give one of them, or a method.'
        )
    init_weights = getattr(model, 'init_weights', lambda: None)
    base, whole = hook.get('base_checkpoint'), hook.get('check_whole', True)
    load_base(model, source, base, init_weights, always_init=False, check_whole=whole)
    if source is not None and manifest is None:
        if hook:
            _note(f'{source.path} holds no adapters: the model has none, whatever the config says.')
    elif hook:
        adapt(model, cfg, manifest=manifest)
    else:
        if is_former(manifest):
            manifest = upgraded(model, manifest, source.content['state_dict'])
        attach_adapters(model, manifest)
        methods = ', '.join(each['method']['type'] for each in manifest['injections'])
        _note(f'{cfg.filename} has no PEFTHook: adapted as {source.path} says, with {methods}.')
    if source is None:
        return
    if manifest is not None:
        check_base = hook.get('check_base', True)
        if _is_adapter_file(source.path):
            check_whole(
                model, source.content['state_dict'], repr(source.path), check_base, late=True
            )
        complete(model, source.content, check_base, repr(source.path))
    if whole:
        load_whole(model, source.content, repr(source.path))
    elif left_out := load_fitting(model, source.content):
        _note(f'{source.path}: {left_out}. {KEPT}')
    if manifest is None:
        _note_unused(model, source)


def _note_unused(model, source):
    state = source.content.get('state_dict', source.content)
    unused = sorted({key.removeprefix('module.') for key in state} - model.state_dict().keys())
    if unused:
        _note(f'{source.path}: {len(unused)} tensors are not in the model, such as {unused[0]}.')


def _note(text):
    print_log(text, 'current', logging.WARNING)


def _dataset_meta(cfg, saved):
    """Classes as a checkpoint has them, else those of the config; a palette."""
    dataset, known = (cfg.get('test_dataloader') or {}).get('dataset'), {}
    with suppress(TypeError):  # a dataset that cannot be built without its data
        if dataset is not None:
            known = DATASETS.build(dict(copy.deepcopy(dataset), lazy_init=True)).metainfo
    saved = {key.lower(): value for key, value in saved.items()}
    classes = saved.get('classes') or known.get('classes') or ()
    palette = known.get('palette') or saved.get('palette') or 'random'
    return dict(classes=classes, palette=palette)


@contextmanager
def _seeded(cfg) -> Iterator[None]:
    """With the config's seed, as a Runner has it: a base that is not from a file is drawn again."""
    seed = (cfg.get('randomness') or {}).get('seed')
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Without a line for every parameter that ``init_weights`` sets."""
    with ExitStack() as stack:
        for logger in MMLogger._instance_dict.values() or [MMLogger.get_instance('mmengine')]:
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.WARNING)
        yield
