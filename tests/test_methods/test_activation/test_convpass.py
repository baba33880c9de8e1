"""Convpass by modules of torch, as its authors write it."""

import pytest
import torch
from torch import nn

import mmpeft
from mmpeft.errors import UsageError
from mmpeft.injection.site import attached
from tests.activations import bottleneck, loaded, plain_and_adapted, vit
from tests.cases import randomize

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')
CLOSE = dict(rtol=1e-12, atol=1e-12)


def test_convpass():
    plain, model = plain_and_adapted(vit(), type='Convpass', rank=3, scale=0.3)
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
    _, model = plain_and_adapted(nn.Sequential(vit().blocks), type='Convpass')
    with pytest.raises(UsageError, match='7 tokens is not an image .*no convolution cut it'):
        model(torch.randn(1, 7, 8, dtype=torch.float64))
