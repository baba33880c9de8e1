"""AdaptFormer, Convpass and Conv-Adapter by modules of torch, as their authors write them."""

import copy

import pytest
import timm
import torch
from torch import nn

import mmpeft
from mmpeft.errors import UsageError
from mmpeft.injection.site import attached
from tests.cases import randomize

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')
CLOSE = dict(rtol=1e-12, atol=1e-12)


def adapted(model, **method):
    plain = model.double().eval()
    model = copy.deepcopy(plain)
    mmpeft.inject(model, method)
    randomize(model)
    return plain, model


def vit(**settings):
    """With a class token, on 2x3 patches."""
    sizes = dict(img_size=(32, 48), patch_size=16, embed_dim=8, depth=1, num_heads=2)
    return timm.create_model('vit_tiny_patch16_224', **sizes, num_classes=0)


def loaded(module, **values):
    """A module of torch with given parameters."""
    for name, value in values.items():
        getattr(module, name).data = value.data.view_as(getattr(module, name))
    return module.double()


def bottleneck(f, width, rank):
    down = loaded(nn.Linear(width, rank), weight=f['down'], bias=f['down_bias'])
    return down, loaded(nn.Linear(rank, width), weight=f['up'], bias=f['up_bias'])


def test_adaptformer():
    plain, model = adapted(vit(), type='AdaptFormer', rank=3, scale=0.3)
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    (site,) = attached(model)
    down, up = bottleneck(site.adapter.factors, 8, 3)
    block = plain.blocks[0]
    h = x + block.attn(block.norm1(x))
    inside = block.norm2(h)
    expected = h + block.mlp(inside) + 0.3 * up(down(inside).relu())
    torch.testing.assert_close(model.blocks[0](x), expected, **CLOSE)


def test_convpass():
    plain, model = adapted(vit(), type='Convpass', rank=3, scale=0.3)
    images = torch.randn(2, 3, 32, 48, dtype=torch.float64)

    def beside(x, f):
        down, up = bottleneck(f, 8, 3)
        conv = loaded(nn.Conv2d(3, 3, 3, padding=1), weight=f['kernel'], bias=f['kernel_bias'])
        z = down(x)
        z = z * torch.sigmoid(1.702 * z)
        patches = conv(z[:, 1:].reshape(2, 2, 3, 3).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        token = conv(z[:, :1].reshape(2, 1, 1, 3).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        z = torch.cat([token.flatten(1, 2), patches.flatten(1, 2)], 1)
        return 0.3 * up(z * torch.sigmoid(1.702 * z))

    block = plain.blocks[0]
    attention, mlp = (site.adapter.factors for site in attached(model))
    x = plain._pos_embed(plain.patch_embed(images))
    inside = block.norm1(x)
    x = x + block.attn(inside) + beside(inside, attention)
    inside = block.norm2(x)
    x = x + block.mlp(inside) + beside(inside, mlp)
    torch.testing.assert_close(model.forward_features(images), plain.norm(x), **CLOSE)


def test_convpass_beside_attention_whose_tokens_come_first():
    """The same as where images come first, also where their number is a window's."""

    class Net(nn.Sequential):
        def __init__(self, batch_first):
            super().__init__(
                nn.Conv2d(3, 8, 2, 2), nn.MultiheadAttention(8, 2, batch_first=batch_first)
            )
            self.batch_first = batch_first

        def forward(self, x):
            x = self[0](x).flatten(2).mT
            x = x if self.batch_first else x.transpose(0, 1)
            y = self[1](x, x, x)[0]
            return y if self.batch_first else y.transpose(0, 1)

    one, two = Net(True).double(), Net(False).double()
    mmpeft.inject(one, dict(type='Convpass', rank=2))
    mmpeft.inject(two, dict(type='Convpass', rank=2))
    randomize(one)
    two.load_state_dict(one.state_dict())
    x = torch.randn(4, 3, 6, 8, dtype=torch.float64)
    torch.testing.assert_close(two(x), one(x), **CLOSE)


def test_convpass_starts_with_the_identity_in_the_middle():
    model = vit()
    mmpeft.inject(model, dict(type='Convpass', rank=4))
    f = attached(model)[0].adapter.factors
    assert torch.equal(f['kernel'].sum((2, 3)), torch.eye(4)) and f['kernel'].count_nonzero() == 4
    assert f['down'].abs().max() <= (6 / 12) ** 0.5 and not f['up'].any()


def test_convpass_needs_a_map():
    _, model = adapted(nn.Sequential(vit().blocks), type='Convpass')
    with pytest.raises(UsageError, match='7 tokens is not an image .*no convolution cut it'):
        model(torch.randn(1, 7, 8, dtype=torch.float64))


@pytest.mark.parametrize('reduction, width', [(2, 3), (4, 1)])
def test_conv_adapter(reduction, width):
    conv = nn.Conv2d(6, 4, 3, stride=2, padding=2, dilation=2, groups=2)
    plain, model = adapted(nn.Sequential(conv), type='ConvAdapter', reduction=reduction)
    f = attached(model)[0].adapter.factors
    settings = dict(stride=2, padding=2, dilation=2, groups=width)
    first = nn.Conv2d(6, width, 3, **settings)
    loaded(first, weight=f['kernel'], bias=f['kernel_bias'])
    second = loaded(nn.Conv2d(width, 4, 1), weight=f['up'], bias=f['up_bias'])
    x = torch.randn(2, 6, 9, 9, dtype=torch.float64)
    expected = plain(x) + second(first(x).relu()) * f['scale'][:, None, None]
    torch.testing.assert_close(model(x), expected, **CLOSE)


def test_conv_adapters_stand_beside_kernels_of_several_positions():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.ConvTranspose2d(8, 4, 2), nn.Conv2d(4, 4, 2)
    )
    rows = mmpeft.inject(model, dict(type='ConvAdapter')).rows
    assert [row.name for row in rows] == ['0', '3']
