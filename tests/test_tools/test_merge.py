"""merge.py --check: what is compared, what is refused, what is written."""

import numpy as np
import pytest
import torch

import mmpeft
from mmpeft.analysis.comparison import observe
from mmpeft.checkpoint.manifest import describe
from mmpeft.engine import merging
from mmpeft.engine.building import adapt, build_model
from mmpeft.engine.config import compose, read_config
from mmpeft.engine.loading import load_whole
from mmpeft.engine.merging import compare_merged
from mmpeft.engine.trial_images import trial_batch
from mmpeft.errors import UsageError
from tests.cases import randomize

pytestmark = pytest.mark.filterwarnings('ignore')

TASKS = dict(
    coco=['corners of boxes', 'scores', 'masks'],
    ade20k=['logits', 'segmentation map'],
    dota=['corners of boxes', 'scores'],
    classification=['scores of classes'],
)


@pytest.fixture
def merge(script, adapted_demo, monkeypatch):
    """merge.py as from its command line, where the demo's base is."""
    module = script('tools', 'merge')
    monkeypatch.chdir(adapted_demo.folder)

    def call(*arguments):
        monkeypatch.setattr('sys.argv', ['merge.py', *map(str, arguments)])
        module.main()

    call.module = module
    return call


@pytest.mark.parametrize('task', TASKS)
def test_what_is_written_computes_the_same(task, merge, adapted_demo, tmp_path, capsys):
    merge(*adapted_demo(task), tmp_path / 'out.pth', '--check')
    said = capsys.readouterr().out
    assert 'merged against adapted on 2 images of noise' in said
    level = '320x16x16' if task == 'classification' else '40x32x32'
    assert all(name in said for name in [f'backbone {level}', *TASKS[task]])
    assert 'EXCEEDED' not in said
    assert {path.name for path in tmp_path.iterdir()} == {'out.pth', 'out.py'}


def test_the_backbone_of_mmpretrain_is_what_is_compared(merge, adapted_demo, tmp_path, capsys):
    merge(*adapted_demo('ade20k'), tmp_path / 'out.pth', '--check', '--backbone', 'mmpretrain')
    assert 'backbone 40x32x32' in capsys.readouterr().out
    assert "type='mmpretrain.ConvNeXt'" in (tmp_path / 'out.py').read_text()


def test_a_merge_that_changes_the_model_writes_nothing(
    merge, adapted_demo, tmp_path, monkeypatch, capsys
):
    def wrong(model):
        mmpeft.merge(model)
        with torch.no_grad():
            model.backbone.model.stages_3.blocks[0].mlp.fc1.weight.mul_(1.001)

    monkeypatch.setattr(merging, 'merge', wrong)
    out = tmp_path / 'out.pth'
    with pytest.raises(UsageError, match='backbone 320x4x4.*Nothing was written'):
        merge(*adapted_demo('ade20k'), out, '--check')
    assert not list(tmp_path.iterdir())
    assert 'EXCEEDED' in capsys.readouterr().out
    merge(*adapted_demo('ade20k'), out, '--check', '--write-failed')
    assert out.exists()


def test_given_images(merge, adapted_demo, tmp_path, capsys):
    from PIL import Image

    image = tmp_path / 'image.png'
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (60, 90, 3), np.uint8)).save(image)
    batch, words = trial_batch(read_config(adapted_demo('ade20k')[0]), [image])
    assert words == 'the given images' and batch['inputs'][0].shape == (3, 60, 90)
    merge(*adapted_demo('ade20k'), tmp_path / 'out.pth', '--check-images', image)
    assert 'on the given images' in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match='no image'):
        merge(*adapted_demo('ade20k'), tmp_path / 'other.pth', '--check-images', 'none.png')
    assert not (tmp_path / 'other.pth').exists()


@pytest.mark.parametrize('tool, options', [('merge', '--check'), ('export_onnx', '--size 64 64')])
def test_heads_of_other_classes(tool, options, script, adapted_demo, tmp_path, monkeypatch):
    config, checkpoint = adapted_demo('coco')
    monkeypatch.chdir(adapted_demo.folder)
    classes = ['model.roi_head.bbox_head.num_classes=80', 'model.roi_head.mask_head.num_classes=80']
    words = [tool, config, checkpoint, tmp_path / 'out.pth', *options.split(), '--cfg-options']
    monkeypatch.setattr('sys.argv', [*map(str, words), *classes])
    with pytest.raises(
        UsageError, match=r'fc_cls\.bias: \(11,\) in the file, \(81,\) in the model'
    ):
        script('tools', tool).main()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('kind', ["'mmpeft.PEFTHook'", 'PEFTHook'])
def test_the_hook_among_custom_hooks(kind, merge, adapted_demo, tmp_path, capsys):
    """By name, or as the class."""
    config, checkpoint = adapted_demo('ade20k')
    text = config.read_text() + (
        'from mmpeft.engine.hooks import PEFTHook\n'
        "custom_hooks = [default_hooks.pop('peft')]\n"
        f"custom_hooks[0]['type'] = {kind}\n"
    )
    other = adapted_demo.folder / 'custom_hooks.py'
    other.write_text(text)
    merge(other, checkpoint, tmp_path / 'out.pth')
    assert 'merged ' in capsys.readouterr().out
    assert 'PEFTHook' not in (tmp_path / 'out.py').read_text()


def test_a_plain_checkpoint(merge, adapted_demo, tmp_path):
    config, checkpoint = adapted_demo('ade20k')
    merge(config, checkpoint, tmp_path / 'plain.pth')
    with pytest.raises(UsageError, match='plain.pth holds no adapters, so there is nothing to'):
        merge(config, tmp_path / 'plain.pth', tmp_path / 'out.pth')
    assert not (tmp_path / 'out.pth').exists()


@pytest.mark.parametrize('draws_each_time', [True, False])
def test_a_model_that_draws_random_numbers(draws_each_time, scope):
    """SegNeXt's bases, drawn in each forward pass, or in the first one and then kept."""
    from mmseg.structures import SegDataSample

    name = 'mmseg::segnext/segnext_mscan-t_1xb16-adamw-160k_ade20k-512x512.py'
    head = dict(
        ham_channels=32,
        channels=32,
        norm_cfg=dict(type='GN', num_groups=8),
        ham_kwargs=dict(MD_R=4, rand_init=draws_each_time),
    )
    cfg = compose(name, 'lora', {'model.decode_head': head, 'model.backbone.init_cfg': None})
    model = build_model(cfg)
    adapt(model, cfg)
    randomize(model, std=0.02)
    sample = SegDataSample(metainfo=dict(img_shape=(64, 64), ori_shape=(64, 64)))
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    batch = dict(inputs=[image], data_samples=[sample])
    before = observe(model, batch)
    checkpoint = dict(meta=dict(mmpeft=describe(model)), state_dict=dict(model.state_dict()))
    found = compare_merged(before, *merging.merged(model, cfg), batch)
    assert [row.name for row in found if row.exceeds(1e-5)] == []
    again = build_model(cfg)
    adapt(again, cfg)
    load_whole(again, checkpoint, 'It')  # with the bases, which a new model does not have yet
    bases = 'decode_head.hamburger.ham.bases'
    assert (bases in again.state_dict()) is not draws_each_time


@pytest.mark.parametrize('name', ['a.py', 'a.safetensors', 'a'])
def test_a_checkpoint_is_not_written_over_by_its_config(name, merge, adapted_demo, tmp_path):
    with pytest.raises(UsageError, match='name a file that ends in .pth'):
        merge(*adapted_demo('coco'), tmp_path / name)
    assert not list(tmp_path.iterdir())
