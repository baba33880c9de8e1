"""Every execution against the plain parametrized form: the same outputs and gradients."""

import copy

import pytest
import torch
from torch import nn

import mmpeft
from mmpeft import execution
from mmpeft.execution.select import select_kernel
from mmpeft.injection.weights import weights_of
from mmpeft.methods import ActivationMethod
from tests.cases import KINDS, LAYERS, METHODS, Layer, randomize
from tests.comparing import assert_equal, plain_of, results, results_of

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')

# Sizes at which every way is taken, beside those of the common table.
LARGE = dict(
    linear=Layer(lambda: nn.Linear(20, 12), (5, 7, 20)),
    linear_without_bias=Layer(lambda: nn.Linear(12, 20, bias=False), (3, 12)),
    pointwise=Layer(lambda: nn.Conv2d(10, 8, 1), (2, 10, 6, 5)),
    kernel=Layer(lambda: nn.Conv2d(8, 10, 3, stride=2, padding=1, dilation=2), (2, 8, 13, 12)),
    pointwise_strided=Layer(lambda: nn.Conv2d(8, 6, 1, stride=2, padding=1), (2, 8, 7, 6)),
    pointwise_steps=Layer(lambda: nn.Conv2d(8, 6, 1, stride=(2, 3)), (2, 8, 7, 6)),
    patches=Layer(lambda: nn.Conv2d(6, 8, 2, stride=2), (2, 6, 8, 8)),
    sequence=Layer(lambda: nn.Conv1d(8, 6, 5, padding=2, bias=False), (3, 8, 11)),
    volume=Layer(lambda: nn.Conv3d(4, 6, 3, padding=(1, 0, 2)), (1, 4, 5, 5, 5)),
    depthwise=Layer(lambda: nn.Conv2d(16, 16, 7, padding=3, groups=16), (2, 16, 12, 13)),
    depthwise_wide=Layer(
        lambda: nn.Conv2d(24, 24, (3, 5), padding=(2, 1), groups=24), (1, 24, 14, 14)
    ),
)
TABLE = {f'{name}': layer for name, layer in LAYERS.items()} | {
    f'large_{name}': layer for name, layer in LARGE.items()
}


def weight_methods():
    built = {name: mmpeft.METHODS.build(config) for name, config in METHODS.items()}
    spec = dict(weights_of(nn.Linear(1, 1)))['weight']
    weight = [n for n, m in built.items() if m.adapts and not isinstance(m, ActivationMethod)]
    return [n for n in weight if built[n].accepts(spec)]


@pytest.fixture(params=TABLE)
def layer(request):
    return TABLE[request.param]


@pytest.fixture(params=weight_methods())
def config(request):
    return METHODS[request.param]


def pair(layer, config, dtype=torch.float64, way=execution.AUTO):
    """The same adapted layer, executed and plain."""
    model = layer.build(dtype)
    mmpeft.inject(model, config, dict(kinds=KINDS), execution=way)
    randomize(model)
    return model, plain_of(model)


@pytest.mark.parametrize('channels_last', [False, True])
def test_same_function_and_gradients(layer, config, channels_last):
    model, plain = pair(layer, config)
    x = layer.input()
    if channels_last:
        if x.ndim != 4:
            return
        x = x.contiguous(memory_format=torch.channels_last)
    assert_equal(results(model, x), results(plain, x), 1e-10)


THIN = [name for name in weight_methods() if name.startswith(('lora', 'flora', 'lotr'))]


@pytest.mark.parametrize('way', [execution.MERGED, execution.BRANCH, execution.PLAIN])
@pytest.mark.parametrize('name', THIN)
@pytest.mark.parametrize('case', LARGE)
def test_every_way_gives_the_same(case, name, way):
    model, plain = pair(LARGE[case], METHODS[name], way=way)
    x = LARGE[case].input()
    assert_equal(results(model, x), results(plain, x), 1e-10)
    assert all(execution.is_enabled(m) == (way != execution.PLAIN) for m in adapted(model))


def adapted(model):
    return [m for m in model.modules() if hasattr(m, 'parametrizations')]


