"""AdaptFormer by modules of torch, as its authors write it."""

import pytest
import torch

from mmpeft.injection.site import attached
from tests.activations import bottleneck, plain_and_adapted, vit

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')
CLOSE = dict(rtol=1e-12, atol=1e-12)


def test_adaptformer():
    plain, model = plain_and_adapted(vit(), type='AdaptFormer', rank=3, scale=0.3)
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    (site,) = attached(model)
    down, up = bottleneck(site.adapter.factors, 8, 3)
    block = plain.blocks[0]
    h = x + block.attn(block.norm1(x))
    inside = block.norm2(h)
    expected = h + block.mlp(inside) + 0.3 * up(down(inside).relu())
    torch.testing.assert_close(model.blocks[0](x), expected, **CLOSE)
