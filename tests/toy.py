"""A small classifier with its data and metric, for tests of the hooks with a real Runner."""

import numpy as np
import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel, BaseModule
from mmengine.registry import DATASETS, METRICS, MODELS
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import Dataset

IMAGES = 16
LOW_PRECISION = {'optim_wrapper.type': 'AmpOptimWrapper', 'optim_wrapper.dtype': 'bfloat16'}


class ToyBlock(nn.Module):
    """A residual block as ConvNeXt's, where adapters of activations find their places."""

    def __init__(self, width):
        super().__init__()
        self.mix = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x):
        return x + self.mlp(self.mix(x).movedim(1, -1)).movedim(-1, 1)


@MODELS.register_module()
class ToyBackbone(BaseModule):
    """Two stages; the weights of a "pretrained" file are loaded by ``init_weights``."""

    def __init__(
        self,
        checkpoint=None,
        dropout=0.1,
        norm=True,
        unused=False,
        twice=False,
        block=False,
        blocks=0,
        init_cfg=None,
    ):
        super().__init__(init_cfg)
        self.checkpoint = checkpoint
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8) if norm else nn.GroupNorm(2, 8)
        self.stage = nn.Sequential(
            nn.Conv2d(8, 8, 3, groups=8, padding=1), nn.GELU(), nn.Conv2d(8, 12, 1)
        )
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(12, 16)
        self.unused = nn.Linear(3, 3) if unused else None
        self.block = ToyBlock(12) if block else nn.Identity()
        self.blocks = nn.Sequential(*(ToyBlock(12) for _ in range(blocks)))
        self.again = nn.Linear(12, 16) if twice else None

    def init_weights(self):
        super().init_weights()
        if self.checkpoint:
            self.load_state_dict(torch.load(self.checkpoint, weights_only=True))

    def forward(self, x):
        x = self.stage(self.norm(self.stem(x)).relu())
        x = self.dropout(self.blocks(self.block(x)).mean((2, 3)))
        return self.fc(x) if self.again is None else self.fc(x) + self.again(x)


@MODELS.register_module()
class ToyClassifier(BaseModel):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = MODELS.build(backbone)
        self.head = nn.Linear(16, 3)

    def forward(self, inputs, labels, mode='tensor'):
        inputs = torch.stack(inputs) if isinstance(inputs, list) else inputs
        scores = self.head(self.backbone(inputs))
        if mode == 'loss':
            labels = torch.as_tensor(labels, device=scores.device)
            return dict(loss=nn.functional.cross_entropy(scores, labels))
        return [dict(scores=s) for s in scores]


@DATASETS.register_module()
class ToyImages(Dataset):
    """Fixed images, with random noise on top as augmentation."""

    metainfo = {}

    def __init__(self, noise=0.0):
        self.noise = noise

    def __len__(self):
        return IMAGES

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        image = torch.randn(3, 8, 8, generator=generator)
        return dict(inputs=image + self.noise * torch.randn(3, 8, 8), labels=index % 3)


@METRICS.register_module()
class ToyScores(BaseMetric):
    """All scores, so that evaluations can be compared number by number."""

    default_prefix = 'toy'

    def process(self, data_batch, data_samples):
        self.results += [sample['scores'].tolist() for sample in data_samples]

    def compute_metrics(self, results):
        return dict(scores=results)


def toy_config(work_dir, method=None, **changes):
    """A Runner's config; ``changes`` are merged into it by dotted keys."""

    def loader(noise, shuffle):
        return dict(
            batch_size=4,
            num_workers=0,
            dataset=dict(type='ToyImages', noise=noise),
            sampler=dict(type='DefaultSampler', shuffle=shuffle),
        )

    config = Config(
        dict(
            default_scope='mmengine',
            work_dir=str(work_dir),
            log_level='ERROR',
            randomness=dict(seed=3),
            model=dict(type='ToyClassifier', backbone=dict(type='ToyBackbone')),
            train_dataloader=loader(0.1, True),
            val_dataloader=loader(0.0, False),
            test_dataloader=loader(0.0, False),
            train_cfg=dict(by_epoch=True, max_epochs=3),
            val_cfg=dict(),
            test_cfg=dict(),
            val_evaluator=dict(type='ToyScores'),
            test_evaluator=dict(type='ToyScores'),
            optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-2)),
            param_scheduler=[dict(type='MultiStepLR', milestones=[2], by_epoch=True)],
            default_hooks=dict(
                peft=dict(
                    type='mmpeft.PEFTHook', method=method or dict(type='FLoRA', rank=2, scale=1.0)
                ),
                seed=dict(type='mmpeft.SeedHook'),
                checkpoint=dict(type='CheckpointHook', interval=1),
            ),
        ),
        format_python_code=False,  # which takes longer than a run
    )
    config.merge_from_dict(changes)
    return config


def toy_runner(work_dir, method=None, **changes):
    """See :func:`toy_config`."""
    return Runner.from_cfg(toy_config(work_dir, method, **changes))


def by_iterations(stop, interval):
    """Changes that make the config iteration-based."""
    return {
        'train_cfg': dict(
            type='IterBasedTrainLoop', max_iters=stop, val_interval=100, _delete_=True
        ),
        'train_dataloader.sampler': dict(type='InfiniteSampler', shuffle=True),
        'param_scheduler': [dict(type='LinearLR', start_factor=0.1, end=stop, by_epoch=False)],
        'default_hooks.checkpoint': dict(interval=interval, by_epoch=False),
    }


def state_of(path):
    """The state dict of a checkpoint."""
    return torch.load(path, weights_only=False, map_location='cpu')['state_dict']


def save_weights(path, **backbone):
    torch.manual_seed(77)
    backbone = ToyClassifier(dict(type='ToyBackbone', **backbone)).backbone
    for value in backbone.state_dict().values():
        if value.is_floating_point():
            value.add_(0.3 * torch.rand_like(value))
    torch.save(backbone.state_dict(), path)
    return str(path)


def scores(metrics):
    return np.array(metrics['toy/scores'])


def weights(runner):
    return {k: v.clone() for k, v in runner.model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
