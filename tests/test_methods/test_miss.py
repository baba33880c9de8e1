"""MiSS: one shard of columns for all, equal to peft's."""

import copy

import numpy as np
import peft
import torch
from torch import nn

import mmpeft
from mmpeft.injection.site import adapters_of
from tests.adapting import adapted, close, count, init
from tests.cases import randomize


def test_all_shards_change_alike(layer):
    frozen, new, f = adapted(layer, dict(type='MiSS', rank=3, scale=0.5))
    columns = frozen[0].size
    shards = [f['block'][:, column % 3] for column in range(columns)]
    close(new, frozen + 0.5 * np.stack(shards, 1).reshape(frozen.shape))


def test_miss_equals_pefts():
    layer, x = nn.Linear(14, 6).double(), torch.randn(3, 14, dtype=torch.float64)
    ours = nn.Sequential(copy.deepcopy(layer))
    mmpeft.inject(ours, dict(type='MiSS', rank=4))
    randomize(ours)
    config = peft.MissConfig(r=4, target_modules=['0'])
    theirs = peft.get_peft_model(nn.Sequential(layer), config).base_model.model.double()
    block = adapters_of(ours[0], 'weight')[0].block
    theirs[0].miss_block['default'].data = block.data.T
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)
    assert theirs[0].miss_block['default'].numel() == block.numel()


def test_half_of_loras_parameters_on_a_square():
    sizes = [
        count(dict(adapter.named_parameters()))
        for method in ('MiSS', 'LoRA')
        for layer in [nn.Linear(8, 8)]
        if mmpeft.inject(layer, dict(type=method, rank=4))
        for adapter in adapters_of(layer, 'weight')
    ]
    assert sizes == [32, 64]
    method = mmpeft.METHODS.build(dict(type='MiSS'))
    assert not init(nn.Linear(8, 8), method)['block'].any()
