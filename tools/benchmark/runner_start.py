"""The hook's share of what a Runner does before its first iteration."""

import tempfile
import time
from collections.abc import Callable

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, MODELS
from mmengine.runner import Runner
from rounds import Phases
from torch.utils.data import Dataset
from workloads import Workload, find

from mmpeft.engine.hooks import PEFTHook

TEXT = "PEFTHook in a Runner's start: {workload}"
BASE = 'until the first iteration'


@MODELS.register_module()
class BenchmarkModel(BaseModel):
    """The network of a workload as ``backbone``."""

    def __init__(self, workload):
        super().__init__()
        self.backbone = find(workload).network()

    def forward(self, inputs):
        return self.backbone(inputs)


@DATASETS.register_module()
class NoData(Dataset):
    """One item, which nobody takes."""

    metainfo = {}

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return torch.zeros(1)


class _Reached(Exception):
    pass


class StopAtFirstIteration(Hook):
    """Ends the training where it begins."""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        raise _Reached


def entries(workload: Workload, compared, rank: int, device: str) -> dict:
    """A Runner's start with the first method, and what of it the hook takes."""
    first = compared[0]
    method = first.hook['method'] | dict(rank=rank)
    start = Start(workload.name, first.hook | dict(method=method))
    return {BASE: start, f'of it the hook, {first.name}': start.of_hook}


class Start:
    """Starts a Runner, and keeps the seconds of the hook's ``before_run``."""

    def __init__(self, workload: str, hook: dict):
        self.workload, self.hook = workload, hook
        self.seconds_of_hook = 0.0

    def __call__(self) -> Phases:
        """Seconds until the first iteration."""
        with tempfile.TemporaryDirectory() as folder:
            begin = time.perf_counter()
            runner = Runner.from_cfg(self.config(folder))
            runner.register_hook(StopAtFirstIteration(), 'LOWEST')
            for hook in runner.hooks:
                if isinstance(hook, PEFTHook):
                    hook.before_run = self.timed(hook.before_run)
            try:
                runner.train()
            except _Reached:
                return dict(start=time.perf_counter() - begin)
        raise RuntimeError('the training ended without an iteration')

    def of_hook(self) -> Phases:
        """Seconds of the hook in the last start."""
        return dict(start=self.seconds_of_hook)

    def timed(self, before_run: Callable) -> Callable:
        """The same, with its seconds kept."""

        def call(runner):
            begin = time.perf_counter()
            before_run(runner)
            self.seconds_of_hook = time.perf_counter() - begin

        return call

    def config(self, folder: str) -> Config:
        """Of the Runner."""
        loader = dict(
            dataset=dict(type='NoData'),
            sampler=dict(type='DefaultSampler', shuffle=False),
            batch_size=1,
            num_workers=0,
        )
        return Config(
            dict(
                work_dir=folder,
                log_level='ERROR',
                model=dict(type='BenchmarkModel', workload=self.workload),
                train_dataloader=loader,
                train_cfg=dict(by_epoch=True, max_epochs=1),
                optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-4)),
                default_hooks=dict(peft=dict(type='mmpeft.PEFTHook', **self.hook)),
            )
        )
