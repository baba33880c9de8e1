"""Reading the weights of InternViT, shard by shard, in any layout of :mod:`.intern_vit_names`."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from mmengine.logging import print_log
from rich.progress import track
from torch import Tensor, nn

from mmpeft.errors import MissingFileError, UsageError

from .intern_vit_names import official_name
from .shards import shards_of

UNUSED = re.compile(r'(?:.*\.)?(layernorm|norm|fc_norm|head)\.(weight|bias)\Z')


def load_weights(model: nn.Module, source: str) -> None:
    """Copy the weights of a folder, an index or a file into a model, one shard after another.

    The names and shapes of all shards are checked before the first tensor is
    copied. Position embeddings of another image size are an error too: the
    network resizes its own in forward.

    Raises:
        MissingFileError: There is no such file, or a shard is missing.
        UsageError: A file is damaged, or the weights are of another model.
    """
    files = _files(Path(source))
    own, thirds = model.state_dict(), defaultdict(dict)
    shapes = {(name, None): tuple(value.shape) for name, value in own.items()}
    for name, value in own.items():
        if '.qkv.' in name:
            third = len(value) // 3, *value.shape[1:]
            shapes |= {(name, i): third for i in range(3)}
    _check(own, shapes, files, source)
    for path in track(
        files, f'weights of {Path(source).name}', transient=True, disable=len(files) < 2
    ):
        with _opened(path) as tensors:
            for key, (_, read) in tensors.items():
                if (place := official_name(key)) in shapes:
                    name, third = place
                    value = read()
                    if third is not None:
                        thirds[name][third] = value
                        if len(thirds[name]) < 3:
                            continue
                        value = torch.cat([part for _, part in sorted(thirds.pop(name).items())])
                    own[name].copy_(value)
    print_log(f'Loaded {len(own)} tensors of InternViT from {source}', 'current')


def _check(own, shapes, files, source):
    found, unexpected, wrong = set(), [], []
    for path in files:
        with _opened(path) as tensors:
            for key, (shape, _) in tensors.items():
                place = official_name(key)
                if place not in shapes:
                    if place is not None and not UNUSED.match(key):
                        unexpected.append(key)
                    continue
                wanted = shapes[place]
                if wanted != tuple(shape):
                    wrong.append(f'{place[0]} {tuple(shape)} instead of {wanted}')
                found.add(place)
    missing = [
        name
        for name in own
        if (name, None) not in found and not {(name, i) for i in range(3)} <= found
    ]
    if missing or unexpected or wrong:
        raise UsageError(
            f'{source} does not hold the weights of this InternViT: {len(missing)} of {len(own)} '
            f'tensors are missing{_such(missing)}, {len(unexpected)} unexpected'
            f'{_such(unexpected)}, {len(wrong)} of another shape{_such(wrong)}. Set arch to the '
            "model that the file is of ('6b', '6b-224px', '6b-45' or '300m'), or give its file."
        )


def _such(names):
    return f' (such as {", ".join(names[:3])})' if names else ''


def _files(source: Path) -> list[Path]:
    if source.is_dir():
        indices = sorted(source.glob('*.safetensors.index.json'))
        whole = sorted(source.glob('*.safetensors')) or sorted(source.glob('*.bin'))
        if not indices and len(whole) != 1:
            raise UsageError(
                f'The folder {source} holds no *.safetensors.index.json and {len(whole)} weight '
                'files, so it is not clear what to read. Set checkpoint to an index or to one file.'
            )
        source = indices[0] if indices else whole[0]
    if not source.is_file():
        raise MissingFileError(
            f'The checkpoint {str(source)!r} of InternViT does not exist. Set '
            'model.backbone.checkpoint to a folder, an index or a file that does.'
        )
    return shards_of(source) if source.suffix == '.json' else [source]


@contextmanager
def _opened(path: Path) -> Iterator[dict[str, tuple[list[int], Callable[[], Tensor]]]]:
    """A file's tensors by name, each as its shape and a function that reads it."""
    if path.suffix == '.safetensors':
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework='pt') as file:
                yield {
                    key: (file.get_slice(key).get_shape(), lambda key=key: file.get_tensor(key))
                    for key in file.keys()  # noqa: SIM118
                }
        except SafetensorError as error:
            raise UsageError(
                f'{path} is damaged or incomplete ({error}). Download it again.'
            ) from error
        return
    try:
        state = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
    except Exception as error:
        raise UsageError(
            f'{path} could not be read as weights ({type(error).__name__}: {error}). Give a '
            'complete .safetensors file, or a .pth of plain tensors.'
        ) from error
    for name in ('module', 'state_dict', 'model'):
        state = state.get(name, state)
    yield {key: (value.shape, lambda value=value: value) for key, value in state.items()}
