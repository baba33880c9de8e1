"""Products with an adapted matrix: sizes, precisions, what is kept, and second derivatives."""

import copy

import pytest
import torch
from torch import nn

import mmpeft
from mmpeft import execution
from mmpeft.execution.cpu import onednn
from mmpeft.execution.linear import AdaptedLinear, thin_pays
from mmpeft.execution.matmul import ChannelsFirst, ChannelsLast
from tests.cases import METHODS, Layer, randomize
from tests.comparing import (
    assert_as_plain,
    assert_equal,
    plain,
    plain_of,
    results,
    second_derivatives,
)
from tests.test_execution.tables import LARGE, adapted

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')

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
WAYS = [execution.AUTO, execution.MERGED, execution.BRANCH, execution.COMPOSED]
OF_A_LINEAR_LAYER = ['lora', 'flora', 'liera', 'liera_exact', 'dora', 'dora_detached']
CONFIGS = METHODS | dict(dora_detached=dict(type='DoRA', rank=2, detach_norm=True))


@pytest.mark.parametrize(
    'name, way',
    [(name, way) for name in ('lora', 'flora') for way in WAYS]
    + [(name, execution.AUTO) for name in ('liera', 'liera_exact', 'dora')],
)
@pytest.mark.parametrize('case', SIZES)
def test_sizes_at_which_libraries_run_other_code(case, name, way):
    """In float32, at most three times as far from float64 as the plain form, or within 3e-6."""
    model, x = adapted(SIZES[case], METHODS[name], torch.float32, way), None
    x = SIZES[case].input(torch.float32)
    exact = results(plain_of(model).double(), x.double())
    found = results(model, x)
    with plain(model):
        built = results(model, x)
    for tensor, expected in exact.items():
        if expected is not None:
            ours = (found[tensor].double() - expected).norm()
            theirs = (built[tensor].double() - expected).norm()
            assert ours <= max(3 * theirs, 3e-6 * expected.norm()), (tensor, ours, theirs)


@pytest.mark.parametrize('name', ['lora', 'flora', 'liera', 'dora'])
@pytest.mark.parametrize(
    'dtype, bound', [(torch.float32, 2e-5), (torch.bfloat16, 0.05), (torch.float16, 0.01)]
)
def test_bounds_in_lower_precision(name, dtype, bound):
    for key, layer in LARGE.items():
        model, x = adapted(layer, METHODS[name], dtype), layer.input(dtype)
        found = results(model, x)
        with plain(model):
            built = results(model, x)
        for tensor, expected in built.items():
            if expected is not None:
                difference = (found[tensor].double() - expected.double()).norm()
                assert difference <= bound * max(expected.double().norm(), 1e-3), (key, tensor)


SMALL_UPDATES = dict(
    lora=dict(type='LoRA', rank=4),
    flora=dict(type='FLoRA', rank=4, scale=1.0),
    liera=dict(type='LieRA', rank=4, scale=1.0),
    dora=dict(type='DoRA', rank=4),
)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('amp', [False, True])
@pytest.mark.parametrize(
    'name, way',
    [(name, execution.AUTO) for name in SMALL_UPDATES]
    + [(name, execution.COMPOSED) for name in ('lora', 'flora')],
)
def test_small_updates_show_in_low_precision(name, way, amp, dtype, monkeypatch):
    """An update of 1e-5, far below the weights' rounding, moves the outputs by its own amount."""
    monkeypatch.setattr(onednn, 'AMX', amp)  # two products in low precision, or one in float32
    torch.manual_seed(0)
    size = 256
    base = nn.Linear(size, size, bias=False)
    with torch.no_grad():
        base.weight.copy_(base.weight.to(dtype))
    layer = copy.deepcopy(base)
    if not amp:
        layer = layer.to(dtype)
    mmpeft.inject(layer, SMALL_UPDATES[name], execution=way)
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
        change = base.weight.double() * delta if name == 'liera' else delta
    if dtype == torch.bfloat16:
        rounded = (base.weight + change.float()).to(dtype)
        assert (rounded == base.weight.to(dtype)).double().mean() > 0.7
    x = torch.rand(4096, size, dtype=torch.float32 if amp else dtype)
    with torch.autocast('cpu', dtype, enabled=amp):
        y = layer(x)
        unchanged = torch.nn.functional.linear(x.to(dtype), base.weight.to(dtype))
    assert y.dtype == dtype
    moved = (y.double() - unchanged.double()).mean(0)
    expected = (x.to(dtype).double() @ change.T).mean(0)
    if name == 'dora':  # the norm takes its part of the update back
        exact = adapter.in_double(base.weight.double()) - base.weight.double()
        expected = (x.to(dtype).double() @ exact.T).mean(0)
    assert ((moved - expected).norm() / expected.norm()).item() < 0.25
    y.float().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapter.parameters())


