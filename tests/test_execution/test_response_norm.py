"""Global response normalization in few passes is that of timm."""

import pytest
import torch
from timm.layers.grn import GlobalResponseNorm

from mmpeft.execution.response_norm import response_norm


def norm_of(channels, channels_last=True, dtype=torch.float64):
    norm = GlobalResponseNorm(channels, channels_last=channels_last, dtype=dtype)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    return norm.requires_grad_(False)


@pytest.mark.parametrize('channels_last', [True, False])
def test_response_norm_is_timms(channels_last):
    norm = norm_of(6, channels_last)
    x = torch.randn(3, 5, 4, 6, dtype=torch.float64)
    if not channels_last:
        x = x.movedim(-1, 1).contiguous()
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = response_norm(one, norm.weight, norm.bias, norm.eps, norm.channel_dim)
    expected = norm(two)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.backward(dy)
    assert (y - expected).abs().max() < 1e-12
    assert (one.grad - two.grad).abs().max() < 1e-12


def test_response_norm_by_finite_differences():
    norm = norm_of(3)
    x = torch.randn(2, 3, 2, 3, dtype=torch.float64, requires_grad=True)

    def function(x):
        return response_norm(x, norm.weight, norm.bias, norm.eps, -1)

    assert torch.autograd.gradcheck(function, x, atol=1e-7)
    assert torch.autograd.gradgradcheck(function, x, atol=1e-6)


def test_a_channel_of_zeros_has_a_finite_gradient():
    norm = norm_of(4)
    x = torch.randn(1, 3, 3, 4, dtype=torch.float64)
    x[..., 2] = 0
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    response_norm(one, norm.weight, norm.bias, norm.eps, -1).sum().backward()
    norm(two).sum().backward()
    assert one.grad.isfinite().all()
    assert (one.grad - two.grad).abs().max() < 1e-12


@pytest.mark.parametrize('dtype, bound', [(torch.bfloat16, 0.01), (torch.float16, 0.002)])
def test_response_norm_in_low_precision(dtype, bound):
    norm, x = norm_of(16), torch.randn(2, 9, 9, 16, dtype=dtype)
    y = response_norm(x, norm.weight.to(dtype), norm.bias.to(dtype), norm.eps, -1)
    expected = norm(x.double())
    assert y.dtype == dtype
    assert (y.double() - expected).norm() < bound * expected.norm()
