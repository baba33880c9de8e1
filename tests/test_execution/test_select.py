"""Every kernel computes what torch's parametrize does, and each is selected where it should be."""

import copy

import pytest
import torch
from torch import Tensor, nn

import mmpeft
from mmpeft import execution
from mmpeft.execution.function import FastFunction
from mmpeft.execution.select import select_kernel
from tests.cases import METHODS, NO_PLACE
from tests.comparing import assert_as_plain, assert_equal, plain, results
from tests.test_execution.tables import LARGE, NORMAL, OTHER, TABLE, adapted

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')

POINTWISE = ('conv2d_1x1', 'pointwise', 'pointwise_strided')
KERNELS = {
    **dict.fromkeys(('linear', 'large_linear', 'without_bias', *POINTWISE), 'AdaptedLinear'),
    **dict.fromkeys(
        ('conv2d', 'conv2d_wide', 'conv2d_reflect', 'conv3d', 'kernel', 'circular', 'same')
        + ('patches', 'sequence', 'volume', 'pointwise_padded'),
        'TuckerConv',
    ),
    **dict.fromkeys(('large_depthwise', 'depthwise_same', 'depthwise_wide'), 'GroupedConv'),
}
MAPS = [name for name in KERNELS if name in LARGE and len(LARGE[name].size) == 4]
# What differs to a kernel: the update, which factors are there, and what is normalized.
SCALES = ('ia3', 'ssl', 'ssb')
FORMS = ('lora', 'lora_channel', 'flora', 'lotr', 'liera', 'flora_lie_exact', 'dora')


@pytest.mark.parametrize('name', NORMAL)
@pytest.mark.parametrize('case', KERNELS)
def test_same_function_and_gradients(case, name):
    assert_as_plain(adapted(TABLE[case], METHODS[name]), TABLE[case].input())


@pytest.mark.parametrize('name', OTHER)
@pytest.mark.parametrize('case', ['large_depthwise', 'depthwise_wide'])
def test_depthwise_kernels_of_all_methods(case, name):
    assert_as_plain(adapted(TABLE[case], METHODS[name]), TABLE[case].input())


@pytest.mark.parametrize('way', [execution.MERGED, execution.BRANCH, execution.COMPOSED])
@pytest.mark.parametrize('name', ['lora', 'lora_channel', 'flora', 'lotr'])
@pytest.mark.parametrize('case', LARGE)
def test_every_execution_computes_the_same(case, name, way):
    assert_as_plain(adapted(LARGE[case], METHODS[name], way=way), LARGE[case].input())


@torch.no_grad()
@pytest.mark.parametrize('name', NORMAL + OTHER)
def test_evaluation_computes_the_same(name):
    for case, layer in TABLE.items():
        if (METHODS[name]['type'], case) in NO_PLACE:
            continue
        for way in set(execution.CHOICES) - {execution.PLAIN}:
            model, x = adapted(layer, METHODS[name], way=way).eval(), layer.input()
            found = model(x)
            with plain(model):
                assert_equal(dict(y=found), dict(y=model(x)), 1e-10)
            if name in OTHER or case not in LARGE:
                break


@torch.no_grad()
@pytest.mark.parametrize('case', ['large_linear', 'pointwise', 'kernel', 'large_depthwise'])
@pytest.mark.parametrize('name', ['lora_channel', 'flora', 'liera', 'dora', 'loha', 'ssb'])
def test_evaluation_misses_no_change(name, case):
    model, x = adapted(LARGE[case], METHODS[name]).eval(), LARGE[case].input()
    state = {key: value.clone() for key, value in model.state_dict().items()}

    def assign(tensor):
        tensor.data = torch.randn_like(tensor)

    def swap(tensor):  # as an average of the weights is put in place and back
        other = torch.randn_like(tensor)
        tensor.data.copy_(other)

    before = model(x)
    for change in (assign, swap, Tensor.zero_, lambda tensor: tensor.mul_(2)):
        for key, tensor in model.state_dict(keep_vars=True).items():
            model.load_state_dict(state)
            assert torch.equal(model(x), before)
            change(tensor)
            found = model(x)
            with plain(model):
                assert_equal(dict(y=found), dict(y=model(x)), 1e-10)
            assert key.endswith('.bias') or change is Tensor.zero_ or not torch.equal(found, before)
    model.load_state_dict(state)
    model.float()  # moves the tensors as another device does
    assert (model(x.float()).double() - before).abs().max() < 1e-4 * before.abs().max()


