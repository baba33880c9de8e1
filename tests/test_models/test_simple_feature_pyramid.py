"""SimpleFeaturePyramid against its formula in numpy, level by level."""

import numpy as np
import pytest
import torch
from scipy.special import erf

from mmpeft.errors import UsageError
from mmpeft.models import SimpleFeaturePyramid


def norm(x, layer):
    """LayerNorm over channels of (C, H, W)."""
    mean, var = x.mean(0), x.var(0)
    x = (x - mean) / np.sqrt(var + 1e-6)
    return x * layer.weight.numpy()[:, None, None] + layer.bias.numpy()[:, None, None]


def double(x, layer):
    """A transposed convolution of 2x2 and stride 2: a block of 2x2 for each point."""
    weight, bias = layer.weight.numpy(), layer.bias.numpy()
    blocks = np.einsum('chw,cdij->dhiwj', x, weight)
    d, h, _, w, _ = blocks.shape
    return blocks.reshape(d, 2 * h, 2 * w) + bias[:, None, None]


def smooth(x, one, first, three, second):
    """1x1 and 3x3 convolution, each with a norm."""
    x = norm(np.einsum('oc,chw->ohw', one.weight.numpy()[:, :, 0, 0], x), first)
    padded, (_, h, w) = np.pad(x, ((0, 0), (1, 1), (1, 1))), x.shape
    weight = three.weight.numpy()
    y = sum(
        np.einsum('oc,chw->ohw', weight[:, :, i, j], padded[:, i : i + h, j : j + w])
        for i in range(3)
        for j in range(3)
    )
    return norm(y, second)


@torch.no_grad()
def test_levels_are_those_of_the_paper():
    neck = SimpleFeaturePyramid(8, 6, num_outs=5).double()
    for value in neck.parameters():
        torch.nn.init.normal_(value)
    x = torch.randn(1, 8, 4, 6, dtype=torch.float64)
    four, two, one, half = neck.levels
    n = x[0].numpy()
    up = norm(double(n, four[0]), four[1])
    up = double(up * (1 + erf(up / np.sqrt(2))) / 2, four[3])
    pooled = n.reshape(8, 2, 2, 3, 2).max((2, 4))
    expected = [
        smooth(up, *four[4:]),
        smooth(double(n, two[0]), *two[1:]),
        smooth(n, *one),
        smooth(pooled, *half[1:]),
    ]
    expected.append(expected[-1][:, ::2, ::2])
    levels = neck((torch.zeros(1), x))
    assert [tuple(e.shape) for e in expected] == [tuple(level.shape[1:]) for level in levels]
    for ours, theirs in zip(levels, expected, strict=True):
        np.testing.assert_allclose(ours[0].numpy(), theirs, rtol=1e-9, atol=1e-9)
        assert ours.is_contiguous()


def test_what_does_not_fit_is_refused():
    with pytest.raises(UsageError, match=r'no scales=\(8, 1\)'):
        SimpleFeaturePyramid(8, scales=(8, 1))
    with pytest.raises(UsageError, match='num_outs=1'):
        SimpleFeaturePyramid(8, scales=(2, 1), num_outs=1)
    with pytest.raises(UsageError, match=r'got 4\. Set model\.neck\.in_channels=4'):
        SimpleFeaturePyramid(8)([torch.zeros(1, 4, 2, 2)])
