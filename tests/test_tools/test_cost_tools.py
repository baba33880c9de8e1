"""What training costs: predicted memory, and the ways that layers take."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import mmpeft
from mmpeft.analysis.explain import explain
from mmpeft.analysis.operations import Operations
from mmpeft.models import InternViT

ARCH = dict(depth=3, width=64, heads=2, hidden=128, image_size=56)


@pytest.fixture
def memory(script):
    return script('analysis_tools', 'memory_table')


@pytest.mark.parametrize('with_cp', [False, True])
@pytest.mark.parametrize('method', ['FLoRA', 'LieRA', 'DoRA', 'BitFit', 'Full'])
def test_saved_bytes_are_predicted_without_data(method, with_cp, memory):
    saved = []
    for mode in (torch.enable_grad(), FakeTensorMode()):
        with mode:
            model = InternViT(ARCH, frozen_dtype='bfloat16', with_cp=with_cp)
            mmpeft.inject(model, dict(type=method))
            saved.append(memory.saved_bytes(model, torch.randn(2, 3, 56, 56)))
    assert saved[0] == saved[1] > 0


def test_saved_bytes_of_a_layer(memory):
    layer = nn.Linear(8, 4)
    x = torch.randn(16, 8, requires_grad=True)
    assert memory.saved_bytes(layer, x) == 16 * 8 * 4
    assert memory.saved_bytes(layer.requires_grad_(False), x) == 0


def test_the_table_of_a_config(memory, tmp_path):
    rows = [
        dict(config='configs/flora/x.py', batch=1, **dict.fromkeys(memory.COLUMNS, 3 * 2**30)),
    ]
    text = memory.markdown(rows, 504)
    assert '| flora, 1 | 3.00 |' in text and '504x504' in text


def test_explanations():
    model = nn.Sequential(
        nn.Conv2d(64, 64, 3, padding=1),
        nn.Conv2d(64, 64, 7, padding=3, groups=64),
        nn.Flatten(2),
        nn.Linear(64, 32),
        nn.Linear(32, 3),
    )
    mmpeft.inject(model, dict(type='FLoRA', rank=2))
    rows = explain(model, lambda: model(torch.randn(1, 64, 8, 8)))
    assert [row.path for row in rows] == ['0', '1', '3', '4']
    kernel, depthwise, linear, small = rows
    assert kernel.kernel == 'thin convolutions, as a branch' and kernel.tokens == 64
    assert kernel.extra == pytest.approx(64 * (3 * 128 * 2 + 3 * 9 * 4), rel=0.02)
    assert depthwise.kernel == 'kernel gradient as a convolution'
    assert linear.floor == 2 * 64 * 64 * 32
    assert linear.kernel == 'thin products, in the weight'
    assert linear.extra == pytest.approx(2 * 64 * 2 * 96 + 2 * 2 * 64 * 32, rel=0.02)
    assert linear.ratio == 1 + linear.extra / linear.floor
    assert small.kernel == 'dense gradient, nothing kept'
    assert small.extra == pytest.approx(64 * 32 * 3 + 2 * 2 * 32 * 3 + 2 * 2 * 32 * 3, rel=0.02)
    assert not any(module._forward_hooks for module in model)


@pytest.mark.parametrize('way', ['merged', 'branch'])
@pytest.mark.parametrize('method', ['LoRA', 'FLoRA'])
@pytest.mark.parametrize('layer', [nn.Linear(96, 64), nn.Conv2d(48, 64, 3, padding=1)])
def test_explained_operations_are_those_counted(layer, method, way, script):
    """Against torch's own counting of what runs, but for the small products of the factors."""
    model = copy.deepcopy(layer)
    mmpeft.inject(model, dict(type=method, rank=4, **LAYOUT[method]), execution=way)
    conv = isinstance(layer, nn.Conv2d)
    x = torch.randn(2, 48, 24, 24) if conv else torch.randn(900, 96)
    (row,) = explain(model, lambda: model(x))
    counts = {}
    for name, network in dict(plain=layer.requires_grad_(False), adapted=model).items():
        one = x.clone().requires_grad_()
        with Operations() as operations:
            network(one).sum().backward()
        counts[name] = operations.count
    assert counts['plain'] == 2 * row.floor
    assert counts['adapted'] - counts['plain'] == pytest.approx(2 * row.extra, rel=0.03)


LAYOUT = dict(LoRA=dict(layout='channel'), FLoRA={})
