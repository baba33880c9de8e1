"""One trial of detection or segmentation, trained by a Runner on scenes or aerial tiles.

A detector on the frozen backbone is trained first, once for each draw of scenes. Every method
starts from it and trains its heads on for the same number of steps, the frozen backbone too.
BatchNorm keeps its pretrained statistics in every method, full fine-tuning included.
"""

import fcntl
import io
import math
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner
from scene_files import made, making
from torch import nn

import mmpeft
from mmpeft.checkpoint.atomic import replacing
from mmpeft.engine.config import HOOK, compose, dicts_in
from mmpeft.engine.launch import build_runner
from mmpeft.engine.packages import import_task
from mmpeft.injection.statistics import freeze_statistics

from .aerial import write_tiles
from .backbones import BACKBONES
from .classification import MEASURED_ON, sized
from .digits import write_digits
from .methods import MEASURED, METHODS
from .photos import write_photos
from .trial import Trial

FOLDER = Path('work_dirs/transfer_study')
BATCH = 8
TRAIN, HELD = 400, dict(tune=120, final=300)  # scenes
HEADS_EPOCHS, HEADS_RATE = 16, 2e-3  # of the detector on the frozen backbone


class Scenes(NamedTuple):
    """A task.

    Attributes:
        config: Without a method.
        source: Of :data:`SOURCES`.
        folder: Of its format below that of a draw.
        metric: Its main score, from 0 to 1.
        backbone: That of the config, of :data:`.backbones.BACKBONES`.
    """

    config: str
    source: str
    folder: str
    metric: str
    backbone: str = 'efficientnet_lite0'


DIGITS, DEMO = 'mmpeft::demo/_base_/coco.py', 'mmpeft::demo/_base_/photos'
AERIAL = str(Path(__file__).parents[1] / 'configs' / 'aerial.py')
CONFIGS = dict(
    digits_coco=Scenes(DIGITS, 'digits', 'coco', 'segm_mAP', 'convnextv2_digits'),
    photos_coco=Scenes(f'{DEMO}/coco.py', 'photos', 'coco', 'segm_mAP'),
    photos_ade20k=Scenes(f'{DEMO}/ade20k.py', 'photos', 'ade20k', 'mIoU'),
    photos_dota=Scenes(f'{DEMO}/dota.py', 'photos', 'dota', 'mAP'),
    aerial=Scenes(AERIAL, 'aerial', 'coco', 'bbox_mAP'),
)


class KeepStatistics(Hook):
    """BatchNorm of the backbone in evaluation mode, where all of it trains too."""

    def before_train(self, runner):
        freeze_statistics(runner.model.backbone)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait until no other worker makes what is at a path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f'{path.name}.lock').open('w') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


SOURCES = dict(digits=write_digits, photos=write_photos, aerial=write_tiles)


def scenes(trial: Trial) -> Path:
    """The folder of a draw's scenes, ``train`` and ``val``, which are written unless they exist."""
    source = CONFIGS[trial.task].source
    folder = FOLDER / f'{source}_{trial.size}' / f'{trial.stage}_{trial.seed}'
    numbers = dict(train=TRAIN, val=HELD[trial.stage])
    wanted = dict(seed=trial.seed, size=trial.size, stage=trial.stage) | numbers
    with locked(folder):
        if not made(folder, wanted):
            with making(folder, wanted) as root:
                SOURCES[source](trial, root, numbers)
    return folder


def pretrained(trial: Trial) -> Path:
    """The file of the backbone's weights, under timm's names."""
    path = FOLDER / f'{trial.backbone}.pth'
    with locked(path):
        if not path.exists():
            state = BACKBONES[trial.backbone].make(trial.task).state_dict()
            with replacing(path) as temporary:
                torch.save(state, temporary)
    return path


def steps_of(epochs: int) -> int:
    """The steps of so many passes over the training scenes."""
    return epochs * math.ceil(TRAIN / BATCH)


