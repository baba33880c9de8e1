"""Products of maps with matrices: all strides, all sizes at which another library computes."""

import pytest
import torch

from mmpeft.execution.cpu import onednn
from mmpeft.execution.matmul import (
    FEW,
    ChannelsFirst,
    ChannelsLast,
    flat,
    layout_of,
    linear,
    unflat,
)


@pytest.mark.parametrize('avx512', [False, True])
@pytest.mark.parametrize('shape', [(300, 96, 160), (7, 600, 700), (3000, 40, 96)])
def test_products_in_any_strides(shape, avx512, monkeypatch):
    monkeypatch.setattr(onednn, 'IS_FASTER', avx512)
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
        close(ChannelsLast.weight_grad(one, x, x.dtype), square)
        columns = one.T[None].contiguous()
        close(ChannelsFirst.matmul(columns, other, bias), (product + bias.double()).T[None])
        images = columns.expand(2, -1, -1)
        close(ChannelsFirst.matmul(images, other), product.T.expand(2, -1, -1))
        close(ChannelsFirst.weight_grad(columns, columns, columns.dtype), square)
        close(ChannelsFirst.weight_grad(images, images, images.dtype), 2 * square)
    y = torch.randn(positions, out)
    close(ChannelsLast.accumulate(y.clone(), x, w), y.double() + product)
    wide = y.T[None].contiguous()
    close(ChannelsFirst.accumulate(wide.clone(), x.T[None], w), (y.double() + product).T[None])
    close(ChannelsLast.bias_grad(y, torch.float32), y.double().sum(0))
    close(ChannelsFirst.bias_grad(wide, torch.float32), y.double().sum(0))


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_maps_keep_their_memory(memory_format):
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=memory_format)
    layout = layout_of(x)
    y = flat(x, layout)
    assert y.is_contiguous() and y.data_ptr() == x.data_ptr()
    assert torch.equal(unflat(y, layout, (4, 5)), x)


@pytest.mark.parametrize('images', [0, 1, 3])
@pytest.mark.parametrize('positions', [1, FEW, FEW + 1])
def test_few_positions_of_several_images(images, positions):
    """They are joined into one product; sums, memory and rounding are those of one an image."""
    torch.manual_seed(0)
    shapes = (images, 5, positions), (images, 7, positions), (7, 5), (7,)
    x, dy, w, bias = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    product = torch.einsum('oi,nit->not', w, x)
    found = ChannelsFirst.matmul(x, w, bias)
    assert found.is_contiguous()
    torch.testing.assert_close(found, product + bias[:, None])
    torch.testing.assert_close(
        ChannelsFirst.weight_grad(dy, x, x.dtype), torch.einsum('not,nit->oi', dy, x)
    )
    y = dy.clone()
    assert ChannelsFirst.accumulate(y, x, w) is y
    torch.testing.assert_close(y, dy + product)
    # In steps of 2, 256 + 1.004 is 258; had the product been rounded to 1 first, it would be 256.
    low = torch.full((images, 1, positions), 256.0).bfloat16()
    parts = torch.tensor([[1.0], [2.0**-8]]).bfloat16().expand(images, 2, positions).contiguous()
    ChannelsFirst.accumulate(low, parts, torch.ones(1, 2).bfloat16())
    assert (low == 258).all()
