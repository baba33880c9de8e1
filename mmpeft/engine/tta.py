"""Flipped views at test time, for boxes, rotated boxes, masks and segmentations."""

from collections.abc import Mapping

import torch
from mmengine.config import Config
from mmengine.model import BaseTTAModel
from mmengine.structures import InstanceData

from mmpeft.registry import MODELS


@MODELS.register_module()
class FlipTTA(BaseTTAModel):
    """Merge the instances that a detector finds in flipped views of an image.

    All views' boxes, flipped back, go through one non-maximum suppression; a
    box that remains keeps the mask of its own view. mmdet's own model for
    test-time augmentation has neither masks nor rotated boxes.

    Args:
        nms: As in the detector's ``test_cfg``, e.g. ``dict(type='nms',
            iou_threshold=0.5)``; ``nms_rotated`` for rotated boxes.
        max_per_img: The most instances to keep.
        **kwargs: See :class:`mmengine.model.BaseTTAModel`.
    """

    def __init__(self, nms: Mapping, max_per_img: int, **kwargs):
        super().__init__(**kwargs)
        self.nms = nms
        self.max_per_img = max_per_img

    def merge_preds(self, data_samples_list: list[list]) -> list:
        """One ``DetDataSample`` an image, of those of its views in the image's own scale."""
        return [self._merge(views) for views in data_samples_list]

    def _merge(self, views):
        from mmcv.ops import batched_nms

        found = InstanceData.cat([_unflipped(view) for view in views])
        if len(found):
            boxes, keep = batched_nms(found.bboxes, found.scores, found.labels, self.nms)
            found = found[keep][: self.max_per_img]
            found.scores = boxes[: self.max_per_img, -1]
        merged = views[0].clone()
        merged.pred_instances = found
        return merged


def _unflipped(view):
    from mmdet.structures.bbox import HorizontalBoxes, get_box_tensor

    found, shape = view.pred_instances.clone(), view.ori_shape[:2]
    found.bboxes = get_box_tensor(found.bboxes)
    if view.get('flip'):
        boxes = HorizontalBoxes
        if found.bboxes.shape[-1] == 5:
            from mmrotate.structures.bbox import RotatedBoxes as boxes
        flipped = boxes(found.bboxes)
        flipped.flip_(shape, view.flip_direction)
        found.bboxes = flipped.tensor
        if 'masks' in found:
            axes = dict(horizontal=[2], vertical=[1], diagonal=[1, 2])[view.flip_direction]
            found.masks = torch.flip(found.masks, axes)
    return found


def enable_tta(cfg: Config) -> None:
    """Change a config to test each image as it is and flipped.

    Its own ``tta_model`` and ``tta_pipeline`` are used if it has them.
    Otherwise the model is mmseg's, or :class:`FlipTTA` with the detector's own
    suppression, and the pipeline is the test pipeline with flips after its
    last resize.
    """
    scope = 'mmdet' if cfg.default_scope == 'mmrotate' else cfg.default_scope
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    dataset.pipeline = cfg.get('tta_pipeline') or _flip_pipeline(dataset.pipeline, scope)
    wrapper = cfg.get('tta_model') or dict(type='mmseg.SegTTAModel')
    if scope == 'mmdet' and not cfg.get('tta_model'):
        last = cfg.model.test_cfg.get('rcnn', cfg.model.test_cfg)
        wrapper = dict(type='mmpeft.FlipTTA', nms=last.nms, max_per_img=last.max_per_img)
    cfg.model = dict(**wrapper, module=cfg.model)


def _flip_pipeline(pipeline, scope):
    names = [step['type'].rpartition('.')[2] for step in pipeline]
    # Annotations are those of the original image, so they are read after the flip.
    cut = next(i for i, n in enumerate(names) if n.startswith(('LoadAnnotations', 'Pack')))
    tail = [dict(step) for step in pipeline[cut:]]
    if 'meta_keys' in tail[-1]:
        tail[-1]['meta_keys'] = (*tail[-1]['meta_keys'], 'flip', 'flip_direction')
    flips = [dict(type=f'{scope}.RandomFlip', prob=prob) for prob in (0.0, 1.0)]
    return [
        *pipeline[:cut],
        dict(type='TestTimeAug', transforms=[flips, *[[step] for step in tail]]),
    ]
