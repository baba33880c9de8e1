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
from mmpeft.injection.merge import remove

from . import legacy
from .atomic import replacing, write_tensors
from .file_kind import adapter_instead, is_torch_file
from .fingerprint import digest, fingerprint
from .keys import adapter_state_dict, fill_frozen
from .manifest import attach_adapters, check_manifest, describe
from .plain_data import parse
from .validation import check_fingerprint, check_fits, check_whole


def save_adapter(model: nn.Module, path: str | Path) -> Path:
    """Write what was trained as safetensors, and its manifest beside it as JSON.

    Each file appears complete or not at all.

    Args:
        model: After :func:`mmpeft.inject`.
        path: Such as ``adapter.safetensors``; the JSON is
            ``adapter.safetensors.json``.

    Returns:
        The path.

    Raises:
        UsageError: The model has no adapters.
        UnwrittenFileError: The disk is full or cannot be written to.
    """
    if not getattr(model, 'peft', []):
        raise UsageError('There is nothing to save: the model has no adapters (mmpeft.inject).')
    return write_adapter(path, adapter_state_dict(model), describe(model))


def write_adapter(path: str | Path, state: Mapping[str, Tensor], manifest: Mapping) -> Path:
    """Write an adapter file and the JSON beside it.

    Args:
        path: Such as ``adapter.safetensors``.
        state: From :func:`mmpeft.adapter_state_dict`.
        manifest: From :func:`mmpeft.checkpoint.manifest.describe`.

    Returns:
        The path.

    Raises:
        UnwrittenFileError: The disk is full or cannot be written to.
    """
    path = Path(path)
    state = {k: _stored(v) for k, v in state.items()}
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
        temporary.write_text(_readable(readable))
    return path


def json_beside(path: Path) -> Path:
    """The path of the readable manifest of an adapter file."""
    return path.with_name(f'{path.name}.json')


def read_adapter(path: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """Read an adapter file.

    Args:
        path: From :func:`save_adapter`.

    Returns:
        The manifest, and the state dict.

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
    if metadata:
        _check_checksum(metadata, text, state, source)
    try:
        manifest = parse(text)
        former = legacy.is_former(manifest)
        (legacy.check_former if former else check_manifest)(manifest)
    except (UsageError, RecursionError) as error:
        raise UsageError(
            f'{source} is no adapter that this mmpeft can load. {_short(error)}'
        ) from error
    if not former and not metadata:  # mmpeft 0.2 alone wrote none
        raise DamagedFileError(f'{source} is damaged: it has no checksum. Give an intact copy.')
    if former:
        unchecked = '' if metadata else 'has no checksum, so that damage cannot be noticed, and '
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
        path: From :func:`save_adapter`.
        check_base: Refuse another frozen base, and other dtypes.

    Returns:
        The same model.

    Raises:
        UsageError: The file is damaged or no adapter, or does not fit the
            model, which is unchanged.
        MissingFileError: There is no such file.
    """
    manifest, state = read_fitting(model, path, check_base)
    plain = not getattr(model, 'peft', [])
    try:
        if plain:
            attach_adapters(model, manifest)
        model.load_state_dict(fill_frozen(model, state))
    except BaseException:
        if plain:
            remove(model)
        raise
    return model


def read_fitting(
    model: nn.Module, path: str | Path, check_base: bool = True
) -> tuple[dict, dict[str, Tensor]]:
    """Read an adapter file that fits a model, which is not changed.

    Args:
        model: The base with its pretrained weights, with adapters or without.
        path: From :func:`save_adapter`.
        check_base: Refuse another frozen base, and other dtypes.

    Returns:
        As :func:`read_adapter`. On a plain model
        :func:`~mmpeft.checkpoint.manifest.attach_adapters` succeeds with this
        manifest, and needs the memory of the file's tensors.

    Raises:
        UsageError: The file is damaged or no adapter, or does not fit.
        MissingFileError: There is no such file.
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
    check_whole(adapted, state, source, check_dtypes=check_base)
    if check_base:
        check_fingerprint(fingerprint(model, adapted), manifest, source)
    return manifest, state


def _without_values(model):
    """A copy of a model with its tensors on the meta device, which takes no memory."""
    memo = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers, vars(module)):
            for value in held.values():
                if isinstance(value, Tensor):
                    empty = torch.empty_like(value, device='meta', requires_grad=False)
                    if isinstance(value, nn.Parameter):
                        empty = nn.Parameter(empty, requires_grad=value.requires_grad)
                    memo[id(value)] = empty
    return copy.deepcopy(model, memo)


def _stored(value):
    return value.detach().cpu().clone(memory_format=torch.contiguous_format)


def _readable(data):
    """JSON with one line for each item of its lists and dicts."""
    lines = [f'  {json.dumps(key)}: {_lines(value)}' for key, value in data.items()]
    return '{\n' + ',\n'.join(lines) + '\n}\n'


def _lines(value):
    if isinstance(value, dict) and value:
        items, ends = (f'{json.dumps(k)}: {json.dumps(v)}' for k, v in value.items()), '{}'
    elif isinstance(value, list) and value:
        items, ends = map(json.dumps, value), '[]'
    else:
        return json.dumps(value)
    return f'{ends[0]}\n    ' + ',\n    '.join(items) + f'\n  {ends[1]}'


def _short(error):
    """The message of an error in one paragraph, however long a text from the file it quotes."""
    return shorten(str(error), 1000, placeholder=' ...')


def _checksum(text, state):
    return hashlib.sha256(f'{text}{digest(state)}'.encode()).hexdigest()


def _check_checksum(metadata, text, state, source):
    own = _checksum(text, state)
    if metadata != dict(sha256=own):
        raise DamagedFileError(
            f'{source} is damaged: its content has the checksum {own[:16]}, and it says '
            f'{str(metadata.get("sha256"))[:16]}. Give an intact copy.'
        )
