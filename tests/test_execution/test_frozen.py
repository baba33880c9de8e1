"""Frozen layers between adapted ones: the same outputs and gradients, and less to keep."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers.grn import GlobalResponseNorm
from torch import nn

import mmpeft
from mmpeft import execution
from mmpeft.execution.matmul import ChannelsFirst, ChannelsLast, linear
from mmpeft.execution.recompute import recomputation_of, tag_for_recompute
from mmpeft.execution.response_norm import response_norm
from tests.cases import METHODS, randomize
from tests.comparing import assert_equal, plain_of, results

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')


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


@pytest.fixture
def network():
    torch.manual_seed(0)
    model = timm.create_model('convnextv2_atto', features_only=True, drop_path_rate=0.0).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if 'grn' in name:
                parameter.normal_(std=0.1)
    return Pyramid(model)


class Pyramid(nn.Module):
    """All levels of a backbone as one tensor."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, x):
        return torch.cat([y.flatten() for y in self.backbone(x)])


@pytest.mark.parametrize('way', [execution.AUTO, execution.MERGED, execution.BRANCH])
@pytest.mark.parametrize('name', ['flora', 'lora', 'liera', 'dora', 'bitfit', 'frozen'])
def test_a_whole_backbone(network, name, way):
    mmpeft.inject(network, METHODS[name], dict(module='backbone'), execution=way)
    randomize(network)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    assert_equal(results(network, x), results(plain_of(network), x), 1e-10)


@pytest.mark.parametrize('kinds', [('linear', 'pointwise'), ('depthwise',)])
def test_layers_without_adapters_compute_the_same(network, kinds):
    mmpeft.inject(network, METHODS['flora'], dict(module='backbone', kinds=kinds))
    randomize(network)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    assert_equal(results(network, x), results(plain_of(network), x), 1e-10)


def test_norms_that_train_get_their_gradients(network):
    mmpeft.inject(network, METHODS['flora'], dict(module='backbone'), unfreeze=['norm', 'grn'])
    randomize(network)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    ours, plain = results(network, x), results(plain_of(network), x)
    assert any('grn' in name and value is not None for name, value in ours.items())
    assert_equal(ours, plain, 1e-10)


@pytest.mark.parametrize('amp', [False, True])
def test_under_autocast_and_recomputation(network, amp):
    """No further from float64 than the plain form by much."""
    mmpeft.inject(network.float(), METHODS['flora'], dict(module='backbone'))
    randomize(network, std=0.02)
    x = torch.randn(1, 3, 64, 64)
    plain = plain_of(network)
    exact = gradients(copy.deepcopy(plain).double(), x.double())
    ours, built = gradients(network, x, amp), gradients(plain, x, amp)

    def error(found):
        return sum((found[n].double() - g).norm() / g.norm() for n, g in exact.items())

    assert error(ours) <= 2 * error(built)
    assert error(built) < (0.5 if amp else 1e-4) * len(exact)


def gradients(model, x, amp=False):
    model.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast('cpu', torch.bfloat16, enabled=amp):
        y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
    y.to(x.dtype).square().mean().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return dict(x=x.grad) | found


def test_classes_come_back(network):
    def classes():
        return [type(m) for m in network.modules()]

    before = classes()
    mmpeft.inject(network, METHODS['flora'], dict(module='backbone'))
    assert classes() != before
    mmpeft.merge(network)
    assert classes() == before
    mmpeft.inject(network, METHODS['flora'], dict(module='backbone'), execution='plain')
    types = {type(m).__name__ for m in network.modules()}
    assert {n for n in types if n not in {b.__name__ for b in before}} <= {
        'Adapter',
        'WeightAdapter',
        'ParametrizationList',
        'ParametrizedLinear',
        'ParametrizedConv2d',
        'ModuleDict',
    }
    assert not any(isinstance(m, execution.layers._Fast) for m in network.modules())


def kept_bytes(model, x):
    """What autograd keeps for backward, each storage once, without the parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    return y, sum(n for key, n in sizes.items() if key not in own)


@pytest.mark.parametrize('norm', [nn.LayerNorm(64), nn.RMSNorm(64), nn.GELU(), nn.SiLU()])
def test_a_norms_output_is_not_kept(norm):
    tokens, kept = 100, {}
    for way in ('auto', 'plain'):
        model = nn.Sequential(copy.deepcopy(norm), nn.Linear(64, 80)).double()
        mmpeft.inject(model, dict(type='LoRA', rank=2), execution=way)
        x = torch.randn(tokens, 64, dtype=torch.float64, requires_grad=True)
        y, kept[way] = kept_bytes(model, x)
        y.sum().backward()
    assert kept['plain'] - kept['auto'] > tokens * 64 * 8 * 0.9


def test_an_input_that_was_changed_is_kept_itself():
    x = torch.randn(4, 3, requires_grad=True)
    y = tag_for_recompute(F.gelu(x), F.gelu, x)
    assert recomputation_of(y).tensors == (x,)
    assert recomputation_of(y.add_(1)) is None

    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.fc = nn.LayerNorm(3), nn.Linear(3, 2)

        def forward(self, x):
            return self.fc(self.norm(x).add_(1))

    model = Shifted().double()
    mmpeft.inject(model, dict(type='LoRA', rank=1))
    randomize(model)
    assert_equal(
        results(model, x.double().detach()), results(plain_of(model), x.double().detach()), 1e-10
    )


@pytest.mark.parametrize('shape', [(300, 96, 160), (7, 600, 700), (3000, 40, 96)])
def test_products_in_any_strides(shape):
    tokens, features, out = shape
    x, w = torch.randn(tokens, features), torch.randn(out, features)
    bias = torch.randn(out)
    exact = x.double() @ w.double().T + bias.double()

    def close(found, expected):
        assert found.shape == expected.shape
        assert (found.double() - expected).norm() < 1e-6 * expected.norm()

    turned = x.T.contiguous().T, w.T.contiguous().T
    for one, other in [(x, w), turned, (x, turned[1]), (turned[0], w)]:
        close(linear(one, other, bias), exact)
        close(ChannelsLast.weight_grad(one, x), x.double().T @ x.double())
        columns = one.T[None].contiguous()
        close(ChannelsFirst.matmul(columns, other, bias), exact.T[None])
        close(
            ChannelsFirst.matmul(columns.expand(2, -1, -1), other),
            (x.double() @ w.double().T).T.expand(2, -1, -1),
        )
        close(ChannelsFirst.weight_grad(columns, columns), x.double().T @ x.double())
    y = torch.randn(tokens, out)
    close(ChannelsLast.accumulate(y.clone(), x, w), y.double() + x.double() @ w.double().T)
    wide = y.T[None].contiguous()
    close(
        ChannelsFirst.accumulate(wide.clone(), x.T[None], w),
        (y.double() + x.double() @ w.double().T).T[None],
    )
