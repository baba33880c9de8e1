"""One process of a run of a ViT detector: ``detector_run.py FOLDER``, under torchrun.

DINO on a small DINOv3, in bfloat16, with averaged weights, on two images a process. Two-stage
detectors do not train in bfloat16 on a CPU: mmcv's NMS takes float32 there.
"""

import os
import sys
from pathlib import Path

import torch
from mmengine.registry import DATASETS
from torch.utils.data import Dataset

from mmpeft.engine.launch import build_runner
from tests.tasks import batch
from tests.test_backbone_recipes import fewer_queries, small

PARTS = ('dataloader', 'cfg', 'evaluator')


@DATASETS.register_module()
class TwoScenes(Dataset):
    """Two images with boxes, twice over."""

    metainfo = {}

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {key: values[index % 2] for key, values in batch('mmdet').items()}


def config(folder):
    cfg = fewer_queries(small('vit-dino_coco', 'vit_small_patch16_dinov3.lvd1689m'))
    cfg.default_hooks.peft.method = dict(type='LoRA', rank=2)
    evaluated = (f'{split}_{part}' for split in ('val', 'test') for part in PARTS)
    cfg.update(dict.fromkeys([*evaluated, 'param_scheduler']))
    cfg.train_dataloader = dict(
        batch_size=2,
        dataset=dict(type='TwoScenes'),
        sampler=dict(type='DefaultSampler', shuffle=False),
        collate_fn=dict(type='pseudo_collate'),
    )
    cfg.train_cfg = dict(by_epoch=False, max_iters=3)
    cfg.optim_wrapper.update(type='AmpOptimWrapper', dtype='bfloat16', loss_scale=1.0)
    cfg.custom_hooks = [dict(type='EMAHook', momentum=0.3)]
    cfg.default_hooks.checkpoint = dict(type='CheckpointHook', by_epoch=False, interval=3)
    cfg.work_dir, cfg.launcher, cfg.log_level = str(folder), 'pytorch', 'ERROR'
    cfg.model_wrapper_cfg = dict(type='MMDistributedDataParallel', broadcast_buffers=False)
    return cfg


def main(folder):
    torch.set_num_threads(1)
    runner = build_runner(config(folder))
    runner.train()
    rank = os.environ['RANK']
    torch.save(runner.model.module.state_dict(), Path(folder) / f'rank{rank}.pth')


if __name__ == '__main__':
    main(sys.argv[1])