def config(trial: Trial, hook: dict, epochs: int, rate: float, work_dir: Path) -> Config:
    """The config of a run on a draw's scenes, whose end is tested.

    Args:
        hook: Arguments of PEFTHook.
        rate: Of the heads.
    """
    task = CONFIGS[trial.task]
    root = f'{scenes(trial)}/{task.folder}/'
    steps = steps_of(epochs)
    cfg = compose(task.config)
    cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None
    for loader in cfg.train_dataloader, cfg.test_dataloader:
        loader.dataset.data_root = root
        loader.batch_size = BATCH
    for node in dicts_in(cfg.test_evaluator):
        if 'ann_file' in node:
            node['ann_file'] = f'{root}annotations/instances_val.json'
    for node in dicts_in([cfg.train_dataloader, cfg.test_dataloader, cfg.model.data_preprocessor]):
        for key in {'scale', 'size'} & node.keys():
            node[key] = (trial.size, trial.size)
    cfg.model.backbone.checkpoint = str(pretrained(trial))
    cfg.train_cfg.update(max_iters=steps, val_interval=steps + 1)
    cfg.optim_wrapper.optimizer.lr = rate
    warm_up = max(steps // 20, 1)
    cfg.param_scheduler = [
        dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=warm_up),
        dict(type='CosineAnnealingLR', by_epoch=False, begin=warm_up, end=steps),
    ]
    cfg.default_hooks.peft = dict(type=HOOK, **hook)
    cfg.custom_hooks = [dict(type=KeepStatistics)]
    cfg.randomness = dict(seed=trial.seed)
    cfg.log_level = 'ERROR'
    # mmengine keeps loggers and visualizers by these names, each with its folder.
    cfg.work_dir = cfg.experiment_name = cfg.visualizer.name = str(work_dir)
    import_task(cfg)
    return cfg


def converged(trial: Trial) -> Path:
    """The checkpoint of a draw's detector on the frozen backbone, trained unless it exists."""
    name = f'{trial.task}_{trial.backbone}_{trial.size}_{trial.stage}_{trial.seed}'
    path = FOLDER / 'heads' / f'{name}.pth'
    with locked(path):
        if not path.exists():
            hook = dict(method=dict(type='Frozen'), targets=dict(module='backbone'))
            work_dir = path.with_suffix('')
            cfg = config(trial, hook, HEADS_EPOCHS, HEADS_RATE, work_dir)
            cfg.resume = (work_dir / 'last_checkpoint').exists()
            runner = build_runner(cfg)
            model = runner.train()
            mmpeft.merge(model)
            with replacing(path) as temporary:
                torch.save(dict(state_dict=model.state_dict()), temporary)
            shutil.rmtree(work_dir)
    return path


def adapted(trial: Trial, work_dir: Path) -> Config:
    """The config of a trial: from the converged heads on, at rates for heads and backbone."""
    hook = METHODS[trial.method]
    net = nn.Sequential()
    net.add_module('features', BACKBONES[trial.backbone].make(trial.task))
    method, targets = sized(hook, trial, net)
    hook = hook | dict(method=method, targets=targets | dict(module='backbone'))
    if trial.method in MEASURED:
        hook['sensitivity'] = MEASURED_ON
    cfg = config(trial, hook, trial.epochs, trial.head_rate, work_dir)
    cfg.load_from = str(converged(trial))
    cfg.default_hooks.checkpoint.update(interval=steps_of(trial.epochs) + 1, save_last=False)
    backbone = dict(lr_mult=trial.rate / trial.head_rate, decay_mult=0.0)
    cfg.optim_wrapper.paramwise_cfg = dict(custom_keys={'backbone.model': backbone})
    return cfg


def results(runner: Runner) -> dict[str, float]:
    """What the test finds, by the metrics' names, from 0 to 1.

    mmrotate's metric would start four processes; here a thread computes the same.
    """
    context = SimpleNamespace(Pool=lambda _: ThreadPool(1))
    with patch('mmrotate.evaluation.functional.mean_ap.get_context', lambda _: context):
        scores = runner.test()
    found = {key.split('/')[-1]: float(value) for key, value in scores.items()}
    percent = 'mIoU' in found
    return {key: value / 100 if percent else value for key, value in found.items()}


def run_dense(trial: Trial) -> dict:
    """Run a trial of detection or segmentation on one thread.

    Returns:
        Scores on the held scenes after the last step; ``loss``, the last epoch's mean, and
        ``history``, that of each epoch; ``parameters`` that train in the network, ``seconds`` of
        one core, the detector's included if this trial trained it; or ``failed``, with the reason.
    """
    torch.set_num_threads(1)
    start = time.process_time()
    record = dict(failed=None, history=[])
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        runner = build_runner(adapted(trial, Path(folder)))
        try:
            runner.train()
            # mmdet gives a detector that finds nothing no score.
            record |= {CONFIGS[trial.task].metric: 0.0} | results(runner)
        except mmpeft.errors.TrainingError as error:
            record['failed'] = str(error)
    model = runner.model
    trained = [p.numel() for p in model.backbone.model.parameters() if p.requires_grad]
    losses = runner.message_hub.get_scalar('train/loss').data[0]
    epochs = np.split(losses, range(steps_of(1), len(losses), steps_of(1)))
    history = [dict(loss=float(np.mean(epoch))) for epoch in epochs]
    record |= dict(
        parameters=sum(trained),
        method=repr(model.peft[0].method),
        history=history,
        loss=history[-1]['loss'],
        seconds=round(time.process_time() - start, 1),
    )
    return record