SIZES = dict(
    rows=Layer(lambda: nn.Linear(96, 160), (300, 96)),
    few_rows=Layer(lambda: nn.Linear(512, 640), (2, 9, 512)),
    columns=Layer(lambda: nn.Conv2d(96, 80, 1, bias=False), (1, 96, 20, 18)),
    few_columns=Layer(lambda: nn.Conv2d(512, 640, 1, bias=False), (1, 512, 3, 4)),
    columns_with_bias=Layer(lambda: nn.Conv2d(96, 80, 1), (2, 96, 20, 18)),
    kernels=Layer(lambda: nn.Conv2d(64, 48, 3, padding=1), (2, 64, 20, 18)),
    few_positions=Layer(lambda: nn.Conv2d(128, 160, 3, padding=1), (2, 128, 4, 5)),
    depthwise=Layer(lambda: nn.Conv2d(64, 64, 7, padding=3, groups=64), (2, 64, 20, 18)),
)


@pytest.mark.parametrize('way', [execution.AUTO, execution.MERGED, execution.BRANCH])
@pytest.mark.parametrize('name', ['lora', 'flora', 'liera', 'liera_exact', 'dora'])
@pytest.mark.parametrize('case', SIZES)
def test_sizes_at_which_libraries_take_other_kernels(case, name, way):
    """In float32 against float64, and no further from it than the plain form by much."""
    model, plain = pair(SIZES[case], METHODS[name], torch.float32, way)
    x = SIZES[case].input(torch.float32)
    exact = results(copy.deepcopy(plain).double(), x.double())
    fast, built = results(model, x), results(plain, x)
    for tensor, expected in exact.items():
        if expected is not None:
            ours = (fast[tensor].double() - expected).norm()
            theirs = (built[tensor].double() - expected).norm()
            assert ours <= max(3 * theirs, 1e-6 * expected.norm()), (tensor, ours, theirs)


@pytest.mark.parametrize('name', ['flora', 'liera', 'dora'])
def test_compiled(name):
    model, plain = pair(LARGE['linear'], METHODS[name])
    x = LARGE['linear'].input()
    compiled = torch.compile(model, backend='aot_eager')
    assert_equal(results_of(compiled, model, x), results(plain, x), 1e-10)


def test_under_ddp(tmp_path):
    model, plain = pair(LARGE['kernel'], METHODS['flora'])
    x = LARGE['kernel'].input()
    store = f'file://{tmp_path / "store"}'
    torch.distributed.init_process_group('gloo', init_method=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        assert_equal(results_of(wrapped, model, x), results(plain, x), 1e-10)
    finally:
        torch.distributed.destroy_process_group()


def test_choices_are_named():
    with pytest.raises(mmpeft.errors.UsageError, match="'fast' is none of 'auto', 'plain'"):
        mmpeft.inject(nn.Linear(4, 4), METHODS['lora'], execution='fast')


SMALL_UPDATES = dict(
    lora=dict(type='LoRA', rank=4),
    flora=dict(type='FLoRA', rank=4, scale=1.0),
    liera=dict(type='LieRA', rank=4),
    dora=dict(type='DoRA', rank=4),
)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('amp', [False, True])
@pytest.mark.parametrize('name', SMALL_UPDATES)
def test_small_updates_show_in_low_precision(name, amp, dtype):
    """An update of 1e-5, far below the weights' rounding, moves the outputs by its own amount."""
    torch.manual_seed(0)
    size = 256
    plain = nn.Linear(size, size, bias=False)
    with torch.no_grad():
        plain.weight.copy_(plain.weight.to(dtype))
    layer = copy.deepcopy(plain)
    if not amp:
        layer = layer.to(dtype)
    mmpeft.inject(layer, SMALL_UPDATES[name])
    adapter = layer.parametrizations.weight[0]
    spec = adapter.spec
    with torch.no_grad():
        # All entries of dW are 1e-5 (of W, for the multiplicative update: 1e-3 of it).
        wanted = 1e-3 if name == 'liera' else 1e-5
        for factor in adapter.parameters():
            if factor.shape != (size,):
                factor.zero_()
        if name == 'flora':
            adapter.factor0[:, 0] = adapter.factor1[:, 0] = 1.0
            adapter.core[0, 0] = wanted
        else:
            adapter.lora_B[:, 0] = wanted
            adapter.lora_A[0] = 1.0
        delta = adapter.method.delta(adapter.factors, spec).double()
        change = plain.weight.double() * delta if name == 'liera' else delta
    if dtype == torch.bfloat16:
        rounded = (plain.weight + change.float()).to(dtype)
        assert (rounded == plain.weight.to(dtype)).double().mean() > 0.7
    x = torch.rand(4096, size, dtype=torch.float32 if amp else dtype)
    with torch.autocast('cpu', dtype, enabled=amp):
        y = layer(x)
        base = torch.nn.functional.linear(x.to(dtype), plain.weight.to(dtype))
    assert y.dtype == dtype
    moved = (y.double() - base.double()).mean(0)
    expected = (x.to(dtype).double() @ change.T).mean(0)
    if name == 'dora':  # the norm takes its part of the update back
        exact = adapter.in_double(plain.weight.double()) - plain.weight.double()
        expected = (x.to(dtype).double() @ exact.T).mean(0)
    assert ((moved - expected).norm() / expected.norm()).item() < 0.25
    y.float().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapter.parameters())


