"""TimmBackbone: weights from files, levels, norms."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from mmcv.cnn.utils import fuse_conv_bn
from mmcv.ops import roi_align
from mmengine.model import convert_sync_batchnorm
from safetensors.torch import save_file
from torch import nn

import mmpeft
from mmpeft.errors import DamagedFileError, UsageError
from mmpeft.injection.site import adapter_parameters
from mmpeft.interop.mmpretrain import mmpretrain_convnext
from mmpeft.models import TimmBackbone
from tests.networks import Runs

TINY = dict(name='convnextv2_atto', depths=(1, 1, 2, 1), dims=(8, 16, 24, 32))


def randomized(model):
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn_like(value))
    return model


def whole(**changes):
    config = dict(TINY, **changes)
    return randomized(timm.create_model(config.pop('name'), num_classes=7, **config))


@pytest.mark.parametrize('suffix', ['pth', 'safetensors', 'index.json'])
def test_a_classifiers_file_fills_the_backbone(suffix, tmp_path):
    classifier, path = whole(), tmp_path / f'weights.{suffix}'
    if suffix == 'pth':
        torch.save(classifier.state_dict(), path)
    elif suffix == 'safetensors':
        save_file(classifier.state_dict(), path)
    else:
        names = list(classifier.state_dict())
        places = {name: f'{i % 3}.safetensors' for i, name in enumerate(names)}
        for file in set(places.values()):
            part = {k: v for k, v in classifier.state_dict().items() if places[k] == file}
            save_file(part, tmp_path / file)
        path.write_text(json.dumps(dict(weight_map=places)))
    backbone = TimmBackbone(**TINY, checkpoint=str(path), out_norm=False)
    before = backbone.model.stem_0.weight.clone()
    backbone.init_weights()
    assert not torch.equal(backbone.model.stem_0.weight, before)
    x = torch.randn(1, 3, 64, 64)
    levels = classifier.forward_intermediates(x, intermediates_only=True)
    for level, expected in zip(backbone.eval()(x), levels[-4:], strict=True):
        torch.testing.assert_close(level, expected, rtol=1e-4, atol=1e-5)


def test_levels_have_their_own_norm_over_channels():
    backbone = randomized(TimmBackbone(**TINY, out_indices=(1, 3)))
    maps = backbone(torch.randn(2, 3, 64, 64))
    assert [tuple(m.shape) for m in maps] == [(2, 16, 8, 8), (2, 32, 2, 2)]
    assert {n for n, _ in backbone.named_children()} == {'model', 'norm1', 'norm3'}
    plain = backbone.model(torch.ones(1, 3, 64, 64))[0]
    expected = torch.nn.functional.layer_norm(
        plain.permute(0, 2, 3, 1), (16,), backbone.norm1.weight, backbone.norm1.bias, 1e-6
    )
    first = backbone(torch.ones(1, 3, 64, 64))[0]
    torch.testing.assert_close(first, expected.permute(0, 3, 1, 2))


@pytest.mark.parametrize('indices', [(3, 0), (0, 0, 1), (0, -4)])
def test_levels_come_in_their_order(indices):
    with pytest.raises(UsageError, match=r'out_indices=\(.*once and in this order'):
        TimmBackbone(**TINY, out_indices=indices)


@pytest.mark.parametrize(
    'config, shapes',
    [
        (
            dict(name='swin_tiny_patch4_window7_224', img_size=64, depths=(1, 1, 1, 1)),
            [(96, 16), (192, 8), (384, 4), (768, 2)],
        ),
        (
            dict(name='vit_tiny_patch16_224', img_size=64, depth=2, out_indices=(0, 1)),
            [(192, 4), (192, 4)],
        ),
        (
            dict(name='resnet18', out_indices=(1, 2, 3, 4)),
            [(64, 16), (128, 8), (256, 4), (512, 2)],
        ),
    ],
    ids=lambda c: c['name'] if isinstance(c, dict) else '',
)
def test_other_families(config, shapes):
    maps = TimmBackbone(**config)(torch.randn(1, 3, 64, 64))
    assert [tuple(m.shape[1:3]) for m in maps] == shapes
    assert all(m.is_contiguous() for m in maps)


@pytest.mark.parametrize('out_norm', [True, False])
def test_regions_are_pooled_from_the_right_places(out_norm):
    """mmcv's RoIAlign takes channels-last maps, which ConvNeXt has inside, for contiguous ones."""
    level = randomized(TimmBackbone(**TINY, out_norm=out_norm))(torch.randn(1, 3, 64, 64))[0]
    boxes = torch.tensor([[0.0, 2.0, 2.0, 9.0, 11.0], [0.0, 0.0, 4.0, 15.0, 8.0]])
    expected = torchvision.ops.roi_align(level, boxes, 3, 1.0, 2, aligned=True)
    torch.testing.assert_close(roi_align(level, boxes, 3, 1.0, 2, 'avg', True), expected)


