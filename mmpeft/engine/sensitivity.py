"""Sensitivities measured on a few batches of a Runner's training data."""

import random
from collections.abc import Iterator

import numpy as np
import torch
from mmengine.dist import get_rank, get_world_size
from mmengine.runner import Runner
from torch import Tensor, nn

from mmpeft.training.sensitivity import sensitivity


def measure(runner: Runner, injection: dict) -> dict[str, Tensor]:
    """See :func:`mmpeft.sensitivity`.

    Args:
        runner: That trains, before adapters are injected; ``runner.model`` is not wrapped.
        injection: One of :func:`~mmpeft.engine.injections.injections`, whose ``sensitivity`` is the
            number of batches in each process.
    """

    def loss(model: nn.Module, batch) -> Tensor:
        data = model.data_preprocessor(batch, True)
        with runner.optim_wrapper.optim_context(model):
            losses = model._run_forward(data, mode='loss')
        return model.parse_losses(losses)[0]

    batches = first_batches(runner, injection['sensitivity'])
    states = random.getstate(), np.random.get_state()  # which augmentations draw from
    try:
        return sensitivity(runner.model, injection['method'], batches, loss, injection['targets'])
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def first_batches(runner: Runner, count: int) -> Iterator:
    """Batches of random training data for this process, whatever the sampler will give later.

    They follow from the run's seed, are disjoint between processes, and leave the sampler as it is.
    """
    loader = runner.train_dataloader
    generator = torch.Generator().manual_seed(runner.seed)
    order = torch.randperm(len(loader.dataset), generator=generator)
    batches = order.split(loader.batch_sampler.batch_size)[get_rank() :: get_world_size()]
    for chosen in batches[:count]:
        yield loader.collate_fn([loader.dataset[index] for index in chosen.tolist()])