@pytest.mark.parametrize('amp', [False, True])
def test_a_dense_gradient_in_low_precision(amp, monkeypatch):
    monkeypatch.setattr(onednn, 'AMX', True)
    case = Layer(lambda: nn.Linear(64, 64), (300, 64))
    assert not thin_pays(300, 64, 64, 32)
    model = adapted(case, dict(type='LoRA', rank=32), torch.float32)
    x = case.input(torch.float32)
    exact = results(model, x)
    model = model if amp else model.to(torch.bfloat16)
    for p in model[0].parametrizations.weight[0].parameters():
        p.data = p.data.float()
    with torch.autocast('cpu', torch.bfloat16, enabled=amp):
        found = results(model, x if amp else x.bfloat16())
    for tensor, expected in exact.items():
        if expected is not None:
            assert (found[tensor].float() - expected).norm() <= 0.03 * expected.norm(), tensor


def test_nothing_of_the_built_weight_is_kept_for_backward():
    case = Layer(lambda: nn.Linear(64, 48), (2, 64))
    model = adapted(case, dict(type='LoRA', rank=2))
    own = {p.untyped_storage()._cdata for p in model.parameters()}

    def kept():
        sizes = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            sizes[storage._cdata] = (storage.nbytes(), tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(case.input().requires_grad_())
        return sum(n for key, (n, _) in sizes.items() if key not in own)

    assert kept() == 2 * (64 + 2) * 8  # the input, and its product with A
    with plain(model):
        assert kept() >= 48 * 64 * 8


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('name', OF_A_LINEAR_LAYER)
def test_outputs_that_are_changed_in_place(name, way):
    model = adapted(LARGE['large_linear'], CONFIGS[name], way=way)
    model.append(nn.ReLU(inplace=True))
    assert_as_plain(model, LARGE['large_linear'].input())


def test_rows_of_zeros_and_magnitudes_of_zero_under_dora():
    case = LARGE['large_linear']
    model = adapted(case, METHODS['dora'])
    adapter = model[0].parametrizations.weight[0]
    with torch.no_grad():
        model[0].parametrizations.weight.original[:2] = 0
        adapter.lora_B[0] = 0
        adapter.magnitude[:4] = 0
    assert_as_plain(model, case.input())


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('name', OF_A_LINEAR_LAYER)
@pytest.mark.parametrize('case', ['large_linear', 'without_bias', 'pointwise_strided'])
def test_second_derivatives(case, name, way):
    model, x = adapted(LARGE[case], CONFIGS[name], way=way), LARGE[case].input()
    found = second_derivatives(model, x)
    with plain(model):
        assert_equal(found, second_derivatives(model, x), 1e-10)


@pytest.mark.parametrize('layout', [ChannelsLast, ChannelsFirst])
@pytest.mark.parametrize('with_core', [False, True])
@pytest.mark.parametrize('rank', [1, 2])  # thin products, and the dense gradient
@pytest.mark.parametrize(
    'update, branch, with_ratio',
    [
        ('additive', False, False),
        ('additive', True, False),
        ('additive', False, True),
        ('lie', False, False),
        ('lie_exact', False, False),
    ],
)
def test_gradients_by_finite_differences(update, branch, with_ratio, rank, with_core, layout):
    """Of every argument; W has none."""
    torch.manual_seed(0)
    function = AdaptedLinear(layout, update, 0.5, branch)
    shapes = [(1, 12, 5), (6, 5), (6,), (6, 3 if with_core else rank), (3, rank), (rank, 5), (6,)]
    tensors = [torch.randn(s, dtype=torch.float64, requires_grad=s != (6, 5)) for s in shapes]
    if layout is ChannelsFirst:
        tensors[0] = tensors[0].detach().mT.contiguous().requires_grad_()
    if not with_ratio:
        tensors[-1] = None
    if not with_core:
        tensors[4] = None
    assert thin_pays(12, 6, 5, rank) == (rank == 1)
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)
    exact = function.reference(*tensors)
    assert (function(*tensors) - exact).abs().max() <= 1e-12 * exact.abs().max()


@pytest.mark.parametrize('method', ['ia3', 'ssb', 'dora'])
@pytest.mark.parametrize('layer', ['linear', 'pointwise'])
def test_gradients_of_scales_survive_a_large_bias_in_low_precision(layer, method):
    """They are a difference to the bias' gradient, which may not be rounded to bfloat16."""

    def gradients(execution, low):
        torch.manual_seed(0)
        linear = layer == 'linear'
        module = nn.Linear(64, 64) if linear else nn.Conv2d(64, 64, 1)
        nn.init.constant_(module.bias, 5.0)
        network = nn.Sequential(module)
        mmpeft.inject(network, METHODS[method], execution=execution)
        randomize(network, 0.1)
        shape = (16384, 64) if linear else (4, 64, 64, 64)
        x, dy = torch.randn(shape), torch.randn(shape) + 1
        if not low:
            network, x, dy = network.double(), x.double(), dy.double()
        with torch.autocast('cpu', torch.bfloat16, enabled=low):
            y = network(x)
        y.backward(dy.to(y.dtype))
        return [p.grad.double() for p in network.parameters() if p.requires_grad]

    exact = gradients('plain', False)
    for found, expected in zip(gradients('auto', True), exact, strict=True):
        assert (found - expected).norm() <= 0.05 * expected.norm()
