"""Adapter files: safetensors with a description, whole or not at all."""

import json
import os
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from .checkpoint import adapter_state_dict, check_fits, complete, describe
from .errors import MissingFileError, UsageError
from .injection import inject


def save_adapter(model: nn.Module, path) -> Path:
    """Write what was trained as safetensors, with its description as metadata.

    The file appears whole or not at all.

    Args:
        model: After :func:`mmpeft.inject`.
        path: Such as ``adapter.safetensors``.

    Returns:
        The path.

    Raises:
        UsageError: The model has no adapters.
    """
    from safetensors.torch import save_file

    if not getattr(model, 'peft', []):
        raise UsageError('There is nothing to save: the model was not adapted (mmpeft.inject).')
    path = Path(path)
    state = {k: v.detach().cpu().clone() for k, v in adapter_state_dict(model).items()}
    with replacing(path) as temporary:
        save_file(state, temporary, metadata={'mmpeft': json.dumps(describe(model))})
    return path


def load_adapter(model: nn.Module, path, check_base: bool = True) -> nn.Module:
    """Read an adapter into a model; adapt the model first if it is not yet.

    Args:
        model: The base with its pretrained weights, adapted or not.
        path: From :func:`save_adapter`.
        check_base: Refuse another frozen base.

    Returns:
        The same model.

    Raises:
        UsageError: The file is no adapter, or does not fit the model.
        MissingFileError: There is no such file.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f'There is no adapter file {str(path)!r}.')
    try:
        with safe_open(path, framework='pt') as file:
            description = json.loads((file.metadata() or {}).get('mmpeft', 'null'))
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UsageError(f'{str(path)!r} is no whole safetensors file: {error}.') from error
    if description is None:
        raise UsageError(
            f'{str(path)!r} is a safetensors file without a description of adapters. Give one '
            'that mmpeft.save_adapter wrote.'
        )
    if not getattr(model, 'peft', []):
        for injection in description['injections']:
            inject(model, **injection, empty=True)
    check_fits(model, state, description, repr(str(path)), check_base)
    model.load_state_dict(complete(model, state))
    return model


@contextmanager
def replacing(path: Path):
    """A temporary path beside a path, which takes its place when all went well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        yield temporary
        with open(temporary, 'rb') as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
