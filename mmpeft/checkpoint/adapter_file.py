"""Adapter files: safetensors with a description, and the same for people in JSON beside it.

Reading one executes nothing and believes nothing: a checksum is over all that
the file says and holds, and the model is touched only after everything in the
file was found to fit it.
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
from mmpeft.injection.inject import inject
from mmpeft.injection.merge import remove
from mmpeft.injection.targets import target_module

from .atomic import replacing
from .file_kind import adapter_instead, is_torch_file
from .fingerprint import digest, fingerprint
from .keys import adapter_state_dict, fill_frozen
from .manifest import describe, read_description
from .patterns import check_patterns
from .validation import check_fingerprint, check_fits, check_whole


def save_adapter(model: nn.Module, path) -> Path:
    """Write what was trained as safetensors, and its description beside it as JSON.

    Each file appears whole or not at all.

    Args:
        model: After :func:`mmpeft.inject`.
        path: Such as ``adapter.safetensors``; the JSON is
            ``adapter.safetensors.json``.

    Returns:
        The path.

    Raises:
        UsageError: The model has no adapters, or the disk is full.
    """
    if not getattr(model, 'peft', []):
        raise UsageError('There is nothing to save: the model was not adapted (mmpeft.inject).')
    return write_adapter(path, adapter_state_dict(model), describe(model))


def write_adapter(path, state: Mapping[str, Tensor], description: Mapping) -> Path:
    """Write an adapter file and the JSON beside it.

    Args:
        path: Such as ``adapter.safetensors``.
        state: From :func:`mmpeft.adapter_state_dict`.
        description: From :func:`mmpeft.checkpoint.manifest.describe`.

    Returns:
        The path.

    Raises:
        UsageError: The disk is full, or may not be written to.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    state = {k: _stored(v) for k, v in state.items()}
    text = json.dumps(dict(description))
    beside = json_beside(path)
    with replacing(path) as temporary:
        try:
            save_file(state, temporary, dict(mmpeft=text, sha256=_checksum(text, state)))
        except SafetensorError as error:
            raise OSError(error) from error
        readable = dict(
            file=path.name,
            sha256=hashlib.sha256(temporary.read_bytes()).hexdigest(),
            **description,
            tensors={
                k: f'{v.dtype} {list(v.shape)}'.removeprefix('torch.') for k, v in state.items()
            },
        )
        beside.unlink(missing_ok=True)  # which must not be taken for that of the new file
    with replacing(beside) as temporary:
        temporary.write_text(json.dumps(readable, indent=2) + '\n')
    return path


def json_beside(path: Path) -> Path:
    """Where the readable description of an adapter file is."""
    return path.with_name(f'{path.name}.json')


def read_adapter(path) -> tuple[dict, dict[str, Tensor]]:
    """Read an adapter file.

    Args:
        path: From :func:`save_adapter`.

    Returns:
        The description, and the state dict.

    Raises:
        UsageError: The file is damaged, or no adapter.
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
    except Exception as error:  # what is raised depends on the bytes of the file
        if is_torch_file(path):
            raise UsageError(adapter_instead(path)) from error
        raise DamagedFileError(
            f'{source} is damaged, or not a safetensors file: {_short(error)}. Give an intact copy '
            'of a file that mmpeft.save_adapter wrote.'
        ) from error
    text = metadata.pop('mmpeft', None)
    if text is None:
        raise UsageError(
            f'{source} is a safetensors file without a description of adapters. Give one '
            'that mmpeft.save_adapter wrote.'
        )
    _check_checksum(metadata, text, state, source)
    try:
        return read_description(text), state
    except (UsageError, RecursionError) as error:
        raise UsageError(
            f'{source} is no adapter that this mmpeft can load. {_short(error)}'
        ) from error


def load_adapter(model: nn.Module, path, check_base: bool = True) -> nn.Module:
    """Read an adapter into a model; adapt the model first if it is not yet.

    Args:
        model: The base with its pretrained weights, adapted or not.
        path: From :func:`save_adapter`.
        check_base: Refuse another frozen base, and other dtypes.

    Returns:
        The same model.

    Raises:
        UsageError: The file is damaged or no adapter, or does not fit the
            model, which is as it was.
        MissingFileError: There is no such file.
    """
    description, state = read_fitting(model, path, check_base)
    plain = not getattr(model, 'peft', [])
    try:
        if plain:
            for injection in description['injections']:
                inject(model, **injection, empty=True)
        model.load_state_dict(fill_frozen(model, state))
    except BaseException:
        if plain:
            remove(model)
        raise
    return model


def read_fitting(model: nn.Module, path, check_base: bool = True) -> tuple[dict, dict[str, Tensor]]:
    """Read an adapter file that fits a model, which is not touched.

    Args:
        model: The base with its pretrained weights, adapted or not.
        path: From :func:`save_adapter`.
        check_base: Refuse another frozen base, and other dtypes.

    Returns:
        As :func:`read_adapter`. On a plain model the injections succeed and
        take the memory that the file's tensors have.

    Raises:
        UsageError: The file is damaged or no adapter, or does not fit.
        MissingFileError: There is no such file.
    """
    description, state = read_adapter(path)
    source = repr(str(path))
    adapted = model if getattr(model, 'peft', []) else _adapted_like(model, description, source)
    check_fits(adapted, state, description, source, check_base=False)
    check_whole(adapted, state, source, check_dtypes=check_base)
    if check_base:
        check_fingerprint(fingerprint(model, adapted), description, source)
    return description, state


def _adapted_like(model, description, source):
    """What the model would become, without values: nothing is allocated, nothing is touched."""
    skeleton = _without_values(model)
    try:
        for injection in description['injections']:
            root = target_module(skeleton, injection['targets'].get('module', ''))
            names = {name for name, _ in (*root.named_parameters(), *root.named_modules())}
            check_patterns(_patterns(injection), names)
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                inject(skeleton, **injection, empty=True)
    except Exception as error:  # what is raised depends on the arguments in the file
        raise UsageError(f'{source} does not fit this model: {_short(error)}') from error
    return skeleton


def _without_values(model):
    """A copy of a model with its tensors on the meta device."""
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


def _patterns(injection):
    targets = injection['targets']
    groups = ('include', 'exclude', 'overrides')
    return [*injection['unfreeze'], *(p for group in groups for p in targets.get(group, ()))]


def _stored(value):
    return value.detach().cpu().clone(memory_format=torch.contiguous_format)


def _short(error):
    """What an error says, in one paragraph whatever the file made it quote."""
    return shorten(str(error), 1000, placeholder=' ...')


def _checksum(text, state):
    return hashlib.sha256(f'{text}{digest(state)}'.encode()).hexdigest()


def _check_checksum(metadata, text, state, source):
    if not metadata:  # mmpeft 0.2
        warnings.warn(
            f'{source} was written by mmpeft 0.2 or earlier and has no checksum, so that damage '
            'to its values cannot be noticed. Save it again with save_adapter.',
            stacklevel=4,
        )
        return
    own = _checksum(text, state)
    if metadata != dict(sha256=own):
        raise UsageError(
            f'{source} is damaged: what it holds has the checksum {own[:16]}, and it says '
            f'{str(metadata.get("sha256"))[:16]}. Take a copy that is whole.'
        )
