"""One rank of the tests of sharded models: ``sharded_run.py CASE FOLDER``, under torchrun or not.

Each rank writes what it found to ``FOLDER/rank<n>.pth``.
"""

import os
import sys
from functools import partial
from pathlib import Path

import torch
from torch import distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

import mmpeft
from mmpeft.checkpoint.fingerprint import fingerprint
from mmpeft.errors import UsageError

METHODS = {
    'LoRA': dict(type='LoRA', rank=2),
    'FLoRA': dict(type='FLoRA', rank=2, scale=1.0),
    'DoRA': dict(type='DoRA', rank=2),
    'LieRA': dict(type='LieRA', rank=2),
    'PiSSA': dict(type='PiSSA', rank=2),
}
TARGETS = dict(module='blocks')
RANK, RANKS = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))


class TransformerBlock(nn.Module):
    """Its last operation is a norm, whose output the next block's first layer reads."""

    def __init__(self, width=12):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        x = self.norm1(x + self.proj(nn.functional.scaled_dot_product_attention(q, k, v)))
        return self.norm2(x + self.mlp(x))


class ConvBlock(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.BatchNorm2d(width)
        self.wide = nn.Conv2d(width, 2 * width, 1)
        self.narrow = nn.Conv2d(2 * width, width, 3, padding=1)

    def forward(self, x):
        return x + self.narrow(self.wide(self.norm(self.depthwise(x))).relu())


class Network(nn.Module):
    """Blocks, whose weights are adapted, and a head, which trains itself."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        width = 12 if kind == 'transformer' else 8
        block = TransformerBlock if kind == 'transformer' else ConvBlock
        self.blocks = nn.Sequential(block(), block())
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        x = self.blocks(x)
        return self.head(x.mean(1) if self.kind == 'transformer' else x.mean((2, 3)))


def network(kind, method=None):
    torch.manual_seed(0)
    model = Network(kind).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    if method is not None:
        mmpeft.inject(model, METHODS[method], TARGETS)
        with torch.no_grad():
            for name, parameter in model.blocks.named_parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def sharded(way, model):
    """A model wrapped in one of the ways, or itself."""
    if way == 'fsdp2':
        for block in model.blocks:
            fully_shard(block)
        return fully_shard(model)
    if way.startswith('fsdp1'):
        policy = ModuleWrapPolicy({TransformerBlock, ConvBlock})
        cpu = torch.device('cpu')
        whole = way == 'fsdp1'
        return FullyShardedDataParallel(
            model, auto_wrap_policy=policy, use_orig_params=whole, device_id=cpu
        )
    return DistributedDataParallel(model) if way == 'ddp' else model


def batch(kind):
    """This rank's part of four samples."""
    torch.manual_seed(1)
    shape = (4, 5, 12) if kind == 'transformer' else (4, 8, 6, 6)
    x, y = torch.randn(shape, dtype=torch.float64), torch.arange(4) % 3
    return x.chunk(RANKS)[RANK], y.chunk(RANKS)[RANK]


def train(model, kind):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9)
    x, y = batch(kind)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def error_of(function, *args):
    try:
        function(*args)
    except UsageError as error:
        return str(error)
    return None


def train_all(folder, way):
    """Train each network with each method, and save it."""
    found = {}
    for kind in ('transformer', 'conv'):
        for method in METHODS:
            model = sharded(way, network(kind, method))
            train(model, kind)
            path = Path(folder) / f'{kind}_{method}.safetensors'
            mmpeft.save_adapter(model, path)
            found[kind, method] = mmpeft.adapter_state_dict(model)
            found[kind, method, 'fingerprint'] = fingerprint(model)
    return found


CASES = {way: partial(train_all, way=way) for way in ('plain', 'ddp', 'fsdp1', 'fsdp2')}


def main(case, folder):
    torch.set_num_threads(1)
    if RANKS > 1:
        distributed.init_process_group('gloo')
    found = CASES[case](folder)
    torch.save(found, f'{folder}/rank{RANK}.pth')
    if RANKS > 1:
        distributed.barrier()
        distributed.destroy_process_group()


if __name__ == '__main__':
    main(*sys.argv[1:])
