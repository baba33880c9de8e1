"""VPT on transformers and on convolutional networks: formulas, counts and refusals."""

import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import mmpeft
from mmpeft.errors import UsageError
from mmpeft.injection.site import attached, named_adapters
from mmpeft.methods.activation.prompts import ring_numbers
from tests.activations import adapted, factors_of
from tests.cases import BLOCKS, Attention, TransformerBlock, randomize

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')


def through(model, x, prompts, deep):
    """The blocks of the small transformer with prompts put in and cut off by hand."""
    tokens = model[0][0](x)
    length, carried = tokens.shape[1], None
    for number, block in enumerate((model[0][1], model[0][2])):
        if deep or number == 0:
            carried = prompts[number].expand(len(x), -1, -1)
        y = block(torch.cat([tokens, carried], 1))
        tokens, carried = y[:, :length], y[:, length:]
    return tokens


@pytest.mark.parametrize('deep', [False, True])
def test_vpt_appends_prompts_and_hides_them(deep):
    plain, model, x = adapted('vit', dict(type='VPT', tokens=3, deep=deep))
    prompts = [at.adapter.prompts for at in attached(model)]
    assert len(prompts) == 2 and (prompts[0] is prompts[1]) is not deep
    expected = through(plain, x, prompts, deep)
    assert model(x).shape == plain(x).shape
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(model(x), plain(x))


@pytest.mark.parametrize('deep, count', [(False, 1), (True, 12)])
def test_parameters_of_vpt_in_closed_form(deep, count):
    with torch.device('meta'):
        model = timm.create_model('vit_tiny_patch16_224')
    summary = mmpeft.inject(model, dict(type='VPT', tokens=50, deep=deep))
    assert summary.adapters == count * 50 * 192 and len(summary.rows) == 12
    assert len(mmpeft.adapter_state_dict(model)) == count


@pytest.mark.parametrize('patch_size', [4, 16])
def test_vpt_starts_uniform_as_in_the_paper(patch_size):
    model = BLOCKS['vit'].build()
    mmpeft.inject(model, dict(type='VPT', tokens=5000, deep=True, patch_size=patch_size))
    bound = math.sqrt(6 / (3 * patch_size * patch_size + 8))
    for adapter in named_adapters(model).values():
        assert 0.999 * bound < adapter.prompts.abs().max() <= bound
        assert abs(adapter.prompts.std() / bound * 3**0.5 - 1) < 0.01


@pytest.mark.parametrize('deep', [False, True])
def test_vpt_in_timm_shows_nothing_of_its_prompts(deep):
    model = timm.create_model(
        'vit_tiny_patch16_224', depth=3, embed_dim=24, img_size=32, features_only=True
    )
    x = torch.randn(2, 3, 32, 32)
    before = [y.shape for y in model(x)]
    mmpeft.inject(model, dict(type='VPT', tokens=3, deep=deep))
    after = model(x)
    assert [y.shape for y in after] == before
    sum(y.sum() for y in after).backward()
    assert all(
        p.grad.any() for adapter in named_adapters(model).values() for p in adapter.parameters()
    )


class Between(nn.Module):
    def __init__(self, between, attention=Attention):
        super().__init__()
        self.blocks = nn.ModuleList([TransformerBlock(attention(8), 8) for _ in range(2)])
        self.between = between

    def forward(self, x):
        return self.blocks[1](self.between(self.blocks[0](x)))


def test_shallow_vpt_tells_when_its_prompts_got_lost():
    x = torch.randn(2, 5, 8)
    for between, targets in ((lambda x: x + 0, None), (lambda x: x, dict(include=r'blocks\.1'))):
        model = Between(between)
        mmpeft.inject(model, dict(type='VPT'), targets)
        with pytest.raises(
            UsageError, match='prompts of the block before did not reach .*deep=True'
        ):
            model(x)
        mmpeft.remove(model)
        mmpeft.inject(model, dict(type='VPT', deep=True), targets)
        assert model(x).shape == x.shape


class Recomputed(Between):
    def __init__(self, reentrant):
        super().__init__(None)
        self.reentrant = reentrant

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x