@pytest.mark.parametrize('name', FORMS)
@pytest.mark.parametrize('case', MAPS)
def test_channels_last(case, name):
    x = LARGE[case].input().contiguous(memory_format=torch.channels_last)
    assert_as_plain(adapted(LARGE[case], METHODS[name]), x)


@pytest.mark.parametrize('case', TABLE)
def test_which_fast_form_a_layer_takes(case, monkeypatch):
    taken, call = [], FastFunction.__call__

    def noting(function, *tensors):
        taken.append(type(function).__name__)
        return call(function, *tensors)

    monkeypatch.setattr(FastFunction, '__call__', noting)
    model = adapted(TABLE[case], METHODS['lotr'], way=execution.MERGED)
    model(TABLE[case].input())
    assert taken == ([KERNELS[case]] if case in KERNELS else [])


@pytest.mark.parametrize('way', [execution.AUTO, execution.MERGED, execution.BRANCH])
@pytest.mark.parametrize('name', SCALES)
def test_scaled_channels(name, way):
    for layer in TABLE.values():
        model, x = adapted(layer, METHODS[name], way=way), layer.input()
        assert_as_plain(model, x)
        if model(x).ndim == 4 and x.ndim == 4:
            assert_as_plain(model, x.contiguous(memory_format=torch.channels_last))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data[1] = -1.0  # a scale of zero
        assert_as_plain(model, x)


@pytest.mark.parametrize('name', [name for name in OTHER if name not in SCALES])
def test_without_a_normal_form_the_weight_is_built(name):
    model = adapted(TABLE['linear'], METHODS[name])
    assert execution.is_enabled(model[0])
    assert select_kernel(model[0], TABLE['linear'].input()) is None


def test_a_method_that_redefines_what_it_computes_does_not_inherit_the_form(monkeypatch):
    from mmpeft.methods.lora import LoRA

    class Doubled(LoRA):
        def apply(self, weight, factors, spec, training=False):
            return 2 * super().apply(weight, factors, spec, training)

    class Squared(LoRA):
        def delta(self, factors, spec):
            return super().delta(factors, spec).square()

    for kind in (Doubled, Squared):
        layer = nn.Sequential(nn.Linear(6, 4)).double()
        monkeypatch.setitem(mmpeft.METHODS.module_dict, kind.__name__, kind)
        mmpeft.inject(layer, kind(rank=2))
        assert select_kernel(layer[0], torch.randn(3, 6).double()) is None


@pytest.mark.parametrize('name', ['lora_channel', 'flora', 'dora', 'ssb', 'svdiff'])
def test_no_images_and_no_batch(name):
    for layer in LARGE.values():
        model, x = adapted(layer, METHODS[name]), layer.input()[:0]
        model(x.requires_grad_()).sum().backward()
        for parameter in model.parameters():
            assert not parameter.requires_grad or not parameter.grad.any()
    assert_as_plain(adapted(LARGE['large_linear'], METHODS[name]), torch.randn(20).double())


def test_weights_that_train_beside_their_adapter_get_their_gradient():
    model, x = adapted(TABLE['linear'], METHODS['lora']), TABLE['linear'].input()
    model[0].parametrizations.weight.original.requires_grad_()
    assert select_kernel(model[0], x) is None
    assert_as_plain(model, x)


def test_plain_execution_leaves_layers_unchanged():
    model = adapted(TABLE['linear'], METHODS['lora'], way=execution.PLAIN)
    assert not execution.is_enabled(model[0])


def test_unknown_executions_are_refused():
    with pytest.raises(mmpeft.errors.UsageError, match="'fast'.*'auto', 'plain'"):
        mmpeft.inject(nn.Linear(4, 4), METHODS['lora'], execution='fast')


def test_what_kernels_say_of_themselves():
    model = nn.Sequential(
        nn.Conv2d(16, 16, 7, padding=3, groups=16),
        nn.Conv2d(16, 32, 1),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.Flatten(),
        nn.Linear(32 * 64 * 4, 8),
        nn.Linear(8, 64),
    )
    mmpeft.inject(model, dict(type='FLoRA', rank=3))
    x, found = torch.randn(2, 16, 16, 16), []
    for layer in model:
        if execution.is_enabled(layer):
            found.append(select_kernel(layer, x).name)
        x = layer(x)
    assert found == [
        'kernel gradient as a convolution',
        'thin products, in the weight',
        'thin convolutions, in the weight',
        'thin products, as a branch',
        'thin products, as a branch',
    ]


