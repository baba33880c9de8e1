"""Adapter files: safetensors with a manifest, and a readable copy of it in JSON beside it.

Reading one executes nothing and trusts nothing: a checksum covers all that
the file holds, and the model is changed only after everything in the file was
found to fit it.
"""

import copy
import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten

import torch
from torch import Tensor, nn

from mmpeft.errors import DamagedFileError, MissingFileError, UsageError
from mmpeft.injection.merge import how_to_adapt, remove
from mmpeft.injection.wrappers import (
    is_sharded,
    refuse_ddp,
    refuse_deepspeed,
    refuse_elsewhere,
    refuse_offloaded,
    refuse_sharded,
    unwrapped,
    writes,
)
from mmpeft.quantization import adopted

from . import legacy
from .atomic import replacing, write_tensors
from .file_kind import adapter_instead, is_torch_file
from .fingerprint import digest, fingerprint
from .keys import adapter_state_dict, fill_frozen, frozen_keys
from .late_buffers import make_late_buffers
from .manifest import attach_adapters, check_manifest, describe
from .plain_data import parse
from .sharding import load_sharded, on_whole
from .validation import check_fingerprint, check_fits, check_whole


def save_adapter(model: nn.Module, path: str | Path) -> Path:
    """Write what was trained as safetensors, and its manifest beside it as JSON.

    Each file appears complete or not at all: ``adapter.safetensors`` and
    ``adapter.safetensors.json``. The model may be in wrappers (DDP, torch.compile), which leave
    no trace in the file; of DDP rank 0 alone writes, and the others return at once. It may be
    sharded (FSDP, fully_shard, stage 3 of DeepSpeed): then all ranks have to call this, and
    rank 0 writes.

    Raises:
        UsageError: The model has no adapters, or they are not whole.
        UnwrittenFileError: The disk is full or cannot be written to.
    """
    refuse_offloaded(model, 'save_adapter')
    with unwrapped(model) as bare:
        refuse_elsewhere(bare, 'save_adapter')
        if not getattr(bare, 'peft', []):
            raise UsageError(
                f'There is nothing to save: the model has no adapters. {how_to_adapt(bare)}'
            )
    return _save(model, path) if writes(model) else Path(path)


@on_whole(share=True)
def _save(model, path):
    return write_adapter(path, adapter_state_dict(model), describe(model))


def write_adapter(path: str | Path, state: Mapping[str, Tensor], manifest: Mapping) -> Path:
    """Write what :func:`adapter_state_dict` and :func:`describe` gave; see :func:`save_adapter`."""
    path = Path(path)
    layout = torch.contiguous_format
    state = {k: v.detach().cpu().clone(memory_format=layout) for k, v in state.items()}
    text = json.dumps(dict(manifest))
    beside = json_beside(path)
    with replacing(path) as temporary:
        write_tensors(temporary, state, dict(mmpeft=text, sha256=_checksum(text, state)))
        readable = dict(
            file=path.name,
            sha256=hashlib.sha256(temporary.read_bytes()).hexdigest(),
            **manifest,
            tensors={
                k: f'{v.dtype} {list(v.shape)}'.removeprefix('torch.') for k, v in state.items()
            },
        )
        beside.unlink(missing_ok=True)  # or it would be taken for that of the new file
    with replacing(beside) as temporary:
        temporary.write_text(json.dumps(readable, indent=2) + '\n')
    return path


def json_beside(path: Path) -> Path:
    """The path of the readable manifest of an adapter file."""
    return path.with_name(f'{path.name}.json')


