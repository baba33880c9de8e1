"""Backbones of docs/backbones.md as timm names them, with arguments that make each small.

Vision transformers are 48 wide. The stages of others are 8, 16, 24 and 32 wide, at strides 4
to 32; those of Swin and SAM 2 double from 24.
"""

VIT = dict(depth=2, embed_dim=48, num_heads=3, out_indices=(0, -1))
PYRAMID = dict(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32))
SWIN = dict(depths=(1, 1, 2, 1), embed_dim=24, num_heads=(1, 2, 4, 8))
SMALL = {
    'vit_small_patch16_dinov3.lvd1689m': VIT,
    'vit_huge_plus_patch16_dinov3.lvd1689m': VIT,  # gated, as the 7B
    'eva02_tiny_patch14_224.mim_in22k': VIT | dict(patch_size=16),
    'vit_pe_spatial_tiny_patch16_512.fb': VIT,
    'vit_base_patch16_siglip_512.v2_webli': VIT | dict(img_size=64),
    'vit_intern300m_patch14_448.ogvl_2pt5': VIT | dict(patch_size=16, img_size=64),
    'convnext_tiny.dinov3_lvd1689m': PYRAMID,
    'convnextv2_atto.fcmae_ft_in1k': PYRAMID,
    'swin_tiny_patch4_window7_224.ms_in22k': SWIN,
    'swinv2_tiny_window8_256.ms_in1k': SWIN,
    'sam2_hiera_tiny.fb_r896_2pt1': dict(
        stages=(1, 1, 3, 1), embed_dim=24, num_heads=1, global_att_blocks=(3,)
    ),
}
PLAIN = [name for name, small in SMALL.items() if small.get('embed_dim') == 48]
