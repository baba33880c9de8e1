"""Layer-wise learning-rate decay: rates that fall towards the image (arXiv:2106.08254, A.1)."""

import re

from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn

from mmpeft.errors import UsageError
from mmpeft.registry import OPTIM_WRAPPER_CONSTRUCTORS

# Names that lead to a block: blocks.3, stages.0.1, stages_0.blocks.1, layers.0.blocks.1, layer1.0.
CONTAINERS = re.compile(
    r'(?:(?:model|encoder|trunk|body|backbone|(?:blocks|layers|layer|stages|stage)(?:_?\d+)?|\d+)\.)+'
)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayConstructor(DefaultOptimWrapperConstructor):
    """mmengine's constructor, whose rates are multiplied by ``layer_decay``.

    ``paramwise_cfg=dict(layer_decay=0.8)`` gives the last block of the backbone
    0.8 of the rate, the one before 0.64, and so on to the embeddings. Neck,
    heads and norms on the backbone's outputs have the whole rate. An adapter
    has the rate of its layer. Other entries of ``paramwise_cfg`` are mmengine's.

    Raises:
        UsageError: ``layer_decay`` is missing or not in (0, 1], or the model has
            no backbone with blocks.
    """

    def add_params(self, params, module, prefix='', **kwargs):
        super().add_params(params, module, prefix=prefix, **kwargs)
        if prefix:
            return
        decay = self.paramwise_cfg.get('layer_decay')
        if not isinstance(decay, (int, float)) or not 0 < decay <= 1:
            raise UsageError(
                f'LayerDecayConstructor needs paramwise_cfg=dict(layer_decay=...) between 0 and 1, '
                f'such as 0.8, not {decay!r}.'
            )
        backbone = getattr(module, 'backbone', None)
        heights = {} if backbone is None else heights_of(backbone)
        if not any(heights.values()):
            raise UsageError(
                'LayerDecayConstructor finds no blocks in model.backbone. Take constructor and '
                'layer_decay out of optim_wrapper.'
            )
        height = {id(p): heights[name] for name, p in backbone.named_parameters()}
        for group in params:
            above = height.get(id(group['params'][0]), 0)
            group['lr'] = group.get('lr', self.base_lr) * decay**above


def heights_of(backbone: nn.Module) -> dict[str, int]:
    """How many layers each parameter of a backbone lies below the heads.

    A layer is a block. What stands before the first block is one more; what
    stands between blocks, such as the reduction between two stages, belongs to
    the block that follows it in the network; what stands after the last block
    has height 0.

    Returns:
        By name, from the number of blocks + 1 to 0.
    """
    names = [name for name, _ in backbone.named_parameters()]
    if hasattr(backbone, 'get_layer_depth'):  # mmpretrain's, whose names need not be in order
        depths = {name: backbone.get_layer_depth(name, prefix='') for name in names}
        return {name: total - 1 - depth for name, (depth, total) in depths.items()}
    found = {name: _containers(name) for name in names}
    deepest = max(map(_numbers, found.values()), default=0)  # stages.0.1 is a block
    block = {name: path for name, path in found.items() if _numbers(path) == deepest > 0}
    order = {path: i for i, path in enumerate(dict.fromkeys(block.values()))}
    heights, following = {}, 0
    for name in reversed(names):
        if name in block:
            following = len(order) - order[block[name]]
        stem = name not in block and following == len(order) > 0
        heights[name] = following + stem
    return heights


def _containers(name):
    """The path of the block or the stage that a parameter is in, '' if it is in none."""
    found = CONTAINERS.match(name)
    return found[0] if found else ''


def _numbers(path):
    return len(re.findall(r'\d+', path))
