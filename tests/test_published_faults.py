"""Faults of published implementations, each with a test that would catch it here.

What needs a Runner (weights that are decomposed before they are loaded,
optimizers that were built too early, schedules that stand still) is in
``test_hooks``; merged against attached, for all methods and layers, in
``test_methods``.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mmpeft
from mmpeft.errors import UsageError
from mmpeft.injection.site import adapter_parameters
from tests.cases import randomize

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')


def test_flora_respects_groups():
    """FLoRA's own layers build a (C, C, k, k) update for a depthwise kernel and fail."""
    layer = nn.Conv2d(16, 16, 7, padding=3, groups=16).double()
    model = nn.Sequential(layer)
    mmpeft.inject(model, dict(type='FLoRA', rank=4, kernel_rank=2))
    randomize(model)
    x = torch.randn(1, 16, 9, 9, dtype=torch.float64)
    adapter = layer.parametrizations.weight[0]
    delta = adapter.method.delta(adapter.factors, adapter.spec)
    assert delta.shape == (16, 1, 7, 7)
    weight = layer.parametrizations.weight.original + 4 * delta
    expected = F.conv2d(x, weight, layer.bias, padding=3, groups=16)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('method', ['FLoRA', 'LoRA', 'DoRA', 'LieRA'])
def test_parameters_are_the_same_objects_throughout(method):
    """Subspace-Tuning's loralib makes parameters in forward, which then never train."""
    model = nn.Sequential(nn.Linear(6, 5))
    mmpeft.inject(model, dict(type=method, rank=2))
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.SGD(adapter_parameters(model), 0.1)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
        assert torch.equal(parameter, before[name]) is not parameter.requires_grad, name


@pytest.mark.parametrize('method', ['LoRA', 'DoRA'])
@pytest.mark.parametrize(
    'options',
    [dict(dilation=2), dict(groups=4), dict(padding=1, padding_mode='circular'), dict(stride=2)],
    ids=str,
)
def test_convolutions_keep_their_options(method, options):
    """peft builds A without dilation, padding mode or groups."""
    layer = nn.Conv2d(8, 12, 3, **options).double()
    model = nn.Sequential(layer)
    mmpeft.inject(model, dict(type=method, rank=2))
    randomize(model)
    x = torch.randn(2, 8, 9, 9, dtype=torch.float64)
    plain = nn.Conv2d(8, 12, 3, **options).double()
    plain.load_state_dict(dict(weight=layer.weight, bias=layer.bias))
    torch.testing.assert_close(model(x), plain(x), rtol=1e-12, atol=1e-12)


def test_a_depthwise_adapter_can_be_smaller_than_its_layer():
    """peft puts 803k parameters beside the 6.4k of a depthwise convolution of 128 channels."""
    layer = nn.Conv2d(128, 128, 7, groups=128)
    for method in (dict(type='LoRA', rank=8), dict(type='FLoRA', rank=8)):
        summary = mmpeft.inject(nn.Sequential(copy.deepcopy(layer)), method)
        assert summary.adapters < layer.weight.numel() == 6272
    with pytest.warns(UserWarning, match='more parameters than the weight'):
        mmpeft.inject(nn.Sequential(layer), dict(type='LoRA', rank=8, layout='loralib'))


def test_dora_on_an_output_channel_of_zeros():
    """peft divides by the zero norm."""
    layer = nn.Linear(6, 5)
    nn.init.zeros_(layer.weight[2])
    model = nn.Sequential(layer)
    mmpeft.inject(model, dict(type='DoRA', rank=2))
    x = torch.randn(3, 6)
    for _ in range(2):
        model(x).square().sum().backward()
        assert all(p.grad.isfinite().all() for p in adapter_parameters(model))
        assert model(x).isfinite().all()
        randomize(model)
    assert mmpeft.merge(model)[0].weight.isfinite().all()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float32])