def test_shallow_vpt_in_a_reentrant_checkpoint_is_refused():
    model = Recomputed(reentrant=True)
    mmpeft.inject(model, dict(type='VPT'))
    y = model(torch.randn(2, 5, 8, requires_grad=True))
    with pytest.raises(UsageError, match='reentrant'):
        y.sum().backward()


class Pooling(TransformerBlock):
    def forward(self, x):
        return super().forward(x)[:, :1]


@pytest.mark.parametrize(
    'block, size, message',
    [
        (TransformerBlock, (2, 2, 3, 8), 'prompts need a sequence'),
        (Pooling, (2, 5, 8), 'prompts in its output are unknown'),
    ],
)
def test_vpt_refuses_blocks_on_other_than_sequences(block, size, message):
    class AnyShape(Attention):
        def forward(self, x):
            return self.proj(self.qkv(x)[..., :8])

    model = nn.Sequential(block(AnyShape(8), 8))
    mmpeft.inject(model, dict(type='VPT'))
    with pytest.raises(UsageError, match=message):
        model(torch.randn(size))


@pytest.mark.parametrize(
    'convolution',
    [
        dict(kernel_size=3, padding=1),
        dict(kernel_size=(3, 5), padding=(1, 2), groups=2),
        dict(kernel_size=5, padding='same', dilation=2),
        dict(kernel_size=7, padding=3, groups=4),
        dict(kernel_size=(1, 3), padding=(0, 1)),
        dict(kernel_size=5, padding=1),
    ],
)
def test_vpt_replaces_the_zeros_of_a_padding(convolution):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, **convolution)

        def forward(self, x):
            return self.conv2(self.conv1(x))

    model, x = Block().double(), torch.randn(2, 4, 6, 9, dtype=torch.float64)
    middle = model.conv1(x).detach().numpy()
    mmpeft.inject(model, dict(type='VPT'))
    randomize(model)
    (at,) = attached(model)
    pads = [before for before, _ in at.adapter.spec.geometry.padding]
    rings = factors_of(at)['prompts']
    assert at.path == 'conv2' and rings.shape == (4, max(pads))
    framed = np.zeros((2, 4, 6 + 2 * pads[0], 9 + 2 * pads[1]))
    for h, w in np.ndindex(*framed.shape[2:]):
        beyond = [max(pads[0] - h, h - pads[0] - 5), max(pads[1] - w, w - pads[1] - 8)]
        ring = max(beyond)
        framed[..., h, w] = (
            rings[:, ring - 1] if ring > 0 else middle[..., h - pads[0], w - pads[1]]
        )
    layer = model.conv2
    expected = F.conv2d(
        torch.from_numpy(framed),
        layer.weight,
        layer.bias,
        dilation=layer.dilation,
        groups=layer.groups,
    )
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def test_numbers_of_rings():
    assert ring_numbers((2, 1), (1, 2)).tolist() == [
        [2, 1, 1, 1, 2],
        [2, 1, 0, 1, 2],
        [2, 1, 0, 1, 2],
        [2, 1, 1, 1, 2],
    ]


@pytest.mark.parametrize(
    'deep, expected', [(False, ['1.conv_dw']), (True, ['1.conv_dw', '2.conv_dw'])]
)
def test_vpt_on_convolutions_is_in_the_first_block_or_in_each(deep, expected):
    model = BLOCKS['convnext'].build()
    summary = mmpeft.inject(model, dict(type='VPT', deep=deep))
    assert [row.name.removeprefix('0.') for row in summary.rows] == expected
    assert summary.adapters == len(expected) * 6 * 2


def test_vpt_keeps_the_layout_of_memory():
    model = BLOCKS['convnext'].build(torch.float32)[0]
    mmpeft.inject(model, dict(type='VPT'))
    layer, x = model[1].conv_dw, torch.randn(2, 6, 5, 7)
    assert layer(x).is_contiguous()
    y = layer.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('argument', ['tokens', 'patch_size'])
def test_vpt_wants_positive_numbers(argument):
    with pytest.raises(UsageError, match=f'VPT: {argument}=0 must be a positive integer'):
        mmpeft.METHODS.build({'type': 'VPT', argument: 0})
