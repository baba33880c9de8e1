"""merge.py --check: what is compared, what is refused, what is written."""

import math

import numpy as np
import pytest
import torch
from mmengine.structures import InstanceData

import mmpeft
from mmpeft.analysis.comparison import corners, differences, quantity, table
from mmpeft.engine.config import read_config
from mmpeft.engine.trial_images import trial_batch
from mmpeft.errors import UsageError

pytestmark = pytest.mark.filterwarnings('ignore')

TASKS = dict(
    coco=['corners of boxes', 'scores', 'masks'],
    ade20k=['logits', 'segmentation map'],
    dota=['corners of boxes', 'scores'],
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
    assert 'merged against adapted on 2 images of noise, 128x128' in said
    assert all(name in said for name in ['backbone 40x32x32', *TASKS[task]])
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
        mmpeft.injection.merge.merge(model)
        with torch.no_grad():
            model.backbone.model.stages_3.blocks[0].mlp.fc1.weight.mul_(1.01)

    monkeypatch.setattr(merge.module.mmpeft, 'merge', wrong)
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


class Sample(dict):
    """Stands for a data sample."""

    __getattr__ = dict.__getitem__


def instances(boxes, scores, labels, masks=None):
    masks = {} if masks is None else dict(masks=masks)
    return Sample(
        pred_instances=InstanceData(
            bboxes=torch.as_tensor(boxes, dtype=torch.float),
            scores=torch.as_tensor(scores, dtype=torch.float),
            labels=torch.as_tensor(labels),
            **masks,
        )
    )


def compared(one, other):
    found = differences(dict(maps=[], predictions=[one]), dict(maps=[], predictions=[other]))
    return {row.name: row for row in found}


BOXES = [[0.0, 0, 10, 10], [20, 20, 40, 30], [20, 20, 40, 30]]


def test_instances_are_paired_in_any_order():
    order = [2, 0, 1]
    masks = torch.rand(3, 5, 5) > 0.5
    one = instances(BOXES, [0.9, 0.8, 0.8], [1, 2, 3], masks)
    moved = (torch.tensor(BOXES) + 0.01)[order]
    other = instances(moved, [0.8, 0.9, 0.8], [3, 1, 2], masks[order].numpy())
    rows = compared(one, other)
    assert rows['instances without pair'].relative == 0
    assert rows['corners of boxes'].absolute == pytest.approx(0.01, rel=1e-4)
    assert rows['corners of boxes'].relative == pytest.approx(0.01 / 40.01, rel=1e-4)
    assert rows['scores'].absolute == 0
    assert rows['masks'].relative == 0
    masks[0, 0, 0] ^= True
    assert compared(one, other)['masks'].relative == 1 / 75


@pytest.mark.parametrize(
    'boxes, scores, labels',
    [
        ([BOXES[0], BOXES[1]], [0.9, 0.8], [1, 2]),
        (BOXES, [0.9, 0.8, 0.8], [1, 2, 2]),
        (BOXES, [0.9, 0.8, 0.7], [1, 2, 3]),
        ([*BOXES[:2], [20, 20, 41, 30]], [0.9, 0.8, 0.8], [1, 2, 3]),
        ([*BOXES[:2], [math.nan] * 4], [0.9, 0.8, 0.8], [1, 2, 3]),
    ],
    ids=['missing', 'label', 'score', 'place', 'nan'],
)
def test_an_instance_without_its_like_is_counted(boxes, scores, labels):
    row = compared(
        instances(boxes, scores, labels),
        instances(BOXES, [0.9, 0.8, 0.8], [1, 2, 3]),
    )['instances without pair']
    assert row.relative == 1 / 3 and row.exceeds(1.0)


def test_no_instances_at_all():
    none = instances(torch.zeros(0, 5), [], torch.zeros(0, dtype=torch.long))
    assert not any(row.exceeds(0) for row in compared(none, none).values())
    one = instances([[5.0, 5, 4, 2, 0.1]], [0.5], [0])
    assert compared(none, one)['instances without pair'].relative == 1
    assert compared(one, none)['instances without pair'].relative == 1


def test_descriptions_of_one_rotated_box_are_one():
    box = torch.tensor([[30.0, 20, 8, 3, 0.4]])
    for same in ([30, 20, 8, 3, 0.4 + math.pi], [30, 20, 3, 8, 0.4 - math.pi / 2]):
        rows = compared(instances(box, [0.5], [0]), instances([same], [0.5], [0]))
        assert rows['instances without pair'].relative == 0
        assert rows['corners of boxes'].absolute < 1e-5


def test_corners():
    flat = corners(torch.tensor([[1.0, 2, 5, 4]]))
    assert flat.tolist() == [[[1, 2], [5, 2], [5, 4], [1, 4]]]
    torch.testing.assert_close(corners(torch.tensor([[3.0, 3, 4, 2, 0]])), flat)
    turned = corners(torch.tensor([[3.0, 3, 4, 2, math.pi / 2]]))
    torch.testing.assert_close(turned[0, 0], torch.tensor([4.0, 1.0]))


def test_quantities():
    one, other = torch.tensor([1.0, 4.0]), torch.tensor([1.5, 2.0])
    row = quantity('x', [one], [other])
    assert (row.absolute, row.relative) == (2, 1) and row.exceeds(0.99) and not row.exceeds(1)
    assert quantity('x', [torch.tensor([math.nan])], [one[:1]]).exceeds(1e9)
    assert 'EXCEEDED' in table([row], 0.5) and 'EXCEEDED' not in table([row], 1)
    with pytest.raises(UsageError, match='other shapes'):
        quantity('x', [one], [one[:1]])
