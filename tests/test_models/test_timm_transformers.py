"""TimmBackbone for transformers: maps, sizes, weights in all layouts, recomputed gradients."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import to_2tuple

import mmpeft
from mmpeft.errors import UsageError
from mmpeft.injection.site import adapter_parameters
from mmpeft.models import TimmBackbone
from tests.backbones import PLAIN, SMALL

DINO = 'vit_small_patch16_dinov3_qkvb'


@torch.no_grad()
def randomized(model):
    for value in model.parameters():
        value.add_(0.1 * torch.randn_like(value))
    return model.double().eval()


def own_features(backbone, name, small, images):
    """timm's whole model with a backbone's weights, asked for its intermediate features."""
    options = {k: v for k, v in small.items() if k != 'out_indices'}
    options |= dict(dynamic_img_size=True) if name in PLAIN else {}
    options |= dict(strict_img_size=False) if name.startswith('swin') else {}
    whole = timm.create_model(name, **options).double().eval()
    names = backbone.names_in_whole()
    parts = {k: k.rpartition('.') for k in backbone.model.state_dict()}
    state = {
        f'{names[path]}.{tensor}'.lstrip('.'): backbone.model.state_dict()[key]
        for key, (path, _, tensor) in parts.items()
    }
    assert not whole.load_state_dict(state, strict=False).unexpected_keys
    levels = list(small.get('out_indices', (0, 1, 2, 3)))
    return whole.forward_intermediates(images, indices=levels, intermediates_only=True)


@pytest.mark.parametrize('name', SMALL)
def test_maps_are_timms_own_features(name):
    """At a size of images that the weights were not trained at."""
    backbone = randomized(TimmBackbone(name, **SMALL[name], out_norm=False))
    images = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        maps = backbone(images)
        expected = own_features(backbone, name, SMALL[name], images)
        for ours, theirs in zip(maps, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    sides = [16] * len(maps) if name in PLAIN else [4, 8, 16, 32]
    assert [tuple(m.shape[2:]) for m in maps] == [(64 // s, 96 // s) for s in sides]
    assert all(m.is_contiguous() for m in maps)


def test_names_of_layers_are_timms():
    backbone = TimmBackbone(DINO, depth=3, embed_dim=48, num_heads=3, out_indices=(0, -2))
    assert {n for n, _ in backbone.named_children()} == {'model', 'norm0', 'norm1'}
    assert backbone.model.blocks[1].attn.qkv.weight.shape == (144, 48)
    assert len(backbone.model.blocks) == 2  # what lies behind the last level is left out


def test_what_a_plain_transformer_refuses():
    with pytest.raises(UsageError, match=r'12 blocks have maps of the same .*out_indices=\(-1,\)'):
        TimmBackbone(DINO)
    with pytest.raises(UsageError, match='out_indices=.*out of range'):
        TimmBackbone(DINO, depth=2, embed_dim=48, num_heads=3, out_indices=(3,))
    backbone = TimmBackbone(DINO, depth=1, embed_dim=48, num_heads=3, out_indices=(0,))
    with pytest.raises(UsageError, match=r'multiples of 16, not \(64, 72\).*pad_size_divisor=16'):
        backbone(torch.randn(1, 3, 64, 72))


@pytest.mark.parametrize('name', PLAIN)
def test_timm_may_pad_images(name):
    padding, plain = (
        TimmBackbone(name, **SMALL[name], out_norm=False, **options).double().eval()
        for options in (dict(dynamic_img_pad=True), {})
    )
    plain.load_state_dict(randomized(padding).state_dict())
    images = torch.randn(1, 3, 50, 70, dtype=torch.float64)
    padded = torch.nn.functional.pad(images, (0, 10, 0, 14))
    with torch.no_grad():
        for ours, expected in zip(padding(images), plain(padded), strict=True):
            assert ours.shape[2:] == (4, 5) and torch.equal(ours, expected)


def dinov3(gated):
    """transformers' DINOv3 with random weights."""
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    config = DINOv3ViTConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=128 if gated else 192,
        num_register_tokens=4,
        use_gated_mlp=gated,
        hidden_act='silu' if gated else 'gelu',
    )
    return randomized(DINOv3ViTModel(config))


@pytest.mark.parametrize('gated', [False, True])
def test_dinov3_of_transformers(gated, tmp_path):
    """An independent network, from its own file."""
    theirs = dinov3(gated)
    save_file(theirs.state_dict(), tmp_path / 'hf.safetensors')
    name = 'vit_huge_plus_patch16_dinov3_qkvb' if gated else DINO
    small = SMALL['vit_small_patch16_dinov3.lvd1689m'] | dict(mlp_ratio=128 / 48 if gated else 4)
    backbone = TimmBackbone(
        name, **small, out_norm=False, checkpoint=str(tmp_path / 'hf.safetensors')
    )
    backbone.init_weights()
    images = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        hidden = theirs(images, output_hidden_states=True).hidden_states[1:]
        for ours, tokens in zip(backbone.double().eval()(images), hidden, strict=True):
            expected = tokens[:, 5:].transpose(1, 2).unflatten(2, (4, 6))
            torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


