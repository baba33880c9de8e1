"""What a network keeps for backward by `memory`: less, and the same function."""

import copy
from functools import partial

import pytest
import timm
import torch
from timm.layers.grn import GlobalResponseNorm
from torch import nn
from torch.utils.checkpoint import checkpoint

import mmpeft
from mmpeft.analysis.memory import saved_bytes
from mmpeft.errors import UsageError
from mmpeft.execution.memory import RecomputedBlock
from mmpeft.injection.blocks import blocks
from mmpeft.models.intern_vit import Block, InternViT
from mmpeft.models.intern_vit_arch import Architecture
from tests.cases import METHODS, randomize
from tests.comparing import (
    assert_as_plain,
    assert_equal,
    plain,
    plain_of,
    results,
    second_derivatives,
)

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')
SMALL_RESNET = dict(layers=(2, 2, 1, 1), channels=(8, 8, 8, 8), stem_width=8, num_classes=3)


def convnext():
    sizes = dict(depths=(2, 2, 1, 1), dims=(8, 16, 16, 16), num_classes=3)
    return timm.create_model('convnextv2_atto', **sizes), (2, 3, 64, 64)


def resnet():
    return timm.create_model('resnet50', **SMALL_RESNET), (2, 3, 32, 32)


def vit():
    sizes = dict(embed_dim=32, depth=3, num_heads=2, patch_size=8, img_size=32, num_classes=3)
    return timm.create_model('vit_tiny_patch16_224', **sizes), (2, 3, 32, 32)


def efficientnet():
    return timm.create_model('test_efficientnet', num_classes=3), (2, 3, 64, 64)


def regnet():
    return timm.create_model('regnety_002', num_classes=3), (2, 3, 32, 32)


NETWORKS = dict(convnext=convnext, resnet=resnet, vit=vit, efficientnet=efficientnet, regnet=regnet)


def adapted(build, memory, method='flora', **arguments):
    torch.manual_seed(0)
    model, size = build()
    mmpeft.inject(model.double(), METHODS[method], memory=memory, **arguments)
    randomize(model, 0.05)
    return model, torch.randn(size, dtype=torch.float64)


@pytest.mark.parametrize('memory', ['speed', 'balanced', 'small'])
@pytest.mark.parametrize('build', NETWORKS.values(), ids=NETWORKS)
def test_the_same_function(build, memory):
    model, x = adapted(build, memory)
    assert_as_plain(model.train(), x)
    assert any(isinstance(m, RecomputedBlock) for m in model.modules()) == (memory == 'small')


@pytest.mark.parametrize('memory', ['balanced', 'small'])
@pytest.mark.parametrize('method', ['dora', 'frozen', 'bitfit', 'houlsby', 'vpt_deep', 'full'])
def test_other_methods(method, memory):
    model, x = adapted(vit, memory, method)
    assert_as_plain(model.train(), x)


@pytest.mark.parametrize('memory', ['balanced', 'small'])
def test_adapters_on_attention_alone(memory):
    """The products that backward does again are those of frozen layers."""
    model, x = adapted(vit, memory, 'lora', targets=dict(include=['attn']))
    assert_as_plain(model, x)


@pytest.mark.parametrize('build', [convnext, vit])
def test_second_derivatives_of_products_that_are_done_again(build):
    model, x = adapted(build, 'balanced')
    for module in model.modules():
        module.fused_attn = False  # torch has no second derivatives of the fused one
        if isinstance(module, GlobalResponseNorm):
            nn.init.normal_(module.weight)
    found = second_derivatives(model, x)
    with plain(model):
        assert_equal(found, second_derivatives(model, x), 1e-9)


@pytest.mark.parametrize('memory', ['balanced', 'small'])
def test_random_numbers_are_those_of_the_forward_pass(memory):
    """Dropout, and drop path, which the plain model draws in the same order."""
    sizes = dict(embed_dim=32, depth=3, num_heads=2, patch_size=8, img_size=32, num_classes=3)
    drops = dict(drop_path_rate=0.5, proj_drop_rate=0.3)
    build = lambda: (timm.create_model('vit_tiny_patch16_224', **sizes, **drops), (4, 3, 32, 32))  # noqa: E731
    model, x = adapted(build, memory)
    assert_as_plain(model.train(), x)


