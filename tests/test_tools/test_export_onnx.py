"""export_onnx.py, from a config and a checkpoint to a file that onnxruntime runs."""

import json

import onnx
import onnxruntime
import pytest
import torch

import mmpeft
from mmpeft.errors import UsageError
from mmpeft.interop.onnx import Part

pytestmark = pytest.mark.filterwarnings('ignore')


@pytest.fixture
def tool(script, adapted_demo, monkeypatch):
    """The script's main, called where the demo's base is."""
    module = script('tools', 'export_onnx')
    monkeypatch.chdir(adapted_demo.folder)

    def call(*arguments):
        monkeypatch.setattr('sys.argv', ['export_onnx.py', *map(str, arguments)])
        module.main()

    return call


@pytest.mark.parametrize(
    'task, part, options, size',
    [
        ('coco', 'neck', ['--size', 64, 96], (1, 3, 64, 96)),
        ('ade20k', 'model', ['--batch', 2], (2, 3, 128, 128)),
    ],
)
@torch.no_grad()
def test_a_file_computes_what_the_adapted_network_does(
    task, part, options, size, tool, adapted_demo, tmp_path, capsys
):
    out = tmp_path / 'net.onnx'
    tool(*adapted_demo(task), out, '--part', part, *options)
    assert 'EXCEEDED' not in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ['net.onnx']
    images = torch.randn(size)
    session = onnxruntime.InferenceSession(str(out), providers=['CPUExecutionProvider'])
    outputs = session.run(None, {'images': images.numpy()})
    expected = Part(mmpeft.init_model(*adapted_demo(task)), part)(images)
    for one, other in zip(outputs, expected, strict=True):
        assert (torch.from_numpy(one) - other).abs().max() < 1e-5 * other.abs().max()
    (entry,) = onnx.load(out).metadata_props
    assert json.loads(entry.value) == dict(
        version=mmpeft.__version__,
        bgr_to_rgb=True,
        mean=pytest.approx([123.675, 116.28, 103.53]),
        std=pytest.approx([58.395, 57.12, 57.375]),
    )


def test_what_is_not_written(tool, adapted_demo, tmp_path, monkeypatch):
    out = tmp_path / 'net.onnx'
    config, checkpoint = adapted_demo('coco')
    with pytest.raises(UsageError, match='MaskRCNN has no dense head.*--part neck'):
        tool(config, checkpoint, out, '--part', 'model', '--size', 64, 64)
    with pytest.raises(UsageError, match='--size H W'):
        tool(config, checkpoint, out)
    with pytest.raises(UsageError, match='something else than torch: backbone0'):
        tool(config, checkpoint, out, '--size', 32, 32, '--bound', 0.0)
    assert not list(tmp_path.iterdir())
    out.write_text('precious')
    with pytest.raises(UsageError, match=r'net\.onnx exists already\. Give another name'):
        tool(config, checkpoint, out, '--size', 32, 32)
    assert out.read_text() == 'precious'