def test_dinov3_convnext_of_transformers(tmp_path):
    from transformers import DINOv3ConvNextConfig, DINOv3ConvNextModel

    config = DINOv3ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1])
    theirs = randomized(DINOv3ConvNextModel(config))
    save_file(theirs.state_dict(), tmp_path / 'hf.safetensors')
    name = 'convnext_tiny.dinov3_lvd1689m'
    backbone = TimmBackbone(
        name, **SMALL[name], out_norm=False, checkpoint=str(tmp_path / 'hf.safetensors')
    )
    backbone.init_weights()
    images = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        hidden = theirs(images, output_hidden_states=True).hidden_states[1:]
        for ours, expected in zip(backbone.double().eval()(images), hidden, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


def meta_layout(state):
    """timm's names to those of Meta's release, whose bias on keys is masked."""
    result = dict(mask_token=torch.zeros(1, 48))
    for key, value in state.items():
        key = key.replace('reg_token', 'storage_tokens')
        key = key.replace('gamma_1', 'ls1.gamma').replace('gamma_2', 'ls2.gamma')
        if key.endswith('q_bias'):
            bias = torch.cat([value, torch.ones(48), state[key.replace('q_bias', 'v_bias')]])
            result[key.replace('q_bias', 'qkv.bias')] = bias
        elif not key.endswith('v_bias'):
            result[key] = value
    return result


def test_dinov3_of_meta(tmp_path):
    small = SMALL['vit_small_patch16_dinov3.lvd1689m']
    state = randomized(TimmBackbone(DINO, **small)).float().model.state_dict()
    torch.save(meta_layout(state), tmp_path / 'meta.pth')
    backbone = TimmBackbone(DINO, **small, checkpoint=str(tmp_path / 'meta.pth'))
    backbone.init_weights()
    read = backbone.model.state_dict()
    assert all(torch.equal(read[key], value) for key, value in state.items())
    without = TimmBackbone(
        'vit_small_patch16_dinov3', **small, checkpoint=str(tmp_path / 'meta.pth')
    )
    with pytest.raises(UsageError, match=r'attn\.q_bias, and they are not zero.*_dinov3_qkvb'):
        without.init_weights()


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / 'weights.pth'
    torch.save(dinov3(False).state_dict(), path)
    small = dict(depth=3, embed_dim=48, num_heads=3, out_indices=(-1,))
    with pytest.raises(UsageError, match=r'does not fit .*: 15 of 49 tensors.* blocks\.2\.'):
        TimmBackbone(DINO, **small, checkpoint=str(path)).init_weights()
    torch.save(dict(weight=torch.ones(2)), path)
    for name in (DINO, 'vit_base_patch16_siglip_512.v2_webli'):
        with pytest.raises(UsageError, match='does not fit'):
            TimmBackbone(name, **small, checkpoint=str(path)).init_weights()


def test_weights_of_another_patch_and_size(tmp_path):
    """Patch embeddings and positions are resized, as timm does when it fetches them."""
    vit = dict(depth=1, embed_dim=48, num_heads=3)
    name = 'eva02_tiny_patch14_224.mim_in22k'
    whole = timm.create_model(name, **vit)
    torch.save(whole.state_dict(), tmp_path / 'weights.pth')
    changed = dict(patch_size=16, img_size=64, **vit)
    backbone = TimmBackbone(
        name, out_indices=(0,), checkpoint=str(tmp_path / 'weights.pth'), **changed
    )
    backbone.init_weights()
    overlay = dict(file=str(tmp_path / 'weights.pth'))
    expected = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **changed)
    assert to_2tuple(backbone.model.patch_embed.patch_size) == (16, 16)
    for key, value in backbone.model.state_dict().items():
        assert torch.equal(value, expected.state_dict()[key]), key


@pytest.mark.parametrize('name', [PLAIN[0], 'sam2_hiera_tiny.fb_r896_2pt1'])
def test_recomputation_gives_adapters_the_same_gradients(name):
    images, gradients = torch.randn(1, 3, 64, 64, dtype=torch.float64), []
    for with_cp in (False, True):
        torch.manual_seed(5)
        backbone = randomized(TimmBackbone(name, **SMALL[name], with_cp=with_cp)).train()
        mmpeft.inject(backbone, dict(type='LoRA', rank=2))
        sum(level.square().sum() for level in backbone(images)).backward()
        gradients.append([p.grad for p in adapter_parameters(backbone)])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)
    assert any(gradient.any() for gradient in gradients[0])


def test_the_largest_needs_no_memory_to_be_counted():
    """DINOv3's 7B: 6.7 billion parameters, LoRA of rank 16 in all linear layers."""
    with torch.device('meta'):
        backbone = TimmBackbone('vit_7b_patch16_dinov3.lvd1689m', out_indices=(-1,))
        summary = mmpeft.inject(backbone, dict(type='LoRA', rank=16))
    width, hidden = 4096, 8192
    block = (width + 3 * width) + (width + width) + 3 * (width + hidden)
    assert summary.adapters == 16 * (40 * block + 3 * 16 * 16 + width)
    assert summary.unfrozen == 2 * width
    assert 6.6e9 < summary.base < 6.8e9
