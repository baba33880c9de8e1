"""Weights of InternViT: the layouts that they come in, and reading them shard by shard.

``official``      embeddings.class_embedding, encoder.layers.0.attn.qkv.weight
``transformers``  embeddings.cls_token, encoder.layer.0.attention.q_proj.weight
``segmentation``  cls_token, blocks.0.attn.qkv.weight: InternVL's own recipes

each with a prefix such as ``vision_model.`` or without.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from mmengine.logging import print_log
from rich.progress import track
from torch import Tensor, nn

from mmpeft.errors import MissingFileError, UsageError

# A pattern of a foreign key, the official one, and the third of qkv that it is.
RULES = [
    (re.compile(pattern + r'\Z'), name, third)
    for pattern, name, third in [
        # transformers
        (r'embeddings\.cls_token', 'embeddings.class_embedding', None),
        (r'embeddings\.position_embeddings', 'embeddings.position_embedding', None),
        (
            r'embeddings\.patch_embeddings\.projection\.(\w+)',
            r'embeddings.patch_embedding.\1',
            None,
        ),
        (
            r'encoder\.layer\.(\d+)\.attention\.q_proj\.(\w+)',
            r'encoder.layers.\1.attn.qkv.\2',
            0,
        ),
        (
            r'encoder\.layer\.(\d+)\.attention\.k_proj\.(\w+)',
            r'encoder.layers.\1.attn.qkv.\2',
            1,
        ),
        (
            r'encoder\.layer\.(\d+)\.attention\.v_proj\.(\w+)',
            r'encoder.layers.\1.attn.qkv.\2',
            2,
        ),
        (
            r'encoder\.layer\.(\d+)\.attention\.projection_layer\.(\w+)',
            r'encoder.layers.\1.attn.proj.\2',
            None,
        ),
        (
            r'encoder\.layer\.(\d+)\.attention\.([qk]_norm)\.(\w+)',
            r'encoder.layers.\1.attn.\2.\3',
            None,
        ),
        (r'encoder\.layer\.(\d+)\.layernorm_before\.(\w+)', r'encoder.layers.\1.norm1.\2', None),
        (r'encoder\.layer\.(\d+)\.layernorm_after\.(\w+)', r'encoder.layers.\1.norm2.\2', None),
        (r'encoder\.layer\.(\d+)\.lambda_([12])', r'encoder.layers.\1.ls\2', None),
        (r'encoder\.layer\.(\d+)\.mlp\.(fc[12])\.(\w+)', r'encoder.layers.\1.mlp.\2.\3', None),
        # segmentation
        (r'cls_token', 'embeddings.class_embedding', None),
        (r'pos_embed', 'embeddings.position_embedding', None),
        (r'patch_embed\.proj\.(\w+)', r'embeddings.patch_embedding.\1', None),
        (r'blocks\.(\d+)\.ls([12])\.gamma', r'encoder.layers.\1.ls\2', None),
        (r'blocks\.(\d+)\.(.+)', r'encoder.layers.\1.\2', None),
    ]
]
START = re.compile(
    r'(?:\A|\.)(embeddings\.|encoder\.layers?\.|blocks\.|cls_token|pos_embed|patch_)'
)
UNUSED = re.compile(r'(?:.*\.)?(layernorm|norm|fc_norm|head)\.(weight|bias)\Z')


def official_name(key: str) -> tuple[str, int | None] | None:
    """The official name of a tensor of any layout.

    Args:
        key: Such as ``vision_tower.encoder.layer.3.attention.k_proj.weight``.

    Returns:
        ``encoder.layers.3.attn.qkv.weight`` and 1, the third of qkv that it
        is, or None for a whole tensor. None for what is no part of the blocks.
    """
    start = START.search(key)
    if start is None:
        return None
    key = key[start.start(1) :]
    for pattern, name, third in RULES:
        if pattern.match(key):
            return pattern.sub(name, key), third
    return key, None


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of :class:`~.intern_vit.InternViT` as transformers' InternVL names them.

    Args:
        state: ``InternViT.state_dict()``.

    Returns:
        For ``InternVLVisionModel.load_state_dict``; views of the same tensors.
    """
    names = {
        'embeddings.class_embedding': 'embeddings.cls_token',
        'embeddings.position_embedding': 'embeddings.position_embeddings',
        'embeddings.patch_embedding.': 'embeddings.patch_embeddings.projection.',
        'encoder.layers.': 'encoder.layer.',
        '.attn.proj.': '.attention.projection_layer.',
        '.attn.': '.attention.',
        '.norm1.': '.layernorm_before.',
        '.norm2.': '.layernorm_after.',
        '.ls1': '.lambda_1',
        '.ls2': '.lambda_2',
    }
    result = {}
    for key, value in state.items():
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        if '.qkv.' in key:
            for part, third in zip('qkv', value.chunk(3), strict=True):
                result[key.replace('.qkv.', f'.{part}_proj.')] = third
        else:
            result[key] = value
    return result