def test_a_file_of_another_model_is_refused(tmp_path):
    path = str(tmp_path / 'weights.pth')
    torch.save(whole(dims=(8, 16, 24, 40)).state_dict(), path)
    backbone = TimmBackbone(**TINY, checkpoint=path)
    with pytest.raises(UsageError, match=r'does not fit .*tensors are missing'):
        backbone.init_weights()
    with pytest.raises(FileNotFoundError, match='none.pth'):
        TimmBackbone(**TINY, checkpoint=str(tmp_path / 'none.pth')).init_weights()


@pytest.mark.parametrize('name', ['truncated.pth', 'truncated.safetensors', 'runs.pth', 'list.pth'])
def test_a_file_that_is_no_state_dict_is_refused_and_runs_nothing(name, tmp_path):
    path, ran = tmp_path / name, tmp_path / 'ran'
    state = whole().state_dict()
    (save_file if name.endswith('safetensors') else torch.save)(state, path)
    if name.startswith('truncated'):
        path.write_bytes(path.read_bytes()[:-1000])
    elif name == 'runs.pth':
        torch.save(state | dict(epoch=Runs(ran)), path)
    else:
        torch.save([1, 2], path)
    backbone = TimmBackbone(**TINY, checkpoint=str(path))
    with pytest.raises(DamagedFileError, match=rf"^'.*{name}' is damaged or holds more than"):
        backbone.init_weights()
    assert not ran.exists()


def test_names_and_contradictions():
    with pytest.raises(UsageError, match="no model 'convnextv2_big'.*convnextv2_atto"):
        TimmBackbone('convnextv2_big')
    with pytest.raises(UsageError, match='Keep the one'):
        TimmBackbone('convnextv2_atto', pretrained=True, checkpoint='x.pth')
    with pytest.raises(UsageError, match=r'timm cannot build .*[^.]\.$'):
        TimmBackbone('vit_tiny_patch16_224', embed_dim=64, num_heads=5, out_indices=(-1,))


def test_building_with_pretrained_fetches_nothing_and_loading_says_what_to_do(monkeypatch):
    backbone = TimmBackbone(**TINY, pretrained=True)

    def unreachable(*args, **kwargs):
        raise OSError('no route')

    monkeypatch.setattr(timm, 'create_model', unreachable)
    with pytest.raises(UsageError, match=r"no route.*backbone\.checkpoint='FILE'"):
        backbone.init_weights()


def test_pretrained_weights_are_taken_over(monkeypatch):
    backbone, source = TimmBackbone(**TINY, pretrained=True), TimmBackbone(**TINY).model
    asked = []

    def hub(**kwargs):
        asked.append(kwargs)
        return source

    monkeypatch.setattr(timm, 'create_model', hub)
    backbone.init_weights()
    assert asked[0]['pretrained'] and asked[0]['model_name'] == 'convnextv2_atto'
    assert all(
        torch.equal(value, source.state_dict()[key])
        for key, value in backbone.model.state_dict().items()
    )


@pytest.mark.filterwarnings('ignore:.*adapters have more parameters')
def test_recomputation_gives_adapters_the_same_gradients():
    x = torch.randn(2, 3, 64, 64)
    gradients = []
    for with_cp in (False, True):
        torch.manual_seed(5)
        backbone = randomized(TimmBackbone(**TINY, with_cp=with_cp)).train()
        mmpeft.inject(backbone, dict(type='FLoRA', rank=2), dict(exclude=['stem']))
        sum(level.square().sum() for level in backbone(x)).backward()
        gradients.append([p.grad for p in adapter_parameters(backbone)])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)
    assert any(gradient.any() for gradient in gradients[0])


