"""What training costs: the tools on configs, and how layers are computed."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import mmpeft
from mmpeft.analysis.explain import explain
from mmpeft.analysis.operations import Operations
from mmpeft.errors import UsageError

ROOT = Path(__file__).parents[2]
UPSTREAM = sorted((ROOT / 'configs/upstream').glob('*.py'))
TOOLS = ('explain', 'memory_table')
pytestmark = pytest.mark.usefixtures('scope')


@pytest.mark.parametrize(
    'tool, config',
    [
        pytest.param(tool, path, id=f'{tool}-{path.stem}')
        for number, path in enumerate(UPSTREAM)
        for turn, tool in enumerate(TOOLS)
        if path.stem == 'rtmdet_tiny_coco' or number % len(TOOLS) == turn
    ],
)
def test_upstream_configs(tool, config, script, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', [f'{tool}.py', str(config), '--size', '128', '160'])
    script('tools/analysis_tools', tool).main()
    shown = capsys.readouterr().out
    assert ('GMAC in the adapted layers' if tool == 'explain' else 'MiB') in shown


@pytest.mark.parametrize('tool', TOOLS)
def test_a_config_without_a_backbone(tool, script, monkeypatch):
    monkeypatch.setattr(sys, 'argv', [f'{tool}.py', str(ROOT / 'configs/_base_/runtime_det.py')])
    with pytest.raises(UsageError, match='has no model.backbone'):
        script('tools/analysis_tools', tool).main()


@pytest.mark.parametrize('method', ['frozen', 'bitfit'])
def test_nothing_to_explain(method, script, monkeypatch):
    words = ['mmpeft::demo/_base_/classification.py', '--method', method, '--size', '40', '40']
    monkeypatch.setattr(sys, 'argv', ['explain.py', *words])
    with pytest.raises(UsageError, match='adapts no weight of a linear layer or convolution'):
        script('tools/analysis_tools', 'explain').main()


@pytest.mark.parametrize('tool', TOOLS)
@pytest.mark.parametrize('words', [('--batch', 0), ('--batch', -1), ('--size', 0, 0)])
def test_no_images(words, tool, script, monkeypatch):
    monkeypatch.setattr(sys, 'argv', [f'{tool}.py', 'config.py', *map(str, words)])
    with pytest.raises(UsageError, match='give numbers above 0'):
        script('tools/analysis_tools', tool).main()


def test_another_method_on_a_config(script, monkeypatch, capsys):
    words = [str(ROOT / 'configs/upstream/rtmdet_tiny_coco.py'), '--method', 'lora']
    words += ['--size', '64', '64', '--cfg-options', 'default_hooks.peft.method.rank=4']
    monkeypatch.setattr(sys, 'argv', ['explain.py', *words])
    script('tools/analysis_tools', 'explain').main()
    assert 'GMAC' in capsys.readouterr().out


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


@pytest.mark.parametrize('way', ['merged', 'branch', 'composed'])
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
