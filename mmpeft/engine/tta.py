"""Flipped views at test time, for boxes, rotated boxes, masks, segmentations and classes."""

from collections.abc import Mapping
from itertools import chain

import torch
from mmengine.config import Config
from mmengine.model import BaseTTAModel
from mmengine.structures import InstanceData

from mmpeft.errors import UsageError
from mmpeft.registry import MODELS

from .building import model_settings
from .config import class_name


@MODELS.register_module()
class FlipTTA(BaseTTAModel):
    """Merge the instances that a detector finds in flipped views of an image.

    All views' boxes, flipped back, go through one non-maximum suppression; a
    box that remains keeps the mask of its own view. mmdet's own model for
    test-time augmentation has neither masks nor rotated boxes.

    Args:
        nms: As in the detector's ``test_cfg``, e.g. ``dict(type='nms',
            iou_threshold=0.5)``; ``nms_rotated`` for rotated boxes.
        max_per_img: The most instances to keep; None for all.
        **kwargs: See :class:`mmengine.model.BaseTTAModel`.
    """

    def __init__(self, nms: Mapping, max_per_img: int | None, **kwargs):
        super().__init__(**kwargs)
        self.nms = nms
        self.max_per_img = max_per_img

    def test_step(self, data):
        """Predict without the detector's knowing of flips: mmdet's cascades would unflip masks."""
        for sample in chain(*data['data_samples']):
            if sample.pop('flip', False):
                sample.set_metainfo(dict(flipped=sample.flip_direction))
        return super().test_step(data)

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
    direction = view.get('flipped')
    if direction:
        boxes = HorizontalBoxes
        if found.bboxes.shape[-1] == 5:
            from mmrotate.structures.bbox import RotatedBoxes as boxes
        flipped = boxes(found.bboxes)
        flipped.flip_(shape, direction)
        found.bboxes = flipped.tensor
        if 'masks' in found:
            axes = dict(horizontal=[2], vertical=[1], diagonal=[1, 2])[direction]
            found.masks = torch.flip(found.masks, axes)
    return found


def enable_tta(cfg: Config) -> None:
    """Change a config to test each image as it is and flipped.

    Its own ``tta_model`` and ``tta_pipeline`` are used if it has them.
    Otherwise the model is mmseg's, mmpretrain's for classifiers, or
    :class:`FlipTTA` with the detector's own suppression, and the pipeline is
    the test pipeline with flips after its last resize.

    Raises:
        UsageError: The predictions of the model's views cannot be merged so.
    """
    scope = 'mmdet' if cfg.default_scope == 'mmrotate' else cfg.default_scope
    wrapper = cfg.get('tta_model') or _wrapper(cfg, scope)
    dataset = (cfg.get('test_dataloader') or {}).get('dataset') or {}
    while 'dataset' in dataset:
        dataset = dataset.dataset
    if 'pipeline' not in dataset:
        raise UsageError(
            f'--tta: the test data of {cfg.filename} has no pipeline to put flips into. Give '
            'test_dataloader.dataset one, or leave --tta out.'
        )
    dataset.pipeline = cfg.get('tta_pipeline') or _flip_pipeline(dataset.pipeline, scope)
    cfg.model = dict(**wrapper, module=model_settings(cfg))
    cfg.pop('data_preprocessor', None)  # which would replace the model's own


def _wrapper(cfg, scope):
    kind = class_name(cfg.model)
    if scope == 'mmseg':
        return dict(type='mmseg.SegTTAModel')
    if scope == 'mmpretrain' and kind.endswith('Classifier'):
        return dict(type='mmpretrain.AverageClsScoreTTA')
    last = cfg.model.get('test_cfg') or {}
    last = last.get('rcnn') or last
    if scope != 'mmdet' or not last.get('nms') or 'panoptic_fusion_head' in cfg.model:
        raise UsageError(
            f'--tta merges classes, segmentations, and boxes by the non-maximum suppression in '
            f'model.test_cfg; {kind} of {cfg.filename} has none of them, as DETR and its kin and '
            'models of queries or panoptic maps. Leave --tta out, or write a tta_model in the '
            'config.'
        )
    most = last.get('max_per_img', -1)
    return dict(type='mmpeft.FlipTTA', nms=last.nms, max_per_img=most if most > 0 else None)


def _flip_pipeline(pipeline, scope):
    names = [class_name(step) for step in pipeline]
    # Annotations are those of the original image, so they are read after the flip; and padding is
    # at the right and below, of the flipped image too.
    cut = next(i for i, n in enumerate(names) if n.startswith(('LoadAnnotations', 'Pad', 'Pack')))
    tail = [dict(step) for step in pipeline[cut:]]
    if 'meta_keys' in tail[-1]:
        tail[-1]['meta_keys'] = (*tail[-1]['meta_keys'], 'flip', 'flip_direction')
    flips = [dict(type=f'{scope}.RandomFlip', prob=prob) for prob in (0.0, 1.0)]
    return [
        *pipeline[:cut],
        dict(type='TestTimeAug', transforms=[flips, *[[step] for step in tail]]),
    ]