def test_norms_that_lose_their_activation_are_noticed():
    """mmengine puts norms in their place that do nothing else."""
    backbone = TimmBackbone('test_efficientnet', out_norm=False)
    mmpeft.inject(backbone, dict(type='LoRA', rank=2))
    backbone.train().eval()
    backbone = TimmBackbone('test_efficientnet', out_norm=False)
    backbone.model = timm.layers.convert_sync_batchnorm(backbone.model)
    backbone.train()
    lost = TimmBackbone('test_efficientnet', out_norm=False)
    for convert in (convert_sync_batchnorm, fuse_conv_bn):
        with pytest.raises(UsageError, match='batch norms of test_efficientnet, such as .*sync_bn'):
            convert(copy.deepcopy(lost)).eval()
    lost.model.bn1 = nn.Sequential(nn.GroupNorm(4, lost.model.bn1.num_features), nn.SiLU())
    lost.train()  # which does the same
    resnet = TimmBackbone('test_resnet', out_norm=False)
    convert_sync_batchnorm(resnet).train()


def test_drop_path_reaches_timm():
    rates = [
        m.drop_prob
        for m in TimmBackbone(**TINY, drop_path=0.4).modules()
        if hasattr(m, 'drop_prob')
    ]
    assert max(rates) == pytest.approx(0.4)


