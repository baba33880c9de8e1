"""Folders of Hugging Face's peft: ``adapter_model.safetensors`` and ``adapter_config.json``."""

import json
from pathlib import Path

from torch import Tensor, nn

from mmpeft.checkpoint.atomic import replacing
from mmpeft.errors import MissingFileError, UsageError

from .peft_format import from_peft, to_peft

WEIGHTS, CONFIG = 'adapter_model.safetensors', 'adapter_config.json'


def save_peft(model: nn.Module, folder, names=None, inference=False, overwrite=False) -> Path:
    """Write the adapters of a model as a folder that peft loads.

    ``PeftModel.from_pretrained(base, folder)`` then computes what the model
    does.

    Args:
        model: After :func:`mmpeft.inject`, with LoRA or DoRA.
        folder: Made if it is not there.
        names (Names, optional): How the base of peft calls the modules; see
            :class:`~.peft_format.Names`.
        inference: Leave out what only training knows: dropout, MPC.
        overwrite: Replace the two files if they exist.

    Returns:
        The folder.

    Raises:
        UsageError: See :func:`~.peft_format.to_peft`; or the files exist
            already, or the disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder = Path(folder)
    taken = [str(folder / name) for name in (WEIGHTS, CONFIG) if (folder / name).exists()]
    if taken and not overwrite:
        raise UsageError(f'{" and ".join(taken)} exist already. Name another folder.')
    config, state = to_peft(model, names, inference)
    with replacing(folder / WEIGHTS) as temporary:
        try:
            save_file(state, temporary, metadata={'format': 'pt'})
        except SafetensorError as error:
            raise OSError(error) from error
    with replacing(folder / CONFIG) as temporary:
        temporary.write_text(json.dumps(config, indent=2) + '\n')
    return folder


def load_peft(model: nn.Module, folder, module='', names=None, inference=False) -> nn.Module:
    """Adapt a model as a folder of peft says, in place.

    Args:
        model: The base with its pretrained weights, not adapted.
        folder: Of ``PeftModel.save_pretrained``; safetensors alone are read.
        module: Target module of the injection: what is below it is the
            frozen base.
        names (Names, optional): How the base of peft calls the modules.
        inference: Leave out what only training knows: dropout.

    Returns:
        The same model.

    Raises:
        UsageError: See :func:`from_peft`; the model is as it was.
        MissingFileError: There is no such folder, or a file of it is missing.
    """
    return from_peft(model, *read_peft(folder), module, names, inference)


def read_peft(folder) -> tuple[dict, dict[str, Tensor]]:
    """The config and the tensors of a folder; nothing in it is executed.

    Raises:
        UsageError: It holds a pickle alone, or the files are damaged.
        MissingFileError: It or one of its files does not exist.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    if (folder / 'adapter_model.bin').exists() and not (folder / WEIGHTS).exists():
        raise UsageError(
            f'{str(folder)!r} holds adapter_model.bin, a pickle, which can run code and is not '
            'read. Where you trust it, load it with peft and save it again: '
            "PeftModel.from_pretrained(base, 'FOLDER').save_pretrained('NEW'), which writes "
            f'{WEIGHTS}.'
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
        raise UsageError(f'{str(folder)!r} is damaged: {error}.') from error
    if not isinstance(config, dict):
        raise UsageError(f'{str(folder / CONFIG)!r} is no config of peft.')
    return config, state
