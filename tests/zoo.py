"""Small networks of other libraries with random weights, and a loss that a forward pass gives."""

import mmdet.models
import mmpretrain.models
import mmseg.models
import timm
import torch
import torchvision

from .hf_zoo import HF, Network


def timm_network(name, size=64, **arguments):
    return Network(
        lambda: timm.create_model(name, num_classes=5, **arguments),
        lambda: (torch.randn(2, 3, size, size),),
    )


def image_network(build, size=64):
    return Network(build, lambda: (torch.randn(2, 3, size, size),))


STAGES = dict(depths=(1, 2), embed_dim=8, num_heads=(2, 2))
CONVNEXT = dict(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16))
TRANSFORMER = dict(depth=2, embed_dim=24, num_heads=2, img_size=32, patch_size=8)

TIMM = dict(
    convnext=timm_network('convnext_tiny', **CONVNEXT),
    convnextv2=timm_network('convnextv2_atto', **CONVNEXT),
    vit=timm_network('vit_tiny_patch16_224', 32, **TRANSFORMER),
    swin=timm_network('swin_tiny_patch4_window7_224', img_size=64, window_size=4, **STAGES),
    swinv2=timm_network('swinv2_tiny_window8_256', img_size=64, window_size=4, **STAGES),
    eva02=timm_network('eva02_tiny_patch14_224', 32, **TRANSFORMER),
    dinov3=timm_network('vit_small_patch16_dinov3', 32, **TRANSFORMER),
    beit=timm_network('beit_base_patch16_224', 32, **TRANSFORMER),
    pvtv2=timm_network(
        'pvt_v2_b0', depths=(1, 1, 1, 1), embed_dims=(8, 16, 16, 16), num_heads=(1, 2, 2, 2)
    ),
    maxvit=timm_network('maxvit_rmlp_pico_rw_256', img_size=64, depths=(1, 1), embed_dim=(32, 32)),
    resnet=timm_network(
        'resnet18', block_args=dict(), layers=(1, 1, 1, 1), channels=(8, 8, 16, 16)
    ),
    regnet=timm_network('regnety_002', 32),
    efficientnet=timm_network('efficientnet_lite0', 32),
    mobilenet=timm_network('mobilenetv3_small_050', 32),
)
OTHERS = dict(
    torchvision_swin=image_network(
        lambda: torchvision.models.SwinTransformer([4, 4], 12, [2, 1], [2, 4], [4, 4])
    ),
    mmdet_swin=image_network(
        lambda: mmdet.models.SwinTransformer(
            embed_dims=12, depths=(2, 1), num_heads=(2, 4), strides=(4, 2), out_indices=(0, 1)
        )
    ),
    mmdet_resnet=image_network(lambda: mmdet.models.ResNet(18, base_channels=8)),
    mmdet_cspnext=image_network(
        lambda: mmdet.models.CSPNeXt(
            deepen_factor=0.167, widen_factor=0.125, norm_cfg=dict(type='BN')
        )
    ),
    mmseg_mit=image_network(
        lambda: mmseg.models.MixVisionTransformer(
            embed_dims=8, num_layers=(1, 1, 1, 1), num_heads=(1, 1, 2, 2)
        )
    ),
    mmseg_cgnet=image_network(
        lambda: mmseg.models.CGNet(num_channels=(8, 16, 32), num_blocks=(2, 2))
    ),
    mmseg_beit=image_network(
        lambda: mmseg.models.BEiT(
            img_size=32, patch_size=8, embed_dims=24, num_layers=2, num_heads=2, out_indices=(1,)
        ),
        32,
    ),
    mmseg_mscan=image_network(
        lambda: mmseg.models.MSCAN(
            embed_dims=(8, 8, 16, 16), depths=(1, 1, 1, 1), norm_cfg=dict(type='BN')
        )
    ),
    mmpretrain_beit=image_network(
        lambda: mmpretrain.models.BEiTViT(
            dict(embed_dims=24, num_layers=2, num_heads=2, feedforward_channels=48),
            img_size=32,
            patch_size=8,
        ),
        32,
    ),
)
NETWORKS = {
    **{f'timm_{name}': network for name, network in TIMM.items()},
    **OTHERS,
    **{f'hf_{name}': network for name, network in HF.items()},
}
