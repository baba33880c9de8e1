"""Products of maps with matrices: all strides, all sizes at which another library computes."""

import pytest
import torch

from mmpeft.execution.cpu import onednn
from mmpeft.execution.matmul import ChannelsFirst, ChannelsLast, flat, layout_of, linear, unflat


@pytest.mark.parametrize('avx512', [False, True])
@pytest.mark.parametrize('shape', [(300, 96, 160), (7, 600, 700), (3000, 40, 96)])
def test_products_in_any_strides(shape, avx512, monkeypatch):
    monkeypatch.setattr(onednn, 'AVX512', avx512)
    positions, features, out = shape
    x, w = torch.randn(positions, features), torch.randn(out, features)
    bias = torch.randn(out)
    product = x.double() @ w.double().T
    square = x.double().T @ x.double()

    def close(found, expected):
        assert found.shape == expected.shape
        assert (found.double() - expected).norm() < 1e-6 * expected.norm()

    turned = x.T.contiguous().T, w.T.contiguous().T
    for one, other in [(x, w), turned, (x, turned[1]), (turned[0], w)]:
        close(linear(one, other, bias), product + bias.double())
        close(ChannelsLast.weight_grad(one, x), square)
        columns = one.T[None].contiguous()
        close(ChannelsFirst.matmul(columns, other, bias), (product + bias.double()).T[None])
        images = columns.expand(2, -1, -1)
        close(ChannelsFirst.matmul(images, other), product.T.expand(2, -1, -1))
        close(ChannelsFirst.weight_grad(columns, columns), square)
        close(ChannelsFirst.weight_grad(images, images), 2 * square)
    y = torch.randn(positions, out)
    close(ChannelsLast.accumulate(y.clone(), x, w), y.double() + product)
    wide = y.T[None].contiguous()
    close(ChannelsFirst.accumulate(wide.clone(), x.T[None], w), (y.double() + product).T[None])
    close(ChannelsLast.bias_grad(y), y.double().sum(0))
    close(ChannelsFirst.bias_grad(wide), y.double().sum(0))


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_maps_keep_their_memory(memory_format):
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=memory_format)
    layout = layout_of(x)
    y = flat(x, layout)
    assert y.is_contiguous() and y.data_ptr() == x.data_ptr()
    assert torch.equal(unflat(y, layout, (4, 5)), x)
