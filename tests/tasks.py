"""What the tests of configs share: models with adapters, and batches with labels."""

import numpy as np
import torch
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData, PixelData

import mmpeft
from mmpeft.engine.packages import import_task


def build(cfg):
    """The model of a config, without adapters."""
    import_task(cfg)
    init_default_scope(cfg.default_scope)
    return MODELS.build(cfg.model)


def adapt(model, cfg):
    """Inject what the PEFTHook of a config says, and return the summary."""
    hook = cfg.default_hooks.peft
    targets = dict(module='backbone') | dict(hook.get('targets') or {})
    return mmpeft.inject(model, hook.method, targets, hook.get('unfreeze', ()))


def shrink(cfg):
    """A config with a ConvNeXt-V2 of the smallest size, fewer proposals and slides."""
    cfg.model.backbone.update(name='convnextv2_atto', pretrained=False)
    SMALLER[cfg.default_scope](cfg.model, [40, 80, 160, 320])
    return cfg


def _two_stages(model, widths):
    model.neck.in_channels = widths
    model.train_cfg.rpn_proposal.update(nms_pre=50, max_per_img=20)
    model.train_cfg.rcnn.sampler.num = 16
    model.test_cfg.rpn.update(nms_pre=50, max_per_img=20)


def _segmentor(model, widths):
    model.data_preprocessor.size = (128, 128)
    model.decode_head.update(in_channels=widths, channels=32)
    model.auxiliary_head.update(in_channels=widths[2], channels=32)
    model.test_cfg.update(crop_size=(128, 128), stride=(96, 96))
    for head in (model.decode_head, model.auxiliary_head):
        head.norm_cfg.type = 'BN'


def _classifier(model, widths):
    model.head.in_channels = widths[-1]


# How the model of each package is made small, and what its samples hold.
SMALLER = dict(mmdet=_two_stages, mmrotate=_two_stages, mmseg=_segmentor, mmpretrain=_classifier)


def batch(scope, size=128):
    """Two images with labels, as the task's pipeline packs them."""
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randint(0, 256, (3, size, size), generator=generator, dtype=torch.uint8)
        for _ in range(2)
    ]
    meta = dict(
        img_shape=(size, size),
        ori_shape=(size, size),
        pad_shape=(size, size),
        scale_factor=(1.0, 1.0),
        img_id=0,
        img_path='',
    )
    return dict(inputs=inputs, data_samples=[_sample(scope, meta, size) for _ in inputs])


def _sample(scope, meta, size):
    if scope == 'mmseg':
        from mmseg.structures import SegDataSample

        labels = torch.arange(size * size).view(1, size, size) % 150
        return SegDataSample(metainfo=meta, gt_sem_seg=PixelData(data=labels))
    if scope == 'mmpretrain':
        from mmpretrain.structures import DataSample

        return DataSample(metainfo=meta).set_gt_label(1)
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    truth = InstanceData(labels=torch.tensor([1, 3]))
    if scope == 'mmrotate':
        from mmrotate.structures.bbox import RotatedBoxes

        truth.bboxes = RotatedBoxes(
            torch.tensor([[40.0, 40.0, 50.0, 30.0, 0.3], [80.0, 90.0, 40.0, 60.0, -0.5]])
        )
    else:
        truth.bboxes = torch.tensor([[10.0, 10.0, 60.0, 70.0], [50.0, 60.0, 110.0, 120.0]])
        masks = np.zeros((2, size, size), np.uint8)
        masks[0, 10:70, 10:60] = masks[1, 60:120, 50:110] = 1
        truth.masks = BitmapMasks(masks, size, size)
    sample = DetDataSample(metainfo=meta, gt_instances=truth)
    sample.ignored_instances = truth[:0]
    return sample
