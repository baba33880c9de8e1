"""Updates that are products of matrices, their shared factors, and constraints on them."""

import copy

import numpy as np
import pytest
import torch
from mmengine.optim import build_optim_wrapper
from torch import nn

import mmpeft
from mmpeft.errors import UsageError
from mmpeft.injection.site import adapter_parameters, adapters_of, named_adapters
from mmpeft.injection.weights import weights_of
from mmpeft.methods.lora import LoRA
from mmpeft.methods.lotr import LoTR
from mmpeft.methods.matrix import matrix_shape
from mmpeft.methods.moslora import MoSLoRA
from mmpeft.methods.mpc import mpc_d, mpc_o
from mmpeft.methods.trilora import TriLoRA
from mmpeft.methods.vera import VeRA, random_pair
from tests.cases import KINDS, LAYERS, randomize


def counted(adapters):
    """Parameters of some adapters, those held in common once."""
    return sum({id(p): p.numel() for a in adapters for p in a.parameters()}.values())


pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')

WEIGHTS = dict(
    linear=lambda: nn.Linear(6, 5),
    kernel=lambda: nn.Conv2d(4, 6, 3, groups=2),
    depthwise=lambda: nn.Conv2d(6, 6, 3, groups=6),
    transposed=lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
    kernel3d=lambda: nn.Conv3d(4, 5, (1, 2, 3)),
    embedding=lambda: nn.Embedding(9, 5),
)
LAYOUTS = ('loralib', 'channel')


@pytest.fixture(params=WEIGHTS)
def layer(request):
    return WEIGHTS[request.param]()


def spec_of(layer):
    return dict(weights_of(layer))['weight']


def weights_in(model):
    """Each weight that a method of updates can adapt, with its role."""
    return [
        (getattr(module, name).detach(), spec)
        for module in model.modules()
        for name, spec in weights_of(module)
        if not spec.is_bias and len(spec.shape) > 1
    ]


def adapted(layer, config):
    """The frozen weight, the adapted one and the factors, as numpy arrays."""
    layer.double()
    mmpeft.inject(layer, config, dict(kinds=KINDS))
    randomize(layer)
    factors = {k: v.detach().numpy() for k, v in adapters_of(layer, 'weight')[0].factors.items()}
    frozen = layer.parametrizations.weight.original.detach().numpy()
    return frozen, layer.weight.detach().numpy(), factors


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


