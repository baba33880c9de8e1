"""What all methods on activations live with: copies, removal, autocast, other methods."""

import copy

import mmdet.models
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import mmpeft
from mmpeft.errors import UsageError
from mmpeft.injection.site import adapters_of, named_adapters
from mmpeft.methods import ActivationAdapter
from mmpeft.models import InternViT, TimmBackbone
from tests.activations import adapted, hooks
from tests.cases import (
    BLOCKS,
    METHODS,
    NO_PLACE,
    Attention,
    TransformerBlock,
    randomize,
)

pytestmark = pytest.mark.filterwarnings('ignore:.*adapters have more parameters')

CASES = [
    (name, key)
    for name in BLOCKS
    for key in (
        'houlsby',
        'pfeiffer',
        'parallel',
        'scaled_parallel',
        'vpt',
        'vpt_deep',
        'mona',
        'convpass',
    )
    if (METHODS[key]['type'], name) not in NO_PLACE
]
over_cases = pytest.mark.parametrize('name, key', CASES, ids=lambda part: part)


@pytest.mark.parametrize('method', ['HoulsbyAdapter', 'ParallelAdapter'])
@pytest.mark.parametrize(
    'arguments, message',
    [
        (dict(rank=(2, 3)), 'must be one integer'),
        (dict(activation='tanh'), "activation='tanh' is unknown.*'gelu', 'relu', 'swish'"),
    ],
)
def test_arguments_that_adapters_refuse(method, arguments, message):
    with pytest.raises(UsageError, match=message):
        mmpeft.METHODS.build(dict(type=method, **arguments))


def test_a_branch_does_not_expand_what_a_module_returns():
    model = timm.create_model('cait_xxs24_224', depth=1, img_size=32)
    mmpeft.inject(model, dict(type='Convpass', rank=2))
    with pytest.raises(UsageError, match=r'returned .*\(1, 1, 192\) for \(1, 5, 192\), as att'):
        model(torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize('type_name, name', sorted(p for p in NO_PLACE if p[1] in BLOCKS))
def test_networks_without_a_place_are_refused(type_name, name):
    model = BLOCKS[name].build()
    with pytest.raises(
        UsageError, match=f'^{type_name} acts at insertion points of kind .* has none'
    ):
        mmpeft.inject(model, dict(type=type_name))


@over_cases
def test_adapters_of_a_copy_are_the_copys(name, key):
    _, model, x = adapted(name, METHODS[key])
    before, copied = model(x), copy.deepcopy(model)
    own = set(map(id, named_adapters(model).values()))
    others = set(map(id, named_adapters(copied).values()))
    called = [getattr(h, '__self__', h) for m in hooks(copied) for h in m._forward_hooks.values()]
    early = [hook.__self__ for m in hooks(copied) for hook in m._forward_pre_hooks.values()]
    assert set(map(id, called)) == others and set(map(id, early)) <= others and not own & others
    mmpeft.remove(copied)
    assert not hooks(copied) and not named_adapters(copied)
    assert torch.equal(model(x), before) and hooks(model)


@over_cases
def test_removal_leaves_no_hook(name, key):
    plain, model, x = adapted(name, METHODS[key])
    mmpeft.remove(model)
    assert not hooks(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [path for path, _ in model.named_modules()] == [
        path for path, _ in plain.named_modules()
    ]


@over_cases
def test_recomputed_without_reentrance(name, key):
    _, model, x = adapted(name, METHODS[key])
    parameters = [p for p in model.parameters() if p.requires_grad]
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in parameters]
    model.zero_grad()
    y = x
    for stage in model[0]:
        y = checkpoint(stage, y, use_reentrant=False)
    y.square().sum().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters, expected, strict=True))


@over_cases
def test_under_autocast(name, key):
    """Layers run in bfloat16, and adapters get their gradients in float32."""
    model, x = BLOCKS[name].build(torch.float32), BLOCKS[name].input(torch.float32)
    mmpeft.inject(model, METHODS[key])
    randomize(model)
    exact = model(x)
    with torch.autocast('cpu', torch.bfloat16):
        y = model(x)
    assert not torch.equal(y.float(), exact)
    torch.testing.assert_close(y.float(), exact, rtol=0.1, atol=0.1)
    y.float().square().sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in trained)


def test_a_branch_is_added_in_float32_and_rounded_once():
    layer, x = nn.Conv2d(4, 6, 3, padding=1), torch.randn(2, 4, 5, 5)
    for dtype, context in (
        (torch.bfloat16, torch.autocast('cpu', enabled=False)),
        (torch.float32, torch.autocast('cpu', torch.bfloat16)),
    ):
        model = nn.Sequential(copy.deepcopy(layer)).to(dtype)
        mmpeft.inject(model, dict(type='ParallelAdapter', rank=2))
        randomize(model)
        f, given = adapters_of(model[0], '')[0].factors, x.to(dtype)
        with context, torch.no_grad():
            y = model(given)
            before = type(layer).forward(model[0], given)
        inner = F.conv2d(given.float(), f['down'], padding=1).relu()
        added = F.conv2d(inner, f['up'][:, :, None, None])
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, (before.float() + added).to(torch.bfloat16))