def test_under_ddp(tmp_path):
    model, x = adapted(LARGE['kernel'], METHODS['flora']), LARGE['kernel'].input()
    store = f'file://{tmp_path / "store"}'
    torch.distributed.init_process_group('gloo', init_method=store, rank=0, world_size=1)
    try:
        found = results(model, x, nn.parallel.DistributedDataParallel(model))
    finally:
        torch.distributed.destroy_process_group()
    with plain(model):
        assert_equal(found, results(model, x), 1e-10)


@pytest.mark.parametrize('reentrant', [False, True])
def test_under_checkpointing(reentrant):
    model, x = adapted(LARGE['kernel'], METHODS['flora']), LARGE['kernel'].input()

    def run(x):
        return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant)

    found = results(model, x, run)
    with plain(model):
        assert_equal(found, results(model, x, run), 1e-10)


@pytest.mark.parametrize('case', ['large_linear', 'pointwise', 'kernel', 'patches'])
@pytest.mark.parametrize('name', ['lora_channel', 'flora', 'liera', 'dora'])
def test_dropout_is_that_of_the_plain_form(name, case):
    model = adapted(LARGE[case], METHODS[name] | dict(dropout=0.5), way=execution.MERGED)
    x = LARGE[case].input()
    assert_as_plain(model, x)
    with torch.no_grad():
        torch.default_generator.manual_seed(0)
        found = model(x)
        with plain(model):
            torch.default_generator.manual_seed(0)
            assert_equal(dict(y=found), dict(y=model(x)), 1e-10)


@pytest.mark.parametrize('name, way', [('ia3', execution.AUTO), ('flora', execution.BRANCH)])
def test_borders_that_autocast_reflects_in_float32(name, way):
    case = TABLE['conv2d_reflect']
    model, x = adapted(case, METHODS[name], torch.float32, way), case.input(torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        found = model(x)
        with plain(model):
            assert (found - (expected := model(x))).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize('autocast', [False, True])
@pytest.mark.parametrize(
    'name, moved', [('lora_channel', 3e-4), ('flora', 1e-4), ('liera', 1e-3), ('dora', 3e-4)]
)
def test_small_updates_do_not_vanish_in_evaluation_in_bfloat16(name, moved, autocast):
    """The share of a change below bfloat16's steps of W that outputs have, over many positions."""
    model, x = nn.Sequential(nn.Linear(64, 64)).bfloat16(), torch.randn(512, 64).bfloat16()
    model, x = (model.float(), x.float()) if autocast else (model, x)
    nn.init.uniform_(model[0].weight, 0.25, 0.5)
    mmpeft.inject(model, METHODS[name])
    exact = copy.deepcopy(model).double()
    before = exact(x.double())
    with torch.no_grad():
        for some in (model, exact):
            torch.default_generator.manual_seed(3)
            for parameter in some.parameters():
                if parameter.requires_grad:
                    parameter.add_((moved * torch.randn(parameter.shape)).to(parameter))
        wanted = exact(x.double()) - before
        size = wanted.abs().mean() / before.abs().mean()
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
            found = model.eval()(x).double() - before
    assert size < 2**-8
    share = ((found * wanted).sum() / wanted.square().sum()).item()
    assert share == pytest.approx(1, abs=0.2)


def test_a_bias_that_has_an_adapter_is_computed_once():
    """Also where no kernel fits the weight: a method may draw random numbers for it."""

    class Counted(nn.Module):
        calls = 0

        def forward(self, bias):
            self.calls += 1
            return bias

    for method in (dict(type='LoRA', rank=2), dict(type='OFT', block_size=4)):
        layer = nn.Linear(8, 8)
        mmpeft.inject(nn.Sequential(layer), method)
        counted = Counted()
        torch.nn.utils.parametrize.register_parametrization(layer, 'bias', counted, unsafe=True)
        before = counted.calls
        layer(torch.randn(3, 8))
        assert counted.calls == before + 1
