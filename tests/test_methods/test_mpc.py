"""Matrix pattern constraints on factors."""

import numpy as np
import pytest
import torch
from torch import nn

import mmpeft
from mmpeft.injection.site import named_adapters
from mmpeft.methods.mpc import mpc_d, mpc_o
from tests.adapting import EqualBlocks, close
from tests.cases import randomize

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')


def numpy_mpc(kind, up, down):
    eye = np.eye(up.shape[1])
    right = ((down @ down.T - eye) ** 2).sum()
    left = up.T @ up
    if kind == 'o':
        return ((left - eye) ** 2).sum() + right
    return sum(left[i, j] ** 2 for i, j in np.ndindex(left.shape) if i != j) + right


MPC_FUNCTIONS = dict(o=mpc_o, d=mpc_d)


@pytest.fixture(params=[(7, 3, 5), (5, 5, 5), (2, 4, 9)], ids=['tall', 'square', 'short'])
def factors(request):
    n, r, m = request.param
    shapes = (n, r), (r, m)
    return [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]


@pytest.mark.parametrize('kind', MPC_FUNCTIONS)
def test_mpc_against_numpy(kind, factors):
    value = MPC_FUNCTIONS[kind](*factors)
    assert value.shape == ()
    close(value.item(), numpy_mpc(kind, *(f.detach().numpy() for f in factors)))


@pytest.mark.parametrize('kind', MPC_FUNCTIONS)
def test_mpcs_gradients(kind, factors):
    function = MPC_FUNCTIONS[kind]
    assert torch.autograd.gradcheck(function, factors)
    function(*factors).backward()
    up, down = (f.detach().numpy() for f in factors)
    eye = np.eye(up.shape[1])
    gram = up.T @ up
    close(factors[1].grad.numpy(), 4 * (down @ down.T - eye) @ down)
    distance = gram - eye if kind == 'o' else gram - np.diag(np.diag(gram))
    close(factors[0].grad.numpy(), 4 * up @ distance)


def test_mpc_d_lets_the_columns_of_b_have_any_length():
    q = torch.linalg.qr(torch.randn(6, 3, dtype=torch.float64))[0]
    lengths = torch.tensor([0.1, 1.0, 30.0], dtype=torch.float64)
    assert mpc_o(q, q.T) < 1e-25
    assert mpc_d(q * lengths, q.T) < 1e-20
    assert mpc_o(q * lengths, q.T) > 1
    assert mpc_d(q, (q * lengths).T) > 1


METHODS_WITH_MPC = [
    dict(type='LoRA', rank=2, mpc='o', mpc_weight=0.3),
    dict(type='LoRA', rank=2, mpc='d', mpc_weight=0.3),
    dict(type='LoRA', rank=2, mpc='d', layout='channel', alpha=8),
    dict(type='TriLoRA', rank=2, mpc='o', mpc_weight=2.0),
    dict(type='MoSLoRA', rank=2, mpc='o'),
    dict(type='DoRA', rank=2, mpc='d'),
    dict(type='LieRA', rank=2, mpc='o'),
]


@pytest.mark.parametrize('config', METHODS_WITH_MPC, ids=lambda c: c['type'] + c['mpc'])
def test_the_penalty_is_the_sum_over_adapters_with_weights(config):
    model = EqualBlocks().double()
    overrides = {'^up.0': dict(mpc_weight=0.7), '^up.1': dict(mpc=None)}
    mmpeft.inject(model, config, dict(overrides=overrides))
    randomize(model)
    terms = {}
    for path, own in named_adapters(model).items():
        up, down = own.lora_B.detach().numpy(), own.lora_A.detach().numpy()
        terms[path.split('.parametrizations')[0]] = numpy_mpc(config['mpc'], up, down)
    weight = config.get('mpc_weight', 0.1)
    expected = sum(weight * v for path, v in terms.items() if not path.startswith('up'))
    penalty = mmpeft.penalty(model)
    close(penalty.item(), expected + 0.7 * terms['up.0'])

    penalty.backward()
    constrained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert constrained == {
        n
        for n, _ in model.named_parameters()
        if n.endswith(('lora_A', 'lora_B')) and not n.startswith('up.1')
    }


@pytest.mark.parametrize('config', METHODS_WITH_MPC, ids=lambda c: c['type'] + c['mpc'])
def test_the_penalty_goes_down_when_minimised_alone(config):
    model = nn.Sequential(nn.Linear(6, 5), nn.Conv2d(4, 6, 3)).double()
    mmpeft.inject(model, config)
    randomize(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, 0.02)
    values = []
    for _ in range(300):
        optimizer.zero_grad()
        values.append(mmpeft.penalty(model))
        values[-1].backward()
        optimizer.step()
    assert values[-1] < 1e-3 * values[0]
    for own in named_adapters(model).values():
        gram = own.lora_A.detach() @ own.lora_A.detach().T
        torch.testing.assert_close(gram, torch.eye(len(gram)).double(), rtol=0, atol=0.03)


def test_there_is_no_penalty_without_mpc():
    for config in (dict(type='LoRA'), dict(type='TriLoRA'), dict(type='VeRA', rank=4)):
        model = EqualBlocks()
        mmpeft.inject(model, config)
        assert mmpeft.penalty(model) is None
    assert mmpeft.penalty(EqualBlocks()) is None
