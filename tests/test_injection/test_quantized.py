"""Frozen weights in few bits, against the same network with the values that they stand for."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, StdConv2d
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm

import mmpeft
from mmpeft.analysis.memory import saved_bytes
from mmpeft.errors import UsageError
from mmpeft.execution import MEMORY
from mmpeft.methods import ActivationMethod
from mmpeft.methods.adapter import SHARDED
from mmpeft.quantization import FORMATS, Quantized, dequantized
from mmpeft.training.sharding import sharded_blocks
from tests.cases import METHODS

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')

LINEAR, BOTH = dict(kinds=('linear',)), dict(kinds=('conv', 'linear'))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.depthwise = nn.Conv2d(64, 64, 3, padding='same', groups=64)
        self.act = nn.GELU()
        self.pointwise = nn.Conv2d(64, 64, 1, bias=False)

    def forward(self, x):
        return x + self.pointwise(self.act(self.depthwise(x)))


class Net(nn.Module):
    """A convolution for each kernel of ``mmpeft.execution``, one that none fits, and an MLP."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 4, 4)
        self.up = nn.ConvTranspose2d(32, 64, 2, 2, groups=2)
        self.blocks = nn.Sequential(Block(), Block())
        self.norm = nn.LayerNorm(64)
        self.fc1 = nn.Linear(64, 128)
        self.fc2 = nn.Linear(128, 64, bias=False)
        self.head = nn.Linear(64, 3)

    def forward(self, images):
        x = self.blocks(self.up(self.stem(images))).flatten(2).mT
        x = x + self.fc2(F.gelu(self.fc1(self.norm(x))))
        return self.head(x.mean(1))


def net():
    torch.manual_seed(0)
    return Net()


def adapted(method, kind='nf4', targets=BOTH, **kwargs):
    model = net()
    mmpeft.inject(model, method, targets, unfreeze='head', frozen_dtype=kind, **kwargs)
    return model


def plain(model):
    """A copy with the values in place of what is stored."""
    model = copy.deepcopy(model)
    for layer in model.modules():
        for name, weight in layer._parameters.items():
            if isinstance(weight, Quantized):
                layer._parameters[name] = nn.Parameter(dequantized(weight), False)
    return model


def noisy(model, scale=0.1):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn_like(parameter)
    return model


def images():
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))


def step(model):
    torch.manual_seed(3)
    y = model.train()(images())
    y.square().sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return dict(y=y.detach()) | grads


def close(one, other):
    return (one - other).norm() <= 1e-6 * other.norm()


def is_for_weights(config):
    method = mmpeft.METHODS.build(config)
    return method.adapts and not isinstance(method, ActivationMethod) and config['type'] != 'Full'


CASES = [name for name, config in METHODS.items() if is_for_weights(config)]


@pytest.mark.parametrize('case', CASES)
def test_equals_the_dequantized_network(case):
    number = CASES.index(case)
    kind, memory = list(FORMATS)[number % 3], MEMORY[number // 3 % 3]
    model = noisy(adapted(METHODS[case], kind, memory=memory))
    got, expected = step(model), step(plain(model))
    assert got.keys() == expected.keys() and len(got) > 2
    for name, value in expected.items():
        assert close(got[name], value), name


@pytest.mark.parametrize('execution', ['branch', 'merged', 'plain', 'composed'])
@pytest.mark.parametrize('method', ['LoRA', 'FLoRA'])
def test_ways_to_compute(method, execution):
    model = noisy(adapted(dict(type=method, rank=2), 'int8', execution=execution))
    got, expected = step(model), step(plain(model))
    assert all(close(got[name], value) for name, value in expected.items())
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images()), plain(model).eval()(images()))


