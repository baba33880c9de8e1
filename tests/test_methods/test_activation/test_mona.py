"""Mona: its formula on vision transformers, Swin and ConvNeXt, and which tokens are a map."""

import copy

import mmdet.models
import pytest
import timm
import torch
import torch.nn.functional as F
import transformers

import mmpeft
from mmpeft.errors import UsageError
from mmpeft.injection.site import attached
from mmpeft.methods.activation.maps import grid_of
from tests.cases import randomize

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')
CLOSE = dict(rtol=1e-12, atol=1e-12)


def adapted(model, **method):
    """A network in float64, frozen, and the same with Mona, moved off its start."""
    plain = model.double().requires_grad_(False)
    plain.eval()
    model = copy.deepcopy(plain)
    mmpeft.inject(model, dict(type='Mona', rank=3, **method))
    randomize(model)
    return plain, model


def mona(x, f, grid=None, place=''):
    """Mona by its formula on maps (N, d, h, w), or tokens (N, 1 + h w, d) with a class token."""
    f = {k.removeprefix(place): v for k, v in f.items() if k.startswith('inner_') == bool(place)}
    tokens = x if grid else x.permute(0, 2, 3, 1)
    mean, var = tokens.mean(-1, keepdim=True), tokens.var(-1, correction=0, keepdim=True)
    normed = (tokens - mean) / (var + 1e-5).sqrt() * f['norm_weight'] + f['norm_bias']
    z = (f['scale_norm'] * normed + f['scale_input'] * tokens) @ f['down'].T + f['down_bias']

    def mixed(c):
        c = c + f['filter_bias']
        return c + c @ f['mixer'].T + f['mixer_bias']

    def on_map(z):
        sums = sum(
            torch.stack(  # unfold is a cross-correlation's patches
                [
                    (F.unfold(z[:, [c]], k, padding=k // 2) * f[f'filter_{k}'][c].view(-1, 1)).sum(
                        1
                    )
                    for c in range(z.shape[1])
                ],
                -1,
            )
            for k in (3, 5, 7)
        )
        return mixed(z.flatten(2).mT + sums / 3)

    if grid:
        middle = sum(f[f'filter_{k}'][:, 0, k // 2, k // 2] for k in (3, 5, 7)) / 3
        alone = mixed(z[:, :1] + z[:, :1] * middle)
        z = torch.cat([alone, on_map(z[:, 1:].mT.unflatten(2, grid))], 1)
    else:
        z = on_map(z.permute(0, 3, 1, 2)).unflatten(1, x.shape[2:])
    added = F.gelu(z) @ f['up'].T + f['up_bias']
    return x + (added if grid else added.permute(0, 3, 1, 2))


def test_between_attention_and_mlp_and_at_the_end_of_each_block():
    """With a class token, layer scale, and an image that is no square."""
    settings = dict(img_size=(32, 48), patch_size=16, embed_dim=8, depth=2, num_heads=2)
    model = timm.create_model('vit_tiny_patch16_224', **settings, init_values=0.3, num_classes=0)
    plain, model = adapted(model)
    images = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    x = plain._pos_embed(plain.patch_embed(images))
    for block, site in zip(plain.blocks, attached(model), strict=True):
        f = site.adapter.factors
        x = mona(x + block.ls1(block.attn(block.norm1(x))), f, (2, 3), 'inner_')
        x = mona(x + block.ls2(block.mlp(block.norm2(x))), f, (2, 3))
    torch.testing.assert_close(model.forward_features(images), plain.norm(x), **CLOSE)


def test_at_the_end_of_convnexts_blocks():
    model = timm.create_model('convnextv2_atto', depths=(1, 1, 1, 1), dims=(4, 4, 8, 8))
    plain, model = adapted(model)
    sites = {site.path: site.adapter.factors for site in attached(model)}
    assert list(sites) == [f'stages.{n}.blocks.0' for n in range(4)]
    for path, f in sites.items():
        x = torch.randn(2, f['down'].shape[1], 4, 3, dtype=torch.float64)
        expected = mona(plain.get_submodule(path)(x), f)
        torch.testing.assert_close(model.get_submodule(path)(x), expected, **CLOSE)


def test_parameters_in_closed_form():
    with torch.device('meta'):
        model = timm.create_model('vit_tiny_patch16_224')
    one = 4 * 192 + 2 * 64 * 192 + 64 + 192 + 64 * (9 + 25 + 49 + 1) + 64 * 65
    assert mmpeft.inject(model, dict(type='Mona')).adapters == 24 * one


def test_on_mmdets_swin_whose_patches_are_merged():
    model = mmdet.models.SwinTransformer(
        embed_dims=8, depths=(2, 1), num_heads=(2, 4), strides=(4, 2), out_indices=(0, 1)
    )
    plain, model = adapted(model)
    x = torch.randn(1, 3, 44, 60, dtype=torch.float64)  # 11x15 patches, then 6x8
    before, after = plain(x), model(x)
    assert [y.shape for y in after] == [y.shape for y in before]
    assert not any(torch.allclose(a, b) for a, b in zip(after, before, strict=True))
    assert all(site.adapter._grid == (11, 15) for site in attached(model))
    mmpeft.remove(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_copy_follows_its_own_patches():
    model = timm.create_model(
        'vit_tiny_patch16_224', img_size=32, embed_dim=8, depth=1, num_heads=2
    )
    _, model = adapted(model)
    copied = copy.deepcopy(model)
    model(torch.randn(1, 3, 32, 32, dtype=torch.float64))
    grids = [site.adapter._grid for each in (model, copied) for site in attached(each)]
    assert grids == [(2, 2), None]


@pytest.mark.parametrize(
    'length, grid, expected',
    [
        (12, (3, 4), ((3, 4), 0)),
        (13, (3, 4), ((3, 4), 1)),
        (12, (5, 7), ((3, 4), 0)),
        (900, (7, 7), None),
        (77, (7, 8), None),
        (12, None, None),
    ],
)
def test_which_tokens_are_a_map(length, grid, expected):
    if expected:
        assert grid_of(length, grid) == expected
    else:
        with pytest.raises(UsageError, match='is not an image of patches that can be convolved'):
            grid_of(length, grid)


def test_windows_are_squares_where_there_are_windows():
    assert grid_of(49, (50, 84), windows=True) == ((7, 7), 0)
    with pytest.raises(UsageError, match='is not an image of patches'):
        grid_of(49, (50, 84))


def test_a_sequence_that_is_a_window_or_a_map_is_refused():
    assert grid_of(144, (48, 48), windows=True) == ((12, 12), 0)
    assert grid_of(144, (144, 256)) == ((9, 16), 0)
    with pytest.raises(UsageError, match='whole map of 9x16 here, or a window of 12x12'):
        grid_of(144, (144, 256), windows=True)


def test_post_norm_transformers_are_refused():
    model = timm.create_model(
        'swinv2_tiny_window8_256',
        img_size=32,
        patch_size=4,
        window_size=4,
        embed_dim=8,
        depths=(1,),
        num_heads=(2,),
    )
    _, model = adapted(model)
    with pytest.raises(UsageError, match='runs before the norm'):
        model(torch.randn(1, 3, 32, 32, dtype=torch.float64))


def test_a_block_without_two_norms_of_its_own_gets_one_mona_and_a_warning():
    """BERT's blocks are post-norm, and have one norm beside the one in their attention."""
    config = transformers.BertConfig(8, 8, 1, 2, 16, max_position_embeddings=8)
    model = transformers.BertModel(config, add_pooling_layer=False)
    with pytest.warns(UserWarning, match="such as 'encoder.layer.0', do not have"):
        mmpeft.inject(model, dict(type='Mona', rank=2))
    (site,) = attached(model)
    assert not any(name.startswith('inner_') for name in site.adapter.factors)
