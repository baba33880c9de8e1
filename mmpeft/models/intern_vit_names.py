"""Names of InternViT's weights in the layouts that they are published in.

``official``      embeddings.class_embedding, encoder.layers.0.attn.qkv.weight
``transformers``  embeddings.cls_token, encoder.layer.0.attention.q_proj.weight
``segmentation``  cls_token, blocks.0.attn.qkv.weight: InternVL's own recipes

each with or without a prefix such as ``vision_model.``.
"""

import re
from collections.abc import Mapping

from torch import Tensor

TRANSFORMERS = {
    'embeddings.cls_token': 'embeddings.class_embedding',
    'embeddings.position_embeddings': 'embeddings.position_embedding',
    'embeddings.patch_embeddings.projection.': 'embeddings.patch_embedding.',
    'encoder.layer.': 'encoder.layers.',
    '.attention.projection_layer.': '.attn.proj.',
    '.attention.': '.attn.',
    '.layernorm_before.': '.norm1.',
    '.layernorm_after.': '.norm2.',
    '.lambda_': '.ls',
}
SEGMENTATION = {
    'cls_token': 'embeddings.class_embedding',
    'pos_embed': 'embeddings.position_embedding',
    'patch_embed.proj.': 'embeddings.patch_embedding.',
    'blocks.': 'encoder.layers.',
}
"""Parts of names in the other layouts, in the order of replacing, and the official ones."""
THIRD = re.compile(r'\.([qkv])_proj\.')
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
    key = key[start.start(1) :].removesuffix('.gamma')
    for theirs, ours in SEGMENTATION.items():
        if key.startswith(theirs):
            key = key.replace(theirs, ours, 1)
    for theirs, ours in TRANSFORMERS.items():
        key = key.replace(theirs, ours)
    third = THIRD.search(key)
    return THIRD.sub('.qkv.', key), 'qkv'.index(third[1]) if third else None


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of :class:`~.intern_vit.InternViT` as transformers' InternVL names them.

    Args:
        state: ``InternViT.state_dict()``.

    Returns:
        For ``InternVLVisionModel.load_state_dict``; views of the same tensors.
    """
    result = {}
    for key, value in state.items():
        for theirs, ours in TRANSFORMERS.items():
            key = key.replace(ours, theirs)
        if '.qkv.' in key:
            for part, third in zip('qkv', value.chunk(3), strict=True):
                result[key.replace('.qkv.', f'.{part}_proj.')] = third
        else:
            result[key] = value
    return result