@pytest.mark.parametrize('method', ['LoRA', 'LieRA', 'DoRA', 'LoHa', 'BitFit'])
def test_no_weight_is_kept_for_backward(method):
    """Less than the values of the weights would take; inputs of the layers are far smaller."""
    cases = (
        ((2, 256), lambda: nn.Linear(256, 256)),
        ((2, 256, 1, 1), lambda: nn.Conv2d(256, 256, 1)),
        ((2, 64, 2, 2), lambda: nn.Conv2d(64, 64, 5, padding=2)),
        ((2, 64, 2, 2), lambda: nn.Conv2d(64, 64, 5, padding=2, groups=2)),
        ((1, 4096, 1, 1), lambda: nn.Conv2d(4096, 4096, 7, padding=3, groups=4096)),
        ((2, 64, 2, 2), lambda: nn.ConvTranspose2d(64, 64, 5, padding=2)),
        ((2, 64, 2, 2), lambda: Conv2dSame(64, 64, 5)),
    )
    for size, make in cases:
        model = nn.Sequential(*(make() for _ in range(3)))
        values = model[0].weight.nbytes
        mmpeft.inject(model, dict(type=method), frozen_dtype='int8')
        x = torch.randn(size, requires_grad=True)
        assert saved_bytes(model, x)[0] < values, model[0]


def test_starts_from_the_rounded_weights():
    model = adapted(dict(type='DoRA', rank=2))
    weight = model.fc1.parametrizations.weight.original
    assert isinstance(weight, Quantized) and not weight.requires_grad
    torch.testing.assert_close(model.fc1.weight, weight.values())
    assert isinstance(adapted(dict(type='IA3'), targets=LINEAR).stem.weight, Quantized)
    assert type(model.head.parametrizations.weight.original) is nn.Parameter


def test_summary():
    found = mmpeft.summary(adapted(dict(type='LoRA', rank=2))).stored
    elements = 2 * 64 * 128 + 32 * (48 + 128) + 2 * 64 * (9 + 64)
    assert found['nf4'] == pytest.approx(elements * (0.5 + 1 / 64) + 8 * 4 * 17, rel=0.02)
    assert found['float32'] == 4 * sum(p.numel() for p in net().parameters()) - 4 * elements
    assert not mmpeft.summary(net()).stored


def test_copies_compute_the_same():
    model = noisy(adapted(dict(type='FLoRA', rank=2)))
    expected = step(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.zero_grad()
        assert all(torch.equal(value, expected[name]) for name, value in step(other).items())


@pytest.mark.parametrize('reversible', [False, True])
def test_merging_makes_all_weights_plain(reversible):
    model = noisy(adapted(dict(type='LoRA', rank=2)))
    mmpeft.remove(other := copy.deepcopy(model))
    assert isinstance(other.fc1.weight, Quantized) and not other.fc1.weight.requires_grad
    expected = model.eval()(images())
    mmpeft.merge(model, reversible=reversible)
    assert all(type(p) is nn.Parameter for p in model.parameters())
    assert model.state_dict().keys() == net().state_dict().keys()
    torch.testing.assert_close(model(images()), expected)
    if reversible:
        mmpeft.unmerge(model)
        assert isinstance(model.fc1.parametrizations.weight.original, Quantized)
        assert torch.equal(model(images()), expected)


def test_merging_into_few_bits():
    model = noisy(adapted(dict(type='LoRA', rank=2)), 0.03)
    expected = mmpeft.merge(copy.deepcopy(model))
    mmpeft.merge(model, frozen_dtype='int8')
    assert type(model.head.weight) is nn.Parameter
    for layer, exact in ((model.fc1, expected.fc1), (model.stem, expected.stem)):
        found, weight = layer.weight.values().flatten(1), exact.weight.flatten(1)
        assert layer.weight.format == 'int8'
        assert ((found - weight).abs() <= weight.abs().amax(1, keepdim=True) / 250).all()


def test_a_tied_weight_is_stored_once():
    model = nn.ModuleDict(dict(a=nn.Linear(64, 64), b=nn.Linear(64, 64), c=nn.Linear(64, 64)))
    model.e = nn.Embedding(64, 64)
    model.b.weight, model.c.weight = model.a.weight, model.e.weight
    targets = dict(include=(r'^[abc]\.weight',))
    mmpeft.inject(model, dict(type='LoRA', rank=1), targets, frozen_dtype='nf4')
    first, second = (model[k].parametrizations.weight.original for k in 'ab')
    assert first is second and isinstance(first, Quantized)
    assert type(model.e.weight) is nn.Parameter


def test_kernels_that_stay_as_they_are():
    """Those of another shape, and those that something else reads than the convolution."""
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3),
        StdConv2d(8, 8, 3),
        spectral_norm(nn.Conv2d(8, 8, 3)),
        parametrizations.spectral_norm(nn.Conv2d(8, 8, 3)),
        parametrizations.weight_norm(nn.Conv2d(8, 8, 3)),
        Conv2dSame(8, 8, 3),
    )
    mmpeft.inject(model, dict(type='LoRA', rank=1), dict(include=(r'^5',)), frozen_dtype='nf4')
    stored = [name for name, p in model.named_parameters() if isinstance(p, Quantized)]
    assert stored == ['5.parametrizations.weight.original']


