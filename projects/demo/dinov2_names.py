"""The weights of an exported DINOv2, under timm's names.

torch's exporter keeps transformers' names of parameters, except where a weight is a factor of a
``MatMul``: that one is transposed and named by a number, and only the name of its node says
which it is.
"""

import re

import torch
from onnx import ModelProto, numpy_helper
from torch import Tensor

NAMES = (
    (r'^backbone\.', ''),
    (r'^embeddings\.cls_token$', 'cls_token'),
    (r'^embeddings\.patch_embeddings\.projection', 'patch_embed.proj'),
    (r'^encoder\.layer\.', 'blocks.'),
    (r'^layernorm\.', 'norm.'),
    (r'attention\.output\.dense', 'attn.proj'),
    (r'attention\.attention', 'attn'),
    (r'layer_scale(\d)\.lambda1', r'ls\1.gamma'),
)


def timm_state(model: ModelProto) -> dict[str, Tensor]:
    """State of timm's vision transformer from ONNX, without what follows the last norm.

    Args:
        model: A graph whose module ``backbone`` was transformers' ``Dinov2Model``.
    """
    arrays = {item.name: item for item in model.graph.initializer}
    state, positions = {}, {}
    for node in model.graph.node:
        for name in arrays.keys() & {*node.input}:
            value = torch.tensor(numpy_helper.to_array(arrays[name]))
            if name.startswith('backbone.'):
                state[_timm_name(name)] = value
            elif node.op_type == 'MatMul' and node.name.startswith('/backbone/'):
                path = node.name.strip('/').removesuffix('/MatMul').replace('/', '.')
                state[_timm_name(f'{path}.weight')] = value.T.contiguous()
            elif node.name.startswith('/backbone/embeddings/'):
                positions[node.op_type] = value
    state['pos_embed'] = torch.cat([positions['Concat'], positions['Reshape']], 1)
    for prefix in [key.removesuffix('query.weight') for key in state if 'query.weight' in key]:
        for kind in 'weight', 'bias':
            parts = [state.pop(f'{prefix}{part}.{kind}') for part in ('query', 'key', 'value')]
            state[f'{prefix}qkv.{kind}'] = torch.cat(parts)
    return state


def _timm_name(name: str) -> str:
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    return name
