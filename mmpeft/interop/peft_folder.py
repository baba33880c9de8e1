"""Folders of Hugging Face's peft: ``adapter_model.safetensors`` and ``adapter_config.json``."""

import json
from pathlib import Path

from torch import Tensor, nn

from mmpeft.checkpoint.atomic import refuse_existing, replacing, write_tensors
from mmpeft.errors import DamagedFileError, MissingFileError, UsageError

from .peft_export import to_peft
from .peft_import import from_peft
from .peft_names import Names

WEIGHTS, CONFIG = 'adapter_model.safetensors', 'adapter_config.json'


def save_peft(
    model: nn.Module,
    folder: str | Path,
    names: Names | None = None,
    inference: bool = False,
    overwrite: bool = False,
    as_lora: bool = False,
) -> Path:
    """Write the adapters of a model as a folder that peft loads; see :func:`to_peft`.

    ``PeftModel.from_pretrained(base, folder)`` then computes what the model does.

    Raises:
        UsageError: See :func:`to_peft`; or the files exist, and not ``overwrite``.
        UnwrittenFileError: The disk is full or cannot be written to.
    """
    folder = Path(folder)
    if not overwrite:
        files = folder / WEIGHTS, folder / CONFIG
        refuse_existing(*files, option='overwrite=True (--overwrite)')
    config, state = to_peft(model, names, inference, as_lora)
    with replacing(folder / WEIGHTS) as temporary:
        write_tensors(temporary, state, dict(format='pt'))
    with replacing(folder / CONFIG) as temporary:
        temporary.write_text(json.dumps(config, indent=2) + '\n')
    return folder


def load_peft(
    model: nn.Module,
    folder: str | Path,
    module: str = '',
    names: Names | None = None,
    inference: bool = False,
) -> nn.Module:
    """Adapt a model with what ``PeftModel.save_pretrained`` wrote, in place.

    Arguments and errors are those of :func:`from_peft` and :func:`read_peft`.
    """
    return from_peft(model, *read_peft(folder), module, names, inference)


def read_peft(folder: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """The config and the tensors of a folder; nothing in it is executed.

    Raises:
        UsageError: It holds a pickle alone, or its config is none of peft.
        DamagedFileError: A file is damaged.
        MissingFileError: The folder or one of its files does not exist.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    if (folder / 'adapter_model.bin').exists() and not (folder / WEIGHTS).exists():
        raise UsageError(
            f'{str(folder)!r} holds adapter_model.bin, a pickle, which can run code and is not '
            'read. If you trust it, load it with peft and save it again: '
            "PeftModel.from_pretrained(base, 'FOLDER').save_pretrained('NEW')."
        )
    for name in (WEIGHTS, CONFIG):
        if not (folder / name).is_file():
            raise MissingFileError(
                f'There is no {name} in {str(folder)!r}. Give a folder that '
                "peft's save_pretrained wrote."
            )
    try:
        config = json.loads((folder / CONFIG).read_text())
        state = load_file(folder / WEIGHTS)
    except (ValueError, RecursionError, SafetensorError) as error:
        raise DamagedFileError(f'{str(folder)!r} is damaged: {error}.') from error
    if not isinstance(config, dict):
        raise UsageError(f'{str(folder / CONFIG)!r} is not a config of peft.')
    return config, state
