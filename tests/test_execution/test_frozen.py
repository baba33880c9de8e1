"""Frozen layers between adapted ones: the same outputs and gradients."""

import pytest
import timm
import torch
from torch import nn

import mmpeft
from mmpeft import execution
from tests.cases import METHODS, randomize
from tests.comparing import assert_as_plain, assert_equal, plain, plain_of, second_derivatives

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')


@pytest.fixture
def network():
    return pyramid((1, 1, 1, 1))


def pyramid(depths):
    torch.manual_seed(0)
    model = timm.create_model(
        'convnextv2_atto', depths=depths, features_only=True, drop_path_rate=0.0
    ).double()
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


@pytest.mark.parametrize(
    'name, way',
    [(name, execution.AUTO) for name in ('flora', 'lora', 'liera', 'dora', 'bitfit', 'frozen')]
    + [('flora', execution.MERGED), ('flora', execution.BRANCH)],
)
def test_a_whole_backbone(network, name, way):
    mmpeft.inject(network, METHODS[name], dict(module='backbone'), execution=way)
    randomize(network)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    assert_as_plain(network, x)


@pytest.mark.parametrize('kinds', [('linear', 'pointwise'), ('depthwise',)])
def test_layers_without_adapters_compute_the_same(network, kinds):
    mmpeft.inject(network, METHODS['flora'], dict(module='backbone', kinds=kinds))
    randomize(network)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    assert_as_plain(network, x)


def test_norms_that_train_get_their_gradients(network):
    mmpeft.inject(network, METHODS['flora'], dict(module='backbone'), unfreeze=['norm', 'grn'])
    randomize(network)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    assert any('grn' in name and p.requires_grad for name, p in network.named_parameters())
    assert_as_plain(network, x)


@pytest.mark.parametrize('name', ['flora', 'dora'])
def test_second_derivatives(network, name):
    """Through norms, activations and response norms that are computed again."""
    mmpeft.inject(network, METHODS[name], dict(module='backbone'))
    randomize(network, std=0.02)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    found = second_derivatives(network, x)
    with plain(network):
        assert_equal(found, second_derivatives(network, x), 1e-10)


@pytest.mark.parametrize('amp', [False, True])
def test_under_autocast_and_recomputation(amp):
    """No further from float64 than the plain form by much, in a network of the usual depth."""
    network = pyramid((2, 2, 6, 2)).float()
    mmpeft.inject(network, METHODS['flora'], dict(module='backbone'))
    randomize(network, std=0.02)
    x = torch.randn(1, 3, 64, 64)
    exact = gradients(plain_of(network).double(), x.double())
    ours = gradients(network, x, amp)
    with plain(network):
        built = gradients(network, x, amp)

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


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('affine', [True, False])
def test_a_batch_norm_keeps_no_map(layout, affine):
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4, affine=affine).double()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(inplace=True), nn.Conv2d(4, 2, 1))
    mmpeft.inject(model.double(), METHODS['lora'])
    randomize(model)
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64).contiguous(memory_format=layout)
    assert_as_plain(model.train(), x)
    found = second_derivatives(model, x)
    with plain(model):
        assert_equal(found, second_derivatives(model, x), 1e-10)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
        y = norm(x.new_ones(2, 4, 6, 5, requires_grad=True))
    assert all(t.numel() <= 4 for t in saved) and y.shape == (2, 4, 6, 5)


def test_a_batch_norm_in_low_precision_is_no_less_exact():
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(4).requires_grad_(False).eval()
    norm.running_var.uniform_(0.5, 2)
    x = torch.randn(5, 4, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(5, 4, dtype=torch.bfloat16)
    (expected,) = torch.autograd.grad(norm(x), x, dy)
    execution.enable_frozen(norm)
    (dx,) = torch.autograd.grad(norm(x), x, dy)
    assert dx.dtype == torch.bfloat16 and torch.equal(dx, expected)
