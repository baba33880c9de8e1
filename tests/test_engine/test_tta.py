"""Views of an image at test time."""

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import TRANSFORMS
from PIL import Image

from mmpeft.engine.building import build_model
from mmpeft.engine.config import read_config, type_name
from mmpeft.engine.tta import enable_tta
from mmpeft.errors import UsageError

FEW = dict(nms_pre=50, max_per_img=10)


def test_flipped_views_come_back():
    """A view that is the exact mirror of another adds nothing to it."""
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    from mmpeft.engine.tta import FlipTTA

    mask = torch.zeros(1, 20, 30, dtype=torch.bool)
    mask[0, 2:12, 4:10] = True
    boxes = torch.tensor([[4.0, 2.0, 10.0, 12.0]])
    views = []
    for direction in (None, 'horizontal', 'vertical', 'diagonal'):
        axes = dict(horizontal=[2], vertical=[1], diagonal=[1, 2]).get(direction, [])
        x1, y1, x2, y2 = boxes[0].tolist()
        if 2 in axes:
            x1, x2 = 30 - x2, 30 - x1
        if 1 in axes:
            y1, y2 = 20 - y2, 20 - y1
        found = InstanceData(
            bboxes=torch.tensor([[x1, y1, x2, y2]]),
            scores=torch.tensor([0.5]),
            labels=torch.tensor([1]),
            masks=torch.flip(mask, axes),
        )
        meta = dict(ori_shape=(20, 30), flipped=direction)
        views.append(DetDataSample(metainfo=meta, pred_instances=found))
    model = FlipTTA(nms=ConfigDict(type='nms', iou_threshold=0.9), max_per_img=10, module=_Tested())
    (merged,) = model.merge_preds([views])
    assert torch.equal(merged.pred_instances.bboxes, boxes)
    assert torch.equal(merged.pred_instances.masks, mask)


class _Tested(torch.nn.Module):
    def test_step(self, data):
        raise NotImplementedError


MODELS = {
    'mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py': {
        'backbone': dict(depth=18, init_cfg=None),
        'neck.in_channels': [64, 128, 256, 512],
        'test_cfg': dict(rpn=FEW, rcnn=dict(score_thr=0.0, max_per_img=5)),
        **{f'roi_head.bbox_head.{stage}.fc_out_channels': 32 for stage in range(3)},
        'roi_head.mask_head.num_convs': 1,
    },
    'mmdet::yolox/yolox_tiny_8xb8-300e_coco.py': {'test_cfg.score_thr': 0.0},
    'mmpretrain::resnet/resnet18_8xb32_in1k.py': {},
    'mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py': {'backbone.init_cfg': None},
}


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', MODELS)
def test_a_mirrored_image_has_mirrored_predictions(name, tmp_path, scope):
    cfg = read_config(name)
    cfg.merge_from_dict({f'model.{key}': value for key, value in MODELS[name].items()})
    cfg.tta_model = cfg.tta_pipeline = None
    for step in cfg.test_dataloader.dataset.pipeline:
        if step['type'].endswith('Resize'):
            step.scale = (96, 64)
        # A class, as mmengine's configs in Python have it.
        step['type'] = TRANSFORMS.get(f'{cfg.default_scope}.{step["type"].split(".")[-1]}')
    enable_tta(cfg)
    # mmseg reads annotations after the flip
    steps = cfg.test_dataloader.dataset.pipeline
    for transform in steps[-1]['transforms']:
        transform[:] = [t for t in transform if not type_name(t).endswith('LoadAnnotations')]
    steps[-1]['transforms'] = [t for t in steps[-1]['transforms'] if t]
    model, pipeline = build_model(cfg).eval(), Compose(steps)
    picture = np.random.default_rng(0).integers(0, 256, (96, 64, 3), np.uint8)
    found, views = [], []
    for image in (picture, picture[:, ::-1]):
        Image.fromarray(image).save(tmp_path / 'image.png')
        item = pipeline(dict(img_path=str(tmp_path / 'image.png'), img_id=0))
        with torch.no_grad():
            (sample,) = model.test_step(pseudo_collate([item]))
        found.append(numbers(sample))
        views.append(item['inputs'])
    if 'pred_score' not in sample:  # whose resize rounds
        assert torch.equal(views[0][1], views[1][0]) and torch.equal(views[0][0], views[1][1])
    for one, other in zip(found[0], found[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def numbers(sample):
    """What does not change if the image is mirrored."""
    if 'pred_score' in sample:
        return [sample.pred_score]
    if 'pred_sem_seg' in sample:
        return [sample.pred_sem_seg.data.flatten().bincount(minlength=150).double() / 500]
    found = sample.pred_instances
    assert len(found) > 3
    return [found.scores.sort()[0], (found.bboxes[:, 2] - found.bboxes[:, 0]).sort()[0]]


@pytest.mark.parametrize(
    'name',
    [
        'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py',
        'mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py',
        'mmdet::panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py',
    ],
)
def test_models_whose_predictions_are_not_merged(name):
    with pytest.raises(UsageError, match='--tta merges .*has none of them'):
        enable_tta(read_config(name))
