"""Evaluation: the plain network, with adapters attached, and with one merged."""

import copy

import torch
import variants
from rounds import Clock, Phases
from torch.nn.utils import parametrize
from workloads import Workload

import mmpeft

TEXT = 'evaluation without gradients: {workload}'
BASE = 'plain'


def entries(workload: Workload, compared, rank: int, device: str) -> dict:
    """A forward pass of each."""
    network = workload.build(device)
    batch = workload.batch(device)
    models = {BASE: variants.twin(network)}
    models |= {f'{v.name}, attached': v.of(network, rank) for v in compared}
    first = compared[0]
    models[f'{first.name}, merged'] = mmpeft.merge(first.of(copy.deepcopy(network), rank))
    return {name: Evaluation(model.eval(), batch, device) for name, model in models.items()}


class Evaluation:
    """A forward pass with weights built once, as PEFTHook evaluates; on a GPU in autocast."""

    def __init__(self, model, batch, device):
        self.model, self.batch, self.device = model, batch, device

    @torch.no_grad()
    def __call__(self) -> Phases:
        with parametrize.cached():
            self._forward()  # builds the weights
            clock = Clock(self.device)
            self._forward()
            clock.mark()
        return dict(forward=clock.seconds()[0])

    def _forward(self):
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device != 'cpu'):
            self.model(self.batch)
