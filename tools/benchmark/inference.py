"""Evaluation: the plain network, with adapters attached, and with one merged."""

import copy

import torch
import variants
from rounds import Clock, Phases
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
    """A forward pass; on a GPU in bfloat16 autocast."""

    def __init__(self, model, batch, device):
        self.model, self.batch, self.device = model, batch, device

    @torch.no_grad()
    def __call__(self) -> Phases:
        clock = Clock(self.device)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device != 'cpu'):
            self.model(self.batch)
        clock.mark()
        return dict(forward=clock.seconds()[0])