def test_modules_that_get_no_tensor():
    class Lists(nn.Sequential):
        def forward(self, maps):
            return super().forward(maps[0])

    model = nn.Sequential(Lists(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)))
    mmpeft.inject(model, dict(type='HoulsbyAdapter', rank=2), dict(kinds='mlp', include='0'))
    with pytest.raises(UsageError, match=r'got none \(list\)'):
        model([torch.randn(2, 4)])
    with pytest.raises(UsageError, match=r'got none \(Proxy\)'):
        torch.fx.symbolic_trace(model)


def test_modules_that_are_called_by_keyword():
    class Named(TransformerBlock):
        def forward(self, mask=None, hidden=None):
            return super().forward(hidden)

    class Calls(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Named(Attention(8), 8)

        def forward(self, x):
            return self.block(mask=None, hidden=x)

    for key in ('vpt', 'houlsby'):
        model, x = Calls(), torch.randn(2, 5, 8)
        before = model(x)
        mmpeft.inject(model, METHODS[key])
        randomize(model)
        assert model(x).shape == before.shape and not torch.allclose(model(x), before)


def test_they_compose_with_each_other_and_with_methods_on_weights():
    plain, x = BLOCKS['convnext'].build().requires_grad_(False), BLOCKS['convnext'].input()
    model = copy.deepcopy(plain).requires_grad_(True)
    methods = [
        METHODS[key] for key in ('houlsby', 'parallel', 'lora', 'vpt_deep', 'scaled_parallel')
    ]
    for method in methods:
        mmpeft.inject(model, method)
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
    kinds = {type(a.method).__name__ for a in named_adapters(model).values()}
    assert kinds == {method['type'] for method in methods}
    randomize(model)
    model(x).square().sum().backward()
    assert all(p.grad.any() for a in named_adapters(model).values() for p in a.parameters())
    copied = copy.deepcopy(plain)
    for method in methods:
        mmpeft.inject(copied, method)
    copied.load_state_dict(model.state_dict())
    assert torch.equal(copied(x), model(x))
    mmpeft.remove(model)
    assert torch.equal(model(x), plain.requires_grad_(True)(x)) and not hooks(model)


def test_targets_choose_among_insertion_points():
    model = BLOCKS['vit'].build()
    targets = dict(kinds=('attention', 'mlp'), exclude=r'1\.attn', overrides={r'2\.': dict(rank=5)})
    rows = mmpeft.inject(model, dict(type='HoulsbyAdapter', rank=2), targets).rows
    assert [row.name for row in rows] == ['0.1.mlp', '0.2.attn', '0.2.mlp']
    assert [a.method.rank for a in named_adapters(model).values()] == [2, 5, 5]


@pytest.mark.parametrize('key', ['houlsby', 'pfeiffer', 'parallel', 'vpt', 'vpt_deep'])
@pytest.mark.parametrize('depth', [18, 50])
def test_on_mmdets_resnet(depth, key):
    model, x = mmdet.models.ResNet(depth, frozen_stages=-1), torch.randn(2, 3, 64, 64)
    model.eval()
    with torch.no_grad():
        before = model(x)
    mmpeft.inject(model, METHODS[key])
    model.train()
    after = model(x)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    randomize(model, 0.05)
    sum(y.square().mean() for y in model(x)).backward()
    missing = [
        path for path, a in named_adapters(model).items() for p in a.parameters() if p.grad is None
    ]
    assert not missing


BACKBONES = dict(
    swin=lambda: mmdet.models.SwinTransformer(
        embed_dims=12, depths=(2, 1), num_heads=(2, 4), strides=(4, 2), out_indices=(0, 1)
    ),
    convnext=lambda: TimmBackbone(
        'convnextv2_atto', depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), with_cp=True, out_norm=False
    ),
    intern_vit=lambda: InternViT(
        dict(depth=2, width=16, heads=2, hidden=32, image_size=28, patch_size=14), with_cp=True
    ),
    intern_vit_bfloat16=lambda: InternViT(
        dict(depth=2, width=16, heads=2, hidden=32, image_size=28, patch_size=14),
        with_cp=True,
        frozen_dtype='bfloat16',
    ),
)


@pytest.mark.parametrize(
    'name, key',
    [
        (name, key)
        for name in BACKBONES
        for key in ('houlsby', 'pfeiffer', 'parallel', 'scaled_parallel', 'vpt')
        if (name, key) != ('swin', 'vpt')
    ],
)
def test_on_backbones_that_recompute(name, key):
    model, x = BACKBONES[name](), torch.randn(2, 3, 56, 56)
    model.init_weights()
    model.requires_grad_(False).eval()
    before = model(x)
    mmpeft.inject(model, METHODS[key])
    if key != 'vpt' or name == 'convnext':
        assert all(torch.equal(a, b) for a, b in zip(before, model(x), strict=True))
    model.train()
    randomize(model, 0.05)
    after = model(x)
    assert [(y.shape, y.dtype) for y in after] == [(y.shape, y.dtype) for y in before]
    sum(y.square().mean() for y in after).backward()
    adapters = named_adapters(model).values()
    assert all(isinstance(a, ActivationAdapter) and a.training for a in adapters)
    assert all(p.grad is not None for a in adapters for p in a.parameters())