@pytest.mark.parametrize('memory', ['balanced', 'small'])
def test_under_autocast(memory):
    """No further from float64 than with all maps kept."""
    errors, exact = {}, None
    for mode in ('speed', memory):
        model, x = adapted(vit, mode)
        exact = exact or results(plain_of(model), x)
        model, x = model.float(), x.float()
        with torch.autocast('cpu', torch.bfloat16):
            found = results(model, x)
        errors[mode] = sum((found[n].double() - g).norm() / g.norm() for n, g in exact.items())
    assert errors[memory] <= 1.2 * errors['speed'] < 0.5 * len(exact)


@pytest.mark.parametrize('build, balanced, small', [(convnext, 0.7, 0.5), (vit, 0.75, 0.4)])
def test_it_keeps_less(build, balanced, small):
    kept = {}
    for memory in ('speed', 'balanced', 'small'):
        model, x = adapted(build, memory)
        kept[memory], _ = saved_bytes(model, x)
    assert kept['balanced'] < balanced * kept['speed']
    assert kept['small'] < small * kept['speed']


def test_a_block_keeps_its_input_alone():
    arch = Architecture(depth=3, width=64, heads=2, hidden=128, image_size=56)
    model = nn.Sequential(Block(arch), Block(arch), Block(arch))
    mmpeft.inject(model, dict(type='LoRA'), memory='small')
    x = torch.randn(2, 17, 64, requires_grad=True)
    assert saved_bytes(model, x)[0] == 3 * x.nbytes


@pytest.mark.parametrize(
    'build, kinds',
    [
        (convnext, {'ConvNeXtBlock'}),
        (resnet, {'Bottleneck'}),
        (vit, {'Block'}),
        (efficientnet, {'EdgeResidual', 'InvertedResidual'}),
        (regnet, {'Bottleneck'}),  # its stages are modules of their own
    ],
)
def test_blocks(build, kinds):
    model, _ = build()
    assert {type(m).__name__ for m in blocks(model).values()} == kinds


def test_what_recomputes_itself_is_left_to_it():
    model, _ = vit()
    model.set_grad_checkpointing()
    mmpeft.inject(model, METHODS['lora'], memory='small')
    arch = dict(depth=2, width=64, heads=2, hidden=128, image_size=56)
    other = InternViT(arch, with_cp=True)
    mmpeft.inject(other, METHODS['lora'], memory='small')
    for each in (model, other):
        assert not any(isinstance(m, RecomputedBlock) for m in each.modules())


def test_in_a_checkpoint_of_ones_own():
    model, x = adapted(vit, 'small')
    found = results(model, x, lambda x: checkpoint(model, x, use_reentrant=False))
    assert_equal(found, results(model, x), 1e-12)


def test_statistics_that_train_are_counted_once():
    model, size = resnet()
    with pytest.warns(UserWarning, match='would count each batch twice'):
        mmpeft.inject(model, dict(type='Full'), memory='small')
    model.train()(torch.randn(size)).sum().backward()
    assert {int(m.num_batches_tracked) for m in model.modules() if hasattr(m, 'eps')} == {1}


def test_copies_compiled_models_and_removal():
    model, x = adapted(vit, 'small')
    expected = results(model, x)
    assert_equal(results(copy.deepcopy(model), x), expected, 1e-12)
    with torch.no_grad():
        assert torch.allclose(model(x), expected['y'], rtol=1e-12)
    network = partial(torch.compile(model, backend='eager'))
    assert_equal(results(model, x, network), expected, 1e-10)
    mmpeft.remove(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in vit()[0].modules()]


def test_an_object_that_a_block_may_change_is_not_passed_twice():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.one, self.two = nn.LayerNorm(4), nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x, cache):
            cache.add(len(cache))
            return x + self.two(self.one(self.norm(x)))

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Counting(), Counting()])

        def forward(self, x, cache):
            for layer in self.layers:
                x = layer(x, cache)
            return x

    model, cache = Network(), set()
    mmpeft.inject(model, dict(type='LoRA', rank=1), memory='small')
    with pytest.warns(UserWarning, match='use_cache=False'):
        model(torch.randn(2, 4), cache).sum().backward()
    assert len(cache) == 2


@pytest.mark.parametrize(
    'arguments, words',
    [
        (dict(memory='tiny'), "memory='tiny' is not one of 'speed', 'balanced', 'small'"),
        (dict(memory='balanced', execution='plain'), "Take execution='auto'"),
    ],
)
def test_refused(arguments, words):
    with pytest.raises(UsageError, match=words):
        mmpeft.inject(vit()[0], METHODS['lora'], **arguments)