def test_the_base_comes_back_to_the_last_bit(dtype):
    """peft's merge and unmerge change 29% of the weights in bfloat16."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Conv2d(4, 4, 3)).to(dtype)
    before = copy.deepcopy(model.state_dict())
    mmpeft.inject(model, dict(type='LoRA', rank=4))
    randomize(model)
    mmpeft.remove(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_small_updates_add_up_in_bfloat16():
    """LyCORIS holds the update in the base's dtype, where 1e-5 beside a weight is nothing."""
    model = nn.Sequential(nn.Linear(32, 32, bias=False)).to(torch.bfloat16)
    mmpeft.inject(model, dict(type='LoRA', rank=4))
    adapter = model[0].parametrizations.weight[0]
    start = adapter.lora_B.detach().clone()
    for _ in range(1000):
        with torch.no_grad():
            adapter.lora_B.add_(1e-5)
    torch.testing.assert_close(adapter.lora_B.detach(), start + 1e-2, rtol=1e-3, atol=0)
    adapter.lora_A.detach().fill_(1.0)
    moved = (model[0].weight - model[0].parametrizations.weight.original).float()
    assert abs(moved.mean() - 4e-2) < 2e-3


def test_small_updates_have_gradients_in_bfloat16():
    """The update's gradient is as precise as bfloat16, however small the update is."""
    base = nn.Linear(32, 32, bias=False).to(torch.bfloat16)
    model = nn.Sequential(base)
    mmpeft.inject(model, dict(type='LoRA', rank=4))
    adapter = base.parametrizations.weight[0]
    with torch.no_grad():
        adapter.lora_B.fill_(1e-5)
    x = torch.randn(8, 32).to(torch.bfloat16)
    model(x).float().sum().backward()
    upstream = torch.ones(8, 32, dtype=torch.bfloat16).T @ x
    expected = upstream.float() @ adapter.lora_A.detach().T
    assert adapter.lora_B.grad.dtype == torch.float32
    difference = (adapter.lora_B.grad - expected).norm() / expected.norm()
    assert difference < 2**-7


@pytest.mark.parametrize('method', ['FLoRA', 'LoRA', 'LieRA'])
def test_merging_scales_once(method):
    """LyCORIS's LoHa and LoKr apply the scale a second time when they merge."""
    model = nn.Sequential(nn.Linear(6, 5)).double()
    mmpeft.inject(model, dict(type=method, rank=2, scale=3.0))
    randomize(model)
    x = torch.randn(2, 6, dtype=torch.float64)
    expected = model(x)
    torch.testing.assert_close(mmpeft.merge(model)(x), expected, rtol=1e-12, atol=1e-12)


def test_a_target_that_cannot_be_adapted_is_no_silent_skip():
    """mmpretrain's LoRAModel passes over convolutions without a word."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    assert len(mmpeft.inject(copy.deepcopy(model), dict(type='LoRA', rank=2)).rows) == 1
    with pytest.raises(UsageError, match="'1.weight' matches no weight"):
        mmpeft.inject(model, dict(type='LoRA', rank=2), dict(include=['0.weight', '1.weight']))


def test_names_keep_their_prefix():
    """mmpretrain's LoRAModel renames every key, on which layer-wise decay relies."""
    model = nn.ModuleDict(dict(backbone=nn.ModuleDict(dict(stages=nn.Linear(3, 3)))))
    before = set(model.state_dict())
    mmpeft.inject(model, dict(type='LoRA', rank=1))
    assert all(name.startswith('backbone.stages.') for name, _ in model.named_parameters())
    assert 'backbone.stages.bias' in model.state_dict()
    assert set(mmpeft.merge(model).state_dict()) == before


def test_attention_uses_the_adapter_of_its_output_projection():
    """nn.MultiheadAttention reads out_proj.weight and never calls out_proj."""
    model = nn.MultiheadAttention(8, 2).eval()
    x = torch.randn(5, 1, 8)
    before = model(x, x, x)[0]
    mmpeft.inject(model, dict(type='LoRA', rank=2), dict(include=['out_proj']))
    randomize(model)
    with torch.no_grad():
        fast = model(x, x, x)[0]
    torch.testing.assert_close(fast, model(x, x, x)[0])
    assert (fast - before).abs().max() > 1e-2
