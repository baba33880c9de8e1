"""Layer-wise decay: an adapter has its layer's rate, by the names of timm, mmdet, mmpretrain."""

import pytest
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from torch import nn

import mmpeft
from mmpeft.errors import UsageError
from mmpeft.injection.weights import plain_key
from mmpeft.models import TimmBackbone
from tests.backbones import SMALL

pytestmark = [
    pytest.mark.usefixtures('scope'),
    pytest.mark.filterwarnings('ignore:.*adapters have more parameters'),
]
RATE, DECAY = 1e-3, 0.5
# How many layers a parameter lies below the heads. Blocks: 1, 1, 2 and 1 in four stages, or 3.
TABLE = {
    'timm convnext': {
        'model.stem_0.weight': 6,
        'model.stages_0.blocks.0.mlp.fc1.weight': 5,
        'model.stages_1.downsample.1.weight': 4,
        'model.stages_1.blocks.0.conv_dw.weight': 4,
        'model.stages_2.blocks.1.mlp.fc2.weight': 2,
        'model.stages_3.blocks.0.mlp.fc1.weight': 1,
        'norm3.weight': 0,
    },
    'timm swin': {
        'model.patch_embed.proj.weight': 6,
        'model.layers_0.blocks.0.attn.qkv.weight': 5,
        'model.layers_2.downsample.reduction.weight': 3,
        'model.layers_2.blocks.0.attn.qkv.weight': 3,
        'model.layers_2.blocks.1.mlp.fc1.weight': 2,
    },
    'timm vit': {
        'model.patch_embed.proj.weight': 4,
        'model.blocks.0.attn.qkv.weight': 3,
        'model.blocks.2.mlp.fc2.weight': 1,
        'norm2.weight': 0,
    },
    'mmdet swin': {
        'patch_embed.projection.weight': 6,
        'stages.0.blocks.0.attn.w_msa.qkv.weight': 5,
        'stages.0.downsample.reduction.weight': 4,
        'stages.2.blocks.1.ffn.layers.0.0.weight': 2,
        'stages.3.blocks.0.ffn.layers.1.weight': 1,
    },
    'mmdet resnet': {
        'conv1.weight': 9,
        'layer1.0.conv1.weight': 8,
        'layer2.0.downsample.0.weight': 6,
        'layer4.1.conv2.weight': 1,
    },
    'mmpretrain convnext': {
        'downsample_layers.0.0.weight': 7,
        'stages.0.0.pointwise_conv1.weight': 6,
        'downsample_layers.1.1.weight': 5,
        'stages.1.0.depthwise_conv.weight': 5,
        'stages.3.0.pointwise_conv2.weight': 1,
    },
    'mmpretrain vit': {
        'patch_embed.projection.weight': 4,
        'layers.0.attn.qkv.weight': 3,
        'layers.2.ffn.layers.0.0.weight': 1,
    },
}


def backbone(kind):
    if kind == 'timm convnext':
        return TimmBackbone('convnextv2_atto', depths=(1, 1, 2, 1), dims=(8, 16, 24, 32))
    if kind == 'timm swin':
        name = 'swin_tiny_patch4_window7_224.ms_in22k'
        return TimmBackbone(name, **SMALL[name])
    if kind == 'timm vit':
        vit = dict(depth=3, embed_dim=48, num_heads=3, out_indices=(-1,))
        return TimmBackbone('vit_small_patch16_dinov3', **vit)
    if kind == 'mmdet swin':
        from mmdet.models import SwinTransformer

        return SwinTransformer(embed_dims=24, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8))
    if kind == 'mmdet resnet':
        from mmdet.models import ResNet

        return ResNet(18, base_channels=8)
    from mmpretrain.models import ConvNeXt, VisionTransformer

    if kind == 'mmpretrain convnext':
        arch = dict(depths=[1, 1, 2, 1], channels=[8, 16, 24, 32])
        return ConvNeXt(arch, out_indices=(0, 1, 2, 3), gap_before_final_norm=False)
    arch = dict(embed_dims=48, num_layers=3, num_heads=3, feedforward_channels=96)
    return VisionTransformer(arch, img_size=32)


def detector(kind):
    model = nn.Module()
    model.backbone, model.head = backbone(kind), nn.Linear(2, 2)
    mmpeft.inject(model, dict(type='LoRA', rank=1), dict(module='backbone'))
    return model


def rates(model, **config):
    """Names without what adapters add, and the rate of each parameter that trains."""
    config = dict(optimizer=dict(type='AdamW', lr=RATE, weight_decay=0.05)) | config
    groups = build_optim_wrapper(model, config).optimizer.param_groups
    rate = {id(p): group['lr'] for group in groups for p in group['params']}
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            path, inside, rest = name.partition('.parametrizations.')
            key = f'{path}.{rest.partition(".")[0]}' if inside else plain_key(name)
            found.setdefault(key, set()).add(rate[id(parameter)])
    return found


@pytest.mark.parametrize('kind', TABLE)
def test_an_adapter_has_the_rate_of_its_layer(kind):
    model = detector(kind)
    found = rates(
        model,
        constructor='mmpeft.LayerDecayConstructor',
        paramwise_cfg=dict(layer_decay=DECAY, custom_keys={'head': dict(lr_mult=2.0)}),
    )
    for name, height in TABLE[kind].items():
        assert found[f'backbone.{name}'] == {RATE * DECAY**height}, name
    assert found['head.weight'] == {2 * RATE}
    adapted = {row.name for row in mmpeft.summary(model).rows}
    assert adapted <= set(found) and all(len(found[name]) == 1 for name in adapted)


def test_the_constructors_of_mmdet_and_mmpretrain_know_adapters_too():
    import mmdet.engine  # noqa: F401
    from mmpretrain.models import ImageClassifier

    model = detector('mmpretrain convnext')
    paramwise = dict(decay_rate=DECAY, decay_type='stage_wise', num_layers=6)
    found = rates(
        model,
        constructor='mmdet.LearningRateDecayOptimizerConstructor',
        paramwise_cfg=paramwise,
    )
    assert found['backbone.stages.3.0.pointwise_conv1.weight'] == {RATE * DECAY**3}
    assert found['backbone.stages.0.0.pointwise_conv1.weight'] == {RATE * DECAY**6}
    init_default_scope('mmpretrain')
    classifier = ImageClassifier(backbone('mmpretrain vit'))
    mmpeft.inject(classifier, dict(type='LoRA', rank=1), dict(module='backbone'))
    found = rates(
        classifier,
        constructor='mmpretrain.LearningRateDecayOptimWrapperConstructor',
        paramwise_cfg=dict(layer_decay_rate=DECAY),
    )
    for name, height in TABLE['mmpretrain vit'].items():
        assert found[f'backbone.{name}'] == {RATE * DECAY**height}, name


def test_what_has_no_layers_is_refused():
    model = nn.Module()
    model.backbone = nn.Linear(2, 2)
    config = dict(constructor='mmpeft.LayerDecayConstructor')
    with pytest.raises(UsageError, match='finds no blocks'):
        rates(model, paramwise_cfg=dict(layer_decay=0.9), **config)
    with pytest.raises(UsageError, match='between 0 and 1'):
        rates(model, paramwise_cfg=dict(layer_decay=9), **config)
