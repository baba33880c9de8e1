"""A detector, adapters for it that have little in common, and their training."""

import copy

import torch
from torch import nn

import mmpeft
from tests.cases import randomize
from tests.networks import Block

DOUBLE = torch.float64
BACKBONE = dict(module='backbone')
LORA = dict(method=dict(type='LoRA', rank=2), targets=BACKBONE)


class Detector(nn.Module):
    """Statistics inside and outside the backbone, and a head that shares a weight with itself."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(Block(), Block())
        self.neck = nn.Sequential(nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6))
        self.head, self.twin = nn.Linear(6, 3), nn.Linear(6, 3)
        self.twin.weight = self.head.weight

    def forward(self, x):
        y = self.neck(self.backbone(x)).relu().mean((2, 3))
        return self.head(y) * self.twin(y)


# Methods, ranks, targets and unfrozen parameters that have little in common.
ADAPTERS = dict(
    coco=LORA,
    dota=dict(
        method=dict(type='FLoRA', rank=3),
        targets=dict(module='backbone', kinds=['conv'], exclude_kinds=['depthwise']),
        unfreeze=[r'norm'],
    ),
    vera=dict(method=dict(type='VeRA', rank=3), targets=dict(module='backbone.1')),
    bias=dict(method=dict(type='BitFit'), targets=BACKBONE),
    houlsby=dict(method=dict(type='HoulsbyAdapter', rank=2), targets=BACKBONE),
    whole=dict(method=dict(type='DoRA', rank=1), targets=dict(kinds=['conv', 'linear'])),
    heads=dict(method=dict(type='Frozen'), targets=BACKBONE),
    full=dict(method=dict(type='Full'), targets=BACKBONE),
)


def trained(base, injections, x, steps=2):
    """A model of its own, trained for a few steps, in evaluation mode."""
    model = copy.deepcopy(base).train()
    for injection in injections if isinstance(injections, list) else [injections]:
        mmpeft.inject(model, **injection)
    randomize(model, 0.1)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model.eval()


def assert_equal_states(model, other):
    state, expected = model.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(state[key], value), key