def test_under_ddp(tmp_path):
    """Which sends all parameters to all ranks; what is stored stays."""
    model = noisy(adapted(dict(type='LoRA', rank=2)))
    alone, before = copy.deepcopy(model), copy.deepcopy(model.fc1.parametrizations.weight.original)
    store = f'file://{tmp_path / "store"}'
    torch.distributed.init_process_group('gloo', init_method=store, rank=0, world_size=1)
    try:
        got = step(nn.parallel.DistributedDataParallel(model))
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(model.fc1.parametrizations.weight.original, before)
    for name, value in step(alone).items():
        assert close(got[name if name == 'y' else f'module.{name}'], value), name


def test_sharding_is_refused():
    """FSDP marks the modules that it shards, of values in their whole size."""
    model = adapted(dict(type='LoRA', rank=1))
    vars(model.stem.parametrizations.weight[0])[SHARDED] = True
    with pytest.raises(UsageError, match='FSDP shards the values of weights in few bits'):
        model(images())
    for method in ('LoRA', 'BitFit'):
        with pytest.raises(UsageError, match='stem.weight is stored in few bits, which sharding'):
            sharded_blocks(adapted(dict(type=method)))


def test_a_second_injection():
    model = adapted(dict(type='LoRA', rank=1))
    mmpeft.inject(model, dict(type='IA3'), LINEAR, frozen_dtype='nf4')
    assert step(model)['y'].isfinite().all()
    with pytest.raises(UsageError, match=r"stem.weight is stored in 'nf4' already"):
        mmpeft.inject(model, dict(type='IA3'), LINEAR, frozen_dtype='int8')


def test_a_method_that_does_not_fit_leaves_weights_whole():
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UsageError, match='does not fit a weight of shape'):
        mmpeft.inject(model, dict(type='FLoRA', rank=(2, 2, 1, 1)), frozen_dtype='nf4')
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_reversible_merge_without_adapters_keeps_what_was_stored():
    model = mmpeft.remove(adapted(dict(type='LoRA', rank=2)))
    stored = model.fc1.weight
    mmpeft.merge(model, reversible=True)
    assert type(model.fc1.weight) is nn.Parameter
    assert mmpeft.unmerge(model).fc1.weight is stored
    assert not mmpeft.summary(model).rows


def test_refusals():
    model = net()
    with pytest.raises(UsageError, match='Full trains the weights themselves'):
        mmpeft.inject(model, dict(type='Full'), frozen_dtype='nf4')
    rounded = mmpeft.remove(adapted(dict(type='LoRA')))
    with pytest.raises(UsageError, match=r'Full trains .*\(such as stem.weight\) stay frozen'):
        mmpeft.inject(rounded, dict(type='Full'))
    with pytest.raises(UsageError, match=r'fc1.weight is stored in few bits \(nf4\), so it cannot'):
        mmpeft.inject(rounded, dict(type='LoRA'), unfreeze=r'fc1\.')
    with pytest.raises(UsageError, match=r"'bfloat16' is no format of few bits.*torch\.bfloat16"):
        mmpeft.inject(model, dict(type='LoRA'), frozen_dtype='bfloat16')
    with pytest.raises(UsageError, match="'norm' has no linear layer or convolution whose"):
        mmpeft.inject(model, dict(type='SSF'), dict(module='norm'), frozen_dtype='nf4')
    assert not hasattr(model, 'peft') and all(p.requires_grad for p in model.parameters())
    mmpeft.inject(model, dict(type='LoRA'))
    with pytest.raises(UsageError, match='stem.weight has an adapter already.*first mmpeft.inj'):
        mmpeft.inject(model, dict(type='LoRA'), frozen_dtype='nf4')