@pytest.mark.parametrize(
    'config',
    [
        TINY,
        dict(name='convnextv2_base', depths=(1, 2, 1, 1), dims=(8, 16, 24, 32)),
        dict(name='convnext_tiny', depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)),
    ],
    ids=lambda config: config['name'],
)
def test_the_equal_convnext_of_mmpretrain(config):
    from mmpretrain.registry import MODELS

    backbone = randomized(TimmBackbone(**config, out_indices=(0, 2, 3))).eval()
    state = {f'backbone.{key}': value for key, value in backbone.state_dict().items()}
    plain, renamed = mmpretrain_convnext(
        dict(type='mmpeft.TimmBackbone', out_indices=(0, 2, 3)), state | dict(other=torch.ones(1))
    )
    assert renamed.pop('other') == 1
    equal = MODELS.build(plain)
    equal.eval()
    equal.load_state_dict({k.removeprefix('backbone.'): v for k, v in renamed.items()})
    x = torch.randn(1, 3, 64, 64)
    for ours, theirs in zip(backbone(x), equal(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('given', [None, (0, 1, 2, -1)])
def test_levels_in_the_equal_convnext_of_mmpretrain(given):
    config = dict(TINY, type='mmpeft.TimmBackbone', out_indices=given)
    backbone = TimmBackbone(**TINY, out_indices=given)
    state = {f'backbone.{key}': value for key, value in backbone.state_dict().items()}
    plain, renamed = mmpretrain_convnext(config, state)
    assert plain['out_indices'] == (0, 1, 2, 3) and 'backbone.norm3.weight' in renamed


def test_what_mmpretrain_has_no_equal_of():
    state = {f'backbone.{k}': v for k, v in TimmBackbone('resnet18').state_dict().items()}
    with pytest.raises(UsageError, match='not a ConvNeXt with output norms'):
        mmpretrain_convnext(dict(type='mmpeft.TimmBackbone', name='resnet18'), state)


LINEAR = TINY | dict(name='convnextv2_tiny')  # whose 1x1 convolutions are linear layers
VIT = dict(name='vit_small_patch16_dinov3', depth=2, embed_dim=64, num_heads=2, out_indices=(-1,))
SWIN = dict(name='swin_tiny_patch4_window7_224', embed_dim=32, depths=(1, 1, 1, 1))


@pytest.mark.parametrize(
    'arguments, size', [(LINEAR, 64), (VIT, 64), (SWIN, 224)], ids=['convnext', 'vit', 'swin']
)
@pytest.mark.parametrize('dtype', ['int8', 'nf4'])
def test_a_file_is_read_into_few_bits(arguments, size, dtype, tmp_path):
    """Bit by bit what rounding the whole network makes of it; without a file, of what is drawn."""
    torch.manual_seed(0)
    path = tmp_path / 'weights.safetensors'
    source = randomized(TimmBackbone(**arguments, out_norm=False))
    save_file({k: v.contiguous() for k, v in source.model.state_dict().items()}, path)
    read = TimmBackbone(**arguments, checkpoint=str(path), frozen_dtype=dtype, out_norm=False)
    assert not any(value.is_meta for value in (*read.parameters(), *read.buffers()))
    read.init_weights()
    expected = copy.deepcopy(source)
    method = dict(type='LoRA', rank=1)
    mmpeft.inject(expected, method, frozen_dtype=dtype)
    assert mmpeft.inject(read, method).adapters > 0
    x = torch.randn(1, 3, size, size)
    for level, other in zip(read.eval()(x), expected.eval()(x), strict=True):
        assert torch.equal(level, other)
    for level, other in zip(read(x), source.eval()(x), strict=True):
        assert 0 < ((level - other).norm() / other.norm()).item() < 0.5
    drawn = TimmBackbone(**arguments, frozen_dtype=dtype)
    drawn.init_weights()
    assert all(level.any() and level.isfinite().all() for level in drawn.eval()(x))


def test_accelerate_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'accelerate', None)
    with pytest.raises(UsageError, match=r'needs accelerate .*mmpeft\[quantized\]'):
        TimmBackbone(**LINEAR, checkpoint='weights.safetensors', frozen_dtype='int8')
    with pytest.raises(UsageError, match="frozen_dtype='int7' is unknown"):
        TimmBackbone(**TINY, frozen_dtype='int7')
    with pytest.raises(UsageError, match='init_cfg draws weights, which few bits do not keep'):
        TimmBackbone(**LINEAR, frozen_dtype='int8', init_cfg=dict(type='TruncNormal'))
    standardized = dict(name='resnetv2_50x1_bit', channels=(128,) * 4, stem_chs=32)
    with pytest.raises(UsageError, match='has no linear layer or convolution whose weight can be'):
        TimmBackbone(**standardized, frozen_dtype='int8')


def test_reading_into_few_bits_never_holds_the_weights_whole(tmp_path):
    script = """
import accelerate, sys, threading, time, torch
from safetensors.torch import save_file
from torchao.quantization.quantize_.workflows.nf4 import nf4_tensor
from mmpeft.models import TimmBackbone
nf4_tensor.CHUNK_SIZE = 2**16  # the pieces of a weight, which take 16 times as much

def own():  # without the pages of the file, which the system can take back
    lines = open('/proc/self/status').read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith('RssAnon'))

def build(**changes):
    arguments = dict(name='vit_small_patch16_224', depth=14, out_indices=(-1,), out_norm=False)
    return TimmBackbone(**arguments | changes)

def watch():
    while True:
        sizes.append(own())
        time.sleep(0.002)

path = sys.argv[1]
if sys.argv[2] == 'write':
    save_file(build().model.state_dict(), path)
    save_file(build(depth=1).model.state_dict(), 'small-' + path)
else:  # what is imported and set up once is not counted
    build(depth=1, checkpoint='small-' + path, frozen_dtype='nf4').init_weights()
    sizes = [own()]
    threading.Thread(target=watch, daemon=True).start()
    build(checkpoint=path, frozen_dtype='nf4').init_weights()
    print('GREW', max(sizes) - sizes[0])
"""
    path = tmp_path / 'weights.safetensors'
    environment = os.environ | dict(PYTHONPATH=str(Path(__file__).parents[2]), OMP_NUM_THREADS='1')
    environment['MALLOC_MMAP_THRESHOLD_'] = '65536'  # what is freed is given back at once
    call = [sys.executable, '-c', script, path.name]
    given = dict(check=True, cwd=tmp_path, env=environment)
    subprocess.run([*call, 'write'], **given)
    done = subprocess.run([*call, 'read'], stdout=subprocess.PIPE, text=True, **given)
    assert path.stat().st_size > 95e6
    grew = int(done.stdout.split('GREW')[1])
    assert grew < path.stat().st_size / 2
