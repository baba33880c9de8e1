"""Conv-Adapter by modules of torch, as its authors write it."""

import pytest
import torch
from torch import nn

import mmpeft
from mmpeft.injection.site import attached
from tests.activations import loaded, plain_and_adapted

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')
CLOSE = dict(rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('reduction, width', [(2, 3), (4, 1)])
def test_conv_adapter(reduction, width):
    conv = nn.Conv2d(6, 4, 3, stride=2, padding=2, dilation=2, groups=2)
    plain, model = plain_and_adapted(nn.Sequential(conv), type='ConvAdapter', reduction=reduction)
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
