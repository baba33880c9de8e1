"""Exact resuming: the random state as a function of seed, rank and iteration."""

import random

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook

from mmpeft.registry import HOOKS


@HOOKS.register_module()
class SeedHook(Hook):
    """Seed the generators anew at each iteration.

    mmengine keeps no random states in its checkpoints, so drop path, dropout
    and augmentation differ after a resume. Here the states follow from the
    Runner's seed, the rank and the iteration: a run that was resumed equals one
    without a stop, bit by bit, on the same number of processes. That holds for
    data that is loaded in the main process (``num_workers=0``) and, in
    epoch-based runs, by workers that are started at each epoch. Those of
    ``persistent_workers`` augment by another draw after a resume.
    """

    priority = 'HIGHEST'

    def before_train(self, runner):
        """Seed each fetch of an iteration-based loop, which replays them to resume."""
        loop = runner.train_loop
        if hasattr(loop, 'dataloader_iterator'):
            loop.dataloader_iterator = _SeededFetches(
                loop.dataloader_iterator, lambda n: _seed(runner, 'fetch', n)
            )

    def before_train_epoch(self, runner):
        """Seed the sampler and the workers."""
        _seed(runner, 'epoch', runner.epoch)

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        """Seed the forward pass."""
        _seed(runner, 'forward', runner.iter)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        """Seed the fetch of the next batch."""
        _seed(runner, 'next', runner.iter)


class _SeededFetches:
    def __init__(self, iterator, seed):
        self.iterator = iterator
        self.seed = seed
        self.fetched = 0

    def __iter__(self):
        return self

    def __next__(self):
        # A loader that is opened at its first fetch draws a random number for that.
        getattr(self.iterator, '_ensure_iterator', lambda: None)()
        self.seed(self.fetched)
        self.fetched += 1
        return next(self.iterator)

    def skip_iter(self, num_iters):
        self.fetched += num_iters
        self.iterator.skip_iter(num_iters)


STAGES = ('fetch', 'epoch', 'forward', 'next')


def _seed(runner, stage, step):
    entropy = (runner.seed or 0, get_rank(), STAGES.index(stage), step)
    for_torch, for_numpy = np.random.SeedSequence(entropy).generate_state(2)
    torch.manual_seed(int(for_torch))
    np.random.seed(int(for_numpy))
    random.seed(int(for_numpy))
