"""The ratio of rows to their magnitudes: its formula and its derivatives."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mmpeft
from mmpeft.execution.row_ratio import RowRatio, row_ratio
from mmpeft.methods.normal_form import NormalForm


def tensors():
    torch.manual_seed(0)
    up, weight, down, magnitude = (
        torch.randn(shape, dtype=torch.float64, requires_grad=shape != (5, 4))
        for shape in [(5, 2), (5, 4), (2, 4), (5,)]
    )
    with torch.no_grad():
        up[0] = weight[0] = 0  # a row of zeros
        magnitude[1] = 0
    return up, weight, down, magnitude


def test_the_ratio_as_numpy_computes_it():
    up, weight, down, magnitude = tensors()
    found = row_ratio(NormalForm(up, None, down, scale=0.7, magnitude=magnitude), weight)
    u, w, v, m = (t.detach().numpy() for t in (up, weight, down, magnitude))
    expected = np.ones(5)
    expected[1:] = (m / np.maximum(np.linalg.norm(w + 0.7 * u @ v, axis=1), 1e-300))[1:]
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-12)
    assert row_ratio(NormalForm(up, None, down), weight) is None


@pytest.mark.parametrize('scale', [1.0, 0.7])
def test_derivatives(scale):
    up, weight, down, magnitude = tensors()
    function = RowRatio(scale)
    moved = [t[1:].detach().requires_grad_(t.requires_grad) for t in (up, weight, magnitude)]
    args = moved[0], moved[1], down, moved[2]
    assert torch.autograd.gradcheck(function, args)
    assert torch.autograd.gradgradcheck(function, args)
    for detach in (False, True):
        form = NormalForm(up, None, down, 'additive', scale, 0.0, magnitude, detach)
        wanted = [magnitude] if detach else [up, down, magnitude]
        found = torch.autograd.grad(row_ratio(form, weight).sum(), wanted)
        exact = torch.autograd.grad(form.ratio(weight).sum(), wanted)
        for one, other in zip(found, exact, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('how', [{}, dict(frozen_dtype='nf4')])
def test_no_copy_of_the_weight_is_kept(how):
    """Of one that is stored in fewer bits than the factors, whose ratio is computed in float32."""
    layer = nn.Linear(64, 48).to(torch.float32 if how else torch.bfloat16)
    model = nn.Sequential(layer)
    mmpeft.inject(model, dict(type='DoRA', rank=2), **how)
    kept, x = [], torch.randn(4, 64, dtype=layer.bias.dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = model(x)
    original = layer.parametrizations.weight.original
    assert not any(t.shape == (48, 64) and type(t) is Tensor for t in kept if t is not original)
    assert any(t.numel() for t in kept)
    y.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parametrizations.weight[0].parameters())