class Net(nn.Module):
    """Two weights of each of three shapes, and one alone."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.depthwise = nn.Sequential(*(nn.Conv2d(8, 8, 3, groups=8, padding=1) for _ in range(2)))
        self.up = nn.ModuleList(nn.Linear(8, 12) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(12, 8) for _ in range(2))

    def forward(self, x):
        x = self.depthwise(self.stem(x)).mean((2, 3))
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(up(x).relu())
        return x


IMAGES = (2, 3, 5, 5)


def adapter(model, path, tensor='weight'):
    return adapters_of(model.get_submodule(path), tensor)[0]


def trained_steps(model, steps, lr=0.05):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr)
    x = torch.randn(IMAGES)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


# TriLoRA


@pytest.mark.parametrize('layout', LAYOUTS)
def test_trilora_is_b_diag_lambda_a(layer, layout):
    config = dict(type='TriLoRA', rank=2, alpha=6, layout=layout)
    frozen, new, f = adapted(layer, config)
    product = f['lora_B'] @ np.diag(f['lora_lambda']) @ f['lora_A']
    close(new, frozen + 3 * product.reshape(frozen.shape))


@pytest.mark.parametrize('name', LAYERS)
@pytest.mark.parametrize('layout', LAYOUTS)
def test_trilora_has_one_lambda_for_each_inner_index_of_lora(name, layout):
    for weight, spec in weights_in(LAYERS[name].make()):
        lora = LoRA(rank=3, layout=layout).init(weight, spec)
        factors = TriLoRA(rank=3, layout=layout).init(weight, spec)
        inner = len(lora['lora_A'])
        assert {k: v.shape for k, v in factors.items()} == {
            **{k: v.shape for k, v in lora.items()},
            'lora_lambda': (inner,),
        }
        half = len(spec.kernel_size) // 2
        assert inner == 3 * (np.prod(spec.kernel_size[:half]) if layout == 'loralib' else 1)


def test_trilora_starts_with_a_zero_lambda_between_gaussian_factors():
    layer = nn.Linear(400, 300)
    for config, std in ((dict(), 0.02), (dict(init_std=0.1), 0.1)):
        factors = TriLoRA(rank=50, **config).init(layer.weight.detach(), spec_of(layer))
        assert not factors['lora_lambda'].any()
        for name in ('lora_A', 'lora_B'):
            assert abs(factors[name].std().item() / std - 1) < 0.03
            assert abs(factors[name].mean().item() / std) < 0.03


def test_trilora_trains_lambda_first_and_everything_from_the_second_step_on():
    layer = nn.Linear(6, 5).double()
    mmpeft.inject(layer, dict(type='TriLoRA', rank=2))
    own = adapters_of(layer, 'weight')[0]
    x = torch.randn(4, 6, dtype=torch.float64)
    moving = []
    for _ in range(2):
        layer.zero_grad()
        layer(x).square().sum().backward()
        moving.append({name for name, p in own.named_parameters() if p.grad.any()})
        with torch.no_grad():
            own.lora_lambda -= 0.1 * own.lora_lambda.grad
    assert moving == [{'lora_lambda'}, {'lora_lambda', 'lora_A', 'lora_B'}]


def test_trilora_can_be_any_matrix_of_its_rank_with_orthogonal_factors():
    """The compact SVD of an update, put into the factors, is that update at penalty 0."""
    layer = nn.Linear(6, 5).double()
    method, spec = TriLoRA(rank=2, mpc='o'), spec_of(layer)
    update = torch.randn(5, 2, dtype=torch.float64) @ torch.randn(2, 6, dtype=torch.float64)
    u, s, vt = torch.linalg.svd(update)
    factors = {'lora_B': u[:, :2], 'lora_lambda': s[:2], 'lora_A': vt[:2]}
    torch.testing.assert_close(method.delta(factors, spec), update, rtol=1e-12, atol=1e-12)
    assert method.penalty(factors, spec) < 1e-25


def test_trilora_refuses_mpc_d():
    with pytest.raises(UsageError, match="TriLoRA: mpc='d'.*Write mpc='o'"):
        TriLoRA(mpc='d')


# MoSLoRA


@pytest.mark.parametrize('layout', LAYOUTS)
def test_moslora_is_b_m_a(layer, layout):
    frozen, new, f = adapted(layer, dict(type='MoSLoRA', rank=2, scale=0.5, layout=layout))
    product = np.einsum('ip,pq,qj->ij', f['lora_B'], f['mixer'], f['lora_A'])
    close(new, frozen + 0.5 * product.reshape(frozen.shape))


@pytest.mark.parametrize('name', LAYERS)
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('mixer_init', ['kaiming', 'orthogonal'])
def test_moslora_adds_a_square_mixer_to_lora(name, layout, mixer_init):
    for weight, spec in weights_in(LAYERS[name].make()):
        lora = LoRA(rank=3, layout=layout).init(weight, spec)
        factors = MoSLoRA(rank=3, layout=layout, mixer_init=mixer_init).init(weight, spec)
        inner = len(lora['lora_A'])
        assert factors['mixer'].shape == (inner, inner)
        assert {k: v.shape for k, v in factors.items() if k != 'mixer'} == {
            k: v.shape for k, v in lora.items()
        }


def test_moslora_starts_with_a_zero_b_and_a_mixer_of_choice():
    layer = nn.Linear(400, 300).double()
    weight, spec = layer.weight.detach(), spec_of(layer)
    for mixer_init in ('kaiming', 'orthogonal'):
        factors = MoSLoRA(rank=100, mixer_init=mixer_init).init(weight, spec)
        assert not factors['lora_B'].any()
        assert 0.99 / 20 < factors['lora_A'].abs().max() <= 1 / 20
        mixer = factors['mixer'].numpy()
        if mixer_init == 'kaiming':
            assert 0.99 / 10 < np.abs(mixer).max() <= 1 / 10
            assert abs(mixer.std() * 10 * 3**0.5 - 1) < 0.03
        else:
            close(mixer @ mixer.T, np.eye(100))
            assert np.abs(mixer - np.eye(100)).max() > 0.1


def test_moslora_with_an_identity_mixer_is_lora():
    layer = nn.Conv2d(4, 6, 3)
    weight, spec = layer.weight.detach(), spec_of(layer)
    lora, mosl = LoRA(rank=2, layout='loralib'), MoSLoRA(rank=2, layout='loralib')
    factors = lora.init(weight, spec)
    factors['lora_B'].normal_()
    mixed = mosl.delta(factors | {'mixer': torch.eye(6)}, spec)
    torch.testing.assert_close(mixed, lora.delta(factors, spec))


def test_an_unknown_mixer_is_an_error():
    with pytest.raises(UsageError, match="mixer_init='identity' is unknown.*'orthogonal'"):
        MoSLoRA(mixer_init='identity')


# VeRA


@pytest.mark.parametrize('layout', LAYOUTS)
def test_vera_is_diag_b_b_diag_d_a(layer, layout):
    config = dict(type='VeRA', rank=4, d_initial=0.3, seed=5, layout=layout)
    frozen, new, f = adapted(layer, config)
    product = np.diag(f['vera_b']) @ f['vera_B'] @ np.diag(f['vera_d']) @ f['vera_A']
    close(new, frozen + product.reshape(frozen.shape))


@pytest.mark.parametrize('name', LAYERS)
@pytest.mark.parametrize('layout', LAYOUTS)
def test_vera_trains_a_number_for_each_row_and_inner_index(name, layout):
    model = LAYERS[name].make()
    shapes = [matrix_shape(spec, 3, layout) for _, spec in weights_in(model)]
    summary = mmpeft.inject(model, dict(type='VeRA', rank=3, layout=layout), dict(kinds=KINDS))
    assert [row.adapter for row in summary.rows] == [rows + inner for rows, inner, _ in shapes]
    assert summary.adapters == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_vera_starts_with_zero_b_constant_d_and_kaiming_uniform_matrices():
    layer = nn.Linear(200, 300)
    method, spec = VeRA(rank=150, d_initial=0.2), spec_of(layer)
    factors = method.init(layer.weight.detach(), spec)
    assert not factors['vera_b'].any() and (factors['vera_d'] == 0.2).all()
    for name, fan_in in (('vera_A', 200), ('vera_B', 150)):
        values, bound = method.rebuilt(spec)[name], (6 / fan_in) ** 0.5
        assert 0.999 * bound < values.abs().max() <= bound
        assert abs(values.std().item() / (2 / fan_in) ** 0.5 - 1) < 0.01


def test_veras_update_has_one_variance_at_all_ranks():
    layer = nn.Linear(200, 300)
    spread = []
    for rank in (16, 64, 256):
        method, spec = VeRA(rank=rank), spec_of(layer)
        factors = method.init(layer.weight.detach(), spec) | method.rebuilt(spec)
        factors['vera_b'].fill_(1)
        spread.append(method.delta(factors, spec).std().item())
    np.testing.assert_allclose(spread, 0.1 * 2 / 200**0.5, rtol=0.1)


def test_veras_matrices_never_change():
    """Adapters do not hold them: other values here would spoil every file."""
    up, down = random_pair(3, 2, 4, seed=0)
    assert up.dtype == down.dtype == torch.float32
    expected = np.random.RandomState([0, 3, 2, 4]).uniform(-1, 1, 3 * 2 + 2 * 4)
    close(up.numpy(), (expected[:6] * 3**0.5).astype(np.float32).reshape(3, 2))
    close(down.numpy(), (expected[6:] * 1.5**0.5).astype(np.float32).reshape(2, 4))
    np.testing.assert_allclose(up[0].numpy(), [1.2441076, 1.5898685], rtol=1e-6)
    np.testing.assert_allclose(
        down[1].numpy(), [-0.99934399, 0.74941081, 0.04258755, -0.17029285], rtol=1e-6
    )


def test_veras_matrices_differ_by_seed_and_shape():
    first = random_pair(4, 4, 4, 0)[0]
    others = [random_pair(4, 4, 4, 1)[0], random_pair(4, 4, 5, 0)[0], random_pair(4, 4, 4, 0)[1]]
    assert not any(torch.isclose(first, other).any() for other in others)


def test_vera_shares_its_matrices_and_stores_none(tmp_path):
    model = Net()
    plain = copy.deepcopy(model)
    mmpeft.inject(model, dict(type='VeRA', rank=4))
    pairs = [('up.0', 'up.1'), ('down.0', 'down.1'), ('depthwise.0', 'depthwise.1')]
    for holder in (model, copy.deepcopy(model)):
        for one, two in pairs:
            for name in ('vera_A', 'vera_B'):
                assert getattr(adapter(holder, one), name) is getattr(adapter(holder, two), name)
            assert adapter(holder, one).vera_b is not adapter(holder, two).vera_b
        assert adapter(holder, 'up.0').vera_B is not adapter(holder, 'down.0').vera_B
    assert not any('vera_A' in key or 'vera_B' in key for key in model.state_dict())
    assert not any(p is adapter(model, 'up.0').vera_A for p in model.parameters())

    randomize(model)
    x = torch.randn(IMAGES)
    path = mmpeft.save_adapter(model, tmp_path / 'vera.safetensors')
    random_pair.cache_clear()
    other_seed = copy.deepcopy(plain)
    mmpeft.load_adapter(plain, path)
    assert torch.equal(plain(x), model(x))
    mmpeft.inject(other_seed, dict(type='VeRA', rank=4, seed=1))
    with pytest.raises(UsageError, match='seed=0 at .*, and the model seed=1'):
        mmpeft.load_adapter(other_seed, path)


def test_training_leaves_veras_matrices_alone():
    model = Net()
    mmpeft.inject(model, dict(type='VeRA', rank=4))
    own = adapter(model, 'up.0')
    before = {name: value.clone() for name, value in own.factors.items()}
    trained_steps(model, 3)
    changed = {name for name, value in own.factors.items() if not torch.equal(value, before[name])}
    assert changed == {'vera_b', 'vera_d'}


def test_veras_matrices_are_the_same_in_every_precision():
    for dtype in (torch.float64, torch.bfloat16):
        layer = nn.Linear(6, 5).to(dtype)
        mmpeft.inject(layer, dict(type='VeRA', rank=4))
        held = adapters_of(layer, 'weight')[0].vera_A
        assert held.dtype == torch.promote_types(dtype, torch.float32)
        assert torch.equal(held.float(), random_pair(5, 4, 6, 0)[1])


def test_a_budget_buys_vera_the_largest_rank():
    fixed = 8 + 2 * (8 + 12 + 8)
    model = Net()
    summary = mmpeft.inject(model, dict(type='VeRA', budget=fixed + 7 * 9 + 6))
    assert model.peft[0].method.rank == 9
    assert summary.adapters == fixed + 7 * 9


def test_veras_rank_may_pass_the_width():
    layer = nn.Linear(6, 5)
    assert mmpeft.inject(layer, dict(type='VeRA', rank=12)).adapters == 5 + 12
    with pytest.raises(UsageError, match='largest possible is 12'):
        mmpeft.inject(nn.Linear(6, 5), dict(type='VeRA', rank=13))


@pytest.mark.parametrize(
    'arguments, message',
    [
        (dict(rank=(2, 3)), 'must be one integer'),
        (dict(seed=-1), 'seed=-1'),
        (dict(seed=2**32), 'seed=4294967296'),
        (dict(seed=0.5), 'seed=0.5'),
        (dict(d_initial=0.0), 'd_initial=0'),
        (dict(layout='rows'), "layout='rows' is unknown"),
    ],
)
def test_veras_arguments_are_checked(arguments, message):
    with pytest.raises(UsageError, match=message):
        VeRA(**arguments)


# LoTR


def test_lotr_is_tucker_2(layer):
    frozen, new, f = adapted(layer, dict(type='LoTR', rank=3, scale=0.7))
    core = f['core'].reshape(*f['core'].shape[:2], -1)
    expected = np.einsum('ia,abk,jb->ijk', f['lotr_A'], core, f['lotr_B'])
    close(new, frozen + 0.7 * expected.reshape(frozen.shape))


@pytest.mark.parametrize('name', LAYERS)
@pytest.mark.parametrize('rank', [2, 64])
def test_lotrs_parameters_in_closed_form(name, rank):
    for weight, spec in weights_in(LAYERS[name].make()):
        factors = LoTR(rank=rank).init(weight, spec)
        n, m, *kernel = spec.shape
        r, s = min(rank, n), min(rank, m)
        assert factors['core'].shape == (r, s, *kernel)
        expected = n * r + m * s + r * s * int(np.prod(kernel))
        assert sum(f.numel() for f in factors.values()) == expected


def test_lotr_starts_with_a_zero_core_and_gaussian_factors():
    layer = nn.Linear(400, 300)
    for config, std in ((dict(), 50**-0.5), (dict(init_std=0.02), 0.02)):
        factors = LoTR(rank=50, **config).init(layer.weight.detach(), spec_of(layer))
        assert not factors['core'].any()
        for name in ('lotr_A', 'lotr_B'):
            assert abs(factors[name].std().item() / std - 1) < 0.03
    layer = nn.Conv2d(8, 8, 3, groups=8)
    factors = LoTR(rank=4).init(layer.weight.detach(), spec_of(layer))
    assert torch.equal(factors['lotr_B'], torch.ones(1, 1))


def test_an_adam_step_on_lotrs_core_moves_weights_alike_at_every_rank():
    layer = nn.Linear(300, 200)
    moved = []
    for rank in (4, 32, 128):
        method, spec = LoTR(rank=rank), spec_of(layer)
        factors = method.init(layer.weight.detach(), spec)
        factors['core'] = torch.randn(rank, rank).sign()
        moved.append(method.delta(factors, spec).std().item())
    assert max(moved) / min(moved) < 1.3 and 0.8 < moved[-1] < 1.2


@pytest.fixture
def lotr():
    model = Net()
    mmpeft.inject(model, dict(type='LoTR', rank=4))
    return model


# Parameters of LoTR(rank=r) on Net: the pair of factors of each shape, and a core for each weight.
def net_parameters(r):
    stem = 8 * min(r, 8) + 3 * min(r, 3) + min(r, 8) * min(r, 3)
    depthwise = 8 * min(r, 8) + 1 + 2 * min(r, 8) * 9
    linear = 2 * (8 * min(r, 8) + 12 * r) + 4 * min(r, 8) * r
    return stem + depthwise + linear


def test_weights_of_one_shape_share_lotrs_factors_and_have_their_own_core(lotr):
    for holder in (lotr, copy.deepcopy(lotr)):
        for one, two in (('up.0', 'up.1'), ('down.0', 'down.1'), ('depthwise.0', 'depthwise.1')):
            first, second = adapter(holder, one), adapter(holder, two)
            assert first.lotr_A is second.lotr_A and first.lotr_B is second.lotr_B
            assert first.core is not second.core
        assert adapter(holder, 'up.0').lotr_A is not adapter(holder, 'down.0').lotr_A
    assert adapter(copy.deepcopy(lotr), 'up.0').lotr_A is not adapter(lotr, 'up.0').lotr_A


def test_lotr_does_not_share_between_roles_or_arguments():
    model = nn.ModuleList(
        [nn.Linear(6, 6), nn.Embedding(6, 6), nn.Linear(6, 6), nn.Linear(6, 6).double()]
    )
    overrides = {'^2.weight': dict(scale=2.0)}
    mmpeft.inject(model, dict(type='LoTR', rank=2), dict(kinds=KINDS, overrides=overrides))
    assert len({id(adapter(model, str(i)).lotr_A) for i in range(4)}) == 4


def test_lotrs_shared_factors_count_once(lotr):
    summary = mmpeft.summary(lotr)
    assert summary.adapters == net_parameters(4)
    assert counted(named_adapters(lotr).values()) == net_parameters(4)
    assert sum(p.numel() for p in lotr.parameters() if p.requires_grad) == net_parameters(4)
    rows = {row.name: row.adapter for row in summary.rows}
    assert rows['up.0.weight'] - rows['up.1.weight'] == (8 + 12) * 4
    assert rows['up.1.weight'] == 4 * 4


def test_lotrs_gradients_add_up_over_the_weights_that_share(lotr):
    randomize(lotr)
    x = torch.randn(IMAGES)
    lotr(x).square().sum().backward()
    shared = adapter(lotr, 'up.0').lotr_A.grad

    apart = copy.deepcopy(lotr)
    apart.zero_grad()
    second = adapter(apart, 'up.1')
    second.lotr_A = nn.Parameter(second.lotr_A.detach().clone())
    apart(x).square().sum().backward()
    torch.testing.assert_close(shared, adapter(apart, 'up.0').lotr_A.grad + second.lotr_A.grad)
    assert second.lotr_A.grad.any()


def test_optimizers_see_lotrs_shared_factors_once(lotr):
    expected = sorted(id(p) for p in adapter_parameters(lotr))
    assert len(set(expected)) == len(expected) == 7 + 2 * 4
    adamw = dict(type='AdamW', lr=0.1)
    for paramwise in (None, dict(norm_decay_mult=0.0, bypass_duplicate=True)):
        config = dict(type='OptimWrapper', optimizer=adamw, paramwise_cfg=paramwise)
        if paramwise:
            config['optimizer'] = adamw | dict(weight_decay=0.05)
        groups = build_optim_wrapper(lotr, config).param_groups
        stepped = [p for group in groups for p in group['params'] if p.requires_grad]
        assert sorted(map(id, stepped)) == expected


def test_lotr_is_saved_once_and_loads_back(tmp_path):
    plain = Net()
    lotr = copy.deepcopy(plain)
    mmpeft.inject(lotr, dict(type='LoTR', rank=4))
    trained_steps(lotr, 3)
    state = mmpeft.adapter_state_dict(lotr)
    assert sum(key.endswith('lotr_A') for key in state) == 4
    assert sum(key.endswith('core') for key in state) == 7
    assert sum(value.numel() for value in state.values()) == net_parameters(4)
    path = mmpeft.save_adapter(lotr, tmp_path / 'lotr.safetensors')
    x = torch.randn(IMAGES)
    again = copy.deepcopy(plain)
    mmpeft.inject(again, dict(type='LoTR', rank=4))
    for model in (plain, again):
        mmpeft.load_adapter(model, path)
        assert adapter(model, 'up.0').lotr_A is adapter(model, 'up.1').lotr_A
        assert torch.equal(model(x), lotr(x))


@pytest.mark.parametrize('rank', [2, 5, 8, 11])
def test_a_budget_buys_lotr_the_largest_rank(rank):
    assert net_parameters(rank) < net_parameters(rank + 1)
    for budget in (net_parameters(rank), net_parameters(rank + 1) - 1):
        model = Net()
        summary = mmpeft.inject(model, dict(type='LoTR', budget=budget))
        assert model.peft[0].method == LoTR(rank=rank)
        assert summary.adapters == net_parameters(rank)
    with pytest.raises(UsageError, match=f'needs {net_parameters(1)} parameters at rank 1'):
        mmpeft.inject(Net(), dict(type='LoTR', budget=net_parameters(1) - 1))


def test_lotrs_rank_is_one_integer_within_the_largest_mode():
    with pytest.raises(UsageError, match='must be one integer'):
        LoTR(rank=(2, 3))
    with pytest.raises(UsageError, match='largest possible is 12'):
        mmpeft.inject(Net(), dict(type='LoTR', rank=13))


# Constraints on factors


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
    model = Net().double()
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
        model = Net()
        mmpeft.inject(model, config)
        assert mmpeft.penalty(model) is None
    assert mmpeft.penalty(Net()) is None


@pytest.mark.parametrize('method', [LoRA, TriLoRA, MoSLoRA])
@pytest.mark.parametrize('mpc', ['n', 'O', True])
def test_wrong_values_of_mpc_are_errors(method, mpc):
    with pytest.raises(UsageError, match=f"{method.__name__}: mpc={mpc!r} is unknown.*'o', 'd'"):
        method(mpc=mpc)
