"""Names of InternViT's weights in the layouts that they are published in.

``official``      embeddings.class_embedding, encoder.layers.0.attn.qkv.weight
``transformers``  embeddings.cls_token, encoder.layer.0.attention.q_proj.weight
``segmentation``  cls_token, blocks.0.attn.qkv.weight: InternVL's own recipes

each with or without a prefix such as ``vision_model.``.
"""

import re
from collections.abc import Mapping

from torch import Tensor

OFFICIAL = {
    # transformers
    r'embeddings\.cls_token': 'embeddings.class_embedding',
    r'embeddings\.position_embeddings': 'embeddings.position_embedding',
    r'embeddings\.patch_embeddings\.projection\.(\w+)': r'embeddings.patch_embedding.\1',
    r'encoder\.layer\.(\d+)\.attention\.[qkv]_proj\.(\w+)': r'encoder.layers.\1.attn.qkv.\2',
    r'encoder\.layer\.(\d+)\.attention\.projection_layer\.(\w+)': r'encoder.layers.\1.attn.proj.\2',
    r'encoder\.layer\.(\d+)\.attention\.([qk]_norm)\.(\w+)': r'encoder.layers.\1.attn.\2.\3',
    r'encoder\.layer\.(\d+)\.layernorm_before\.(\w+)': r'encoder.layers.\1.norm1.\2',
    r'encoder\.layer\.(\d+)\.layernorm_after\.(\w+)': r'encoder.layers.\1.norm2.\2',
    r'encoder\.layer\.(\d+)\.lambda_([12])': r'encoder.layers.\1.ls\2',
    r'encoder\.layer\.(\d+)\.mlp\.(fc[12])\.(\w+)': r'encoder.layers.\1.mlp.\2.\3',
    # segmentation
    r'cls_token': 'embeddings.class_embedding',
    r'pos_embed': 'embeddings.position_embedding',
    r'patch_embed\.proj\.(\w+)': r'embeddings.patch_embedding.\1',
    r'blocks\.(\d+)\.ls([12])\.gamma': r'encoder.layers.\1.ls\2',
    r'blocks\.(\d+)\.(.+)': r'encoder.layers.\1.\2',
}
"""Patterns of the other layouts' names, and the official names."""
THIRD = re.compile(r'\.([qkv])_proj\.\w+\Z')
START = re.compile(
    r'(?:\A|\.)(embeddings\.|encoder\.layers?\.|blocks\.|cls_token|pos_embed|patch_)'
)


def official_name(key: str) -> tuple[str, int | None] | None:
    """The official name of a tensor in any layout.

    Args:
        key: Such as ``vision_tower.encoder.layer.3.attention.k_proj.weight``.

    Returns:
        ``encoder.layers.3.attn.qkv.weight`` and 1, the third of qkv that it
        is, or None for a whole tensor. None if it belongs neither to the blocks
        nor to the embeddings.
    """
    start = START.search(key)
    if start is None:
        return None
    key = key[start.start(1) :]
    third = THIRD.search(key)
    for pattern, name in OFFICIAL.items():
        if re.fullmatch(pattern, key):
            return re.sub(pattern, name, key), 'qkv'.index(third[1]) if third else None
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
