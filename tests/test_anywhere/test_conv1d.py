"""GPT-2's Conv1D is a linear layer that stores (in, out)."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import mmpeft
from mmpeft.analysis.explain import explain
from mmpeft.methods import ActivationMethod
from tests.cases import METHODS, randomize
from tests.hf_zoo import HF

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')
mmpeft.METHODS.import_from_location()
ON_WEIGHTS = [
    name
    for name, config in METHODS.items()
    if (kind := mmpeft.METHODS.get(config['type'])).adapts
    and not issubclass(kind, ActivationMethod)
]


@pytest.mark.parametrize('method', ON_WEIGHTS)
def test_it_is_adapted_as_the_equal_linear_layer(method):
    conv1d, linear = nn.Sequential(Conv1D(5, 7)).double(), nn.Sequential(nn.Linear(7, 5)).double()
    with torch.no_grad():
        linear[0].weight.copy_(conv1d[0].weight.T)
        linear[0].bias.copy_(conv1d[0].bias.normal_())
    plain, x = copy.deepcopy(conv1d), torch.randn(3, 4, 7, dtype=torch.float64)
    summaries = []
    for model in (conv1d, linear):
        torch.manual_seed(1)
        summaries.append(mmpeft.inject(model, METHODS[method], execution='plain').to_dict())
    assert summaries[0] == summaries[1]
    assert torch.equal(conv1d(x), plain(x))
    for model in (conv1d, linear):
        torch.manual_seed(2)
        randomize(model)
        model(x).square().sum().backward()
    close = dict(rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(conv1d(x), linear(x), **close)
    gradients = [
        {n: p.grad for n, p in m.named_parameters() if p.requires_grad} for m in (conv1d, linear)
    ]
    torch.testing.assert_close(*gradients, **close)
    attached = conv1d(x)
    mmpeft.merge(conv1d)
    assert conv1d[0].weight.shape == (7, 5)
    torch.testing.assert_close(conv1d(x), attached, **close)


def test_gpt2_is_adapted_whole(tmp_path):
    model = HF['gpt2'].build().double().eval()
    plain, ids = copy.deepcopy(model), torch.arange(6)[None]
    summary = mmpeft.inject(model, dict(type='LoRA', rank=2), dict(module='transformer'))
    assert [row.kind for row in summary.rows] == ['linear'] * 8
    assert summary.rows[0].shape == (48, 16) and summary.rows[0].adapter == 2 * (48 + 16)
    assert torch.equal(model(ids).logits, plain(ids).logits)
    randomize(model)
    path = mmpeft.save_adapter(model, tmp_path / 'adapter.safetensors')
    mmpeft.load_adapter(plain, path)
    assert torch.equal(model(ids).logits, plain(ids).logits)


def test_explain_counts_it_as_the_equal_linear_layer():
    rows = []
    for layer in (Conv1D(50, 70), nn.Linear(70, 50)):
        model, x = nn.Sequential(layer), torch.randn(3, 4, 70)
        mmpeft.inject(model, dict(type='LoRA', rank=2), execution='plain')
        (row,) = explain(model, lambda model=model, x=x: model(x))
        rows.append(row)
    assert rows[0].kind == 'ParametrizedConv1D' and rows[0].kernel == 'weight built'
    assert (rows[0].tokens, rows[0].floor) == (rows[1].tokens, rows[1].floor) == (12, 2 * 12 * 3500)
    assert rows[0].extra == rows[1].extra > 0
