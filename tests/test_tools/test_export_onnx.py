"""ONNX files: run by onnxruntime and compared with the adapted network in torch."""

import json

import onnx
import onnxruntime
import pytest
import torch
from mmengine.registry import MODELS, init_default_scope
from torch import nn

import mmpeft
from mmpeft.analysis.comparison import Difference
from mmpeft.engine.config import read_config
from mmpeft.engine.packages import import_task
from mmpeft.errors import UsageError
from mmpeft.models import InternViT
from tests.cases import randomize

pytestmark = pytest.mark.filterwarnings('ignore')

TINY = dict(depth=2, width=32, heads=2, hidden=64, image_size=56)


@pytest.fixture
def tool(script, adapted_demo, monkeypatch):
    """The script, and what it prints and writes when it is called where the demo's base is."""
    monkeypatch.syspath_prepend(script('tools', 'merge').__file__.rpartition('/')[0])
    module = script('tools', 'export_onnx')
    monkeypatch.chdir(adapted_demo.folder)

    def call(*arguments):
        monkeypatch.setattr('sys.argv', ['export_onnx.py', *map(str, arguments)])
        module.main()

    call.module = module
    return call


def run(path, images):
    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    return [torch.from_numpy(y) for y in session.run(None, {'images': images.numpy()})]


def assert_same(outputs, expected, tolerance=1e-5):
    assert len(outputs) == len(expected)
    for one, other in zip(outputs, expected, strict=True):
        assert (one - other).abs().max() < tolerance * other.abs().max()


@torch.no_grad()
def adapted_outputs(tool, config, checkpoint, images, part):
    """Of the network with its adapters attached, as a test run loads it."""
    cfg = read_config(config)
    import_task(cfg)
    model = tool.module.load_adapted(cfg, checkpoint)
    return tool.module.Part(model.cpu().eval(), part)(images)


@pytest.mark.parametrize(
    'task, part, options, size',
    [
        ('coco', 'neck', ['--size', 64, 96], (1, 3, 64, 96)),
        ('ade20k', 'model', ['--batch', 2], (2, 3, 128, 128)),
    ],
)
def test_a_file_computes_what_the_adapted_network_does(
    task, part, options, size, tool, adapted_demo, tmp_path, capsys
):
    out = tmp_path / 'net.onnx'
    tool(*adapted_demo(task), out, '--part', part, *options)
    assert 'EXCEEDED' not in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ['net.onnx']
    images = torch.randn(size)
    assert_same(run(out, images), adapted_outputs(tool, *adapted_demo(task), images, part))
    (entry,) = onnx.load(out).metadata_props
    assert json.loads(entry.value) == dict(
        version=mmpeft.__version__,
        bgr_to_rgb=True,
        mean=pytest.approx([123.675, 116.28, 103.53]),
        std=pytest.approx([58.395, 57.12, 57.375]),
    )


def exported(tool, network, images, path, part='backbone', dynamic=False):
    model = nn.Module()
    model.backbone = network.eval().requires_grad_(False)
    whole = tool.module.Part(model, part)
    tool.module.export(whole, images, path, dynamic)
    return whole


def test_intern_vit_at_any_size(tool, tmp_path):
    network = InternViT(TINY)
    network.init_weights()
    mmpeft.inject(network, dict(type='LoRA', rank=2))
    randomize(network)
    sizes = (1, 3, 56, 56), (2, 3, 42, 70)
    expected = [network(torch.ones(size))[-1] for size in sizes]
    mmpeft.merge(network)
    exported(tool, network, torch.randn(3, 3, 70, 84), tmp_path / 'net.onnx', dynamic=True)
    for size, maps in zip(sizes, expected, strict=True):
        assert_same(run(tmp_path / 'net.onnx', torch.ones(size))[-1:], [maps])


@pytest.mark.parametrize(
    'method', [dict(type='PfeifferAdapter', rank=2), dict(type='VPT', tokens=2)]
)
def test_methods_that_do_not_merge_are_exported_as_they_are(method, tool, tmp_path):
    network = InternViT(TINY)
    network.init_weights()
    mmpeft.inject(network, method)
    randomize(network)
    images = torch.randn(1, 3, 56, 56)
    part = exported(tool, network, images, tmp_path / 'net.onnx')
    with torch.no_grad():
        assert_same(run(tmp_path / 'net.onnx', images), part(images))


def test_what_deployed_gives(tool):
    """Merged, in float32, with nothing of the adapters left; attached where they do not merge."""
    init_default_scope('mmseg')
    backbone = dict(type='mmpeft.InternViT', arch=TINY, frozen_dtype='bfloat16', with_cp=True)
    model = dict(type='ToyHolder', backbone=backbone)
    cfg = read_config_of(model)
    holder = MODELS.build(model)
    mmpeft.inject(holder, dict(type='LoRA', rank=2), dict(module='backbone'))
    randomize(holder)
    images = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        expected = holder.backbone(images)
        result = tool.module.deployed(cfg, holder)
        assert {p.dtype for p in result.parameters()} == {torch.float32}
        assert not any('parametrizations' in key for key in result.state_dict())
        assert_same(result.backbone(images), expected, 0.05)
    holder = MODELS.build(model)
    mmpeft.inject(holder, dict(type='PfeifferAdapter', rank=2), dict(module='backbone'))
    with pytest.raises(UsageError, match="bfloat16.*frozen_dtype='float32'"):
        tool.module.deployed(cfg, holder)


@MODELS.register_module()
class ToyHolder(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = MODELS.build(backbone)


def read_config_of(model):
    from mmengine.config import Config

    return Config(dict(model=model, default_hooks=dict(peft=dict(type='mmpeft.PEFTHook'))))


class TakesAnotherPath(nn.Module):
    """As networks do that resize only what is not of their own size."""

    def forward(self, x):
        return (x.tanh() if x.shape[3] > 100 else x.flatten(2).view(-1, 3, 64, 64).tanh(),)


def test_a_file_that_holds_for_some_sizes_alone_is_noticed(tool, tmp_path):
    path = tmp_path / 'net.onnx'
    part = exported(tool, TakesAnotherPath(), torch.randn(1, 3, 64, 64), path)
    found = tool.module.compare(part, path, [torch.randn(1, 3, 64, 64)])
    assert not found[0].exceeds(1e-6)
    with pytest.raises(UsageError, match='onnxruntime cannot run the network on images 1x3x64x128'):
        tool.module.compare(part, path, [torch.randn(1, 3, 64, 128)])


def test_what_is_not_written(tool, adapted_demo, tmp_path, monkeypatch):
    out = tmp_path / 'net.onnx'
    config, checkpoint = adapted_demo('coco')
    with pytest.raises(UsageError, match='MaskRCNN has no dense head.*--part neck'):
        tool(config, checkpoint, out, '--part', 'model', '--size', 64, 64)
    with pytest.raises(UsageError, match='--size H W'):
        tool(config, checkpoint, out)
    differs = Difference('backbone0', 1.0, 1.0, 'one number')
    for name, result in (('export', None), ('describe', None), ('compare', [differs])):
        monkeypatch.setattr(tool.module, name, lambda *_, result=result: result)
    with pytest.raises(UsageError, match='something else than torch: backbone0'):
        tool(config, checkpoint, out, '--size', 32, 32)
    assert not list(tmp_path.iterdir())
    out.write_text('precious')
    with pytest.raises(UsageError, match='exist already'):
        tool(config, checkpoint, out, '--size', 32, 32)
    assert out.read_text() == 'precious'
