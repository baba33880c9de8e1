"""Views of an image at test time."""

import torch
from mmengine.config import ConfigDict


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
        meta = dict(ori_shape=(20, 30), flip=direction is not None, flip_direction=direction)
        views.append(DetDataSample(metainfo=meta, pred_instances=found))
    model = FlipTTA(nms=ConfigDict(type='nms', iou_threshold=0.9), max_per_img=10, module=_Tested())
    (merged,) = model.merge_preds([views])
    assert torch.equal(merged.pred_instances.bboxes, boxes)
    assert torch.equal(merged.pred_instances.masks, mask)


class _Tested(torch.nn.Module):
    def test_step(self, data):
        raise NotImplementedError