def load_weights(model: nn.Module, source: str) -> None:
    """Copy weights into a model, one shard after the other.

    All names and shapes are checked before the first is copied. Position
    embeddings of another image size are refused, as all else that does not
    fit: the network resizes them itself.

    Args:
        model: With the official names.
        source: A folder, an index, or a file.

    Raises:
        MissingFileError: There is no such file, or a shard is missing.
        UsageError: A file is damaged, or the weights are of another model.
    """
    files = _files(Path(source))
    own = model.state_dict()
    _check(own, files, source)
    for path in track(
        files, f'weights of {Path(source).name}', transient=True, disable=len(files) < 2
    ):
        with _opened(path) as tensors:
            for key, (_, read) in tensors.items():
                target = official_name(key)
                if target is None or target[0] not in own:
                    continue
                name, third = target
                into = own[name] if third is None else own[name].chunk(3)[third]
                into.copy_(read())
    print_log(f'Loaded {len(own)} tensors of InternViT from {source}', 'current')


def _check(own, files, source):
    found, unexpected, wrong = set(), [], []
    for path in files:
        with _opened(path) as tensors:
            for key, (shape, _) in tensors.items():
                target = official_name(key)
                if target is None or target[0] not in own:
                    if not UNUSED.match(key) and target is not None:
                        unexpected.append(key)
                    continue
                name, third = target
                wanted = own[name] if third is None else own[name].chunk(3)[third]
                if tuple(wanted.shape) != tuple(shape):
                    wrong.append(f'{name} {tuple(shape)} instead of {tuple(wanted.shape)}')
                found.add((name, third))
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
    if source.suffix != '.json':
        return [source]
    try:
        names = sorted(set(json.loads(source.read_text())['weight_map'].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise UsageError(f'{source} is no index of safetensors shards: {error!r}.') from error
    files = [source.parent / Path(name).name for name in names]
    absent = [path.name for path in files if not path.is_file()]
    if absent:
        raise MissingFileError(
            f'{len(absent)} of the {len(files)} shards that {source} names are missing, such as '
            f'{absent[0]}. Download them into {source.parent}.'
        )
    return files


@contextmanager
def _opened(path: Path) -> Iterator[dict]:
    """Names of a file's tensors, each with its shape and a function that reads it."""
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
                f'{path} is damaged or was not downloaded to its end ({error}). Download it again.'
            ) from error
        return
    try:
        state = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
    except Exception as error:
        raise UsageError(
            f'{path} could not be read as weights ({type(error).__name__}: {error}). Give a whole '
            '.safetensors file, or a .pth of plain tensors.'
        ) from error
    for name in ('module', 'state_dict', 'model'):
        state = state.get(name, state)
    yield {key: (value.shape, lambda value=value: value) for key, value in state.items()}
