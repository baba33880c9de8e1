"""Files of weights for timm's networks, in the layouts that they are published in."""

import inspect
from collections.abc import Mapping
from pathlib import Path

from timm.models import load_state_dict
from torch import Tensor, nn

from mmpeft.errors import DamagedFileError, MissingFileError, UsageError

from .dinov3_names import timm_names
from .shards import shards_of


def read_weights(
    path: Path, name: str, own: Mapping[str, Tensor], whole: nn.Module
) -> dict[str, Tensor]:
    """The weights of a network from a file in timm's layout, its authors', or transformers'.

    What timm converts when it fetches weights is converted alike: names of the
    authors' releases, patch embeddings and positions of another size. DINOv3 is
    also read in transformers' layout.

    Args:
        path: A ``.pth`` or ``.safetensors`` file, or the index (``.json``) of several.
        name: The timm model, for messages.
        own: The network's state dict, which may be cut from timm's whole one.
        whole: timm's whole network, which may be on the meta device.

    Returns:
        A tensor for each key of ``own``.

    Raises:
        MissingFileError: There is no such file, or a shard is missing.
        DamagedFileError: It cannot be read without running code from it.
        UsageError: It lacks weights of the network or has them in other shapes,
            or the network lacks biases that it has.
    """
    if not path.is_file():
        raise MissingFileError(
            f'The backbone checkpoint {str(path)!r} does not exist. Set '
            f'model.backbone.checkpoint to a file with the weights of timm model {name!r}, or to '
            'None.'
        )
    files = shards_of(path) if path.suffix == '.json' else [path]
    try:
        weights = {}
        for file in files:  # weights_only runs no code
            weights |= load_state_dict(str(file), use_ema=False, weights_only=True)
    except Exception as error:  # its type depends on the bytes of the file
        raise DamagedFileError(
            f'{str(path)!r} is damaged or holds more than plain tensors, and was not read. '
            'Give an intact .safetensors file or a .pth of tensors '
            "(torch.save(model.state_dict(), 'FILE.pth'))."
        ) from error
    weights = timm_names(weights)
    convert = getattr(inspect.getmodule(type(whole)), 'checkpoint_filter_fn', None)
    if _misfits(weights, own) and convert is not None:
        try:
            weights = convert(weights, whole)
        except (KeyError, AttributeError, RuntimeError):
            pass  # of another model; what does not fit is named below
    if wrong := _misfits(weights, own):
        raise UsageError(
            f'{str(path)!r} does not fit timm model {name!r}: {len(wrong)} of {len(own)} tensors '
            f'are missing or have another shape, such as {", ".join(wrong[:3])}. Give the file of '
            "the same model, in timm's layout, its authors', or (DINOv3) transformers'."
        )
    if lost := _lost_biases(weights, own):
        raise UsageError(
            f'{str(path)!r} has biases that timm model {name!r} lacks, such as {lost[0]}, and '
            'they are not zero. Choose a model that has them (for DINOv3 the one whose name has '
            '_dinov3_qkvb).'
        )
    return {key: weights[name_in(weights, key)] for key in own}


def name_in(weights: Mapping[str, Tensor], key: str) -> str | None:
    """The name of a features-only tensor in a state dict of the whole model, None if not there."""
    top, _, rest = key.partition('.')
    split = top.replace('_', '.'), top.replace('_', '.', 1)
    names = key, *(f'{each}.{rest}' for each in split)
    return next((name for name in names if name in weights), None)


def _misfits(weights, own):
    names = {key: name_in(weights, key) for key in own}
    return [k for k, name in names.items() if not name or weights[name].shape != own[k].shape]


def _lost_biases(weights, own):
    """Biases, not zero, in the blocks that are read, of layers without one in the network."""
    read = {name_in(weights, key) for key in own}
    blocks = {name.rsplit('.', 2)[0] for name in read if name.count('.') > 1}
    biases = (name for name in weights if name.endswith('bias') and name not in read)
    return [name for name in biases if _block(name) in blocks and weights[name].any()]


def _block(name):
    return name.rpartition('.')[0].rpartition('.')[0]