def test_most_layers_of_a_network_take_a_faster_way():
    taken = []
    model = nn.Sequential(
        nn.Conv2d(16, 16, 7, padding=3, groups=16),
        nn.Conv2d(16, 32, 1),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.Flatten(),
        nn.Linear(32 * 64 * 4, 8),
    )
    mmpeft.inject(model, dict(type='FLoRA', rank=4))
    x = torch.randn(2, 16, 16, 16)
    for layer in model:
        if execution.is_enabled(layer):
            taken.append(select_kernel(layer, x).describe(x))
        x = layer(x)
    assert taken == [
        'kernel gradient as a convolution',
        'thin products, in the weight',
        'thin convolutions, in the weight',
        'dense gradient, nothing kept',
    ]
    with torch.no_grad():
        assert select_kernel(model[4], torch.randn(1, 8192)) is None


def test_nothing_of_the_built_weight_is_kept_for_backward():
    model, plain = pair(Layer(lambda: nn.Linear(64, 48), (2, 64)), dict(type='LoRA', rank=2))
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept = {}
    for name, network in dict(fast=model, plain=plain).items():
        sizes = {}

        def pack(tensor, sizes=sizes):
            storage = tensor.untyped_storage()
            sizes[storage._cdata] = (storage.nbytes(), tensor)
            return tensor

        own |= {p.untyped_storage()._cdata for p in network.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            network(torch.randn(2, 64, dtype=torch.float64, requires_grad=True))
        kept[name] = sum(n for key, (n, _) in sizes.items() if key not in own)
    assert kept['fast'] == 2 * (64 + 2) * 8  # the input, and its product with V
    assert kept['plain'] >= 48 * 64 * 8


@pytest.mark.parametrize('reentrant', [False, True])
def test_under_recomputation(reentrant):
    model, plain = pair(LARGE['kernel'], METHODS['flora'])
    x = LARGE['kernel'].input().requires_grad_()

    def run(network):
        y = torch.utils.checkpoint.checkpoint(network, x, use_reentrant=reentrant)
        y.square().sum().backward()
        gradients = {n: p.grad for n, p in network.named_parameters() if p.requires_grad}
        return dict(y=y) | gradients

    assert_equal(run(model), run(plain), 1e-10)


@pytest.mark.parametrize('name', ['lora', 'flora', 'liera', 'dora'])
@pytest.mark.parametrize(
    'dtype, bound', [(torch.float32, 2e-5), (torch.bfloat16, 0.05), (torch.float16, 0.01)]
)
def test_bounds_in_lower_precision(name, dtype, bound):
    for key, layer in LARGE.items():
        model, plain = pair(layer, METHODS[name], dtype)
        x = layer.input(dtype)
        fast, built = results(model, x), results(plain, x)
        for tensor, expected in built.items():
            if expected is not None:
                difference = (fast[tensor].double() - expected.double()).norm()
                assert difference <= bound * max(expected.double().norm(), 1e-3), (key, tensor)


def test_dropout_is_that_of_the_plain_form():
    case = Layer(lambda: nn.Linear(20, 12), (5, 20))
    model, plain = pair(case, dict(type='LoRA', rank=2, dropout=0.5))
    x = case.input()
    assert_equal(results(model, x), results(plain, x), 1e-10)