def read_adapter(path: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """The manifest and the state dict in an adapter file.

    Raises:
        UsageError: The file is not an adapter.
        DamagedFileError: The file is damaged.
        MissingFileError: There is no such file.
    """
    from safetensors import safe_open

    path, source = Path(path), repr(str(path))
    if not path.is_file():
        raise MissingFileError(f'There is no adapter file {source}.')
    try:
        with safe_open(path, framework='pt') as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except Exception as error:  # its type depends on the bytes of the file
        if is_torch_file(path):
            raise UsageError(adapter_instead(path)) from error
        raise DamagedFileError(
            f'{source} is damaged, or not a safetensors file: {_short(error)}. Give an intact copy '
            'of a file that mmpeft.save_adapter wrote.'
        ) from error
    text = metadata.pop('mmpeft', None)
    if text is None:
        raise UsageError(
            f'{source} is a safetensors file without a manifest of adapters. Give one that '
            'mmpeft.save_adapter wrote.'
        )
    own, stored = _checksum(text, state), metadata.get('sha256')
    if stored not in (None, own):
        raise DamagedFileError(
            f'{source} is damaged: its content has the checksum {own[:16]}, and it says '
            f'{stored[:16]}. Give an intact copy.'
        )
    try:
        manifest = parse(text)
        former = legacy.is_former(manifest)
        (legacy.check_former if former else check_manifest)(manifest)
    except (UsageError, RecursionError) as error:
        raise UsageError(
            f'{source} is not an adapter that this version of mmpeft can load. {_short(error)}'
        ) from error
    if not former and stored is None:  # mmpeft 0.2 alone wrote none
        raise DamagedFileError(f'{source} is damaged: it has no checksum. Give an intact copy.')
    if former:
        unchecked = '' if stored else 'has no checksum, so that damage cannot be noticed, and '
        warnings.warn(
            f'{source} {unchecked}is in the format of mmpeft {manifest["version"][:20]}. Load it '
            'and save it again with mmpeft.save_adapter.',
            stacklevel=3,
        )
    return manifest, state


def load_adapter(model: nn.Module, path: str | Path, check_base: bool = True) -> nn.Module:
    """Read an adapter into a model, which is adapted as the file says if it has no adapters.

    Args:
        model: The base with its pretrained weights, with adapters or without.
        path: Of the file.
        check_base: Refuse another frozen base, and other dtypes.

    All ranks of a sharded model, which has to be adapted already, call this; rank 0 reads.

    Raises:
        UsageError: The file is damaged or no adapter, or does not fit the
            model, which is unchanged; or DeepSpeed trains the model.
        MissingFileError: There is no such file.
    """
    refuse_deepspeed(model, 'load_adapter')
    refuse_offloaded(model, 'load_adapter')
    with unwrapped(model) as bare:
        refuse_elsewhere(bare, 'load_adapter')
        if not getattr(bare, 'peft', []):
            refuse_sharded(model, 'load_adapter')
            refuse_ddp(model, 'load_adapter')
        if not is_sharded(model):
            _load(bare, path, check_base)
            return model
    load_sharded(model, _read_trained(model, path, check_base))
    return model


def _load(model, path, check_base):
    manifest, state = read_fitting(model, path, check_base, late=True)
    plain = not getattr(model, 'peft', [])
    try:
        if plain:
            attach_adapters(model, manifest)
        make_late_buffers(model, state)
        model.load_state_dict(fill_frozen(model, state))
    except BaseException:
        if plain:
            remove(model)
        raise


@on_whole(share=False)
def _read_trained(model, path, check_base):
    """What a file holds for an adapted model, each tensor under its first key there."""
    _, state = read_fitting(model, path, check_base)
    filled, frozen = fill_frozen(model, state), set(frozen_keys(model))
    own = model.state_dict(keep_vars=True)
    first = {id(value): key for key, value in reversed(own.items())}
    return {key: filled[key] for key in first.values() if key not in frozen}


def read_fitting(
    model: nn.Module, path: str | Path, check_base: bool = True, late: bool = False
) -> tuple[dict, dict[str, Tensor]]:
    """:func:`read_adapter` of a file that :func:`load_adapter` can load; the model is not changed.

    Arguments and errors are the same. On a plain model
    :func:`~mmpeft.checkpoint.manifest.attach_adapters` succeeds with the
    manifest, and needs the memory of the file's tensors. ``late`` is for a caller that makes late
    buffers (:mod:`.late_buffers`).
    """
    manifest, state = read_adapter(path)
    source = repr(str(path))
    plain = not getattr(model, 'peft', [])
    adapted = _without_values(model) if plain else model
    try:
        if legacy.is_former(manifest):
            manifest = legacy.upgraded(adapted, manifest, state)
        if plain:
            attach_adapters(adapted, manifest)
    except Exception as error:  # its type depends on the manifest
        raise UsageError(f'{source} does not fit this model: {_short(error)}') from error
    check_fits(adapted, state, manifest, source, check_base=False)
    check_whole(adapted, state, source, check_dtypes=check_base, late=late)
    if check_base:
        check_fingerprint(fingerprint(model, adapted), manifest, source)
    return manifest, state


def _without_values(model):
    """A copy of a model with its tensors on the meta device, which takes no memory."""
    memo = {}
    for module in model.modules():
        for value in (module._parameters | module._buffers | vars(module)).values():
            if isinstance(value, Tensor):
                empty = torch.empty_like(adopted(value), device='meta', requires_grad=False)
                if isinstance(value, nn.Parameter):
                    empty = nn.Parameter(empty, requires_grad=value.requires_grad)
                memo[id(value)] = empty
    return copy.deepcopy(model, memo)


def _short(error):
    """The message of an error in one paragraph, however long a text from the file it quotes."""
    return shorten(str(error), 1000, placeholder=' ...')


def _checksum(text, state):
    return hashlib.sha256(f'{text}{digest(state)}'.encode()).hexdigest()
