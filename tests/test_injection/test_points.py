"""Insertion points of modules that are named, and as plain data."""

import json

import pytest
from torch import nn

from mmpeft.errors import UsageError
from mmpeft.injection.insertion_points import Search
from mmpeft.injection.points import point_at, restore_point
from mmpeft.methods.spec import POINT_KINDS
from tests.cases import BLOCKS, Attention, conv_mlp, mlp
from tests.zoo import NETWORKS


@pytest.mark.parametrize('name', ['hf_bert', 'hf_detr', 'mmseg_mscan', 'timm_mobilenet'])
def test_a_point_is_restored_from_plain_data(name):
    model = NETWORKS[name].build()
    search = Search(model)
    for kind in POINT_KINDS:
        for path, point in search.find(kind).items():
            data = json.loads(json.dumps(point.to_dict()))
            assert restore_point(model.get_submodule(path), data) == point, path


@pytest.mark.parametrize(
    'kind, module, other',
    [
        ('layer', lambda: nn.Linear(4, 6), lambda: nn.Linear(4, 5)),
        ('layer', lambda: nn.Linear(4, 6), nn.Identity),
        ('border', lambda: nn.Conv2d(4, 4, 3, padding=1), lambda: nn.Conv2d(3, 4, 3, padding=1)),
    ],
)
def test_data_of_another_module_is_refused(kind, module, other):
    data = point_at(module(), kind).to_dict()
    with pytest.raises(UsageError, match=f'{type(other()).__name__} is not an .* kind {kind!r}'):
        restore_point(other(), data)


def test_data_with_layers_that_are_not_there_is_refused():
    model = NETWORKS['hf_bert'].build()
    path, point = next(iter(Search(model).find('mlp').items()))
    module = model.get_submodule(path)
    assert point.ends == ('intermediate.dense', 'output.dense')
    assert point.shape == (16, 16) and point.numel == 2 * 16 * 32 + 16 + 32
    with pytest.raises(UsageError, match="layers .'intermediate.dense', 'output.dense'"):
        restore_point(module.attention, point.to_dict())
    for change in (dict(ends=['output.dense']), dict(kinds=['linear'])):
        with pytest.raises(UsageError, match='not an insertion point'):
            restore_point(module, point.to_dict() | change)


@pytest.mark.parametrize('name', BLOCKS)
@pytest.mark.parametrize('kind', POINT_KINDS)
def test_a_module_found_by_structure_is_the_same_point_when_named(name, kind):
    model = BLOCKS[name].build()
    for path, point in Search(model).find(kind).items():
        named = point_at(model.get_submodule(path), kind)
        assert named.axis == point.axis and named.kinds == point.kinds
        if kind == 'branch':  # The norm at its end does not tell how the block begins.
            assert named.out_features == point.out_features
        else:
            assert named.shape == point.shape and named.geometry == point.geometry


@pytest.mark.parametrize(
    'kind, module, shape, axis',
    [
        ('attention', lambda: Attention(8), (8, 8), -1),
        ('attention', lambda: nn.MultiheadAttention(8, 2), (8, 8), -1),
        ('mlp', lambda: mlp(8), (8, 8), -1),
        ('mlp', lambda: conv_mlp(8), (8, 8), 1),
        ('mlp', lambda: nn.Sequential(nn.Linear(8, 2), nn.Linear(2, 8)), (8, 8), -1),
        ('branch', lambda: nn.BatchNorm2d(8), (8, 8), 1),
        ('branch', lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), (8, 3), 1),
        ('mixer', lambda: nn.LayerNorm(8), (8, 8), -1),
        ('layer', lambda: nn.Conv2d(3, 8, 3), (8, 3), 1),
        ('tokens', lambda: nn.Sequential(Attention(8), mlp(8)), (8, 8), -1),
    ],
)
def test_widths_of_a_named_module_are_those_of_its_layers(kind, module, shape, axis):
    point = point_at(module(), kind)
    assert point.shape == shape and point.axis == axis


@pytest.mark.parametrize(
    'kind, module, message',
    [
        ('mlp', lambda: nn.ModuleList([mlp(8)]), 'ModuleList .* only lists modules'),
        ('branch', nn.ReLU, 'ReLU .* holds no linear layer, convolution or norm'),
        ('layer', lambda: mlp(8), 'Sequential .* is not a linear layer or convolution'),
        ('border', lambda: nn.Conv2d(4, 4, 3), 'its padding zeros'),
        ('mlp', lambda: nn.Linear(8, 6), 'takes 8 channels and its last one returns 6'),
        ('tokens', lambda: nn.Conv2d(3, 8, 2), 'takes 3 channels and its last one returns 8'),
    ],
)
def test_a_named_module_without_what_its_kind_needs_is_refused(kind, module, message):
    with pytest.raises(UsageError, match=f'{message}.*') as error:
        point_at(module(), kind)
    assert f'kind {kind!r} (' in str(error.value)
