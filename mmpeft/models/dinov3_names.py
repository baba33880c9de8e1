"""Names of DINOv3's weights (arXiv:2508.10104) in transformers' layout and in Meta's, as timm's.

``timm``          reg_token, blocks.0.attn.qkv.weight, blocks.0.attn.q_bias
``meta``          storage_tokens, blocks.0.attn.qkv.bias; timm renames all but the biases
``transformers``  embeddings.register_tokens, layer.0.attention.q_proj.weight

timm's models ``..._dinov3`` have no biases on queries and values, which are zero in some of the
published files; those of ``..._dinov3_qkvb`` have them.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

VIT = (
    (r'^embeddings\.cls_token$', 'cls_token'),
    (r'^embeddings\.register_tokens$', 'reg_token'),
    (r'^embeddings\.patch_embeddings\.', 'patch_embed.proj.'),
    (r'^layer\.', 'blocks.'),
    (r'\.attention\.o_proj\.', '.attn.proj.'),
    (r'\.attention\.([qv])_proj\.bias$', r'.attn.\1_bias'),
    (r'\.layer_scale([12])\.lambda1$', r'.gamma_\1'),
    (r'\.mlp\.down_proj\.', '.mlp.fc2.'),
    (r'\.mlp\.gate_proj\.', '.mlp.fc1_g.'),
)
CONVNEXT = (
    (r'^stages\.0\.downsample_layers\.', 'stem.'),
    (r'\.downsample_layers\.', '.downsample.'),
    (r'^layer_norm\.', 'head.norm.'),
    (r'^(stages\.\d+)\.layers\.', r'\1.blocks.'),
    (r'\.depthwise_conv\.', '.conv_dw.'),
    (r'\.layer_norm\.', '.norm.'),
    (r'\.pointwise_conv([12])\.', r'.mlp.fc\1.'),
)
QKV = re.compile(r'^layer\.(\d+)\.attention\.q_proj\.weight$')


def timm_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of DINOv3 in any layout as timm's models, or its filters, name them.

    Args:
        weights: By name. Those of other models are returned as they are.
    """
    if 'embeddings.register_tokens' in weights:
        return _vit(weights)
    if 'stages.0.downsample_layers.0.weight' in weights:
        return {_renamed(key, CONVNEXT): value for key, value in weights.items()}
    if 'storage_tokens' in weights:
        return dict(_biases_apart(weights))
    return dict(weights)


def _vit(weights):
    gated = any('.gate_proj.' in key for key in weights)
    names = (*VIT, (r'\.mlp\.up_proj\.', '.mlp.fc1_x.' if gated else '.mlp.fc1.'))
    thirds = re.compile(r'\.attention\.[qkv]_proj\.weight$')
    found = {_renamed(k, names): v for k, v in weights.items() if not thirds.search(k)}
    for block in (match[1] for match in map(QKV.match, weights) if match):
        parts = [weights[f'layer.{block}.attention.{part}_proj.weight'] for part in 'qkv']
        found[f'blocks.{block}.attn.qkv.weight'] = torch.cat(parts)
    return found


def _biases_apart(weights):
    """Meta's bias on keys is masked out and has no effect."""
    for key, value in weights.items():
        if key.endswith('.attn.qkv.bias'):
            query, _, value = value.chunk(3)
            yield key.replace('qkv.bias', 'q_bias'), query
            yield key.replace('qkv.bias', 'v_bias'), value
        else:
            yield key, value


def _renamed(key, names):
    for pattern, name in names:
        key = re.sub(pattern, name, key)
    return key
