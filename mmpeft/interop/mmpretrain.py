"""timm's ConvNeXt under the names of mmpretrain's, which computes the same.

A detector that was trained on :class:`~mmpeft.models.TimmBackbone` can so be
deployed where only OpenMMLab is installed.
"""

import re
from collections import Counter

from torch import Tensor

from mmpeft.errors import UsageError

PREFIX = 'backbone.'
RENAMED = (
    (r'^model\.stem_(\d)\.', r'downsample_layers.0.\1.'),
    (r'^model\.stages_(\d)\.downsample\.(\d)\.', r'downsample_layers.\1.\2.'),
    (r'^model\.stages_(\d)\.blocks\.(\d+)\.', r'stages.\1.\2.'),
    (r'\.conv_dw\.', '.depthwise_conv.'),
    (r'\.mlp\.fc([12])\.', r'.pointwise_conv\1.'),
    (r'\.mlp\.grn\.weight$', '.grn.gamma'),
    (r'\.mlp\.grn\.bias$', '.grn.beta'),
)


def mmpretrain_convnext(backbone: dict, state: dict[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
    """Config and weights of the equal ``mmpretrain.ConvNeXt``.

    Args:
        backbone: Config of a ``TimmBackbone`` that holds a ConvNeXt (V1 or V2).
        state: State dict of the model around it, without adapters.

    Raises:
        UsageError: The backbone is not a ConvNeXt with output norms.
    """
    own = {k.removeprefix(PREFIX): v for k, v in state.items() if k.startswith(PREFIX)}
    found = [re.match(r'model\.stages_(\d)\.blocks\.\d+\.conv_dw\.weight$', k) for k in own]
    depths = Counter(int(match[1]) for match in found if match)
    indices = backbone.get('out_indices') or (0, 1, 2, 3)
    indices = tuple(i % len(depths) for i in indices) if depths else ()
    if not indices or any(f'norm{i}.weight' not in own for i in indices):
        raise UsageError(
            f'The backbone {backbone.get("name", backbone.get("type"))!r} is not a ConvNeXt with '
            'output norms, and has no equal in mmpretrain. Merge without --backbone mmpretrain.'
        )
    stages, first = sorted(depths), 'model.stages_0.blocks.0.'
    config = dict(
        type='mmpretrain.ConvNeXt',
        arch=dict(
            depths=[depths[s] for s in stages],
            channels=[len(own[f'model.stages_{s}.blocks.0.conv_dw.weight']) for s in stages],
        ),
        stem_patch_size=own['model.stem_0.weight'].shape[-1],
        linear_pw_conv=own[f'{first}mlp.fc1.weight'].ndim == 2,
        use_grn=f'{first}mlp.grn.weight' in own,
        layer_scale_init_value=1e-6 if f'{first}gamma' in own else 0.0,
        drop_path_rate=backbone.get('drop_path', 0.0),
        out_indices=indices,
        gap_before_final_norm=False,
    )
    renamed = {}
    for key, value in state.items():
        if key.startswith(PREFIX):
            name = key.removeprefix(PREFIX)
            for pattern, replacement in RENAMED:
                name = re.sub(pattern, replacement, name)
            key = PREFIX + name
        renamed[key] = value
    return config, renamed
