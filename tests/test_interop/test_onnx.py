"""ONNX files: run by onnxruntime and compared with the network in torch."""

import json

import onnxruntime
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import nn

import mmpeft
from mmpeft.engine.packages import import_task
from mmpeft.errors import UsageError
from mmpeft.interop.onnx import (
    Part,
    exporting,
    image_size,
    prepared,
    random_images,
    run_both,
    write,
)
from mmpeft.models import InternViT, SimpleFeaturePyramid, TimmBackbone
from tests.backbones import SMALL
from tests.cases import randomize

pytestmark = pytest.mark.filterwarnings('ignore')

TINY = dict(depth=2, width=32, heads=2, hidden=64, image_size=56)


def run(path, images):
    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    return [torch.from_numpy(y) for y in session.run(None, {'images': images.numpy()})]


def assert_same(outputs, expected, tolerance=1e-5):
    assert len(outputs) == len(expected)
    for one, other in zip(outputs, expected, strict=True):
        assert (one - other).abs().max() < tolerance * other.abs().max()


def backbone_of(network):
    model = nn.Module()
    model.backbone = network.eval().requires_grad_(False)
    return Part(model, 'backbone')


def test_intern_vit_at_any_size(tmp_path):
    network = InternViT(TINY)
    network.init_weights()
    mmpeft.inject(network, dict(type='LoRA', rank=2))
    randomize(network)
    sizes = (1, 3, 56, 56), (2, 3, 42, 70)
    expected = [network(torch.ones(size))[-1] for size in sizes]
    mmpeft.merge(network)
    write(backbone_of(network), torch.randn(3, 3, 70, 84), tmp_path / 'net.onnx', dynamic=True)
    for size, maps in zip(sizes, expected, strict=True):
        assert_same(run(tmp_path / 'net.onnx', torch.ones(size))[-1:], [maps])


class ViTDet(nn.Module):
    """A plain transformer with absolute positions, which are resized in forward, and a pyramid."""

    def __init__(self):
        super().__init__()
        name = 'vit_intern300m_patch14_448.ogvl_2pt5'
        self.backbone = TimmBackbone(name, **SMALL[name] | dict(out_indices=(-1,)))
        self.neck = SimpleFeaturePyramid(48, 16, num_outs=5)

    def extract_feat(self, images):
        return self.neck(self.backbone(images))


def test_a_plain_transformer_with_its_pyramid_at_any_size(tmp_path):
    """Merged equals attached, and the file equals both."""
    model = ViTDet().eval()
    mmpeft.inject(model, dict(type='LoRA', rank=2), dict(module='backbone'))
    randomize(model.backbone)
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        attached = model.extract_feat(images)
        mmpeft.merge(model)
        assert_same(model.requires_grad_(False).extract_feat(images), attached)
    write(Part(model, 'neck'), torch.randn(3, 3, 96, 64), tmp_path / 'net.onnx', dynamic=True)
    assert_same(run(tmp_path / 'net.onnx', images), attached)


@pytest.mark.parametrize(
    'method', [dict(type='PfeifferAdapter', rank=2), dict(type='VPT', tokens=2)]
)
def test_methods_that_do_not_merge_are_exported_as_they_are(method, tmp_path):
    network = InternViT(TINY)
    network.init_weights()
    mmpeft.inject(network, method)
    randomize(network)
    images = torch.randn(1, 3, 56, 56)
    part = backbone_of(network)
    write(part, images, tmp_path / 'net.onnx')
    with torch.no_grad():
        assert_same(run(tmp_path / 'net.onnx', images), part(images))


@pytest.mark.parametrize('scope, key', [('mmdet', 'bgr_to_rgb'), ('mmpretrain', 'to_rgb')])
def test_the_file_says_what_images_it_takes(scope, key, tmp_path):
    kind = dict(mmdet='DetDataPreprocessor', mmpretrain='ClsDataPreprocessor')[scope]
    import_task(Config(dict(default_scope=scope)))
    part = backbone_of(nn.Conv2d(3, 4, 1))
    settings = dict(type=f'{scope}.{kind}', mean=[1.0, 2.0, 3.0], std=[4.0, 5.0, 6.0])
    part.model.data_preprocessor = MODELS.build(settings | {key: True})
    write(part, torch.randn(1, 3, 8, 8), tmp_path / 'net.onnx')
    session = onnxruntime.InferenceSession(str(tmp_path / 'net.onnx'))
    needs = json.loads(session.get_modelmeta().custom_metadata_map['mmpeft'])
    assert (needs['mean'], needs['std']) == ([1, 2, 3], [4, 5, 6])
    assert needs['bgr_to_rgb'] is True


