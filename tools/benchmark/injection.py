"""Injection: how long adapting a network takes, beside building it."""

from functools import partial

import torch
import variants
from rounds import Clock, Phases
from workloads import Workload

TEXT = 'injection, with values and on the meta device: {workload}'
BASE = 'building the network'


def entries(workload: Workload, compared, rank: int, device: str) -> dict:
    """Building the network, and injecting each method, on the device and on meta."""
    found = {BASE: partial(build, workload)}
    with torch.device('meta'):
        shapes = workload.network()
    for place, network in (('', workload.build(device)), (', meta', shapes)):
        for variant in compared:
            found[f'{variant.name}{place}'] = partial(inject, variant, network, rank, device)
    return found


def build(workload) -> Phases:
    """Seconds to build the network, with random weights."""
    clock = Clock('cpu')
    workload.network()
    clock.mark()
    return dict(build=clock.seconds()[0])


def inject(variant, network, rank, device) -> Phases:
    """Seconds to adapt a copy of the network, which is not counted."""
    model = variants.twin(network)
    clock = Clock(device)
    variant.build(model, rank)
    clock.mark()
    return dict(build=clock.seconds()[0])
