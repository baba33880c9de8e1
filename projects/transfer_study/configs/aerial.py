# Faster R-CNN on the demo's EfficientNet-Lite0, and tiles of aerial photographs with their trees.
_base_ = 'mmpeft::demo/_base_/photos/coco.py'

model = dict(roi_head=dict(mask_roi_extractor=None, mask_head=None, bbox_head=dict(num_classes=1)))
pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', scale=(128, 128), keep_ratio=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    ),
]
trees = dict(metainfo=dict(classes=('tree',), palette=[(60, 180, 75)]), pipeline=pipeline)
train_dataloader = dict(dataset=trees)
val_dataloader = dict(dataset=trees)
test_dataloader = val_dataloader
val_evaluator = dict(metric='bbox')
test_evaluator = val_evaluator