def test_what_is_prepared():
    """Merged, in float32, with nothing of the adapters left; attached where they do not merge."""
    init_default_scope('mmseg')
    backbone = dict(type='mmpeft.InternViT', arch=TINY, frozen_dtype='bfloat16', with_cp=True)
    model = dict(type='ToyHolder', backbone=backbone)
    plain = Config(dict(model=model))
    holder = MODELS.build(model)
    mmpeft.inject(holder, dict(type='LoRA', rank=2), dict(module='backbone'))
    randomize(holder)
    images = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        expected = holder.backbone(images)
        result = prepared(holder, plain)
        assert {p.dtype for p in result.parameters()} == {torch.float32}
        assert not any('parametrizations' in key for key in result.state_dict())
        assert_same(result.backbone(images), expected, 0.05)
    holder = MODELS.build(model)
    mmpeft.inject(holder, dict(type='PfeifferAdapter', rank=2), dict(module='backbone'))
    with pytest.raises(UsageError, match="bfloat16.*frozen_dtype='float32'"):
        prepared(holder, plain)


@MODELS.register_module()
class ToyHolder(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = MODELS.build(backbone)


class TakesAnotherPath(nn.Module):
    """As networks do that resize only what is not of their own size."""

    def forward(self, x):
        return (x.tanh() if x.shape[3] > 100 else x.flatten(2).view(-1, 3, 64, 64).tanh(),)


def test_a_file_that_holds_for_some_sizes_alone_is_noticed(tmp_path):
    path, sizes = tmp_path / 'net.onnx', ((1, 3, 64, 64), (1, 3, 64, 128))
    part = backbone_of(TakesAnotherPath())
    fits, other = (torch.randn(size) for size in sizes)
    write(part, fits, path)
    ((name, theirs, ours),) = run_both(part, path, [fits])
    assert name == 'backbone0 of 1x3x64x64'
    assert_same([theirs], [ours], 1e-6)
    with pytest.raises(UsageError, match='onnxruntime cannot run the network on images 1x3x64x128'):
        run_both(part, path, [other])


def test_a_file_appears_only_if_its_outputs_are_accepted(tmp_path):
    part = backbone_of(TakesAnotherPath())
    batches = [torch.randn(1, 3, 64, 64)]
    with pytest.raises(UsageError, match='different'), exporting(part, tmp_path / 'a', batches):
        raise UsageError('different')
    assert not list(tmp_path.iterdir())
    with exporting(part, tmp_path / 'a', batches) as outputs:
        assert len(outputs) == 1 and not (tmp_path / 'a').exists()
    assert [path.name for path in tmp_path.iterdir()] == ['a']


def test_sizes():
    part = backbone_of(nn.Identity())
    shapes = [tuple(images.shape) for images in random_images(part, (70, 100), 2, True)]
    assert shapes == [(2, 3, 70, 100), (4, 3, 96, 96), (1, 3, 128, 224)]
    assert [tuple(images.shape) for images in random_images(part, (70, 100), 2, False)] == shapes[
        :1
    ]
    assert image_size(Config(dict(model=dict(test_cfg=dict(crop_size=[3, 4]))))) == (3, 4)
    assert image_size(Config(dict(model=dict(data_preprocessor=dict(size=(5, 6)))))) == (5, 6)
    with pytest.raises(UsageError, match='--size H W'):
        image_size(Config(dict(model=dict())))


def model_of(**parts):
    found = nn.Module()
    for name, part in parts.items():
        setattr(found, name, part)
    return found


@pytest.mark.parametrize(
    'parts, part, message',
    [
        (dict(neck=nn.Identity(), head=nn.Identity()), 'model', 'a classifier.* --part neck'),
        (dict(neck=None, head=nn.Identity()), 'model', 'a classifier.* --part backbone'),
        (dict(neck=nn.Identity(), roi_head=nn.Identity()), 'model', 'no dense head'),
        (dict(neck=None), 'neck', 'has no neck. Write --part backbone'),
    ],
)
def test_parts_that_a_model_does_not_have(parts, part, message):
    with pytest.raises(UsageError, match=message):
        Part(model_of(**parts), part)
