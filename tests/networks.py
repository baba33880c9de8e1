"""Small networks, a snapshot of all that an adapter must leave as it was, and a harmful pickle."""

from pathlib import Path

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.dw = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.BatchNorm2d(width)
        self.pw = nn.Conv2d(width, 2 * width, 1)
        self.out = nn.Conv2d(2 * width, width, 3, padding=1)

    def forward(self, x):
        return x + self.out(self.pw(self.norm(self.dw(x))).relu())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(Block(), Block())
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.backbone(x).mean((2, 3)))


class NewNorms(nn.Module):
    """A backbone that adds norms to its outputs, of which pretrained weights know nothing."""

    newly_initialized = 'norm0', 'norm1'

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())
        self.norm0, self.norm1 = nn.LayerNorm(8), nn.BatchNorm1d(8)

    def forward(self, x):
        y = self.norm0(self.blocks(x).flatten(2).transpose(1, 2))
        return self.norm1(y.transpose(1, 2))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.out = nn.Linear(6, 9, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, index):
        return self.out(self.embed(index).tanh())


class DeformableLike(nn.Module):
    """A third-party convolution that is no subclass of torch's."""

    def __init__(self):
        super().__init__()
        self.in_channels, self.out_channels, self.groups = 4, 6, 2
        self.kernel_size, self.stride = (3, 3), (1, 1)
        self.weight = nn.Parameter(torch.randn(6, 2, 3, 3))

    def forward(self, x):
        return nn.functional.conv2d(x, self.weight, groups=self.groups)


class TwinNet(nn.Module):
    """Two layers of one shape, a norm with statistics, and a head."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, 3)


class Runs:
    """Would write a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, 'ran')


def snapshot(model):
    """All that unmerging has to bring back."""
    return dict(
        state={key: value.clone() for key, value in model.state_dict().items()},
        objects=[(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
        modes=[(name, type(m).__name__, m.training) for name, m in model.named_modules()],
    )


def assert_same(model, before):
    after = snapshot(model)
    assert list(after['state']) == list(before['state'])
    for key, value in before['state'].items():
        assert after['state'][key].dtype == value.dtype
        assert torch.equal(bits(after['state'][key]), bits(value)), key
    assert after['objects'] == before['objects'] and after['modes'] == before['modes']


def bits(value):
    """Of a tensor, so that signs of zeros count."""
    return value.contiguous().reshape(-1).view(torch.uint8)
